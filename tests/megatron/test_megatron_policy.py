"""MegatronPolicy beyond the numbers of a step: results, refusals, skipped updates, bfloat16."""

from dataclasses import replace

import pytest
import torch
from harness import run_ranks
from hf_reference import hf_config, hf_model
from parallel_cases import (
    LR,
    VOCABULARY,
    WARMUP_STEPS,
    Case,
    Outcome,
    Spread,
    build_policy,
    make_objective,
    make_samples,
    on_ranks,
    one_process,
    relative,
)
from torch import Tensor

from flowrl.batch import pack, response_values
from flowrl.megatron.layout import Layout, is_last_stage
from flowrl.megatron.model import build_chunks
from flowrl.megatron.weights import load_hf_weights
from flowrl.objectives import ObjectiveOutput
from flowrl.policy.forward import token_logprobs

TP2_SP = Spread(2, Layout(tensor=2, sequence_parallel=True))
PP2 = Spread(2, Layout(pipeline=2))


def frozen_passes(rank: int, case: Case, spread: Spread) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of the policy and of a reference with other weights, which has no DDP wrapper."""
    policy = build_policy(case, spread)
    model = hf_model(hf_config(case.kind, vocab_size=VOCABULARY))
    reference = build_chunks(model.config, spread.layout, case.dtype)
    load_hf_weights(reference, model.state_dict().items())
    samples = make_samples(case.num_samples)
    return policy.logprobs(samples), policy.logprobs(samples, reference)


@pytest.mark.parametrize("spread", [TP2_SP, PP2, Spread(2)], ids=["TP2 SP", "PP2", "DP2"])
def test_reference_log_probs_come_in_the_order_of_the_samples(spread: Spread) -> None:
    case = Case()
    model = hf_model(hf_config(case.kind, vocab_size=VOCABULARY))
    model.set_attn_implementation("flowrl_packed")
    batch = pack(make_samples(case.num_samples))
    expected = response_values(batch, token_logprobs(model, batch, 0.7))
    for own, reference in run_ranks(spread.num_ranks, frozen_passes, case, spread):
        for value, truth in zip(own, one_process(case).frozen_logprobs, strict=True):
            torch.testing.assert_close(value, truth, rtol=0, atol=1e-5)
        for value, truth in zip(reference, expected, strict=True):
            assert value.device.type == "cpu" and value.dtype == torch.float32
            torch.testing.assert_close(value, truth, rtol=0, atol=2e-5)


def test_result_covers_the_mini_batch_in_order() -> None:
    case = Case()
    samples = make_samples(case.num_samples)
    for outcome in run_ranks(2, on_ranks, replace(case, num_steps=1), PP2, None):
        (result,) = outcome.results
        expected = pack(samples)
        assert torch.equal(result.batch.input_ids, expected.input_ids)
        assert result.output.normalizer == "sequences"
        truth = one_process(case).results[0]
        for name, values in truth.output.diagnostics.items():
            assert result.output.diagnostics[name].dtype == values.dtype, name
        assert result.log_z is not None and truth.log_z is not None
        torch.testing.assert_close(result.log_z, truth.log_z, rtol=1e-5, atol=1e-6)
        assert result.dropped_mass is None
        assert result.logprobs[~expected.loss_mask].abs().max() == 0


def dropped_outcome(rank: int, case: Case, spread: Spread) -> Outcome:
    return on_ranks(rank, case, spread, None)


@pytest.mark.parametrize("spread", [TP2_SP, Spread(2, Layout(context=2))], ids=["TP2 SP", "CP2"])
def test_dropped_mass_is_within_its_bound_over_all_shards(spread: Spread) -> None:
    drop_mass = 0.4
    case = Case(drop_mass=drop_mass, entropy_coeff=0.0, num_steps=0)
    exact = one_process(replace(case, drop_mass=0.0))
    outcomes = run_ranks(spread.num_ranks, dropped_outcome, case, spread)
    for outcome in outcomes:
        (result,) = outcome.results
        assert result.dropped_mass is not None
        logprobs = result.logprobs[result.batch.loss_mask]
        budget = drop_mass * (8 * (-torch.expm1(logprobs)).clamp(min=2**-16)).clamp(max=1)
        assert (result.dropped_mass <= budget * (1 + 1e-5)).all()
        assert (result.dropped_mass > 0).any()
        assert torch.equal(result.dropped_mass, outcomes[0].results[0].dropped_mass)
        head = relative(outcome.gradients["lm_head.weight"], exact.gradients["lm_head.weight"])
        assert 1e-4 < head < drop_mass
        # The loss does not know of it.
        assert relative(result.output.loss_sum, exact.results[0].output.loss_sum) < 1e-6


def skipped_update(rank: int, case: Case, spread: Spread) -> tuple:
    policy = build_policy(case, spread)
    samples, objective = make_samples(case.num_samples), make_objective(case)

    def poisoned(batch, outputs, log_z) -> ObjectiveOutput:
        output = objective(batch, outputs, log_z)
        has_first = 0 in batch.group_ids.tolist() or 5 in batch.group_ids.tolist()
        factor = torch.nan if has_first else 1.0
        return replace(output, loss_sum=factor * output.loss_sum)

    before = {name: value.clone() for name, value in policy.named_weights()}
    policy.accumulate_gradients(samples, poisoned)
    grad_norm, is_applied = policy.optimizer.step(0)
    after = {name: value.clone() for name, value in policy.named_weights()}
    policy.accumulate_gradients(samples, objective)
    second = policy.optimizer.step(1)
    lr = policy.optimizer.lr
    is_unchanged = all(torch.equal(before[name], after[name]) for name in before)
    return grad_norm, is_applied, is_unchanged, second, lr


@pytest.mark.parametrize("spread", [TP2_SP, PP2, Spread(2)], ids=["TP2 SP", "PP2", "DP2"])
def test_a_gradient_that_is_not_finite_skips_the_update(spread: Spread) -> None:
    truth = one_process(Case())
    for grad_norm, is_applied, is_unchanged, second, lr in run_ranks(
        spread.num_ranks, skipped_update, Case(), spread
    ):
        assert grad_norm != grad_norm and not is_applied and is_unchanged
        assert second[1] and second[0] == pytest.approx(truth.grad_norms[0], rel=1e-5)
        assert lr == pytest.approx(LR * 2 / WARMUP_STEPS)


def padded_rows(rank: int, case: Case, spread: Spread) -> tuple[int, float, float]:
    policy = build_policy(case, spread)
    policy.accumulate_gradients(make_samples(case.num_samples), make_objective(case))
    chunk = policy.chunks[-1].module
    if not is_last_stage():
        return 0, 0.0, 0.0
    grad = chunk.output_weight().main_grad
    used, padding = grad[: chunk.num_vocab_rows], grad[chunk.num_vocab_rows :]
    return len(padding), float(padding.norm()), float(used.norm(dim=1).min())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_padding_of_the_vocabulary_is_no_token(tied: bool) -> None:
    first, second = run_ranks(2, padded_rows, Case(tied=tied), TP2_SP)
    assert first[0] == 0 and second[0] == 1
    assert second[1] == 0.0
    assert first[2] > 0 and second[2] > 0


def too_long(rank: int, case: Case, spread: Spread) -> str:
    policy = build_policy(case, spread)
    with pytest.raises(ValueError) as caught:
        policy.logprobs(make_samples(case.num_samples))
    return str(caught.value)


def test_a_sequence_beyond_the_cap_is_refused_on_every_rank() -> None:
    messages = run_ranks(2, too_long, Case(), replace(PP2, max_tokens=22))
    assert messages[0] == messages[1]
    assert "a sequence of 23 tokens exceeds the micro-batch cap of 22" in messages[0]


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["whole", "spread"])
def test_bfloat16_stays_near_float32(distributed_optimizer: bool) -> None:
    case = Case(dtype=torch.bfloat16)
    truth = one_process(Case())
    spread = replace(
        Spread(4, Layout(tensor=2, sequence_parallel=True)),
        distributed_optimizer=distributed_optimizer,
    )
    for outcome in run_ranks(4, on_ranks, case, spread, None):
        (result,) = outcome.results
        assert result.logprobs.dtype == torch.float32
        assert relative(result.output.loss_sum, truth.results[0].output.loss_sum) < 0.02
        assert outcome.grad_norms[0] == pytest.approx(truth.grad_norms[0], rel=0.05)
        for name, value in outcome.weights.items():
            is_z = name.startswith("partition.")
            assert value.dtype == (torch.float32 if is_z else torch.bfloat16)
            assert relative(value, truth.weights[name]) < 0.05, name


def with_dropout(rank: int, case: Case, spread: Spread) -> Outcome:
    torch.manual_seed(7)
    torch.rand(rank)  # generators diverge where rank 0 alone samples responses
    return on_ranks(rank, case, spread, None)


def test_ranks_that_repeat_z_draw_one_dropout_mask() -> None:
    case = Case(z_dropout=0.5, num_steps=0)
    (alone,) = run_ranks(1, with_dropout, case, Spread(1, max_tokens=1000))
    assert relative_log_z(alone, one_process(Case())) > 0.01
    for layout in (TP2_SP.layout, Layout(tensor=2), Layout(context=2)):
        for outcome in run_ranks(2, with_dropout, case, Spread(2, layout, max_tokens=1000)):
            assert relative_log_z(outcome, alone) < 1e-5
            for name, value in outcome.gradients.items():
                assert relative(value, alone.gradients[name]) < 2e-5, name


def relative_log_z(actual: Outcome, truth: Outcome) -> float:
    a, b = actual.results[0].log_z, truth.results[0].log_z
    assert a is not None and b is not None
    return relative(a, b)
