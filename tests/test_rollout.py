"""The transformers engine: what it samples, the log-probs it reports, and what it leaves behind."""

import math
from collections import Counter

import pytest
import torch
from tiny_model import random_model, tiny_tokenizer
from transformers import PreTrainedModel

from flowrl.batch import Sample, pack, response_values
from flowrl.policy.attention import NAME as PACKED_ATTENTION
from flowrl.policy.forward import forward_tokens, token_logprobs
from flowrl.rollout import Response, SamplingParams
from flowrl.rollout.transformers import TransformersEngine, sample_tokens

EOS = 2
RAGGED = [[5, 6, 7, 8, 9, 10, 3], [4], [11, 12, 13], [4, 4]]


def make_engine(kind: str = "llama", max_num_seqs: int = 256, seed: int = 0) -> TransformersEngine:
    return TransformersEngine(random_model(kind, seed=seed), tiny_tokenizer(), max_num_seqs)


def teacher_forced(
    model: PreTrainedModel, prompt: list[int], response: Response, temperature: float
) -> torch.Tensor:
    batch = pack([Sample(prompt, response.token_ids, response.logprobs, 0)])
    return response_values(batch, token_logprobs(model, batch, temperature))[0]


# One draw


def draws(
    logits: list[float], params: SamplingParams, count: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return sample_tokens(torch.tensor(logits).expand(count, -1), params, generator)


def chi_square(ids: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.detach().double() * len(ids)
    observed = torch.bincount(ids, minlength=len(expected)).double()
    kept = expected > 0
    assert observed[~kept].sum() == 0
    return float(((observed - expected)[kept] ** 2 / expected[kept]).sum())


LOGITS = [2.0, 1.0, 0.0, -1.0, 1.5, -3.0]


# 99.9 % quantiles of chi-square: 20.5 for 5 degrees of freedom, 13.8 for 2.
@pytest.mark.parametrize(
    ("params", "kept", "limit"),
    [
        (SamplingParams(), [0, 1, 2, 3, 4, 5], 20.5),
        (SamplingParams(temperature=0.5), [0, 1, 2, 3, 4, 5], 20.5),
        (SamplingParams(temperature=2.0), [0, 1, 2, 3, 4, 5], 20.5),
        (SamplingParams(top_k=3), [0, 1, 4], 13.8),
        # softmax: 0.48, 0.18, 0.065, 0.024, 0.29, 0.003; the mass reaches 0.9 with the third.
        (SamplingParams(top_p=0.9), [0, 1, 4], 13.8),
        (SamplingParams(top_k=4, top_p=0.9), [0, 1, 4], 13.8),
    ],
    ids=["plain", "cold", "hot", "top_k", "top_p", "top_k and top_p"],
)
def test_draws_follow_the_distribution_they_report(
    params: SamplingParams, kept: list[int], limit: float
) -> None:
    truncated = torch.full((6,), -torch.inf, dtype=torch.float64)
    truncated[kept] = torch.tensor(LOGITS, dtype=torch.float64)[kept] / params.temperature
    logprobs = truncated.log_softmax(-1)
    ids, chosen = draws(LOGITS, params, 40_000)
    assert chi_square(ids, logprobs.exp()) < limit
    torch.testing.assert_close(chosen.double(), logprobs[ids], rtol=0, atol=1e-6)


def test_top_p_keeps_the_likeliest_token_however_small_it_is() -> None:
    ids, logprobs = draws(LOGITS, SamplingParams(top_p=1e-9), 100)
    assert set(ids.tolist()) == {0} and logprobs.abs().max() == 0


@pytest.mark.parametrize("top_k", [-1, 0, 6, 100])
def test_top_k_that_cuts_nothing_is_off(top_k: int) -> None:
    plain, _ = draws(LOGITS, SamplingParams(), 200)
    ids, _ = draws(LOGITS, SamplingParams(top_k=top_k), 200)
    assert torch.equal(ids, plain)


def test_rows_are_drawn_independently() -> None:
    ids, _ = draws([0.0, 0.0], SamplingParams(), 20_000)
    pairs = ids[0::2] * 2 + ids[1::2]
    assert chi_square(pairs, torch.full((4,), 0.25)) < 16.3  # 99.9 % of 3 degrees of freedom


def test_greedy_takes_the_argmax_and_reports_the_plain_softmax() -> None:
    ids, logprobs = draws(LOGITS, SamplingParams(temperature=0.0), 3)
    assert ids.tolist() == [0, 0, 0]
    expected = torch.tensor(LOGITS).log_softmax(-1)[0]
    torch.testing.assert_close(logprobs, expected.expand(3))


# Whole responses


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_the_policys(kind: str, temperature: float) -> None:
    engine = make_engine(kind)
    params = SamplingParams(n=5, temperature=temperature, max_tokens=12)
    groups = engine.generate(RAGGED, params, seed=3)
    responses = [r for group in groups for r in group]
    assert len({len(r.token_ids) for r in responses}) > 2  # rows finish at different times
    for prompt, group in zip(RAGGED, groups, strict=True):
        assert len(group) == 5
        for response in group:
            expected = teacher_forced(engine.model, prompt, response, temperature)
            torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=2e-5)


def test_greedy_follows_the_model_token_by_token() -> None:
    engine = make_engine()
    plain = random_model(attention="eager")
    params = SamplingParams(temperature=0.0, max_tokens=8)
    for prompt, (response,) in zip(RAGGED, engine.generate(RAGGED, params, seed=0), strict=True):
        ids = list(prompt)
        for token in response.token_ids:
            logits = plain(torch.tensor([ids])).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)
        assert response.token_ids[-1] == EOS or len(response.token_ids) == 8


