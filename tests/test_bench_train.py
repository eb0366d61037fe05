"""benchmarks/bench_train.py: both heads take the policy's own step, and a run from end to end."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def bench_train(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_train  # pyright: ignore[reportMissingImports]

    yield bench_train


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_from_end_to_end(bench_train: ModuleType, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "step.json"
    report = bench_train.bench("tiny", 200, 32, CPU, dtype, repeats=1, json_path=path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert (report["num_sequences"], report["num_tokens"]) == (6, 192)
    assert set(report["checked"]) == {"policy", "flowrl", "materialised"}
    for figures in report["variants"].values():
        assert figures["tokens_per_s"] == pytest.approx(192 / figures["median_s"])
        assert sum(figures["phase_shares"].values()) == pytest.approx(1)
        assert set(figures["phases_s"]) == {
            *("frozen pass", "trunk forward", "head forward"),
            *("head backward", "trunk backward", "optimiser"),
        }
        assert figures["mfu"] is None and figures["memory_bytes"] is None
    assert report["variants"]["materialised"]["ratio_to_materialised"] == 1
    assert report["environment"]["versions"]["torch"] == torch.__version__


def test_a_head_that_differs_is_not_timed(
    bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hotter(policy, batch, hidden, trains):
        return bench_train.own_head(replace(policy, temperature=1.1), batch, hidden, trains)

    monkeypatch.setitem(bench_train.HEADS, "materialised", hotter)
    with pytest.raises(ValueError, match="materialised gives a .*; nothing was timed"):
        bench_train.bench("tiny", 64, 32, CPU, "float32", repeats=1)


def test_flops_by_hand(bench_train: ModuleType) -> None:
    sizes = bench_train.SIZES["tiny"]
    samples = bench_train.build_samples(64, 32, sizes.vocab_size)
    # A layer of width 64: queries and output 64, keys and values 2 x 16 each, an MLP of 128.
    weights = 64 * (2 * 64 + 2 * 32 + 3 * 128)
    attention = 2 * 64 * 32  # half the scores of 32 positions, times the values
    head = 48 * 2048 * 64  # 24 of 32 tokens are a response
    assert bench_train.step_flops(sizes, samples) == 4 * (
        2 * 64 * (2 * weights + attention) + 2 * head
    )


def test_unknown_names_are_refused(bench_train: ModuleType) -> None:
    with pytest.raises(ValueError, match="huge in float32: there are tiny, qwen2.5-0.5b"):
        bench_train.bench("huge", 64, 32, CPU, "float32", repeats=1)
    with pytest.raises(ValueError, match="--tokens 16 --length 32"):
        bench_train.bench("tiny", 16, 32, CPU, "float32", repeats=1)
