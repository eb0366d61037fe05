"""AdamW over float32 masters, against torch's own where both apply."""

import math

import pytest
import torch
from torch import Tensor, nn

from flowrl.policy.optimizer import MasterAdamW, ParamGroup

SETTINGS = {"betas": (0.9, 0.99), "weight_decay": 0.1, "warmup_steps": 0, "max_grad_norm": 1.0}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in (("matrix", (4, 3)), ("vector", (5,)))
    }


def master_adamw(
    named: dict[str, nn.Parameter], lr: float = 0.01, **settings: object
) -> MasterAdamW:
    return MasterAdamW(
        [ParamGroup(list(named.items()), lr)],
        **(SETTINGS | settings),  # pyright: ignore[reportArgumentType]
    )


def loss(named: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    terms = [(p.float() * torch.randn(p.shape, generator=generator)).sum() for p in named.values()]
    return scale * torch.stack(terms).sum()


def test_float32_equals_adamw_with_clipping() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = master_adamw(ours)
    expected = torch.optim.AdamW(
        [
            {"params": [theirs["matrix"]], "weight_decay": 0.1},
            {"params": [theirs["vector"]], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.99),
    )
    for step in range(8):
        scale = (0.01, 1.0, 100.0)[step % 3]  # below and above the limit
        loss(ours, step, scale).backward()
        loss(theirs, step, scale).backward()
        norm = nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        expected.step()
        expected.zero_grad()
        grad_norm, is_applied = optimizer.step(step)
        assert is_applied
        assert grad_norm == pytest.approx(float(norm), rel=1e-6)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_vectors_are_not_decayed_and_matrices_are() -> None:
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    master_adamw(named, lr=0.5).step(0)  # gradients are zero: only the decay acts
    torch.testing.assert_close(named["matrix"].detach(), before["matrix"] * (1 - 0.5 * 0.1))
    assert torch.equal(named["vector"], before["vector"])


def test_bfloat16_follows_its_float32_master() -> None:
    named, exact = parameters(torch.bfloat16), parameters(torch.bfloat16)
    exact = {name: nn.Parameter(p.detach().float()) for name, p in exact.items()}
    rounded, reference = master_adamw(named, lr=1e-4), master_adamw(exact, lr=1e-4)
    for step in range(50):
        for p, q in zip(named.values(), exact.values(), strict=True):
            grad = torch.full(p.shape, 2.0**-7)
            rounded.main_grads[p].add_(grad)
            reference.main_grads[q].add_(grad)
        rounded.step(step)
        reference.step(step)
    for name in named:
        assert torch.equal(rounded.masters[name], exact[name])
        assert torch.equal(named[name], exact[name].bfloat16())
    # 50 steps of 1e-4: each is far below bfloat16's spacing (4e-3 at 1) and would be lost in it.
    moved = parameters(torch.bfloat16)["vector"].float() - rounded.masters["vector"]
    torch.testing.assert_close(moved, torch.full((5,), 50e-4), rtol=1e-3, atol=0)


def test_many_small_bfloat16_gradients_add_up() -> None:
    parameter = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    optimizer = master_adamw({"w": parameter})
    for gradient in [1.0, *[2.0**-9] * 512]:  # 1 + 2^-9 is 1 in bfloat16
        (parameter * gradient).sum().backward()
        assert parameter.grad is None
    main_grad = optimizer.main_grads[parameter]
    assert main_grad.dtype == torch.float32 and main_grad.tolist() == [[2.0]]


def test_gradients_added_by_an_op_are_kept_where_autograd_returns_none() -> None:
    class AddsToBuffer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight: Tensor, buffer: Tensor) -> Tensor:
            ctx.buffer = buffer
            return weight.sum()

        @staticmethod
        def backward(ctx, *grads: Tensor) -> tuple[None, None]:
            ctx.buffer.add_(3.0)
            return None, None

    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = master_adamw({"w": parameter})
    buffer = optimizer.main_grads[parameter]
    AddsToBuffer.apply(parameter, buffer).backward()
    assert buffer.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    (2 * parameter).sum().backward()  # a tied weight has a part of its own from autograd
    assert buffer.tolist() == [[5.0, 5.0], [5.0, 5.0]]


@pytest.mark.parametrize(
    ("warmup_steps", "expected"),
    [(4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]), (1, [1.0] * 3), (0, [1.0] * 3)],
    ids=["four", "one", "none"],
)
def test_warm_up_is_linear_and_starts_above_zero(warmup_steps: int, expected: list[float]) -> None:
    named = parameters()
    optimizer = master_adamw(named, lr=0.2, warmup_steps=warmup_steps)
    rates = []
    for step in range(len(expected)):
        optimizer.step(step)
        rates.append(optimizer.lr)
    assert rates == pytest.approx([0.2 * share for share in expected], rel=1e-12)


