"""Rollouts by vLLM servers over HTTP: token ids out, token ids and log-probs back.

Each server runs `flowrl serve`, that is vLLM with flowrl.rollout.vllm_worker in its workers.

Publication to one server: pause and abort; let every worker check what is published; mark the
weights as half loaded; load; mark them with the publication's label; resume. Weights come from a
folder, or from the trainer's memory over the network. vLLM notes the label with every token that
it samples, and a response is used only when all of its tokens carry the label that this engine
published last. So neither a server that was restarted, nor one that took half of a publication,
nor one that another run uses as well can slip in a response.
"""

import asyncio
import logging
import resource
import secrets
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import aiohttp
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.rollout import Response, SamplingParams
from flowrl.rollout.dispatch import (
    RETRY_S,
    Server,
    ServerLost,
    dispatch,
    revive_some,
    try_to_revive,
)
from flowrl.rollout.published_folder import make_run_folder, write_publication
from flowrl.rollout.requests import check_prompts, end_token_ids, request_seeds
from flowrl.rollout.vllm_client import Request, ServedModel, VllmClient
from flowrl.rollout.weight_broadcast import HostCopy, load_nccl, sending_device
from flowrl.settings import RolloutConfig

OTHER_FILES = 512  # that the trainer may have open

T = TypeVar("T")

logger = logging.getLogger(__name__)


