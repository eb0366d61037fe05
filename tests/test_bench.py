"""The head's benchmark: its figures on results known beforehand, and a run from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from flowrl.bench import kernels, measure, variants
from flowrl.bench.inputs import Case, make_inputs
from flowrl.cli import app
from flowrl.kernels.linear_logprob import live_implementation

CPU = torch.device("cpu")
SMALL = Case(num_rows=48, hidden_size=32, vocab_size=700)
PEAKED = replace(SMALL, peak=3.0)
LIVE = live_implementation("cpu")


def scaled(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Log-probs off by a quarter, gradients too large by a tenth."""
    logprob = variants.materialised(hidden, weight, target)
    return logprob.detach() + 0.25 + 1.1 * (logprob - logprob.detach())


def test_errors_are_the_known_ones() -> None:
    found = measure.errors(scaled, make_inputs(SMALL, CPU), is_per_token=True)
    assert found["logprob_error"] == pytest.approx(0.25, abs=1e-5)
    assert found["grad_hidden_error"] == pytest.approx(0.1, rel=1e-4)
    assert found["grad_weight_error"] == pytest.approx(0.1, rel=1e-4)


def test_errors_of_a_sum_are_per_row() -> None:
    found = measure.errors(
        lambda *tensors: scaled(*tensors).sum(), make_inputs(SMALL, CPU), is_per_token=False
    )
    assert found["logprob_error"] == pytest.approx(0.25, abs=1e-5)
    assert found["grad_weight_error"] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("case", [SMALL, PEAKED], ids=["gaussian", "peaked"])