def test_warm_up_scales_the_update() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = master_adamw({"w": parameter}, lr=0.1, warmup_steps=5)
    optimizer.main_grads[parameter].fill_(0.01)
    optimizer.step(1)  # Adam's first step is lr * sign(gradient), here at 2/5 of the rate
    torch.testing.assert_close(parameter.detach(), torch.full((3,), -0.04), rtol=1e-4, atol=0)


def test_z_has_a_learning_rate_of_its_own() -> None:
    policy, z = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [ParamGroup([("policy", policy)], 0.01), ParamGroup([("z", z)], 0.3)]
    optimizer = MasterAdamW(groups, **SETTINGS)
    for parameter in (policy, z):
        optimizer.main_grads[parameter].fill_(0.1)
    optimizer.step(0)
    torch.testing.assert_close(policy.detach(), torch.full((2,), -0.01), rtol=1e-4, atol=0)
    torch.testing.assert_close(z.detach(), torch.full((2,), -0.3), rtol=1e-4, atol=0)
    assert optimizer.lr == 0.01


def test_the_learning_rate_of_a_skipped_update_is_that_of_its_step() -> None:
    named = parameters()
    optimizer = master_adamw(named, lr=0.01, warmup_steps=4)
    optimizer.main_grads[named["vector"]][2] = math.nan
    assert not optimizer.step(0)[1]
    assert optimizer.lr == pytest.approx(0.0025)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, dtype: torch.dtype) -> None:
    named = parameters(dtype)
    optimizer = master_adamw(named)
    loss(named, 0).backward()
    optimizer.step(0)
    weights = {name: p.detach().clone() for name, p in named.items()}
    state = {name: t.clone() for name, t in optimizer.state_tensors().items()}
    loss(named, 1).backward()
    optimizer.main_grads[named["vector"]][2] = bad
    grad_norm, is_applied = optimizer.step(1)
    assert not is_applied and not math.isfinite(grad_norm)
    for name, p in named.items():
        assert torch.equal(p, weights[name])
        assert optimizer.main_grads[p].abs().max() == 0
    after = optimizer.state_tensors()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    loss(named, 2).backward()
    assert optimizer.step(2)[1]
    assert not torch.equal(named["matrix"], weights["matrix"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_restored_optimizer_continues_bitwise(dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    optimizer = master_adamw(ours, warmup_steps=6)
    for step in range(3):
        loss(ours, step).backward()
        optimizer.step(step)
    kept = {name: t.clone() for name, t in optimizer.state_tensors().items()}
    assert set(kept) == {
        f"{kind}.{name}"
        for kind in ("master", "step", "exp_avg", "exp_avg_sq")
        for name in ("matrix", "vector")
    }
    restored = parameters(dtype, seed=9)
    other = master_adamw(restored, warmup_steps=6)
    other.load_state_tensors(kept)
    for step in range(3, 7):
        for named, one in ((ours, optimizer), (restored, other)):
            loss(named, step).backward()
            one.step(step)
        assert all(torch.equal(ours[name], restored[name]) for name in ours)
    # The checkpoint's tensors were copied, not adopted.
    assert float(kept["step.matrix"]) == 3.0
