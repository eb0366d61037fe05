"""Sampling ahead: the schedule, its bound, partial rollouts, and that overlap changes nothing."""

import copy
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_samples import files_of, settings, trained, training_rows, untimed_rows
from transformers import PreTrainedModel

import flowrl.parts
from flowrl.config import load_config
from flowrl.lookahead import Lookahead, joined, staleness_metrics
from flowrl.parts import step_seed
from flowrl.rollout import Response, SamplingParams
from flowrl.rollout.transformers import TransformersEngine
from flowrl.tasks import Prompt, PromptSampler, TokenizedPrompt

pytestmark = pytest.mark.timeout(300)

NUM_PROMPTS, MAX_TOKENS = 12, 12


class ScriptedEngine:
    """Responses have the tokens 0, 1, 2, ... and end where the seed says, if at all."""

    def __init__(self) -> None:
        self.weight_version = 0
        self.calls: list[tuple[int, SamplingParams, int]] = []  # prompts, params, seed

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[list[Response]]:
        self.calls.append((len(prompts), params, seed))
        draw = torch.Generator().manual_seed(seed)
        groups = []
        for prompt in prompts:
            group = []
            for _ in range(params.n):
                length = int(torch.randint(1, 8 * params.max_tokens, (), generator=draw))
                is_whole = length <= params.max_tokens
                done = len(prompt) - 1  # a prompt has one token
                ids = [done + k for k in range(min(length, params.max_tokens))]
                reason = "stop" if is_whole else "length"
                logprobs = [-float(self.weight_version)] * len(ids)
                group.append(Response(ids, logprobs, reason, self.weight_version))
            groups.append(group)
        return groups

    def begin(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> Callable[[], list[list[Response]]]:
        responses = self.generate(prompts, params, seed)
        return lambda: responses

    def publish(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.weight_version = version

    def close(self) -> None:
        pass


def prompts() -> list[TokenizedPrompt]:
    return [TokenizedPrompt(Prompt("t", [], ""), [100 + i]) for i in range(NUM_PROMPTS)]


def lookahead(max_staleness: int, seed: int = 0, n: int = 3) -> Lookahead:
    sampling = SamplingParams(n=n, max_tokens=MAX_TOKENS)
    sampler = PromptSampler(NUM_PROMPTS, 2, seed)
    return Lookahead(ScriptedEngine(), sampler, prompts(), sampling, seed, max_staleness)


Taken = list[tuple[list[int], list[list[Response]]]]


def steps(ahead: Lookahead, first: int, last: int) -> Taken:
    """What training steps take; each then publishes."""
    taken = []
    for step in range(first, last):
        drawn, responses = ahead.take(step, 0)
        taken.append(([p.token_ids[0] - 100 for p in drawn], responses))
        if ahead.max_staleness:
            ahead.begin()
            ahead.finish()
        ahead.engine.publish([], step + 1)
    return taken


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_no_token_is_staler_than_the_bound_and_no_prompt_is_lost(
    max_staleness: int, seed: int
) -> None:
    taken = steps(lookahead(max_staleness, seed), 0, 20)
    order = PromptSampler(NUM_PROMPTS, 2, seed)
    assert [places for places, _ in taken] == [order.next_batch() for _ in range(20)]
    largest = 0
    for step, (_, groups) in enumerate(taken):
        assert [len(group) for group in groups] == [3, 3]
        for response in (r for group in groups for r in group):
            # Each part went on where the one before it had ended, with its own weights.
            length = len(response.token_ids)
            assert response.token_ids == list(range(length))
            assert length == MAX_TOKENS or response.finish_reason == "stop"
            assert response.versions == sorted(response.versions)
            assert response.logprobs == [-float(v) for v in response.versions]
            assert response.weight_version == response.versions[-1]
            assert all(step - max_staleness <= v <= step for v in response.versions)
            largest = max(largest, step - min(response.versions))
    assert largest == max_staleness  # and the bound is reached


def test_one_step_ahead_samples_what_the_next_step_would() -> None:
    now, ahead = lookahead(0), lookahead(1)
    assert [
        [[r.token_ids for r in group] for group in groups] for _, groups in steps(now, 0, 6)
    ] == [[[r.token_ids for r in group] for group in groups] for _, groups in steps(ahead, 0, 6)]
    whole = SamplingParams(n=3, max_tokens=MAX_TOKENS)
    expected = [(2, whole, step_seed(0, step)) for step in range(7)]
    for engine, calls in ((now.engine, expected[:6]), (ahead.engine, expected)):
        assert isinstance(engine, ScriptedEngine) and engine.calls == calls


def test_no_round_is_longer_than_its_part_of_a_response() -> None:
    ahead = lookahead(3)
    steps(ahead, 0, 20)
    assert isinstance(ahead.engine, ScriptedEngine)
    assert {params.max_tokens for _, params, _ in ahead.engine.calls} == {MAX_TOKENS // 3}
    assert len({seed for _, _, seed in ahead.engine.calls}) == len(ahead.engine.calls)


def test_further_draws_of_a_step_are_of_its_own_weights() -> None:
    ahead = lookahead(2)
    steps(ahead, 0, 4)
    _, groups = ahead.take(4, 1)
    assert {v for group in groups for r in group for v in r.versions} == {4}
    assert max(len(r.token_ids) for group in groups for r in group) > MAX_TOKENS // 2


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_a_saved_state_goes_on_exactly(max_staleness: int) -> None:
    straight = steps(lookahead(max_staleness), 0, 12)
    first = lookahead(max_staleness)
    taken = steps(first, 0, 5)
    second = lookahead(max_staleness)
    second.sampler.load_state_dict(first.sampler.state_dict())
    second.load_state_dict(first.state_dict())
    second.engine.publish([], 5)
    assert taken + steps(second, 5, 12) == straight


def test_what_lies_ahead_is_used_up_when_a_run_goes_on_without_looking_ahead() -> None:
    first, second = lookahead(3), lookahead(0)
    steps(first, 0, 5)
    num_ahead = len(first.batches)
    second.sampler.load_state_dict(first.sampler.state_dict())
    second.load_state_dict(first.state_dict())
    second.engine.publish([], 5)
    taken = steps(second, 5, 12)
    order = PromptSampler(NUM_PROMPTS, 2, 0)
    assert [places for places, _ in taken] == [order.next_batch() for _ in range(12)][5:]
    stale = [
        min(min(r.versions) for g in groups for r in g) < 5 + i
        for i, (_, groups) in enumerate(taken)
    ]
    assert num_ahead == 3 and stale == [True] * 3 + [False] * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": 3}, "damaged"),
        ({"num_rounds": None}, "damaged"),
        ({"batches": [{"places": [99, 1], "responses": [[], []]}]}, r"places \[99, 1\] of 12"),
        ({"batches": [{"places": [1], "responses": [[], []]}]}, "2 prompts sampled ahead"),
        ({"batches": [{"places": [1], "responses": [[]]}]}, "resume with rollout.n=0"),
    ],
)
def test_a_damaged_state_is_refused(change: dict, message: str) -> None:
    ahead = lookahead(1)
    steps(ahead, 0, 1)
    before = ahead.state_dict()
    with pytest.raises(ValueError, match=message):
        ahead.load_state_dict({**before, **change})
    assert ahead.state_dict() == before


def test_a_response_that_is_longer_than_the_limit_by_now_is_refused() -> None:
    ahead = lookahead(1)
    steps(ahead, 0, 1)
    shorter = lookahead(1)
    shorter.sampling = replace(shorter.sampling, max_tokens=1)
    with pytest.raises(ValueError, match=r"tokens sampled ahead, beyond .*max_response_length = 1"):
        shorter.load_state_dict(ahead.state_dict())


def test_staleness_is_counted_by_token() -> None:
    start = Response([1, 2], [-1.0, -2.0], "length", 3)
    response = joined(start, Response([3], [-3.0], "stop", 5))
    assert response == Response([1, 2, 3], [-1.0, -2.0, -3.0], "stop", 5, [3, 3, 5])
    assert staleness_metrics([response, Response([4], [0.0], "stop", 6)], step=6) == {
        "rollout/staleness": pytest.approx((3 + 3 + 1 + 0) / 4),
        "rollout/staleness_max": 3.0,
    }


@pytest.mark.parametrize(
    "changes", [("rollout.max_staleness=2",), ("rollout.max_staleness=7", "rollout.stop=[x]")]
)
def test_parts_that_do_not_fit_are_refused(changes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"give a multiple of \d and no stop strings"):
        load_config(None, settings(Path("model"), Path("run"), *changes))
    load_config(None, settings(Path("m"), Path("r"), "rollout.max_staleness=1", "rollout.stop=[x]"))


# Real runs; responses have up to 7 tokens.

WEIGHED = ("flow.old_logprobs=rollout", "trainer.total_training_steps=6")


def test_parts_of_one_response_have_the_log_probs_of_the_whole(
    tiny_sums: Path, tmp_path: Path
) -> None:
    frozen = ("actor.optim.lr=0", "flow.z_lr=0", "trainer.total_training_steps=3")
    for name, max_staleness in (("now", 0), ("one", 1), ("seven", 7)):
        changes = (*frozen, f"rollout.max_staleness={max_staleness}")
        trained(tiny_sums, tmp_path / name, *changes)
    now, one, seven = (training_rows(tmp_path / name) for name in ("now", "one", "seven"))
    for row in [*now, *one, *seven]:
        assert row["mismatch/logprob_abs_diff_max"] < 2e-5
    assert [row["rollout/staleness_max"] for row in one] == [0, 1, 1]
    assert max(row["rollout/staleness_max"] for row in seven) == 2
    # One step ahead of a policy that does not move: the very responses of the synchronous run.
    for key in ("critic/score/mean", "response_length/mean", "actor/loss", "actor/grad_norm"):
        assert [row[key] for row in one] == [row[key] for row in now]


class AsideEngine(TransformersEngine):
    """Samples in a thread, from weights of its own."""

    def __init__(self, model: PreTrainedModel, *arguments: object) -> None:
        super().__init__(copy.deepcopy(model), *arguments)  # pyright: ignore[reportArgumentType]
        self.thread = ThreadPoolExecutor(1)
        self.was_running: list[bool] = []

    def begin(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> Callable[[], list[list[Response]]]:
        future = self.thread.submit(self.generate, prompts, params, seed)
        return future.result


@pytest.mark.parametrize("max_staleness", [1, 7])
def test_what_is_sampled_aside_is_what_is_sampled_before_the_update(
    tiny_sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_staleness: int
) -> None:
    changes = (*WEIGHED, f"rollout.max_staleness={max_staleness}")
    trained(tiny_sums, tmp_path / "before", *changes)
    monkeypatch.setattr(flowrl.parts, "TransformersEngine", AsideEngine)
    trained(tiny_sums, tmp_path / "aside", *changes)
    assert untimed_rows(tmp_path / "aside") == untimed_rows(tmp_path / "before")
    rows = training_rows(tmp_path / "aside")
    assert max(row["rollout/staleness_max"] for row in rows) > 0
    assert any(row["flow/weight"] != 1 for row in rows)  # and is weighed


@pytest.mark.parametrize("max_staleness", [1, 7])
def test_a_resumed_run_repeats_one_that_was_not_stopped(
    tiny_sums: Path, tmp_path: Path, max_staleness: int
) -> None:
    changes = (*WEIGHED, f"rollout.max_staleness={max_staleness}", "trainer.save_freq=3")
    trained(tiny_sums, tmp_path / "straight", *changes)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "global_step_6")
    trained(tiny_sums, tmp_path / "resumed", *changes)
    assert untimed_rows(tmp_path / "resumed") == untimed_rows(tmp_path / "straight")
    straight, resumed = (files_of(tmp_path / name) for name in ("straight", "resumed"))
    for name, content in straight.items():
        if "global_step_6" in name:
            assert resumed[name] == content, name


def test_other_group_size_is_refused_by_name(tiny_sums: Path, tmp_path: Path) -> None:
    changes = (*WEIGHED, "rollout.max_staleness=7", "trainer.total_training_steps=1")
    trained(tiny_sums, tmp_path / "run", *changes)
    more = [c for c in changes if "total" not in c]
    with pytest.raises(ValueError, match=r"4 per prompt, and rollout.n is 2"):
        trained(tiny_sums, tmp_path / "run", *more, "rollout.n=2")


def test_tokens_of_older_weights_are_said_to_pass_for_new_ones(
    tiny_sums: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = ("rollout.max_staleness=1", "trainer.total_training_steps=1")
    trained(tiny_sums, tmp_path / "silent", *one, "flow.old_logprobs=rollout")
    assert "older weights" not in caplog.text
    trained(tiny_sums, tmp_path / "warned", *one)
    assert "takes what older weights sampled for the policy's own" in caplog.text
