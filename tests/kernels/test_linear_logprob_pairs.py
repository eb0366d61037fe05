"""The mass-bounded backward of linear_logprob in Triton: its selection, lists and grouped kernels.

Without a GPU the kernels run in Triton's interpreter. Truth is float64 on the selected pairs, and
on all of them within the error that the dropped mass allows.
"""

from functools import cache

import pytest
import torch
from torch import Tensor

from flowrl.kernels.linear_logprob import reference
from flowrl.kernels.linear_logprob.reference import MASS_SLACK, TILE

pytest.importorskip("triton")

from flowrl.kernels.linear_logprob import gpu_lists, gpu_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
cuda = pytest.mark.cuda if DEVICE == "cuda" else pytest.mark.skip(reason="needs a GPU")
IGNORE = -100
TEMPERATURE = 0.9
# P is rounded to the dtype (in the interpreter bfloat16 is computed in float32).
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-9}


def make_tiles(num_rows: int, num_tiles: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tile_lse, lse, target and logprob of rows from nearly certain to nearly uniform."""
    spread = torch.linspace(0.1, 8, num_rows)[:, None]
    tile_lse = 20 + spread * torch.randn(num_rows, num_tiles)
    lse = tile_lse.double().logsumexp(1).float()
    target = torch.randint(num_tiles * TILE - 3, (num_rows,))
    logprob = -torch.rand(num_rows) * (lse - tile_lse.gather(1, target[:, None] // TILE)[:, 0])
    return tile_lse, lse, target, logprob


def build(
    tile_lse: Tensor,
    lse: Tensor,
    target: Tensor,
    logprob: Tensor | None,
    drop: float = 0.05,
    grad: Tensor | None = None,
    max_chunks: int | None = None,
    max_fill: float = 1.0,
    wave_chunks: int = 10**6,
    block: tuple[int, int] = (512, 16),
) -> gpu_lists.PairLists:
    num_rows, num_tiles = tile_lse.shape
    grad = torch.ones(num_rows) if grad is None else grad
    tile_lse, lse, target, grad = (x.to(DEVICE) for x in (tile_lse, lse, target, grad))
    logprob = None if logprob is None else logprob.to(DEVICE)
    max_chunks = max_chunks or num_tiles * (num_rows // gpu_lists.PAIR_CHUNK + 1)
    lists = gpu_lists.build_lists(
        *(target, 0, num_tiles * TILE - 3, lse, tile_lse, grad, drop, logprob, IGNORE),
        *(max_fill, max_chunks, min(wave_chunks, max_chunks)),
        block,
    )
    return gpu_lists.PairLists(*(part.cpu() for part in lists))


def listed(lists: gpu_lists.PairLists, num_rows: int, num_tiles: int) -> Tensor:
    """[T, tiles] bool from the lists, whose tables must agree with each other."""
    keep = torch.zeros(num_rows, num_tiles, dtype=torch.bool)
    for tile in range(num_tiles):
        begin, end = lists.chunk_start[tile : tile + 2].tolist()
        assert (lists.chunk_tile[begin:end] == tile).all()
        rows = lists.rows[begin * gpu_lists.PAIR_CHUNK : end * gpu_lists.PAIR_CHUNK]
        count = int(lists.row_offset[tile, -1])
        assert end - begin == -(-count // gpu_lists.PAIR_CHUNK)
        assert (rows[count:] == -1).all()
        assert (rows[:count].diff() > 0).all()
        blocks = torch.arange(1, lists.row_offset.shape[1] + 1) * gpu_lists.LIST_ROWS
        before = torch.searchsorted(rows[:count], blocks[:-1])
        assert torch.equal(lists.row_offset[tile, 1:].long(), before)
        keep[rows[:count].long(), tile] = True
    return keep


@pytest.mark.parametrize("has_logprob", [True, False], ids=["logprob", "shard"])
@pytest.mark.parametrize(
    "num_rows,num_tiles,block",
    [(1, 1, (8, 2048)), (20, 13, (8, 2048)), (20, 13, (32, 8)), (270, 3, (512, 4))],
    ids=["one", "resident", "read_again", "blocks"],
)
def test_selection_is_the_smallest_set(num_rows, num_tiles, block, has_logprob):
    tile_lse, lse, target, logprob = make_tiles(num_rows, num_tiles)
    tile_major = tile_lse.t().contiguous().t() if block[0] > 8 else tile_lse
    drop = 0.05
    lists = build(
        *(tile_major, lse, target, logprob if has_logprob else None),
        block=block,
    )
    keep = listed(lists, num_rows, num_tiles)
    expected, bound = reference.select_tiles(
        tile_lse, lse, logprob if has_logprob else None, target, drop
    )
    assert torch.equal(keep, expected)
    assert num_tiles == 1 or 0 < keep.float().mean() < 1
    torch.testing.assert_close(lists.dropped_mass, bound, rtol=1e-5, atol=0)

    mass = (tile_lse.double() - lse.double()[:, None]).exp()
    is_target = target[:, None] // TILE == torch.arange(num_tiles)
    tail = -torch.expm1(logprob.double())
    if not has_logprob:
        tail = mass.masked_fill(is_target, 0).sum(1)
    budget = drop * (8 * tail.clamp(min=2**-16)).clamp(max=1)
    dropped = mass.masked_fill(keep, 0).sum(1)
    assert (dropped <= lists.dropped_mass.double()).all()
    assert (lists.dropped_mass <= budget * (1 + 1e-6)).all()
    # One tile more would exceed the budget: the least of those kept.
    more = mass.masked_fill(~keep | is_target, torch.inf).amin(1)
    assert ((dropped + more) * MASS_SLACK * (1 + 1e-5) > budget).all()


def test_selection_of_extreme_rows():
    """NaN keeps every tile, vanishing tiles go, no gradient or target here keeps no tile or none
    in particular, and equal masses go together or not at all."""
    tile_lse, lse, target, logprob = make_tiles(8, 5)
    grad = torch.ones(8)
    tile_lse[0, 2] = lse[0] = torch.nan
    logprob[1] = torch.nan
    tile_lse[2], lse[2], logprob[2] = torch.tensor([-torch.inf, -300, 0, -200, -1e30]), 0, 0
    tile_lse[3], lse[3], logprob[3] = torch.zeros(5), torch.tensor(5.0).log(), -5
    grad[4] = 0
    grad[5], tile_lse[5], lse[5] = 0, torch.nan, torch.nan
    target[6] = IGNORE
    tile_lse[7], lse[7], logprob[7] = torch.tensor([5.0, 1, -3, -3, -3]), 5.02, -9
    target[2], target[3], target[7] = 3 * TILE, 0, 10**6
    lists = build(tile_lse, lse, target, logprob, drop=0.1, grad=grad)
    keep = listed(lists, 8, 5)
    assert keep[:2].all()
    assert keep[2].tolist() == [False, False, True, True, False]
    assert keep[3].all()
    assert not keep[4:7].any()
    assert keep[7].tolist() == [True, False, False, False, False]
    assert (lists.dropped_mass[[0, 1, 3, 4, 5, 6]] == 0).all()
    assert 0 < lists.dropped_mass[2] < 1e-37


@pytest.mark.parametrize("wave_chunks", [1, 3, 100])
def test_waves_share_out_the_tiles(wave_chunks):
    tile_lse, lse, target, logprob = make_tiles(300, 6)
    tile_lse[:, 4:] = -100.0  # tiles without pairs, two of them last
    target.fill_(1)
    lists = build(tile_lse, lse, target, logprob, max_chunks=13, wave_chunks=wave_chunks)
    assert not lists.is_dense
    assert lists.wave_tile[0] == 0 and lists.wave_tile[-1] == 6
    chunks = lists.chunk_start[lists.wave_tile.long()].diff()
    assert (chunks >= 0).all() and (chunks <= wave_chunks + 300 // gpu_lists.PAIR_CHUNK).all()
    assert chunks.sum() == lists.chunk_start[-1] > 4


def test_too_many_pairs_leave_every_wave_empty():
    tile_lse, lse, target, logprob = make_tiles(300, 6)
    needed = int(build(tile_lse, lse, target, logprob, drop=0.01).chunk_start[-1])
    fitting = build(tile_lse, lse, target, logprob, drop=0.01, max_chunks=needed)
    assert not fitting.is_dense and fitting.wave_tile.any() and fitting.dropped_mass.any()
    lists = build(tile_lse, lse, target, logprob, drop=0.01, max_chunks=needed - 1, wave_chunks=4)
    assert lists.is_dense and not lists.wave_tile.any() and not lists.dropped_mass.any()
    assert (lists.rows == -1).all()


@pytest.mark.parametrize("num_live", [800, 200])
def test_the_fill_is_that_of_the_rows_with_a_gradient(num_live):
    """Which alone the exact backward computes: its cost falls with them, and so does the limit."""
    tile_lse, lse, target, logprob = make_tiles(800, 3)
    tile_lse[:], lse[:], logprob[:] = 0.0, torch.tensor(3.0).log(), -5.0  # nothing can go
    grad = torch.zeros(800)
    grad[:num_live] = 1
    chunks = 3 * -(-num_live // gpu_lists.PAIR_CHUNK)
    for max_fill, is_dense in ((1.0, False), (0.25, True)):
        lists = build(tile_lse, lse, target, logprob, grad=grad, max_fill=max_fill)
        assert lists.chunk_start[-1] == chunks and bool(lists.is_dense) == is_dense
    # Of all rows a quarter would be within the limit.
    assert num_live == 800 or chunks <= 0.25 * 800 * 3 / gpu_lists.PAIR_CHUNK + 3


class Case:
    """Inputs of the backward on a shard of the vocabulary, and their float64 truth."""

    def __init__(self, shape, dtype=torch.float32, scale=6.0, shard=None, drop=2**-5, seed=0):
        torch.manual_seed(seed)
        num_rows, hidden_size, vocab_size = shape
        self.hidden = torch.randn(num_rows, hidden_size).to(dtype)
        weight = (torch.randn(vocab_size, hidden_size) * scale / hidden_size**0.5).to(dtype)
        self.start, stop = shard or (0, vocab_size)
        self.weight = weight[self.start : stop]
        logits = self.hidden.double() @ weight.double().t() / TEMPERATURE
        self.target = torch.multinomial(logits.softmax(1), 1).squeeze(1)
        self.target[0] = 0
        self.target[-1] = vocab_size - 1
        self.target[num_rows // 3 : num_rows // 3 + num_rows // 20] = IGNORE
        self.grad = torch.randn(num_rows)
        self.grad[num_rows // 2 : num_rows // 2 + num_rows // 20] = 0
        self.drop = drop
        lse, target_logit, _, _ = reference.forward(
            self.hidden, weight, self.target, 0, TEMPERATURE, IGNORE
        )
        self.lse, self.logprob = lse, (target_logit - lse).clamp(max=0)
        tile_lse = reference.forward(self.hidden, self.weight, self.target, 0, TEMPERATURE)[3]
        self.tile_lse = tile_lse.t().contiguous().t()

        is_active = (self.target != IGNORE) & (self.grad != 0)
        self.keep, self.dropped = reference.select_tiles(
            tile_lse, lse, self.logprob, self.target - self.start, drop
        )
        self.keep &= is_active[:, None]
        self.dropped = self.dropped.masked_fill(~is_active, 0)
        probability = logits.softmax(1)
        one_hot = torch.zeros_like(probability)
        one_hot.scatter_(1, self.target.clamp(min=0)[:, None], 1)
        grad = self.grad.double().masked_fill(~is_active, 0)[:, None]
        self.grad_logits = (grad * (one_hot - probability))[:, self.start : stop] / TEMPERATURE
        self.mass = probability[:, self.start : stop]
        self.entry_keep = self.keep.repeat_interleave(TILE, 1)[:, : stop - self.start]

    def run(self, rows=slice(None), drop=None, **overrides):
        """grad_hidden, grad_weight, is_dense and dropped_mass of pair_backward for some rows."""
        dropped = torch.full_like(self.lse[rows], torch.nan).to(DEVICE)
        arguments = {
            "hidden": self.hidden[rows],
            "weight_shard": self.weight,
            "target": self.target[rows],
            "vocab_start": self.start,
            "temperature": TEMPERATURE,
            "lse": self.lse[rows],
            "tile_lse": self.tile_lse[rows],
            "grad_logprob": self.grad[rows],
            "drop_mass": self.drop,
            "logprob": self.logprob[rows],
            "ignore_index": IGNORE,
            "dropped_mass": dropped,
            "weight_grad": None,
            "needs_grad_weight": True,
            "grad_weight_dtype": None,
            "max_fill": 1.0,
        } | overrides
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                arguments[name] = value.to(DEVICE)
        results = gpu_pairs.pair_backward(**arguments)
        return *(result.cpu() for result in results), dropped.cpu()


@cache
def whole_chunks() -> tuple[Tensor, ...]:
    return CASES["chunks"].run()


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


CASES = {
    "float32": Case((40, 32, 600), scale=6.0),
    "pointers": Case((40, 19, 1400), scale=16.0, drop=2**-4),
    "flat": Case((24, 16, 600), scale=1.0),
    "chunks": Case((160, 8, 300), scale=8.0),
    "row_ranges": Case((270, 4, 130)),
    "one": Case((1, 8, 130)),
    "tail_shard": Case((40, 16, 700), shard=(256, 700)),
    "float16": Case((40, 32, 600), torch.float16, scale=8.0),
    "bfloat16": Case((40, 32, 600), torch.bfloat16, scale=8.0),
    "bfloat16_pointers": Case((40, 19, 600), torch.bfloat16, scale=8.0),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_float64(name, nan_filled_empty):
    case = CASES[name]
    grad_hidden, grad_weight, is_dense, dropped = case.run()
    assert not is_dense
    assert grad_hidden.dtype == grad_weight.dtype == torch.float32
    torch.testing.assert_close(dropped, case.dropped, rtol=1e-5, atol=0)
    # The same pairs in float64. A float32 logit is off by its last place, in product and lse.
    tolerance = TOLERANCES[case.hidden.dtype] + 2**-22 * float(case.lse.max())
    kept = case.grad_logits * case.entry_keep
    hidden, weight = case.hidden.double(), case.weight.double()
    for result, expected, truth in zip(
        (grad_hidden, grad_weight),
        reference.backward(
            *(case.hidden, case.weight, case.target, case.start, TEMPERATURE, case.lse, case.lse),
            *(case.tile_lse, case.grad, None, case.drop, case.logprob, IGNORE),
        ),
        (kept @ weight, kept.t() @ hidden),
        strict=True,
    ):
        assert relative_error(result, truth) < relative_error(expected, truth) + tolerance
    # All pairs: the rest is within what the reported mass allows, which bounds the true one.
    is_active = (case.target != IGNORE) & (case.grad != 0)
    lost = (case.mass * ~case.entry_keep).sum(1) * is_active
    assert (lost <= dropped).all()
    budget = case.drop * (8 * (-torch.expm1(case.logprob)).clamp(min=2**-16)).clamp(max=1)
    assert (dropped <= budget * (1 + 1e-6)).all()
    unit = case.grad.abs() * weight.norm(dim=1).max() / TEMPERATURE
    error = (grad_hidden - case.grad_logits @ weight).norm(dim=1)
    assert (error <= unit * (dropped + tolerance)).all()
    assert not grad_hidden[~is_active].any() and not dropped[~is_active].any()


def test_fills_of_the_cases():
    """From a few pairs to nearly all of them."""
    fills = [float(case.keep.float().mean()) for case in CASES.values()]
    assert min(fills) < 0.25 and max(fills) > 0.85


def test_waves_and_runs_give_the_same_bits(nan_filled_empty):
    for again in (CASES["chunks"].run(buffer_bytes=1), CASES["chunks"].run()):
        for one, other in zip(whole_chunks(), again, strict=True):
            assert torch.equal(one, other)


# The first rows keep their places in the lists. Rows that change places change their bits in the
# interpreter, as NumPy's matrix product depends on the place; a GPU's does not.
@pytest.mark.parametrize(
    "rows", [slice(0, 1), slice(0, 90), pytest.param(slice(37, 160), marks=cuda)], ids=str
)
def test_a_row_depends_on_no_other(rows):
    case = CASES["chunks"]
    whole, part = whole_chunks(), case.run(rows)
    assert torch.equal(whole[0][rows], part[0])
    assert torch.equal(whole[3][rows], part[3])


def test_overflow_leaves_the_work_to_the_exact_backward(nan_filled_empty):
    case = Case((150, 4, 130), scale=1.0)
    grad_hidden, grad_weight, is_dense, dropped = case.run(max_fill=0.0)
    assert is_dense.tolist() == [1]
    assert not grad_hidden.any() and not dropped.any()
    assert grad_weight.isnan().all()


def test_weight_gradient_where_it_is_wanted(nan_filled_empty):
    case = CASES["tail_shard"]
    grad_hidden, grad_weight, *_ = case.run()
    start = torch.randn(case.weight.t().shape).t()
    buffer = start.clone().to(DEVICE)
    added = case.run(weight_grad=buffer)
    assert added[1].shape == (0, 16) and torch.equal(added[0], grad_hidden)
    torch.testing.assert_close(buffer.cpu(), start + grad_weight, rtol=0, atol=1e-6)
    buffer = start.clone().to(DEVICE)
    case.run(weight_grad=buffer, needs_grad_weight=False)  # of a frozen weight, and yet wanted
    torch.testing.assert_close(buffer.cpu(), start + grad_weight, rtol=0, atol=1e-6)
    none = case.run(needs_grad_weight=False, dropped_mass=None)
    assert none[1].shape == (0, 16) and torch.equal(none[0], grad_hidden)
    narrow = case.run(grad_weight_dtype=torch.bfloat16)
    assert torch.equal(narrow[1], grad_weight.bfloat16())


def test_a_spoilt_row_spoils_no_other():
    case = Case((40, 16, 300), scale=8.0)
    clean = case.run()
    # The last, because it keeps every tile and would move the places of those behind it.
    case.hidden[-1] = case.lse[-1] = case.tile_lse[-1] = torch.nan
    spoilt = case.run()
    assert spoilt[0][-1].isnan().all()
    assert torch.equal(spoilt[0][:-1], clean[0][:-1])
    assert spoilt[1].isnan().all()


def test_small_gradients_survive_float16():
    case = CASES["float16"]
    large = case.run()
    small = case.run(grad_logprob=case.grad * 2**-25)
    # A power of two changes no bit.
    assert torch.equal(small[0] * 2**25, large[0])
    assert torch.equal(small[1] * 2**25, large[1])


@cuda
def test_no_synchronisation_and_graph_capture():
    case = Case((700, 64, 5000), torch.bfloat16, scale=8.0)
    expected = case.run(max_fill=0.25)
    names = ("hidden", "weight", "target", "lse", "tile_lse", "grad", "logprob")
    for name in names:
        setattr(case, name, getattr(case, name).cuda())
    inputs = (case.hidden, case.weight, case.target, 0, TEMPERATURE, case.lse, case.tile_lse)
    inputs += (case.grad, case.drop, case.logprob, IGNORE, None, None, True, None)
    gpu_pairs.pair_backward(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    gpu_pairs.pair_backward(*inputs)
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gpu_pairs.pair_backward(*inputs)
    graph.replay()
    assert torch.equal(captured[0].cpu(), expected[0])
    assert torch.equal(captured[1].cpu(), expected[1])