def test_mean_entropy_is_that_of_the_logits(case: Case) -> None:
    hidden, weight, *_ = inputs = make_inputs(case, CPU)
    logits = hidden.double() @ weight.double().t()
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    found = measure.errors(variants.materialised, inputs, is_per_token=True)
    assert found["mean_entropy_nats"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("entropy", [0.1, 0.75, 2.5])
def test_peaked_logits_are_scaled_to_the_entropy_asked_for(entropy: float) -> None:
    inputs = make_inputs(replace(PEAKED, entropy=entropy), CPU)
    found = measure.errors(variants.materialised, inputs, is_per_token=True)
    assert found["mean_entropy_nats"] == pytest.approx(entropy, rel=1e-3)


def test_errors_take_rows_from_the_whole_batch() -> None:
    case = replace(SMALL, num_rows=3 * measure.CHECKED_ROWS, vocab_size=40)
    seen = []

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        seen.append(hidden.detach())
        return variants.materialised(hidden, weight, target)

    inputs = make_inputs(case, CPU)
    measure.errors(run, inputs, is_per_token=True)
    torch.testing.assert_close(seen[0], inputs[0][::3], rtol=0, atol=0)


def test_kept_share_and_dropped_mass_by_brute_force() -> None:
    drop_mass = 0.05
    hidden, weight, target, grad = inputs = make_inputs(PEAKED, CPU)
    probability = (hidden.double() @ weight.double().t()).softmax(1)
    num_tiles = -(-PEAKED.vocab_size // 128)
    mass = torch.stack([part.sum(1) for part in probability.split(128, dim=1)], dim=1)
    tail = 1 - probability.gather(1, target[:, None])[:, 0]
    num_kept, largest, total = 0, 0.0, 0.0
    for row in range(PEAKED.num_rows):
        left, dropped = drop_mass * min(1.0, 8 * max(float(tail[row]), 2**-16)), 0.0
        others = [float(mass[row, j]) for j in range(num_tiles) if j != int(target[row]) // 128]
        num_kept += 1
        for tile_mass in sorted(others):
            if dropped + tile_mass <= left:
                dropped += tile_mass
            else:
                num_kept += 1
        largest, total = max(largest, dropped), total + dropped
    variant = variants.all_variants("cpu", [drop_mass])[f"{LIVE} drop 5.0e-02"]
    found = measure.kept_and_dropped(variant, inputs)
    assert 0.2 < found["kept_share"] < 0.9  # otherwise the case shows nothing
    assert found["kept_share"] == pytest.approx(num_kept / num_tiles / PEAKED.num_rows)
    assert largest <= found["dropped_mass_max"] <= 1.01 * largest
    assert found["dropped_mass_mean"] == pytest.approx(total / PEAKED.num_rows, rel=0.01)


def test_inputs_repeat_and_fold_in_the_temperature(tmp_path: Path) -> None:
    for first, second in zip(make_inputs(PEAKED, CPU), make_inputs(PEAKED, CPU), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    target = torch.tensor([0, 8, 3, 3, 1])
    path = tmp_path / "states.pt"
    torch.save({"weight": weight, "states": {0.5: (hidden, target)}}, path)
    case = Case(4, 4, 9, states=str(path), temperature=0.5)
    found = make_inputs(case, CPU)
    torch.testing.assert_close(found[0], hidden[:4] / 0.5, rtol=0, atol=0)
    assert found[2].tolist() == [0, 8, 3, 3]
    with pytest.raises(ValueError, match=r"temperatures \[0.5\], none of 0.7"):
        make_inputs(replace(case, temperature=0.7), CPU)
    with pytest.raises(ValueError, match="holds 5 rows, not 6"):
        make_inputs(replace(case, num_rows=6), CPU)


def test_extra_memory_is_what_a_pass_allocates() -> None:
    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        torch.ones(2**24).add_(1)  # 64 MiB
        return variants.materialised(hidden, weight, target)

    inputs = make_inputs(SMALL, CPU)
    assert measure.extra_mib(run, inputs, backward=True) == pytest.approx(64, abs=4)


def test_timing_takes_turns_and_leaves_the_first_round_out() -> None:
    calls = []
    works = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = measure.time_interleaved(works, repeats=3, device=CPU)
    assert "".join(calls) == "abababab"
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_missing_variants_are_named_with_the_remedy() -> None:
    variant = variants.Variant(lambda: scaled, module="no_such_module", package="such-a-package")
    assert variants.missing(variant, "cpu") == "not installed: pip install such-a-package"
    variant = variants.Variant(lambda: scaled, needs_cuda=True)
    assert variants.missing(variant, "cpu") == "needs CUDA"
    assert variants.missing(variant, "cuda") is None


def test_failing_probe_gives_the_reason() -> None:
    figures, reason = kernels.run_probe("nobody", [SMALL], CPU, [], timeout_s=120)
    assert (figures, reason) == ([], "KeyError: 'nobody'")
    figures, reason = kernels.run_probe("torch", [SMALL], CPU, [], timeout_s=0.05)
    assert (figures, reason) == ([], "took more than 0.05 s a case")


def test_wrong_result_of_ours_is_not_timed() -> None:
    figures = {"logprob_error": 1e-6, "grad_hidden_error": 1e-6, "grad_weight_error": 2e-5}
    own = variants.all_variants("cpu", [0.1])
    with pytest.raises(ValueError, match="grad_weight_error 2.0e-05, allowed 1e-05"):
        kernels.check(LIVE, own[LIVE], figures, SMALL)
    with pytest.raises(ValueError, match="logprob_error nan"):
        kernels.check(LIVE, own[LIVE], figures | {"logprob_error": float("nan")}, SMALL)
    for name in ("torch", f"{LIVE} drop 1.0e-01"):  # others' errors are shown, not judged
        kernels.check(name, own[name], figures, SMALL)


def test_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, sparse = tmp_path / "results.json", f"{LIVE} drop 2.0e-03"
    report = kernels.bench_kernels(
        [SMALL, PEAKED], CPU, [2**-9], only=[sparse], repeats=2, json_path=path
    )
    assert json.loads(path.read_text()) == report
    assert capsys.readouterr().err.splitlines() == [
        "errors and memory of torch",
        f"errors and memory of {sparse}",
        "case 1 of 2: 3 rounds of each pass",
        "case 2 of 2: 3 rounds of each pass",
    ]
    assert report["not_run"] == {}
    rows = report["results"]
    assert [(row["variant"], row["peak"]) for row in rows] == [
        *(("torch", 0.0), (sparse, 0.0), ("torch", 3.0), (sparse, 3.0))
    ]
    for row in rows:
        for direction in kernels.PASSES:
            times = row[direction]
            assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"]
            assert times["ratio_range"][0] <= times["ratio"] <= times["ratio_range"][1]
        assert row["logprob_error"] < 1e-5
        assert ("kept_share" in row) == (row["variant"] == sparse)
    assert rows[0]["forward"]["ratio"] == 1
    assert rows[3]["dropped_mass_max"] <= 2**-9
    assert rows[3]["kept_share"] < rows[1]["kept_share"] <= 1
    assert report["environment"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "gpt-7"], "no head ['gpt-7']; there are smollm2-135m"),
        (["--dtype", "int8"], "no dtype ['int8']; there are float32"),
        (["--variant", "nobody"], "no variant ['nobody']; there are torch, cpu"),
        (["--head", "llama-3-8b", "--temperature", "1"], "samples from smollm2-135m"),
        (["--entropy", "0.5"], "scales peaked logits"),
    ],
    ids=["head", "dtype", "variant", "temperature", "entropy"],
)
def test_unknown_names_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
