"""The HTTP conversation with one vLLM server: describe, publish, sample, watch.

Endpoints of vLLM 0.32: those under /inference need --enable-scale-out; /pause, /resume,
/collective_rpc, /reset_prefix_cache, /update_weight_version and those that broadcast weights need
VLLM_SERVER_DEV_MODE=1.
"""

import asyncio
import json
import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import torch

from flowrl.rollout import Response, SamplingParams
from flowrl.rollout.dispatch import BadAnswer, Server, ServerLost, Service
from flowrl.rollout.published_folder import difference
from flowrl.rollout.weight_broadcast import (
    Group,
    HostCopy,
    backend_of,
    in_thread,
    join,
    meeting_place,
)

WATCH_EVERY_S = 5.0
HEALTH_TIMEOUT_S = 30.0  # a server with hundreds of requests answers in well under a second
# The limit of an answer, so that a broken server cannot fill the trainer's memory.
ANSWER_BYTES, ANSWER_BYTES_PER_TOKEN = 64 << 20, 1024  # about 150 are used
HALF_LOADED = "half loaded"
# What PublishedWeights.describe_published_model gives.
DESCRIPTION = {
    "model",
    "architecture",
    "shapes",
    "dtype",
    "max_model_len",
    "logprobs_mode",
    "weight_transfer",
}
HOW_TO_SERVE = "start it with `flowrl serve`"

T = TypeVar("T")


@dataclass(frozen=True)
class ServedModel:
    """What a server must serve."""

    architecture: str
    shapes: Mapping[str, torch.Size]
    max_model_len: int
    dtype: str | None = None  # None: any


@dataclass(frozen=True)
class Request:
    """One prompt and a seed for each of its responses."""

    token_ids: list[int]
    seeds: list[int]
    params: SamplingParams
    end_ids: list[int]

    def body(self, seed: int) -> dict[str, Any]:
        """One response's request as vLLM takes it; the end tokens are the trainer's."""
        params = self.params
        return {
            "token_ids": self.token_ids,
            "sampling_params": {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": max(params.top_k, 0),  # 0: off
                "max_tokens": params.max_tokens,
                "seed": seed,
                "logprobs": 0,  # of the sampled token alone
                "ignore_eos": True,
                "stop_token_ids": self.end_ids,
                "stop": list(params.stop),
                "include_stop_str_in_output": True,
                "detokenize": bool(params.stop),
                "skip_special_tokens": False,  # a stop string may be the text of one
            },
        }