class VllmServerEngine:
    """A client of one or many servers that sample from `model`'s weights; see RolloutEngine.

    Args:
        model_path: where the trained model comes from.
        model: its architecture, names, shapes and dtype are those that the servers must have; its
            weights are published as version 0. It is not kept.
        settings: `servers` are URLs such as http://127.0.0.1:8000.
        max_model_len: tokens that a server must admit in a sequence.
        needs_dtype: refuse a server that computes in another dtype than the model's.

    Raises:
        ValueError: when a server has another model or was not started for this, or for
            weight_transfer = nccl on a trainer with a GPU and without vLLM.
        RuntimeError: when one does not answer within settings.request_timeout_s.
    """

    def __init__(
        self,
        model_path: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: RolloutConfig,
        *,
        max_model_len: int,
        needs_dtype: bool = False,
    ) -> None:
        for url in settings.servers:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"rollout.servers has {url!r}; give http://host:port")
        allow_connections(2 * settings.max_num_seqs * len(settings.servers))
        self.servers = [Server(url.rstrip("/")) for url in settings.servers]
        self.settings = settings
        self.model = ServedModel(
            architecture=type(model).__name__,
            shapes={name: weight.shape for name, weight in model.named_parameters()},
            max_model_len=max_model_len,
            dtype=str(model.dtype).removeprefix("torch.") if needs_dtype else None,
        )
        self.dtype = model.dtype
        self.end_ids = end_token_ids(model_path, model.config, tokenizer)
        self.weight_version = -1
        self.num_published = 0
        # The run's own random word, since servers may be shared by mistake.
        self.word = secrets.token_hex(4)
        self.label = "none"  # of the last publication, and its weights
        self.run_folder: Path | None = None
        self.weights = self._make_room()
        self.thread = ThreadPoolExecutor(1, "rollout")
        self.aside: asyncio.Runner | None = None  # what the thread runs
        with ExitStack() as stack:  # a start that is refused leaves no folder behind
            stack.callback(self.close)
            self._run(self._meet_servers)
            self.publish(model.named_parameters(), version=0)
            stack.pop_all()

    def _make_room(self) -> Path | HostCopy:
        """For publications: this run's folder, or memory."""
        if self.settings.weight_transfer == "disk":
            weight_dir = Path(self.settings.weight_dir or tempfile.gettempdir())
            self.run_folder = make_run_folder(weight_dir)
            return self.run_folder / self.label
        device = sending_device()
        if device.type == "cuda":
            load_nccl()
        return HostCopy(self.model.shapes, self.dtype, device)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[list[Response]]:
        """Sample on all servers; a response does not depend on which of them made it.

        A try of a request takes at most request_timeout_s. Raises RuntimeError when one failed
        1 + max_retries times, or when no server was usable for request_timeout_s, and ValueError
        for a prompt that is empty or too long.
        """
        return self._run(self._sampling(prompts, params, seed))

    def begin(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> Callable[[], list[list[Response]]]:
        """Have the servers sample while this thread goes on; the rest is as with `generate`."""
        assert self.aside is None, "the engine is sampling"
        sample = self._with_client(self._sampling(prompts, params, seed))
        # Its loop is made here, so that `close` can stop it from this thread.
        self.aside = runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        runner.get_loop()
        future = self.thread.submit(runner.run, sample)

        def wait() -> list[list[Response]]:
            try:
                return future.result()
            finally:
                runner.close()
                self.aside = None

        return wait

    def _sampling(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> Callable[[VllmClient], Awaitable[list[list[Response]]]]:
        check_prompts(prompts, params, self.model.max_model_len)
        seeds = request_seeds(seed, len(prompts) * params.n)
        requests = [
            Request(
                list(prompt), seeds[place * params.n : (place + 1) * params.n], params, self.end_ids
            )
            for place, prompt in enumerate(prompts)
        ]
        # A server decodes max_num_seqs sequences together; as many wait there for a free place.
        max_outstanding = max(1, 2 * self.settings.max_num_seqs // params.n)

        async def sample(client: VllmClient) -> list[list[Response]]:
            return await dispatch(
                requests,
                self.servers,
                client.service(),
                max_outstanding=max_outstanding,
                max_retries=self.settings.max_retries,
                give_up_s=self.settings.request_timeout_s,
            )

        return sample

    def publish(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Write the weights to the shared folder, or into memory, and have every server load them.

        One weight at a time is taken. A server that fails is out until it has taken them, which is
        tried again while others sample. Raises ValueError for weights that are not the model's,
        OSError when the disk refuses, and RuntimeError when no server took them within
        request_timeout_s.
        """
        self.num_published += 1
        # With a count, since a version may be published twice.
        label = f"{self.word}-{self.num_published}-version-{version}"
        previous = self.weights
        if isinstance(previous, HostCopy):
            previous.fill(named_weights)
        else:
            folder = previous.with_name(label)
            write_publication(folder, named_weights, self.model.shapes, self.dtype)
            self.weights = folder
        self.label, self.weight_version = label, version

        async def send(client: VllmClient) -> None:
            # Those that are out already would cost every step the time in which they do not answer.
            in_use = [server for server in self.servers if server.is_live]
            for server in in_use:
                server.is_live = False
            service = client.service()
            await asyncio.gather(*(try_to_revive(service, server) for server in in_use))
            await revive_some(service, self.servers, self.settings.request_timeout_s)

        self._run(send)
        if isinstance(previous, Path):
            shutil.rmtree(previous, ignore_errors=True)  # nobody is asked to load it any more

    def close(self) -> None:
        """Give up what is being sampled and remove the published weights; the servers go on."""
        if self.aside is not None:
            loop = self.aside.get_loop()
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        self.thread.shutdown()
        if self.run_folder is not None:
            shutil.rmtree(self.run_folder, ignore_errors=True)

    async def _meet_servers(self, client: VllmClient) -> None:
        """Wait until every server has answered, and refuse one that is not for this run."""
        deadline = time.monotonic() + self.settings.request_timeout_s
        for server in self.servers:
            while True:
                try:
                    problem = await client.wrong_model(server)
                    break
                except ServerLost as error:
                    if time.monotonic() + RETRY_S > deadline:
                        raise RuntimeError(
                            f"rollout.servers: {server.url} did not answer within "
                            f"{self.settings.request_timeout_s:g} s: {error}"
                        ) from error
                    logger.info("waiting for %s: %s", server.url, error)
                    await asyncio.sleep(RETRY_S)
            if problem:
                raise ValueError(f"rollout.servers: {server.url} {problem}")

    def _run(self, use: Callable[[VllmClient], Awaitable[T]]) -> T:
        return asyncio.run(self._with_client(use))

    async def _with_client(self, use: Callable[[VllmClient], Awaitable[T]]) -> T:
        # A connection a request: one that the server has just closed would look like its death.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            client = VllmClient(
                session,
                self.model,
                self.settings.request_timeout_s,
                self.label,
                self.weight_version,
                self.weights,
            )
            return await use(client)


def allow_connections(count: int) -> None:
    """Let this process have that many connections, within what the machine allows.

    The usual limit of 1024 open files is soon reached, and would look like dead servers. Raises
    ValueError when the hard limit is too low.
    """
    needed = count + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"rollout.servers and rollout.max_num_seqs make up to {count} connections, and this "
            f"process may open {hard} files: raise the limit (ulimit -Hn), or lower max_num_seqs"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
