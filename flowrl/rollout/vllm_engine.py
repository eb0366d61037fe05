"""Rollouts by vLLM in the training process: its scheduler and kernels, the policy's weights.

vLLM owns the process that it starts in: it replaces torch.set_num_threads, sets environment
variables that child processes inherit, and reseeds every generator. All of that is undone.
"""

# vLLM is an extra.
# pyright: reportMissingImports=false

import logging
import math
import multiprocessing
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.config import kept_environment
from flowrl.rollout import Response, SamplingParams
from flowrl.rollout.publication import checked, expected_weights
from flowrl.rollout.requests import (
    check_prompts,
    config_overrides,
    enable_chunked_prefill,
    end_token_ids,
    request_seeds,
)
from flowrl.settings import RolloutConfig

logger = logging.getLogger(__name__)

# What vLLM's loaders raise. Anything else is a defect that no second attempt repairs.
LOADING_ERRORS = (
    RuntimeError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    AssertionError,
    OSError,
)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let vLLM do to this process what it likes, and put everything back."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    excepthook, start_method = sys.excepthook, multiprocessing.get_start_method(allow_none=True)
    devices = range(torch.cuda.device_count())
    # On a CPU vLLM compiles one line of its sampler, at the first response, for most of a minute.
    without_compilation = {} if torch.cuda.is_available() else {"TORCHDYNAMO_DISABLE": "1"}
    with (
        kept_environment(
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
            {
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_LOGGING_STREAM": "ext://sys.stderr",
                "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is a share of all memory
                **without_compilation,
            },
        ),
        torch.random.fork_rng(devices),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # about torch, to its own developers
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads  # on a CPU vLLM replaces it by a warning
            torch.set_num_threads(num_threads)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            sys.excepthook = excepthook
            multiprocessing.set_start_method(start_method, force=True)


class VllmEngine:
    """Generates with vLLM; a publication replaces its weights in place.

    Raises ValueError when vLLM cannot run the model with these settings.
    """

    def __init__(
        self,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: RolloutConfig,
        *,
        dtype: str,
        max_model_len: int,
        trust_remote_code: bool = False,
    ):
        if torch.distributed.is_initialized():
            raise ValueError(
                "rollout.engine = vllm needs torch.distributed of this process for itself, and "
                "Megatron or another engine has it; start vLLM apart, see rollout.servers"
            )
        hf_config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        self.max_model_len = max_model_len
        self.weight_version = 0
        self._expected = expected_weights(hf_config, trust_remote_code)
        self._end_ids = end_token_ids(model_path, hf_config, tokenizer)
        self._frees_memory = settings.free_cache_engine
        self._is_asleep = False
        self._mixed_weights: str | None = None  # why they are, while they are
        with undisturbed():
            try:
                from vllm import LLM  # takes seconds, and is wanted only where it is chosen
                from vllm.platforms import current_platform
            except ImportError as error:
                raise ValueError(
                    f"rollout.engine = vllm needs vLLM ({error}): pip install 'flowrl[vllm]' with "
                    "an NVIDIA GPU, make vllm without; or use rollout.engine=transformers"
                ) from error

            is_cpu = current_platform.is_cpu()
            if is_cpu and settings.free_cache_engine:
                raise ValueError(
                    "rollout.free_cache_engine = true: vLLM frees no memory on a CPU; leave it out"
                )
            try:
                self._llm = LLM(
                    model_path,
                    trust_remote_code=trust_remote_code,
                    dtype=dtype,  # pyright: ignore[reportArgumentType]
                    generation_config="vllm",  # the model's own defaults would change sampling
                    logprobs_mode="processed_logprobs",
                    hf_overrides=config_overrides(is_cpu),
                    max_model_len=max_model_len,
                    max_num_seqs=settings.max_num_seqs,
                    gpu_memory_utilization=settings.gpu_memory_utilization,
                    enforce_eager=settings.enforce_eager or is_cpu,
                    enable_prefix_caching=settings.enable_prefix_caching,
                    enable_chunked_prefill=enable_chunked_prefill(is_cpu),
                    enable_sleep_mode=settings.free_cache_engine,
                    use_tqdm_on_load=False,
                )
            except ValueError as error:
                raise ValueError(
                    f"rollout.engine = vllm cannot run {model_path} with max_model_len = "
                    f"{max_model_len} (rollout.max_model_len, or data.max_prompt_length + "
                    f"data.max_response_length): {' '.join(str(error).split())}"
                ) from error

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[list[Response]]:
        """Sample `params.n` responses for every prompt; the same seed gives the same responses.

        Raises RuntimeError while the weights are mixed, and for a response that is not whole.
        """
        from vllm import TokensPrompt

        if self._mixed_weights is not None:
            raise RuntimeError(
                f"vLLM has weights of two versions: {self._mixed_weights}; it samples again after "
                "a publication that succeeds"
            )
        check_prompts(prompts, params, self.max_model_len)
        self._wake_up()
        requests = [
            TokensPrompt(prompt_token_ids=list(prompt))
            for prompt in prompts
            for _ in range(params.n)
        ]
        seeds = request_seeds(seed, len(requests))
        sampling = [self._sampling(params, seed) for seed in seeds]
        with torch.random.fork_rng(range(torch.cuda.device_count())):  # Z's dropout draws from it
            outputs = self._llm.generate(requests, sampling, use_tqdm=False)
        if len(outputs) != len(requests):
            raise RuntimeError(f"vLLM answered {len(outputs)} of {len(requests)} requests")
        responses = [self._response(place, output) for place, output in enumerate(outputs)]
        if self._frees_memory:
            self._llm.sleep(level=1)  # weights to the host, the cache dropped
            self._is_asleep = True
        return [responses[i : i + params.n] for i in range(0, len(responses), params.n)]

    def _sampling(self, params: SamplingParams, seed: int) -> Any:
        from vllm import SamplingParams as VllmSamplingParams

        return VllmSamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),  # 0: off
            max_tokens=params.max_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            ignore_eos=True,  # the ends are all in stop_token_ids
            stop_token_ids=self._end_ids,
            stop=list(params.stop),
            include_stop_str_in_output=True,
            detokenize=bool(params.stop),
            skip_special_tokens=False,
        )

    def _response(self, place: int, output: Any) -> Response:
        (completion,) = output.outputs
        token_ids, reason = list(completion.token_ids), completion.finish_reason
        if reason not in ("stop", "length") or not token_ids:
            raise RuntimeError(
                f"vLLM ended request {place} with {reason} after {len(token_ids)} tokens of a "
                f"response to {len(output.prompt_token_ids)} tokens"
            )
        logprobs = [
            position[token].logprob
            for position, token in zip(completion.logprobs, token_ids, strict=True)
        ]
        if not all(map(math.isfinite, logprobs)):
            raise RuntimeError(f"vLLM gave request {place} log-probs that are no finite numbers")
        return Response(token_ids, logprobs, reason, self.weight_version)

    def _wake_up(self) -> None:
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False

    def begin(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> Callable[[], list[list[Response]]]:
        """Sample at once, since trainer and engine share the process."""
        responses = self.generate(prompts, params, seed)
        return lambda: responses

    def publish(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights; later responses carry `version`, and no cache of older ones is used.

        Raises ValueError, before anything is loaded, for names or shapes that are not the model's,
        and RuntimeError when loading fails twice; the engine then refuses to sample.
        """
        weights = list(checked(named_weights, self._expected))
        self._wake_up()
        self._mixed_weights = f"the publication of version {version} failed half-way"
        try:
            self._load(weights)
        except LOADING_ERRORS as error:
            logger.warning("publication of version %d failed, trying again: %s", version, error)
            try:
                self._load(weights)
            except LOADING_ERRORS as second_error:
                raise RuntimeError(f"{self._mixed_weights} twice: {second_error}") from second_error
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(f"vLLM keeps a cache of the weights before version {version}")
        self._mixed_weights = None
        self.weight_version = version

    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        from flowrl.rollout.vllm_reload import reload_weights

        self._llm.collective_rpc(reload_weights, args=(weights,))

    def close(self) -> None:
        """Free the engine, its caches and its process group."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