@dataclass(frozen=True)
class VllmClient:
    """How the servers are asked while the run's weights are those of one publication."""

    session: aiohttp.ClientSession
    model: ServedModel
    timeout_s: float
    label: str  # of the publication, which tokens must carry
    version: int
    weights: Path | HostCopy  # of the publication: its folder, or the trainer's copy

    def service(self) -> Service[Request, list[Response]]:
        return Service(ask=self.generate, watch=self.watch, revive=self.publish)

    async def generate(self, server: Server, request: Request) -> list[Response]:
        """The responses to a prompt, in the order of the seeds."""
        tasks = [asyncio.ensure_future(self._sample(server, request, s)) for s in request.seeds]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one failed: the prompt is sent again as a whole
                task.cancel()

    async def _sample(self, server: Server, request: Request, seed: int) -> Response:
        body, max_tokens = request.body(seed), request.params.max_tokens
        path = "/inference/v1/generate"
        answer = await self._ask(server, "POST", path, body, num_tokens=max_tokens)
        return read_response(answer, max_tokens, self.label, self.version)

    async def watch(self, server: Server) -> None:
        """Ask for the server's health for as long as it answers."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            await self._check_health(server)

    async def publish(self, server: Server) -> None:
        """Have a server load the publication; raises ServerLost unless it has the whole of it."""
        await self._check_health(server)
        server.is_returning = True
        try:
            if problem := await self.wrong_model(server):
                raise ServerLost(problem)
            await self._publish(server)
        except BadAnswer as error:
            raise ServerLost(f"{error}, while it took {self.label}") from error
        finally:
            server.is_returning = False

    async def _publish(self, server: Server) -> None:
        weights = self.weights
        if isinstance(weights, Path):
            source, check = str(weights), ("check_published", str(weights))
        elif weights.is_whole:
            source, check = self.label, ("check_announced", weights.announcement())
        else:
            raise ServerLost("must wait: the trainer's weights are of two publications")
        await self._ask(server, "POST", "/pause?mode=abort")
        checks = await self._call_workers(server, *check)
        if problems := [check for check in checks if check]:
            if await self._ask(server, "GET", "/weight_info") != {"weight_version": HALF_LOADED}:
                await self._ask(server, "POST", "/resume")  # with the weights that it had
            raise ServerLost(f"does not take {source}: {problems[0]}")
        # A failure from here to the last label leaves it paused, with a label that none expects.
        await self._set_label(server, HALF_LOADED)
        if isinstance(weights, Path):
            await self._call_workers(server, "load_published", str(weights))
        else:
            await self._broadcast(server, weights)
        if await self._ask(server, "POST", "/reset_prefix_cache") != {"success": True}:
            raise BadAnswer("keeps its cache of older weights")
        await self._set_label(server, self.label)
        await self._ask(server, "POST", "/resume")

    async def _broadcast(self, server: Server, weights: HostCopy) -> None:
        """Have a server's workers receive and load the weights, in a group of this call alone."""
        answer = await self._ask(server, "GET", "/get_world_size")
        size, device, timeout_s = 1 + answer["world_size"], weights.device, self.timeout_s
        group: Group | None = None
        try:
            place, listener = meeting_place(device, server.url)
            joining = in_thread(lambda: join(device, place, 0, size, timeout_s, listener))
            init_info = {"place": place, "size": size, "timeout_s": timeout_s}
            body = {"init_info": init_info}
            group = await self._both(joining, server, "/init_weight_transfer_engine", body)
            try:
                await self._ask(server, "POST", "/start_weight_update")
            except BadAnswer:  # an update was broken off: this ends it, and loads nothing
                await self._ask(server, "POST", "/finish_weight_update")
                await self._ask(server, "POST", "/start_weight_update")
            sending = in_thread(lambda group=group: weights.send(group))
            body = {"update_info": weights.announcement()}
            await self._both(sending, server, "/update_weights", body)
            await self._ask(server, "POST", "/finish_weight_update")
            await self._ask(server, "POST", "/shutdown_weight_transfer_engine")
        except (OSError, RuntimeError) as error:
            raise ServerLost(f"weights do not reach it: {error}") from error
        finally:
            if group is not None:
                in_thread(group.close)  # which may take its time

    async def _both(self, ours: Future[T], server: Server, path: str, body: dict) -> T:
        """Do a part of a broadcast on both sides; the first failure ends the wait for the other.

        A thread that hangs in it is left behind.
        """
        asked = asyncio.ensure_future(self._ask(server, "POST", path, body))
        own = asyncio.wrap_future(ours)
        try:
            async with asyncio.timeout(self.timeout_s):
                result, _ = await asyncio.gather(own, asked)
            return result
        except TimeoutError as error:
            raise ServerLost(f"{path} did not end within {self.timeout_s:g} s") from error
        finally:
            asked.cancel()
            own.cancel()

    async def _set_label(self, server: Server, label: str) -> None:
        await self._ask(server, "POST", "/update_weight_version", {"new_version": label})

    async def wrong_model(self, server: Server) -> str:
        """Why this server cannot sample for the run, "" if it can. Raises ServerLost."""
        try:
            (own, *_) = await self._call_workers(server, "describe_published_model")
            await self._ask(server, "POST", "/inference/v1/abort_requests", {"request_ids": []})
        except BadAnswer as error:
            return f"was not started for this: {error}; {HOW_TO_SERVE}"
        needed = self.model
        if not isinstance(own, dict) or own.keys() != DESCRIPTION:
            return f"has another flowrl, which describes its model by {own!r:.200}"
        if own["architecture"] != needed.architecture:
            return f"serves {own['model']}, a {own['architecture']}, not a {needed.architecture}"
        if problem := difference(own["shapes"], needed.shapes, own["model"], "the trained model"):
            return f"serves another model: {problem}"
        if needed.dtype not in (None, own["dtype"]):
            return (
                f"computes in {own['dtype']}, not in {needed.dtype}; {HOW_TO_SERVE} and "
                f"model.dtype={needed.dtype}, or ask for {own['dtype']}"
            )
        if own["logprobs_mode"] != "processed_logprobs":
            return f"reports {own['logprobs_mode']} and not processed_logprobs; {HOW_TO_SERVE}"
        if problem := self._wrong_transfer(own["weight_transfer"]):
            return problem
        if own["max_model_len"] < needed.max_model_len:
            return (
                f"admits {own['max_model_len']} tokens a sequence, and prompt and response may "
                f"have {needed.max_model_len}; {HOW_TO_SERVE}"
            )
        return ""

    def _wrong_transfer(self, theirs: str) -> str:
        """Why a server that takes weights this way cannot take ours; any takes them from disk."""
        if isinstance(self.weights, Path) or theirs == backend_of(self.weights.device):
            return ""
        return (
            f"takes weights by {theirs}, and the trainer sends them by "
            f"{backend_of(self.weights.device)}; {HOW_TO_SERVE} and rollout.weight_transfer=nccl, "
            "on a GPU if the trainer has one"
        )

    async def _check_health(self, server: Server) -> None:
        try:
            await self._ask(server, "GET", "/health", timeout_s=HEALTH_TIMEOUT_S)
        except BadAnswer as error:
            raise ServerLost(str(error)) from error

    async def _call_workers(self, server: Server, method: str, *arguments: Any) -> list[Any]:
        """The results of a method of PublishedWeights, one per worker; raises BadAnswer."""
        body = {"method": method, "args": list(arguments)}
        answer = await self._ask(server, "POST", "/collective_rpc", body)
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or not results:
            raise BadAnswer(f"/collective_rpc {method} answers {answer!r:.200}")
        return results

    async def _ask(
        self,
        server: Server,
        verb: str,
        path: str,
        body: dict | None = None,
        *,
        num_tokens: int = 0,
        timeout_s: float | None = None,
    ) -> Any:
        """The JSON that a server answers, None for an empty answer.

        Raises ServerLost when none comes in time, BadAnswer when it is an error or no JSON, and
        ValueError when the server finds the request itself wrong.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        limit = ANSWER_BYTES + ANSWER_BYTES_PER_TOKEN * num_tokens
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self.session.request(
                verb, server.url + path, json=body, timeout=timeout
            ) as answer:
                text = bytearray()
                async for part in answer.content.iter_any():
                    text += part
                    if len(text) > limit:
                        raise BadAnswer(f"{path} answers with more than {limit} bytes")
        except TimeoutError as error:
            raise ServerLost(f"{path} did not answer within {timeout_s:g} s") from error
        except aiohttp.ClientPayloadError as error:
            raise BadAnswer(f"{path} answers with less than it announced: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(f"{path}: {type(error).__name__}: {error}") from error
        if answer.status == 400 and num_tokens:
            raise ValueError(f"{server.url} refuses a prompt: {text.decode(errors='replace')}")
        if answer.status == 503:
            raise ServerLost(f"{path} answers 503: {text[:500].decode(errors='replace')}")
        if answer.status != 200:
            problem = text[:500].decode(errors="replace")
            raise BadAnswer(f"{path} answers {answer.status}: {problem}")
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise BadAnswer(f"{path} answers with what is no JSON: {text[:80]!r}") from error


def read_response(answer: Any, max_tokens: int, label: str, version: int) -> Response:
    """The response in an answer of /inference/v1/generate.

    Raises BadAnswer naming the field that is not as it must be, and ServerLost when tokens do not
    carry the publication's label.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer(f"`choices` is {choices!r:.80}, not one response")
    choice = choices[0]
    token_ids = choice.get("token_ids")
    if not isinstance(token_ids, list) or not 0 < len(token_ids) <= max_tokens:
        raise BadAnswer(f"`token_ids` is {token_ids!r:.80}, not 1 to {max_tokens} tokens")
    if not all(type(token) is int for token in token_ids):
        raise BadAnswer(f"`token_ids` is {token_ids!r:.80}")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise BadAnswer(f"`finish_reason` is {reason!r} after {len(token_ids)} tokens")
    try:
        content = choice["logprobs"]["content"]
        logprobs = [float(entry["logprob"]) for entry in content]
        is_whole = [entry["token_id"] for entry in content] == token_ids
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"`logprobs` is {choice.get('logprobs')!r:.80}") from error
    if not is_whole or not all(math.isfinite(value) for value in logprobs):
        raise BadAnswer(f"`logprobs` are not one number for each of {len(token_ids)} tokens")
    spans = choice.get("weight_versions")
    if spans != [{"version": label, "start": 0, "end": len(token_ids)}]:
        raise ServerLost(f"sampled with weights {spans!r:.200} and not {label}")
    return Response(token_ids, logprobs, reason, version)
