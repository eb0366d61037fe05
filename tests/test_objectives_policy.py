"""The clipped policy losses of GRPO, PPO and REINFORCE++ against autograd of their formulas."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from objective_samples import (
    F64,
    each_dtype,
    each_implementation,
    each_mode,
    each_ratio,
    each_switch,
    policy_arguments,
    policy_batch,
    policy_leaves,
    written_policy_loss,
)

from flowrl.kernels._triton import HAS_KERNELS
from flowrl.objectives import OBJECTIVES
from flowrl.objectives.grpo import grpo_loss
from flowrl.objectives.ppo import ppo_policy_loss
from flowrl.objectives.reinforce_pp import reinforce_pp_loss


@each_implementation
@each_dtype
@each_switch
@pytest.mark.parametrize("seed", [0, 1])
def testwritten_policy_loss(implementation, dtype, switch, seed):
    arguments = policy_arguments(switch, dtype, seed)
    leaves = policy_leaves(arguments)
    total, num_clipped = written_policy_loss(**arguments)
    truth = torch.autograd.grad(total, leaves)
    out = grpo_loss(**arguments, implementation=implementation)
    grads = torch.autograd.grad(out.loss_sum, leaves)
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == F64 else {"rtol": 2e-5, "atol": 1e-6}
    assert out.loss_sum.dtype == dtype
    torch.testing.assert_close(out.loss_sum.double(), total, **tolerance)
    for grad, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, expected, **tolerance)
        assert grad[~arguments["loss_mask"]].count_nonzero() == 0
    assert out.diagnostics["num_clipped_tokens"].sum().item() == num_clipped > 0
    torch.testing.assert_close(
        out.diagnostics["loss"].sum(), out.loss_sum.detach(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.skipif(not HAS_KERNELS, reason="needs Triton, its interpreter will do")
@pytest.mark.parametrize("switch", ["dapo_tis", "gspo_everything"])
def test_triton(switch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = {
        name: x.detach().to(device).requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in policy_arguments(switch).items()
    }
    runs = []
    for implementation in ("reference", "triton"):
        out = grpo_loss(**arguments, implementation=implementation)
        grads = torch.autograd.grad(out.loss_sum, policy_leaves(arguments))
        runs.append((out.loss_sum, *out.diagnostics.values(), *grads))
    for expected, got in zip(*runs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@each_implementation
def test_grpo_by_hand(implementation):
    # Sequence 0, A = 1: ratios 1, 2, 1/2: losses -1, -1.2, -0.5. Sequence 1, A = -2: ratios 4 (dual
    # clip at 3), 1/2 (clipped to 0.8): losses 6, 1.6.
    log2 = math.log(2)
    policy = torch.tensor([9.0, -1, -1, -1, 9, -1, -1], dtype=F64, requires_grad=True)
    old = torch.tensor([9.0, -1, -1 - log2, -1 + log2, 9, -1 - 2 * log2, -1 + log2], dtype=F64)
    advantages = torch.tensor([7.0, 1, 1, 1, 7, -2, -2], dtype=F64)
    mask = torch.tensor([0, 1, 1, 1, 0, 1, 1])
    cu_seqlens = torch.tensor([0, 4, 7])
    inputs = (policy, old, advantages, mask, cu_seqlens)
    options = {"clip_ratio_c": 3.0, "implementation": implementation}

    out = grpo_loss(*inputs, **options)
    assert out.normalizer == "tokens"
    assert out.loss_sum.item() == pytest.approx(-2.7 + 7.6, abs=1e-14)
    assert out.diagnostics["loss"].tolist() == pytest.approx([-2.7, 7.6], abs=1e-14)
    assert out.diagnostics["num_tokens"].tolist() == [3, 2]
    assert out.diagnostics["num_clipped_tokens"].tolist() == [1, 1]
    assert out.diagnostics["num_lower_clipped_tokens"].tolist() == [0, 1]
    assert out.diagnostics["old_kl"].tolist() == pytest.approx([0.0, -log2], abs=1e-14)
    assert out.diagnostics["ref_kl"].tolist() == [0, 0]
    assert out.diagnostics["ratio"].tolist() == pytest.approx([3.5, 4.5], abs=1e-14)
    (grad,) = torch.autograd.grad(out.loss_sum, policy)
    assert grad.tolist() == pytest.approx([0, -1, 0, -0.5, 0, 0, 0], abs=1e-14)

    expected = {
        "seq-mean-token-mean": -0.9 + 3.8,
        "seq-mean-token-sum": -2.7 + 7.6,
        "seq-mean-token-sum-norm": (-2.7 + 7.6) / 10,
    }
    for mode, value in expected.items():
        out = grpo_loss(*inputs, **options, loss_agg_mode=mode, loss_scale_factor=10)
        assert out.normalizer == "sequences"
        assert out.loss_sum.item() == pytest.approx(value, abs=1e-14)


@each_implementation
def test_ref_kl_by_hand(implementation):
    # On-policy, A = 0: only the KL is left. k = log 2: 2 - log 2 - 1; gradient 1 - 2.
    policy = torch.tensor([-1.0, -2.0], dtype=F64, requires_grad=True)
    ref = torch.tensor([-1.0 + math.log(2), -2.0], dtype=F64)
    out = grpo_loss(
        policy, policy.detach(), torch.zeros(2, dtype=F64), torch.ones(2), torch.tensor([0, 2]),
        ref_logprobs=ref, kl_coef=0.5, implementation=implementation,
    )  # fmt: skip
    assert out.loss_sum.item() == pytest.approx(0.5 * (1 - math.log(2)), abs=1e-15)
    assert out.diagnostics["ref_kl"].tolist() == pytest.approx([1 - math.log(2)], abs=1e-15)
    (grad,) = torch.autograd.grad(out.loss_sum, policy)
    assert grad.tolist() == pytest.approx([-0.5, 0.0], abs=1e-15)


@each_implementation
def test_sequence_ratio_is_gspo(implementation):
    # With one advantage per sequence the value and gradient are those of the sequence-level form,
    # differentiated through the ratio itself.
    batch = policy_batch()
    policy, mask, cu_seqlens = batch["policy_logprobs"], batch["loss_mask"], batch["cu_seqlens"]
    policy.requires_grad_()
    per_sequence = torch.tensor([1.0, 1.0, -1.0, 2.0, 1.0, -0.5], dtype=F64)
    total = torch.zeros((), dtype=F64)
    for b in range(6):
        rows = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        if not mask[rows].any():
            continue
        s = (policy[rows] - batch["old_logprobs"][rows])[mask[rows]].mean().exp()
        a = per_sequence[b]
        total = total + torch.maximum(-a * s, -a * s.clamp(0.95, 1.05))
    out = grpo_loss(
        policy, batch["old_logprobs"], per_sequence.repeat_interleave(cu_seqlens.diff()), mask,
        cu_seqlens, clip_low=0.05, clip_high=0.05, ratio="sequence",
        loss_agg_mode="seq-mean-token-mean", implementation=implementation,
    )  # fmt: skip
    torch.testing.assert_close(out.loss_sum, total, rtol=1e-13, atol=1e-14)
    (grad,) = torch.autograd.grad(out.loss_sum, policy)
    (truth,) = torch.autograd.grad(total, policy)
    torch.testing.assert_close(grad, truth, rtol=1e-13, atol=1e-14)
    # The clip takes a sequence whole, or not at all, and here there are both.
    num_clipped = out.diagnostics["num_clipped_tokens"]
    is_whole = num_clipped == out.diagnostics["num_tokens"]
    assert bool(((num_clipped == 0) | is_whole).all())
    assert 0 < is_whole[num_clipped > 0].sum() < (mask.sum() > 0) * 4
    assert truth.count_nonzero() > 0


@each_implementation
@each_switch
def test_micro_batches_add_up_and_order_does_not_matter(implementation, switch):
    arguments = policy_arguments(switch) | {"implementation": implementation}
    leaves, cu_seqlens = policy_leaves(arguments), arguments["cu_seqlens"]
    whole = grpo_loss(**arguments)
    num_tokens = len(arguments["policy_logprobs"])

    def part(sequences):
        spans = [range(int(cu_seqlens[b]), int(cu_seqlens[b + 1])) for b in sequences]
        rows = torch.tensor([i for span in spans for i in span], dtype=torch.int64)
        tokens = {
            name: x[rows]
            for name, x in arguments.items()
            if isinstance(x, torch.Tensor) and x.shape == (num_tokens,)
        }
        lengths = torch.tensor([0, *map(len, spans)])
        return grpo_loss(**{**arguments, **tokens, "cu_seqlens": lengths.cumsum(0)})

    parts = [part([5, 1]), part([3]), part([4]), part([2, 0])]
    assert {p.normalizer for p in parts} == {whole.normalizer}
    total = torch.stack([p.loss_sum for p in parts]).sum()
    torch.testing.assert_close(total, whole.loss_sum, rtol=1e-13, atol=1e-14)
    for name, values in whole.diagnostics.items():
        together = torch.cat([p.diagnostics[name] for p in parts])
        assert torch.equal(together, values[[5, 1, 3, 4, 2, 0]])
    for got, expected in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(whole.loss_sum, leaves), strict=True
    ):
        assert torch.equal(got, expected)


@each_implementation
@each_switch
def test_sequences_spread_over_ranks(implementation, switch):
    # Two threads hold the even and the odd tokens and add each other's sums, once for the loss and,
    # with the sequence ratio, once before.
    arguments = policy_arguments(switch) | {"implementation": implementation}
    whole = grpo_loss(**arguments)
    truth = torch.autograd.grad(whole.loss_sum, policy_leaves(arguments))
    num_tokens = len(arguments["policy_logprobs"])
    ids = torch.repeat_interleave(torch.arange(6), arguments["cu_seqlens"].diff())
    shares, barrier = [torch.empty(0)] * 2, threading.Barrier(2, timeout=60)

    def run(rank):
        def reduce_sums(mine):
            shares[rank] = mine.detach()
            barrier.wait()
            total = mine + shares[1 - rank]
            barrier.wait()
            return total

        rows = slice(rank, None, 2)
        tokens = {
            name: x.detach()[rows].requires_grad_(x.requires_grad)
            for name, x in arguments.items()
            if isinstance(x, torch.Tensor) and x.shape == (num_tokens,)
        }
        lengths = torch.bincount(ids[rows], minlength=6)
        shard = {**arguments, **tokens, "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0))}
        out = grpo_loss(**shard, reduce_sums=reduce_sums)
        return out, torch.autograd.grad(out.loss_sum, policy_leaves(shard))

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    tolerance = {"rtol": 1e-12, "atol": 1e-14}
    for rank, (out, grads) in enumerate(results):
        torch.testing.assert_close(out.loss_sum, whole.loss_sum, **tolerance)
        for name, values in whole.diagnostics.items():
            torch.testing.assert_close(out.diagnostics[name], values, **tolerance)
        for grad, expected in zip(grads, truth, strict=True):
            torch.testing.assert_close(grad, expected[rank::2], **tolerance)


@each_implementation
@each_dtype
@each_switch
def test_poison_under_the_mask(implementation, dtype, switch):
    arguments = policy_arguments(switch, dtype)
    mask = arguments["loss_mask"]
    poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(11)[: len(mask)]
    runs = []
    for is_poisoned in (False, True):
        inputs = {
            name: torch.where(mask, x, poison).detach().requires_grad_(x.requires_grad)
            if is_poisoned and isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for name, x in arguments.items()
        }
        out = grpo_loss(**inputs, implementation=implementation)
        grads = torch.autograd.grad(out.loss_sum, policy_leaves(inputs))
        runs.append((out.loss_sum.detach(), *out.diagnostics.values(), *grads))
    for clean, poisoned in zip(*runs, strict=True):
        assert torch.equal(clean, poisoned)


@each_implementation
@each_mode
@each_ratio
def test_no_token_counts(implementation, mode, ratio):
    batch = policy_batch()
    policy, entropy = batch["policy_logprobs"].requires_grad_(), batch["entropy"].requires_grad_()
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    out = grpo_loss(
        **batch, kl_coef=0.1, entropy_coeff=0.1, ratio=ratio, loss_agg_mode=mode,
        loss_scale_factor=8.0, implementation=implementation,
    )  # fmt: skip
    assert out.loss_sum.item() == 0
    assert all(x.tolist() == [0.0] * 6 for x in out.diagnostics.values())
    for grad in torch.autograd.grad(out.loss_sum, [policy, entropy]):
        assert grad.count_nonzero() == 0


@each_implementation
@each_dtype
@each_ratio
@pytest.mark.parametrize("log_ratio", [15.0, -15.0, 1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_huge_log_ratios(implementation, dtype, ratio, log_ratio, advantage):
    # Two equal tokens. The unclipped side, A < 0 with a large ratio, is bounded at exp(20).
    policy = torch.full((2,), -1.0, dtype=dtype, requires_grad=True)
    out = grpo_loss(
        policy, policy.detach() - log_ratio, torch.full((2,), advantage, dtype=dtype),
        torch.ones(2), torch.tensor([0, 2]), ratio=ratio, implementation=implementation,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss_sum, policy)
    rho = math.exp(max(min(log_ratio, 20.0), -20.0))
    if advantage > 0:
        loss, slope = (-1.2, 0.0) if log_ratio > 0 else (-rho, -rho)
    else:
        loss, slope = (rho, rho) if log_ratio > 0 else (0.8, 0.0)
    slope = 0.0 if abs(log_ratio) > 20 else slope
    rel = 1e-12 if dtype == F64 else 2e-6
    assert out.loss_sum.item() == pytest.approx(2 * loss, rel=rel, abs=1e-12)
    assert grad.tolist() == pytest.approx([slope] * 2, rel=rel, abs=1e-12)


@each_implementation
def test_weights_leave_the_kl_alone(implementation):
    arguments = policy_arguments("kl_and_weights") | {"implementation": implementation}
    arguments["token_weights"] = torch.zeros_like(arguments["token_weights"])
    out = grpo_loss(**arguments)
    ref_kl = out.diagnostics["ref_kl"]
    assert ref_kl.sum() > 0.1
    torch.testing.assert_close(out.diagnostics["loss"], 0.3 * ref_kl, rtol=1e-14, atol=0)
    without_weights = grpo_loss(**(arguments | {"token_weights": None}))
    assert torch.equal(ref_kl, without_weights.diagnostics["ref_kl"])


@each_implementation
@each_switch
def test_only_policy_and_entropy_get_gradients(implementation, switch):
    arguments = policy_arguments(switch)
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_()
    out = grpo_loss(**arguments, implementation=implementation)
    assert not any(x.requires_grad for x in out.diagnostics.values())
    out.loss_sum.backward()
    got = {
        name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.grad is not None
    }
    assert got == {"policy_logprobs", "entropy"} & set(arguments)


@each_implementation
@each_ratio
def test_on_policy_the_old_log_probs_may_be_the_policy_itself(implementation, ratio):
    batch = policy_batch()
    policy = batch["policy_logprobs"].requires_grad_()
    out = grpo_loss(
        policy, policy, batch["advantages"], batch["loss_mask"], batch["cu_seqlens"],
        ratio=ratio, implementation=implementation,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss_sum, policy)
    assert torch.equal(grad, torch.where(batch["loss_mask"], -batch["advantages"], 0.0))
    assert torch.equal(out.diagnostics["ratio"], out.diagnostics["num_tokens"])


@each_implementation
def test_the_clip_can_be_turned_off(implementation):
    arguments = policy_arguments("dapo") | {"clip_low": 1.0, "clip_high": math.inf}
    out = grpo_loss(**arguments, implementation=implementation)
    policy, old, mask = (arguments[n] for n in ("policy_logprobs", "old_logprobs", "loss_mask"))
    expected = -(arguments["advantages"] * (policy - old).exp())[mask].sum()
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-13, atol=0)
    assert out.diagnostics["num_clipped_tokens"].sum() == 0


def test_ppo_and_reinforce_pp_are_cuts_of_the_same_loss():
    for function, optional in (
        (ppo_policy_loss, ["entropy", "token_weights"]),
        (reinforce_pp_loss, ["entropy", "token_weights", "ref_logprobs"]),
    ):
        batch = policy_batch()
        tensors = ["policy_logprobs", "old_logprobs", "advantages", "loss_mask", "cu_seqlens"]
        arguments = {name: batch[name] for name in [*tensors, *optional]}
        arguments["policy_logprobs"].requires_grad_()
        arguments |= {
            "clip_low": 0.1, "clip_high": 0.3, "entropy_coeff": 0.2,
            "loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 4.0,
        }  # fmt: skip
        if "ref_logprobs" in optional:
            arguments["kl_coef"] = 0.05
        total, _ = written_policy_loss(
            **arguments, clip_ratio_c=3.0
        )  # verl's, and the default here
        out = function(**arguments)
        torch.testing.assert_close(out.loss_sum, total, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(out.loss_sum, batch["policy_logprobs"]),
            torch.autograd.grad(total, batch["policy_logprobs"]),
            rtol=1e-12,
            atol=1e-14,
        )
        assert torch.equal(out.loss_sum, grpo_loss(**arguments, clip_ratio_c=3.0).loss_sum)


def test_dual_clip_binds_by_default_in_ppo_alone():
    inputs = (
        torch.zeros(1, dtype=F64),
        torch.full((1,), -math.log(5.0), dtype=F64),
        -torch.ones(1, dtype=F64),
        torch.ones(1),
        torch.tensor([0, 1]),
    )
    assert grpo_loss(*inputs).loss_sum.item() == pytest.approx(5.0)
    assert ppo_policy_loss(*inputs).loss_sum.item() == 3.0
    assert reinforce_pp_loss(*inputs).loss_sum.item() == 3.0


def test_compiles_without_a_graph_break():
    arguments = policy_arguments("gspo_everything")
    policy = arguments.pop("policy_logprobs").detach()

    def loss_sum(p):
        return grpo_loss(p, **arguments).loss_sum

    compiled = torch.compile(loss_sum, backend="aot_eager", fullgraph=True)
    runs = []
    for function in (loss_sum, compiled):
        p = policy.clone().requires_grad_()
        loss = function(p)
        runs.append((loss.detach(), *torch.autograd.grad(loss, p)))
    for eager, traced in zip(*runs, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_agg_mode": "mean"}, "'mean': use one of token-mean, seq-mean-token-mean"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "give loss_scale_factor"),
        (
            {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 0},
            "finite and > 0, got 0",
        ),
        ({"ratio": "gspo"}, "unknown ratio 'gspo': use one of token, sequence"),
        ({"kl_coef": 0.1}, "kl_coef is 0.1"),
        ({"kl_coef": 0.1, "ratio": "sequence"}, "kl_coef is 0.1"),
        ({"kl_coef": 0.1, "token_weights": torch.ones(32, dtype=F64)}, "kl_coef is 0.1"),
        ({"kl_coef": -1.0, "ref_logprobs": torch.zeros(32, dtype=F64)}, "kl_coef .* got -1.0"),
        ({"entropy_coeff": 0.1}, "entropy_coeff is 0.1: give entropy"),
        ({"entropy": torch.zeros(31, dtype=F64)}, r"entropy must have .* \[32\], got \[31\]"),
        ({"advantages": torch.zeros(6, dtype=F64)}, r"advantages must have .* got \[6\]"),
        ({"advantages": torch.zeros(32)}, "advantages is torch.float32"),
        ({"token_weights": torch.zeros(31, dtype=F64)}, "token_weights must have"),
        ({"ref_logprobs": torch.zeros(31, dtype=F64)}, "ref_logprobs must have"),
        ({"old_logprobs": torch.zeros(32)}, "old_logprobs is torch.float32"),
        ({"old_logprobs": torch.zeros(32), "ratio": "sequence"}, "old_logprobs is torch.float32"),
        ({"loss_mask": torch.full((32,), 2)}, "0 and 1 only, got 2"),
        ({"cu_seqlens": torch.tensor([0, 6, 6, 15, 16, 20, 31])}, "got 0 to 31"),
        ({"clip_low": 1.5}, "clip_low must be in"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"clip_ratio_c": 1.0}, "clip_ratio_c must be > 1"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(policy_arguments("dapo") | change))


def test_objectives_by_name():
    assert OBJECTIVES["grpo"] is grpo_loss
    assert OBJECTIVES["ppo"] is ppo_policy_loss
    assert OBJECTIVES["reinforce_pp"] is reinforce_pp_loss
