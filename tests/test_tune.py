"""benchmarks/tune_linear_logprob.py: every candidate's values, and what it advises."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flowrl.kernels._triton import IS_INTERPRETED

if not IS_INTERPRETED:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from flowrl.kernels.linear_logprob.gpu_blocks import BLOCKS, NAMES, TABLE

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tune_linear_logprob  # pyright: ignore[reportMissingImports]

    yield tune_linear_logprob


def test_every_candidate_computes_the_right_values(tuning: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    assert tuning.check_in_interpreter(tuple(tuning.PASSES), path) == 0
    rows = json.loads(path.read_text())["results"]
    for name in tuning.PASSES:
        for kind in ("sm_80", "sm_90", "sm_100"):
            found = [r["numbers"] for r in rows if (r["kernel"], r["kind"]) == (name, kind)]
            assert found[0] == list(TABLE[name][kind])
            assert 3 <= len(found) <= 6
            assert all(len(numbers) == len(NAMES[name]) for numbers in found)


def test_wrong_values_are_found(tuning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tuning.Case(20, 16, 300, "float16")
    problem = tuning.make_problem(case, torch.device("cpu"), max_fill=1.0)
    expected = tuning.truth(problem, 0.0)
    right = tuning.exact_pass(problem, BLOCKS)
    assert tuning.objection(right, expected, "float16", 0.0) is None
    off = (right[0], right[1] * 1.01)
    assert "wrong: error 1.0e-02 of result 1" in tuning.objection(off, expected, "float16", 0.0)
    nan = (right[0] * torch.nan, right[1])
    assert "error nan of result 0" in tuning.objection(nan, expected, "float16", 0.0)

    def scaled_by_depth(problem, table):
        numbers = table["grad_hidden"]["sm_90"]
        return tuple(x * (1 + 0.1 * (numbers[2] == 32)) for x in right)

    monkeypatch.setitem(tuning.PASSES, "grad_hidden", (scaled_by_depth, 0.0))
    numbers = tuning.candidates("grad_hidden", "sm_80")
    verdicts = tuning.check(problem, "grad_hidden", numbers, "float16", expected)
    assert {numbers[2] for numbers, why in verdicts.items() if why is None} == {64}
    assert {numbers[2] for numbers, why in verdicts.items() if why is not None} == {32}


def row(numbers: tuple[int, ...], hidden_size: int, ratio: float | None) -> dict:
    measured = {} if ratio is None else {"ratio_to_current": ratio}
    return {
        "kernel": "forward",
        "kind": "sm_90",
        "case": {"hidden_size": hidden_size},
        "numbers": numbers,
        **measured,
    }


def test_advice_is_the_least_time_over_all_heads(tuning: ModuleType) -> None:
    current = TABLE["forward"]["sm_90"]
    one, other = (64, *current[1:]), (32, *current[1:])
    rows = [row(current, size, 1.0) for size in (896, 3584)]
    place = 'TABLE["forward"]["sm_90"]'
    # The geometric mean of 0.81 and 1 is 0.9; `other` is faster, but at one head it does not run.
    rows += [row(one, 896, 0.81), row(one, 3584, 1.0), row(other, 896, 0.5), row(other, 3584, None)]
    assert tuning.advice(rows) == [f"{place}: {current} -> {one}, 10.0% less time (2 heads)"]
    rows = [row(current, 896, 1.0), row(one, 896, 0.995)]
    (line,) = tuning.advice(rows)
    assert line.startswith(f"{place} stays {current}")
    assert tuning.advice([row(one, 896, None)]) == [f"{place}: no candidate ran at every head"]


def test_modes_need_the_right_triton(tuning: ModuleType) -> None:
    with pytest.raises(ValueError, match="do not set TRITON_INTERPRET=1"):
        tuning.main(compile_only=True)
    with pytest.raises(ValueError, match=r"no kernel \['softmax'\]; there are forward"):
        tuning.main(kernel=["softmax"], device="cpu")
