"""The numbers of linear_logprob against materialised logits in float64."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.kernels._triton import HAS_KERNELS, IS_INTERPRETED
from flowrl.kernels.linear_logprob import linear_logprob, live_implementation

LIVE = sorted({"reference", live_implementation("cpu")})
# For the tests whose shapes Triton's interpreter manages in a second or two.
EVERY = [*LIVE, "triton"] if HAS_KERNELS else LIVE
OPS = torch.ops.flowrl
OPERATORS = {  # implementation -> (forward, backward)
    "cpu": (OPS.linear_logprob_forward, OPS.linear_logprob_backward),
    "reference": (OPS.linear_logprob_forward_reference, OPS.linear_logprob_backward_reference),
}
if HAS_KERNELS:
    OPERATORS["triton"] = (OPS.linear_logprob_forward_triton, OPS.linear_logprob_backward_triton)
IGNORE = -100

# (T, H, V), each for a path: one row; one tile; ragged everything; V = tiles exactly; several row
# blocks and vocabulary slices with ragged ends.
SHAPES = [(1, 3, 7), (5, 8, 128), (37, 19, 507), (64, 32, 1024), (300, 24, 2500)]


def materialised(hidden, weight, target, temperature=1.0):
    """logprob and entropy in the dtype of the inputs, from the whole [T, V]."""
    logprobs = (hidden @ weight.t() / temperature).log_softmax(dim=1)
    is_real = target != IGNORE
    chosen = logprobs.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    return torch.where(is_real, chosen, 0), torch.where(is_real, entropy, 0)


def make_case(num_rows, hidden_size, vocab_size, dtype=torch.float32, scale=1.0):
    hidden = torch.randn(num_rows, hidden_size).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size) * scale / hidden_size**0.5).to(dtype)
    target = torch.randint(vocab_size, (num_rows,))
    return hidden.requires_grad_(), weight.requires_grad_(), target


def truth_with_gradients(hidden, weight, target, temperature, grad_logprob, grad_entropy=None):
    hidden = hidden.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    logprob, entropy = materialised(hidden, weight, target, temperature)
    loss = (logprob * grad_logprob.double()).sum()
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy.double()).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return logprob.detach(), entropy.detach(), *grads


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-300))


@pytest.mark.parametrize("implementation", LIVE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_match_float64(shape, temperature, implementation, nan_filled_empty):
    hidden, weight, target = make_case(*shape, scale=2.0)
    grad_logprob, grad_entropy = torch.randn(2, shape[0])
    logprob, entropy = linear_logprob(
        hidden, weight, target, temperature, entropy=True, implementation=implementation
    )
    assert entropy is not None
    assert logprob.dtype == entropy.dtype == torch.float32
    for upstream in (None, grad_entropy):
        loss = (logprob * grad_logprob).sum()
        loss = loss if upstream is None else loss + (entropy * upstream).sum()
        grads = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        truth = truth_with_gradients(hidden, weight, target, temperature, grad_logprob, upstream)
        torch.testing.assert_close(logprob.double(), truth[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(entropy.double(), truth[1], atol=2e-4, rtol=0)
        # A float32 lse near 10 leaves 1e-6 of |g| |W|, also in rows of smaller gradient.
        floor = 2e-6 * grad_logprob.norm() / temperature
        bounds = (floor * weight.norm(dim=1).max(), floor * hidden.norm(dim=1).max())
        for grad, exact, bound in zip(grads, truth[2:], bounds, strict=True):
            assert (grad.double() - exact).norm() < 1e-5 * exact.norm() + bound


@pytest.mark.parametrize("implementation", EVERY)
def test_published_vector(implementation):
    path = Path(__file__).parents[1] / "vectors" / "flowrl.json"
    case = json.loads(path.read_text())["cases"]["D_logits_temperature"]
    inputs, expected = case["inputs"], case["expected"]
    dtype, rtol = (torch.float64, 1e-6) if implementation == "reference" else (torch.float32, 2e-4)
    hidden = torch.tensor(inputs["hidden"], dtype=dtype, requires_grad=True)
    weight = torch.tensor(inputs["lm_head"], dtype=dtype, requires_grad=True)
    logprob, entropy = linear_logprob(
        hidden,
        weight,
        torch.tensor(inputs["labels"]),
        temperature=inputs["temperature"],
        entropy=True,
        implementation=implementation,
    )
    logprob.backward(torch.tensor(inputs["grad_log_prob"], dtype=dtype))
    results = (logprob, entropy, hidden.grad, weight.grad)
    names = ("log_prob", "entropy", "grad_hidden", "grad_lm_head")
    for result, name in zip(results, names, strict=True):
        truth = torch.tensor(expected[name], dtype=dtype)
        torch.testing.assert_close(result, truth, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("vocab_size", [7, 131])
def test_gradcheck(vocab_size):
    hidden, weight, target = make_case(4, 3, vocab_size, torch.float64, scale=3.0)
    target[1] = IGNORE

    def separate_and_joint(hidden, weight):
        logprob, entropy = linear_logprob(hidden, weight, target, 0.6, entropy=True)
        assert entropy is not None
        return logprob, entropy, logprob - 0.3 * entropy

    inputs = (hidden, weight)
    assert torch.autograd.gradcheck(separate_and_joint, inputs, fast_mode=vocab_size > 100)


@pytest.mark.parametrize("implementation", EVERY)
def test_hand_derived_uniform_row(implementation):
    """Zero hidden state: p = 1 / V, dlogprob/dW_v = (1[v = y] - 1 / V) h = 0, dH = W_y - mean W."""
    weight = torch.arange(12.0).reshape(6, 2).requires_grad_()
    hidden = torch.zeros(1, 2, requires_grad=True)
    logprob, entropy = linear_logprob(
        hidden, weight, torch.tensor([4]), 0.5, entropy=True, implementation=implementation
    )
    assert entropy is not None
    logprob.sum().backward()
    assert logprob.item() == pytest.approx(-math.log(6))
    assert entropy.item() == pytest.approx(math.log(6))
    # (W_4 - mean W) / 0.5 = ([8, 9] - [5, 6]) / 0.5
    torch.testing.assert_close(hidden.grad, torch.tensor([[6.0, 6.0]]))
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("implementation", LIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_less_than_pytorch(dtype, implementation):
    hidden, weight, target = make_case(70, 64, 1300, dtype, scale=3.0)
    grad_logprob = torch.randn(70)
    logprob, entropy = linear_logprob(
        hidden, weight, target, entropy=True, implementation=implementation
    )
    assert entropy is not None
    grads = torch.autograd.grad((logprob * grad_logprob).sum(), (hidden, weight))
    assert grads[0].dtype == grads[1].dtype == dtype
    rival, _ = materialised(hidden, weight, target)
    rival_grads = torch.autograd.grad((rival * grad_logprob).sum(), (hidden, weight))
    truth = truth_with_gradients(hidden, weight, target, 1.0, grad_logprob)
    torch.testing.assert_close(logprob.double(), truth[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy.double(), truth[1], atol=2e-4, rtol=0)
    for grad, rival_grad, exact in zip(grads, rival_grads, truth[2:], strict=True):
        assert relative_error(grad, exact) <= relative_error(rival_grad, exact) + 1e-4


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("offset", [-400.0, 0.0, 60.0], ids=["all-negative", "centred", "large"])
def test_padding_of_the_last_tile_carries_no_mass(offset, implementation):
    """Logits all near -400: a padded entry of logit 0 would swallow the whole row."""
    hidden, weight, target = make_case(9, 8, 130)
    hidden = torch.cat([hidden.detach(), torch.ones(9, 1)], dim=1)
    weight = torch.cat([weight.detach(), torch.full((130, 1), offset)], dim=1)
    logprob, entropy = linear_logprob(
        hidden, weight, target, entropy=True, implementation=implementation
    )
    truth = materialised(hidden.double(), weight.double(), target)
    torch.testing.assert_close(logprob.double(), truth[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy.double(), truth[1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("implementation", EVERY)
def test_peaked_softmax_keeps_the_small_gradient(implementation):
    """Near-certain rows: g (1[v = y] - p) has norm (1 - p_y) |W| and less, and must not cancel."""
    hidden, weight, _ = make_case(40, 32, 700, scale=1.0)
    target = torch.arange(40) * 17
    with torch.no_grad():
        margins = torch.linspace(10, 19, 40)[:, None] / weight[target].square().sum(1, True)
        hidden.add_(margins * weight[target])
    logprob, _ = linear_logprob(hidden, weight, target, implementation=implementation)
    (grad,) = torch.autograd.grad(logprob.sum(), hidden)
    truth = truth_with_gradients(hidden, weight, target, 1.0, torch.ones(40))
    assert logprob.max() <= 0
    assert truth[0].max() > -1e-3 and truth[0].min() < -0.1  # from near certain to open
    torch.testing.assert_close(logprob.double(), truth[0], atol=1e-5, rtol=0)
    # Logits of 20 in float32 make every p uncertain by 2e-6; a bfloat16 p would be by 2e-3.
    row_errors = (grad.double() - truth[2]).norm(dim=1)
    assert row_errors.max() < 4e-6 * weight.norm(dim=1).max()


@pytest.mark.parametrize("implementation", EVERY)
def test_logprob_is_clamped_at_zero(implementation):
    hidden = torch.full((3, 1), 1.0)
    weight = torch.tensor([[300.0], [-300.0]])
    target = torch.tensor([0, 0, 1])
    logprob, entropy = linear_logprob(
        hidden, weight, target, entropy=True, implementation=implementation
    )
    assert logprob.tolist() == [0, 0, -600]
    assert entropy is not None and entropy.tolist() == [0, 0, 0]


@pytest.mark.parametrize("implementation", EVERY)
def test_ignored_and_zero_gradient_rows(implementation):
    hidden, weight, target = make_case(140, 16, 300)
    target[::3] = IGNORE
    with torch.no_grad():
        hidden[0] = torch.nan  # an ignored row does no harm, whatever it holds
    grad_logprob = torch.randn(140)
    grad_logprob[1::3] = 0
    logprob, entropy = linear_logprob(
        hidden, weight, target, entropy=True, implementation=implementation
    )
    assert entropy is not None
    assert not logprob[::3].any() and not entropy[::3].any()
    grads = torch.autograd.grad((logprob * grad_logprob).sum(), (hidden, weight))
    assert not grads[0][::3].any() and not grads[0][1::3].any()
    rows = torch.arange(140) % 3 == 2
    truth = truth_with_gradients(hidden[rows], weight, target[rows], 1.0, grad_logprob[rows])
    assert relative_error(grads[0][rows], truth[2]) < 1e-5
    assert relative_error(grads[1], truth[3]) < 1e-5


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("num_rows", [0, 4], ids=["no-rows", "all-ignored"])
def test_nothing_to_do(num_rows, implementation):
    hidden, weight, _ = make_case(num_rows, 8, 200)
    target = torch.full((num_rows,), IGNORE)
    logprob, entropy = linear_logprob(
        hidden, weight, target, entropy=True, drop_mass=0.01, implementation=implementation
    )
    assert entropy is not None
    assert logprob.tolist() == entropy.tolist() == [0.0] * num_rows
    grads = torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight))
    assert grads[0].shape == hidden.shape and grads[1].shape == weight.shape
    assert not grads[0].any() and not grads[1].any()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("drop_mass", [0.0, 2**-6])
def test_non_finite_row_spoils_only_itself(value, drop_mass, implementation):
    hidden, weight, target = make_case(20, 8, 300)
    clean = linear_logprob(hidden, weight, target, entropy=True, drop_mass=drop_mass)
    (clean_grad,) = torch.autograd.grad(clean[0].sum(), hidden)
    with torch.no_grad():
        hidden[7, 2] = value
    spoiled = linear_logprob(
        hidden, weight, target, 1.0, True, drop_mass, implementation=implementation
    )
    grads = torch.autograd.grad(spoiled[0].sum(), (hidden, weight))
    others = torch.arange(20) != 7
    for before, after in (*zip(clean, spoiled, strict=True), (clean_grad, grads[0])):
        torch.testing.assert_close(after[others], before[others], atol=1e-5, rtol=1e-5)
        assert not after[7].isfinite().all()
    assert not grads[1].isfinite().all()


@pytest.mark.parametrize("implementation", LIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 23, 1301), (130, 64, 507)], ids=str)
def test_bits_repeat_and_do_not_depend_on_the_batch(shape, dtype, implementation):
    hidden, weight, target = make_case(*shape, dtype)

    def run(rows):
        return linear_logprob(
            hidden[rows], weight, target[rows], 0.7, entropy=True, implementation=implementation
        )

    everything = run(slice(None))
    for rows in (slice(None), slice(77, 78), slice(100, None), torch.randperm(shape[0])):
        for whole, part in zip(everything, run(rows), strict=True):
            assert torch.equal(whole[rows], part)
    grads = [torch.autograd.grad(everything[0].sum(), (hidden, weight), retain_graph=True)]
    grads.append(torch.autograd.grad(everything[0].sum(), (hidden, weight)))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def run_sharded(implementation, hidden, weight, target, bounds, grads, drop_mass=0.0):
    """Merge shards by hand, as a vocabulary-parallel caller does."""
    forward, backward = OPERATORS[implementation]
    temperature = 0.8
    hidden, weight = hidden.detach(), weight.detach()
    starts = list(zip(bounds[:-1], bounds[1:], strict=True))
    parts = [forward(hidden, weight[a:b], target, a, temperature, IGNORE, True) for a, b in starts]
    lses = torch.stack([part[0] for part in parts])
    lse = lses.logsumexp(0)
    mean_logit = ((lses - lse).exp() * torch.stack([part[2] for part in parts])).sum(0)
    logprob = sum(part[1] for part in parts) - lse
    outputs, dropped = [], []
    for (a, b), part in zip(starts, parts, strict=True):
        dropped.append(torch.full_like(lse, torch.nan))
        outputs.append(
            backward(
                *(hidden, weight[a:b], target, a, temperature, lse, mean_logit, part[3], *grads),
                drop_mass,
                logprob,
                IGNORE,
                dropped[-1],
            )
        )
    grad_hidden = sum(output[0] for output in outputs)
    grad_weight = torch.cat([output[1] for output in outputs])
    return logprob, lse - mean_logit, grad_hidden, grad_weight, torch.stack(dropped)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("bounds", [(0, 700), (0, 130, 700), (0, 1, 400, 700)], ids=str)
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprob", "both"])
def test_shards_merge_to_the_whole(bounds, with_entropy, implementation):
    hidden, weight, target = make_case(50, 16, 700, scale=3.0)
    grad_logprob, grad_entropy = torch.randn(2, 50)
    grads = (grad_logprob, grad_entropy if with_entropy else None)
    arguments = (implementation, hidden, weight, target, bounds, grads)
    logprob, entropy, *result, dropped = run_sharded(*arguments)
    truth = truth_with_gradients(hidden, weight, target, 0.8, *grads)
    torch.testing.assert_close(logprob.double(), truth[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy.double(), truth[1], atol=2e-4, rtol=0)
    assert relative_error(result[0], truth[2]) < 1e-5
    assert relative_error(result[1], truth[3]) < 1e-5
    assert not dropped.any()


@pytest.mark.parametrize("implementation", LIVE)
def test_forward_outputs_of_a_shard(implementation):
    forward, _ = OPERATORS[implementation]
    hidden, weight, target = make_case(6, 4, 300, torch.float64)
    target[:3] = torch.tensor([IGNORE, 10, 290])
    logits = (hidden @ weight[100:300].t() / 0.5).detach()
    lse, target_logit, mean_logit, tile_lse = forward(hidden, weight[100:], target, 100, 0.5)
    torch.testing.assert_close(lse[1:], logits[1:].logsumexp(1))
    assert target_logit[:2].tolist() == [0, 0]
    torch.testing.assert_close(target_logit[2], logits[2, 190])
    assert not mean_logit.any()
    tiles = [logits[1:, :128].logsumexp(1), logits[1:, 128:].logsumexp(1)]
    torch.testing.assert_close(tile_lse[1:], torch.stack(tiles, dim=1))
    assert not lse[0] and not tile_lse[0].any()
    mean_logit = forward(hidden, weight[100:], target, 100, 0.5, IGNORE, True)[2]
    torch.testing.assert_close(mean_logit[1:], (logits.softmax(1) * logits).sum(1)[1:])


def peaked_case(num_rows=60, vocab_size=1500):
    """Rows from open to near certain, with the mass of the tail concentrated in few tiles."""
    hidden, weight, target = make_case(num_rows, 32, vocab_size, scale=1.0)
    with torch.no_grad():
        hidden.mul_(torch.linspace(1, 6, num_rows)[:, None])
        pull = torch.linspace(0, 12, num_rows)[:, None] / weight[target].square().sum(1, True)
        hidden.add_(pull * weight[target])
    return hidden, weight, target


def budget_of(truth_logprob: Tensor, drop_mass: float) -> Tensor:
    return drop_mass * (8 * (-truth_logprob.expm1()).clamp(min=2**-16)).clamp(max=1)


@pytest.mark.parametrize("implementation", LIVE)
@pytest.mark.parametrize("drop_mass", [2**-9, 0.05, 0.5], ids=str)
def test_drop_mass_rule_and_error_bound(drop_mass, implementation):
    hidden, weight, target = peaked_case()
    grad_logprob = torch.randn(60)
    grad_logprob[5] = 0
    dropped = torch.full((60,), torch.nan)
    logprob, _ = linear_logprob(
        hidden,
        weight,
        target,
        0.9,
        drop_mass=drop_mass,
        dropped_mass=dropped,
        implementation=implementation,
    )
    (grad,) = torch.autograd.grad((logprob * grad_logprob).sum(), hidden)
    truth = truth_with_gradients(hidden, weight, target, 0.9, grad_logprob)
    budget = budget_of(truth[0], drop_mass)

    # The smallest set in float64: tile masses in ascending order while they fit, target's excluded.
    masses = (hidden.double() @ weight.double().t() / 0.9).softmax(1).detach()
    masses = F.pad(masses, (0, -1500 % 128)).view(60, 12, 128).sum(2)
    masses[torch.arange(60), target // 128] = torch.inf
    totals = masses.sort(dim=1).values.cumsum(1)
    best = torch.where(totals <= budget[:, None], totals, 0).amax(1)
    best[5] = 0
    assert best[:5].gt(0).any() or drop_mass < 0.05
    assert (dropped.double() >= best * (1 - 1e-6)).all()
    assert (dropped.double() <= budget * (1 + 1e-3)).all()
    # A set as large as float64's, unless the next tile lies within rounding of the budget.
    torch.testing.assert_close(dropped.double(), best, rtol=1e-3, atol=1e-9)
    bound = grad_logprob.abs() * dropped * weight.norm(dim=1).max() / 0.9
    error = (grad.double() - truth[2]).norm(dim=1)
    assert (error <= bound + 1e-5 * truth[2].norm(dim=1)).all()
    assert error.max() > 1e-5  # something was left out
    assert not grad[5].any() and dropped[5] == 0


@pytest.mark.parametrize("implementation", LIVE)
def test_dropped_mass_bounds_the_true_mass_of_the_zeroed_tiles(implementation):
    """Read off which tiles were left out: with hidden states of one row, dW is zero there."""
    _, weight, target = peaked_case()
    hidden = peaked_case()[0]
    for row in range(0, 60, 4):
        dropped = torch.empty(1)
        one = slice(row, row + 1)
        logprob, _ = linear_logprob(
            *(hidden[one], weight, target[one], 1.0, False, 0.3, IGNORE, dropped),
            implementation=implementation,
        )
        (grad,) = torch.autograd.grad(logprob.sum(), weight)
        is_dropped = (grad == 0).all(dim=1)
        masses = (hidden[row].double() @ weight.double().t()).softmax(0)
        true_mass = masses[is_dropped].sum().item()
        assert true_mass <= dropped.item() <= true_mass * 1.001 + 1e-30
        assert not is_dropped[target[row] // 128 * 128 : target[row] // 128 * 128 + 128].any()
        others = is_dropped.nonzero().squeeze(1) // 128
        assert torch.equal(is_dropped.nonzero().squeeze(1) % 128, torch.arange(len(others)) % 128)


@pytest.mark.parametrize("implementation", LIVE)
def test_drop_mass_bound_holds_where_masses_underflow(implementation):
    hidden = torch.tensor([[200.0]])
    weight = torch.cat([torch.ones(1, 1), torch.zeros(299, 1)]).requires_grad_()
    dropped = torch.empty(1)
    logprob, _ = linear_logprob(
        *(hidden, weight, torch.tensor([0])),
        drop_mass=0.1,
        dropped_mass=dropped,
        implementation=implementation,
    )
    logprob.sum().backward()
    assert weight.grad is not None and not weight.grad[128:].any()
    assert 172 * math.exp(-200) <= dropped.item() < 1e-30


@pytest.mark.parametrize("implementation", LIVE)
@pytest.mark.parametrize("bounds", [(0, 600, 1500), (0, 200, 900, 1500)], ids=str)
def test_shards_drop_within_the_budget_each(bounds, implementation):
    hidden, weight, target = peaked_case()
    grad_logprob = torch.randn(60)
    arguments = (implementation, hidden, weight, target, bounds, (grad_logprob, None))
    logprob, _, grad_hidden, _, dropped = run_sharded(*arguments, drop_mass=0.02)
    truth = truth_with_gradients(hidden, weight, target, 0.8, grad_logprob)
    assert (dropped.double() <= budget_of(truth[0], 0.02) * 1.001).all()
    assert (dropped > 0).any(dim=1).all()
    bound = grad_logprob.abs() * dropped.sum(0) * weight.norm(dim=1).max() / 0.8
    error = (grad_hidden.double() - truth[2]).norm(dim=1)
    assert (error <= bound + 1e-5 * truth[2].norm(dim=1)).all()


@pytest.mark.parametrize("implementation", LIVE)
def test_without_logprob_less_is_dropped(implementation):
    forward, backward = OPERATORS[implementation]
    hidden, weight, target = (tensor.detach() for tensor in peaked_case())
    lse, target_logit, mean_logit, tile_lse = forward(hidden, weight, target, 0, 1.0)
    dropped = []
    for logprob in (target_logit - lse, None):
        dropped.append(torch.empty(60))
        arguments = (hidden, weight, target, 0, 1.0, lse, mean_logit, tile_lse, torch.ones(60))
        backward(*arguments, None, 0.05, logprob, IGNORE, dropped[-1])
    assert (dropped[1] <= dropped[0]).all() and dropped[1].gt(0).any()


@pytest.mark.parametrize("implementation", LIVE)
def test_entropy_gradient_makes_the_backward_exact(implementation):
    hidden, weight, target = peaked_case()
    dropped = torch.full((60,), torch.nan)
    logprob, entropy = linear_logprob(
        *(hidden, weight, target, 1.0, True, 0.5),
        dropped_mass=dropped,
        implementation=implementation,
    )
    assert entropy is not None
    grads = torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight))
    truth = truth_with_gradients(hidden, weight, target, 1.0, torch.ones(60), torch.ones(60))
    assert relative_error(grads[0], truth[2]) < 1e-5 and relative_error(grads[1], truth[3]) < 1e-5
    assert not dropped.any()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_grad_accumulates(dtype, implementation):
    hidden, weight, target = make_case(30, 8, 1100, dtype)
    buffer = torch.ones(1100, 8)
    for _ in range(2):
        logprob, _ = linear_logprob(
            hidden, weight, target, weight_grad=buffer, implementation=implementation
        )
        logprob.sum().backward()
    truth = truth_with_gradients(hidden, weight, target, 1.0, torch.ones(30))
    assert weight.grad is None
    # Where products are bfloat16, the gradient of a logit is rounded to it, by 2^-9 at most.
    rounding = {"cpu"} if IS_INTERPRETED else {"cpu", "triton"}
    bound = 2**-9 if dtype == torch.bfloat16 and implementation in rounding else 1e-5
    assert relative_error(buffer - 1, 2 * truth[3]) < bound
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert hidden.grad is not None and relative_error(hidden.grad, 2 * truth[2]) < tolerance
