"""vLLM in this process: what it samples, the log-probs it reports, how a response ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from vllm_models import assert_exact, need_vllm, processed, vllm_engine

from flowrl.policy.pretrained import load_model
from flowrl.rollout import Response, SamplingParams
from flowrl.rollout.transformers import TransformersEngine
from flowrl.rollout.vllm_engine import VllmEngine

need_vllm()

PROMPTS = [[1, 7, 11], [2, 5, 11], [9], [1, 2, 10, 5, 11, 3, 1]]  # "17=" "25=" "9" "12+5=31"


@pytest.fixture(scope="module")
def engine(tiny_sums: Path) -> Iterator[VllmEngine]:
    with vllm_engine(tiny_sums) as engine:
        yield engine


@pytest.fixture(scope="module")
def exact(tiny_sums: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        tiny_sums, dtype=torch.float64, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def plain(tiny_sums: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_sums, attn_implementation="eager").eval()


@pytest.fixture
def own_engine(tiny_sums: Path) -> TransformersEngine:
    model = load_model(str(tiny_sums), torch.float32, torch.device("cpu"))
    return TransformersEngine(model, AutoTokenizer.from_pretrained(tiny_sums))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(n=4, max_tokens=16),
        SamplingParams(n=4, max_tokens=16, temperature=0.6),
        SamplingParams(n=4, max_tokens=16, temperature=1.7),
        SamplingParams(n=4, max_tokens=16, top_k=3),
        SamplingParams(n=4, max_tokens=16, top_p=0.7),
        SamplingParams(n=4, max_tokens=16, temperature=1.5, top_k=6, top_p=0.8),
        SamplingParams(n=2, max_tokens=16, temperature=0.0),
    ],
    ids=["plain", "cold", "hot", "top_k", "top_p", "all three", "greedy"],
)
def test_logprobs_are_those_of_the_distribution_sampled_from(
    engine: VllmEngine, exact: PreTrainedModel, plain: PreTrainedModel, params: SamplingParams
) -> None:
    groups = engine.generate(PROMPTS, params, seed=3)
    assert [len(group) for group in groups] == [params.n] * len(PROMPTS)
    assert_exact(exact, plain, PROMPTS, groups, params)


# 99.9 % of chi-square: 37.7 with 15 degrees of freedom, 16.3 with 3, of a kept set of 4.
@pytest.mark.parametrize(
    ("params", "limit"),
    [
        (SamplingParams(n=2000, max_tokens=1), 37.7),
        (SamplingParams(n=2000, max_tokens=1, temperature=2.0, top_k=4), 16.3),
    ],
    ids=["plain", "top_k"],
)
def test_first_tokens_follow_the_distribution(
    engine: VllmEngine, exact: PreTrainedModel, params: SamplingParams, limit: float
) -> None:
    (group,) = engine.generate(PROMPTS[:1], params, seed=1)
    ids = torch.tensor([response.token_ids[0] for response in group])
    logits = exact(torch.tensor(PROMPTS[:1])).logits[0, -1].detach()
    expected = processed(logits, params).exp() * len(ids)
    observed = torch.bincount(ids, minlength=16)
    is_kept = expected > 0
    assert observed[~is_kept].sum() == 0
    assert float(((observed - expected)[is_kept] ** 2 / expected[is_kept]).sum()) < limit


def test_the_seed_alone_decides(engine: VllmEngine) -> None:
    params = SamplingParams(n=4, max_tokens=12, temperature=2.0)
    first = engine.generate(PROMPTS, params, seed=5)
    torch.manual_seed(123)  # nor does the state of this process matter
    assert engine.generate(PROMPTS, params, seed=5) == first
    assert engine.generate(PROMPTS, params, seed=6) != first
    assert len({tuple(r.token_ids) for group in first for r in group}) > 12  # no sample repeats


def test_greedy_is_that_of_the_transformers_engine(
    engine: VllmEngine, own_engine: TransformersEngine
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8)
    found = engine.generate(PROMPTS, params, seed=0)
    expected = own_engine.generate(PROMPTS, params, seed=0)
    for (response,), (other,) in zip(found, expected, strict=True):
        assert response.token_ids == other.token_ids
        assert response.finish_reason == other.finish_reason
        assert response.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("stop", [(), ("+",), ("+1", "3"), ("2", "unseen")], ids=str)
def test_responses_end_where_those_of_the_transformers_engine_do(
    engine: VllmEngine, own_engine: TransformersEngine, stop: tuple[str, ...]
) -> None:
    params = SamplingParams(n=8, temperature=1.5, max_tokens=6, stop=stop)
    reasons = set()
    for group in engine.generate(PROMPTS, params, seed=2):
        for response in group:
            ids = response.token_ids
            is_end = [own_engine._is_end(ids[: i + 1], stop) for i in range(len(ids))]
            assert not any(is_end[:-1])
            assert response.finish_reason == ("stop" if is_end[-1] else "length")
            assert is_end[-1] or len(ids) == params.max_tokens
            assert len(response.logprobs) == len(ids)
            assert response.weight_version == engine.weight_version
            reasons.add(response.finish_reason)
    assert "stop" in reasons and (stop or "length" in reasons)


def test_more_prompts_than_vllm_computes_at_once(engine: VllmEngine) -> None:
    """8160 tokens of different prompts at 2048 or 4096 a time: one would lie across two batches."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 14, (85,), generator=draw).tolist() for _ in range(96)]
    params = SamplingParams(max_tokens=4)
    groups = engine.generate(prompts, params, seed=0)
    assert len(groups) == 96
    assert engine.generate(prompts, params, seed=0) == groups


def test_prompts_that_cannot_be_answered_are_refused(engine: VllmEngine) -> None:
    params = SamplingParams(max_tokens=250)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine.generate([[1], []], params, seed=0)
    with pytest.raises(ValueError, match=r"prompt 1 has 7 tokens.*250.*max_model_len = 256"):
        engine.generate([[1], [1] * 7], params, seed=0)


def test_answers_that_are_not_whole_name_their_request(engine: VllmEngine) -> None:
    (output,) = engine._llm.generate(
        [{"prompt_token_ids": PROMPTS[0]}],
        [engine._sampling(SamplingParams(max_tokens=4), 0)],
        use_tqdm=False,
    )
    output.outputs[0].finish_reason = "abort"
    with pytest.raises(RuntimeError, match="request 7 with abort after .* to 3 tokens"):
        engine._response(7, output)
    output.outputs[0].finish_reason, output.outputs[0].token_ids = "stop", []
    with pytest.raises(RuntimeError, match="request 7 with stop after 0 tokens"):
        engine._response(7, output)


def test_a_second_engine_is_refused(engine: VllmEngine, tiny_sums: Path) -> None:
    message = r"torch.distributed.*rollout.servers"
    with pytest.raises(ValueError, match=message), vllm_engine(tiny_sums):
        pass
    params = SamplingParams(max_tokens=4)
    assert isinstance(engine.generate(PROMPTS, params, 0)[0][0], Response)