def test_first_tokens_follow_the_models_distribution() -> None:
    engine = make_engine(max_num_seqs=20_000)
    (group,) = engine.generate([RAGGED[0]], SamplingParams(n=20_000, max_tokens=1), seed=1)
    logits = random_model(attention="eager")(torch.tensor([RAGGED[0]])).logits[0, -1]
    ids = torch.tensor([r.token_ids[0] for r in group])
    assert chi_square(ids, logits.double().softmax(-1)) < 37.7  # 99.9 % of 15 degrees of freedom


def test_the_seed_alone_decides() -> None:
    engine, params = make_engine(), SamplingParams(n=3, max_tokens=10)
    first = engine.generate(RAGGED, params, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert engine.generate(RAGGED, params, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert engine.generate(RAGGED, params, seed=2) != first
    assert len({tuple(r.token_ids) for r in first[0]}) > 1


def test_responses_end_with_the_end_token_or_at_the_limit() -> None:
    params = SamplingParams(n=30, max_tokens=6)
    responses = [r for group in make_engine().generate(RAGGED, params, seed=0) for r in group]
    reasons = Counter(r.finish_reason for r in responses)
    assert reasons["stop"] > 5 and reasons["length"] > 5
    for r in responses:
        assert EOS not in r.token_ids[:-1]
        assert (r.token_ids[-1] == EOS) == (r.finish_reason == "stop")
        assert len(r.token_ids) <= 6 and len(r.logprobs) == len(r.token_ids)
        assert r.finish_reason == "stop" or len(r.token_ids) == 6


def test_stop_strings_end_a_response_and_stay_in_it() -> None:
    engine, tokenizer = make_engine(), tiny_tokenizer()
    stop = ("1", "5")
    params = SamplingParams(n=30, max_tokens=10, stop=stop)
    responses = [r for group in engine.generate(RAGGED, params, seed=0) for r in group]
    endings = Counter()
    for r in responses:
        words = tokenizer.convert_ids_to_tokens(r.token_ids)
        assert not set(words[:-1]) & set(stop)
        is_stopped = words[-1] in stop or r.token_ids[-1] == EOS
        assert r.finish_reason == ("stop" if is_stopped else "length")
        endings[words[-1]] += 1
    assert endings["1"] and endings["5"] and endings["</s>"]


@pytest.mark.parametrize("num_tokens", [2, 40], ids=["short", "longer than any fixed window"])
def test_stop_strings_span_tokens(num_tokens: int) -> None:
    engine, tokenizer = make_engine(), tiny_tokenizer()
    engine.eos_ids = set()
    ids = [3 + i * 7 % 10 for i in range(60)]
    text = tokenizer.decode(ids[5 : 5 + num_tokens])
    ends = [n for n in range(1, len(ids) + 1) if engine._is_end(ids[:n], (text,))]
    assert ends[0] == 5 + num_tokens


def test_several_end_tokens_are_respected() -> None:
    model = random_model()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [2, 7, 9]
    engine = TransformersEngine(model, tiny_tokenizer())
    params = SamplingParams(n=30, max_tokens=10)
    for response in engine.generate([RAGGED[0]], params, seed=0)[0]:
        assert not set(response.token_ids[:-1]) & {2, 7, 9}
        assert (response.finish_reason == "stop") == (response.token_ids[-1] in {2, 7, 9})


def test_without_any_end_token_every_response_is_full() -> None:
    engine = make_engine()
    engine.eos_ids = set()
    for response in engine.generate([[5]], SamplingParams(n=4, max_tokens=9), seed=0)[0]:
        assert (len(response.token_ids), response.finish_reason) == (9, "length")


@pytest.mark.parametrize("max_num_seqs", [1, 4, 7, 16])
def test_chunks_change_neither_order_nor_logprobs(max_num_seqs: int) -> None:
    engine = make_engine(max_num_seqs=max_num_seqs)
    sizes: list[int] = []
    hook = engine.model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    params = SamplingParams(n=4, max_tokens=6)
    groups = engine.generate(RAGGED, params, seed=0)
    hook.remove()
    assert max(sizes) <= max(max_num_seqs, params.n)
    assert [len(group) for group in groups] == [4] * 4
    for prompt, group in zip(RAGGED, groups, strict=True):
        for response in group:
            expected = teacher_forced(engine.model, prompt, response, 1.0)
            torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=2e-5)


def test_greedy_does_not_depend_on_the_batch() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=10)
    together = make_engine().generate(RAGGED, params, seed=0)
    alone = [make_engine().generate([prompt], params, seed=5)[0] for prompt in RAGGED]
    assert [[r.token_ids for r in g] for g in together] == [[r.token_ids for r in g] for g in alone]


def test_no_prompts_give_no_responses_and_an_empty_prompt_is_refused() -> None:
    engine = make_engine()
    assert engine.generate([], SamplingParams(), seed=0) == []
    with pytest.raises(ValueError, match="no tokens"):
        engine.generate([[3], []], SamplingParams(), seed=0)


# Weights and state


def test_publish_copies_foreign_weights_and_bumps_the_version() -> None:
    engine, other = make_engine(seed=0), random_model(seed=1)
    params = SamplingParams(n=2, max_tokens=6)
    before = engine.generate(RAGGED, params, seed=0)
    assert {r.weight_version for g in before for r in g} == {0}
    engine.publish(other.named_parameters(), version=7)
    after = engine.generate(RAGGED, params, seed=0)
    expected = TransformersEngine(other, tiny_tokenizer()).generate(RAGGED, params, seed=0)
    assert {r.weight_version for g in after for r in g} == {7}
    assert [[r.token_ids for r in g] for g in after] == [[r.token_ids for r in g] for g in expected]
    own, theirs = dict(engine.model.named_parameters()), dict(other.named_parameters())
    for name in own:
        assert torch.equal(own[name], theirs[name])
        assert own[name].data_ptr() != theirs[name].data_ptr()


def test_publish_of_its_own_weights_costs_nothing() -> None:
    engine = make_engine()
    versions = [p._version for p in engine.model.parameters()]
    engine.publish(((n, p.detach()) for n, p in engine.model.named_parameters()), version=3)
    assert engine.weight_version == 3
    assert [p._version for p in engine.model.parameters()] == versions


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_publish_takes_all_weights_or_none(fault: str) -> None:
    engine = make_engine()
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    weights = {name: p + 1 for name, p in before.items()}
    last = list(weights)[-1]
    if fault == "unknown":
        weights["nobody"] = torch.zeros(1)
    elif fault == "missing":
        del weights[last]
    else:
        weights[last] = torch.zeros(3)
    with pytest.raises(ValueError, match=f"1 weights.*{'nobody' if fault == 'unknown' else last}"):
        engine.publish(weights.items(), version=9)
    assert engine.weight_version == 0
    assert all(torch.equal(p, before[n]) for n, p in engine.model.named_parameters())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_model_is_left_as_it_was(training: bool, fails: bool) -> None:
    engine = make_engine()
    engine.model.train(training)
    if fails:
        with pytest.raises(IndexError):
            engine.generate([[10_000]], SamplingParams(max_tokens=3), seed=0)
    else:
        engine.generate([[5]], SamplingParams(max_tokens=3), seed=0)
    assert engine.model.training == training
    assert all(module.training == training for module in engine.model.modules())
    assert engine.model.config._attn_implementation == PACKED_ATTENTION
    batch = pack([Sample([5], [6], [0.0], 0)])
    values = token_logprobs(engine.model, batch, 1.0)
    assert math.isfinite(float(values[1])) and values[1] < 0


def test_generating_leaves_training_intact() -> None:
    engine = make_engine()
    engine.generate(RAGGED, SamplingParams(n=2, max_tokens=4), seed=0)
    batch = pack([Sample([5, 6], [7, 8], [0.0, 0.0], 0)])
    forward_tokens(engine.model, batch, 1.0).logprobs.sum().backward()
    fresh = random_model()
    forward_tokens(fresh, batch, 1.0).logprobs.sum().backward()
    for (name, p), q in zip(engine.model.named_parameters(), fresh.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad), name
