"""Candidates of block sizes for the head's kernels: compiled, checked and, on a GPU, timed.

    python benchmarks/tune_linear_logprob.py --json tuning.json              # on a GPU
    python benchmarks/tune_linear_logprob.py --compile-only --sm 90          # without one
    TRITON_INTERPRET=1 python benchmarks/tune_linear_logprob.py --device cpu # values only

On a GPU every candidate runs at the heads of common models in bfloat16. Its results have to agree
with the reference implementation; then the candidates of a kernel take turns, round by round, the
other kernels as the table has them. The time is the kernel's own, over all its launches in a pass,
between events around each launch; the pass as a whole is in the JSON too. What is printed last is
the line of kernels/linear_logprob/gpu_blocks.py to change, if one is worth it.

--compile-only lists registers, spills, shared memory and instructions of every candidate for
sm_80, sm_90 and sm_100 and fails if one spills, or misses its tensor cores or its asynchronous
loads. --device cpu checks every candidate of every architecture in Triton's interpreter.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from compile_kernels import (
    ARCHITECTURES,
    NUM_ROWS,
    Binary,
    compile_launches,
    meta,
    print_table,
)
from compile_kernels import HEADS as COMPILED_HEADS
from linear_logprob_candidates import CANDIDATES
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor
from triton import knobs
from triton.errors import TritonError

from flowrl.bench.inputs import HEADS, Case, make_inputs
from flowrl.bench.kernels import GRAD_TOLERANCE, LOGPROB_TOLERANCE
from flowrl.bench.measure import environment
from flowrl.kernels._triton import IS_INTERPRETED
from flowrl.kernels.linear_logprob import gpu, gpu_backward, gpu_pairs, reference
from flowrl.kernels.linear_logprob.gpu_blocks import NAMES, TABLE, Table, device_kind

HEAD_NAMES = ("qwen2.5-7b", "llama-3-8b", "qwen2.5-32b", "qwen2.5-0.5b")
DROP_MASS = 2**-9
# A change of the table has to gain more than this; what two equal candidates differ by.
WORTHWHILE = 0.01


@dataclass(frozen=True)
class Problem:
    """Inputs of one pass, what the forward of the table gave, and the reference's results."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]  # hidden, weight, target, grad
    forward: tuple[Tensor, Tensor, Tensor, Tensor]
    buffer: Tensor  # [V, H] float32, which the backward adds the weight's gradient to
    max_fill: float = gpu_pairs.MAX_FILL


Pass = Callable[[Problem, Table], tuple[Tensor, ...]]


def forward_pass(problem: Problem, table: Table) -> tuple[Tensor, ...]:
    """With the entropy, as the policy's update runs it: (logprob, mean logit)."""
    hidden, weight, target, _ = problem.inputs
    lse, target_logit, mean, _ = gpu.forward(
        hidden, weight, target, 0, 1.0, -100, True, None, table
    )
    return target_logit - lse, mean


def exact_pass(problem: Problem, table: Table) -> tuple[Tensor, ...]:
    problem.buffer.zero_()
    grad_hidden, _ = gpu_backward.backward(
        *_backward_arguments(problem, 0.0), weight_grad=problem.buffer, table=table
    )
    return grad_hidden, problem.buffer


def pair_pass(problem: Problem, table: Table) -> tuple[Tensor, ...]:
    hidden, weight, target, grad = problem.inputs
    lse, target_logit, _, tile_lse = problem.forward
    problem.buffer.zero_()
    grad_hidden, _, is_dense = gpu_pairs.pair_backward(
        *(hidden, weight, target, 0, 1.0, lse, tile_lse, grad, DROP_MASS, target_logit - lse),
        *(-100, None, problem.buffer, True, None, problem.max_fill),
        table=table,
    )
    if is_dense.item():
        raise ValueError("too many pairs are kept for the kernels to run; give more peaked logits")
    return grad_hidden, problem.buffer


def _backward_arguments(problem: Problem, drop_mass: float) -> tuple:
    hidden, weight, target, grad = problem.inputs
    lse, target_logit, mean, tile_lse = problem.forward
    sums = (lse, mean, tile_lse, grad, None, drop_mass, target_logit - lse, -100)
    return (hidden, weight, target, 0, 1.0, *sums)


# Which pass runs a kernel, and the drop_mass of that pass: none for the forward.
PASSES: dict[str, tuple[Pass, float | None]] = {
    "forward": (forward_pass, None),
    "grad_logits": (exact_pass, 0.0),
    "grad_hidden": (exact_pass, 0.0),
    "grad_weight": (exact_pass, 0.0),
    "pair_p": (pair_pass, DROP_MASS),
    "pair_dw": (pair_pass, DROP_MASS),
    "pair_dh": (pair_pass, DROP_MASS),
}


def candidates(name: str, kind: str) -> list[tuple[int, ...]]:
    """The table's entry, then the others."""
    return list(dict.fromkeys([TABLE[name][kind], *CANDIDATES[name][kind]]))


def with_entry(name: str, numbers: tuple[int, ...]) -> Table:
    """The table with `numbers` as the entry of one kernel, whatever the device."""
    return {**TABLE, name: dict.fromkeys(TABLE[name], numbers)}


def make_problem(case: Case, device: torch.device, max_fill: float = gpu_pairs.MAX_FILL) -> Problem:
    inputs = make_inputs(case, device)
    hidden, weight, target, _ = inputs
    forward = gpu.forward(hidden, weight, target, 0, 1.0, -100, True)
    return Problem(inputs, forward, torch.zeros_like(weight, dtype=torch.float32), max_fill)


def truth(problem: Problem, drop_mass: float | None) -> tuple[Tensor, ...]:
    """What a pass has to give, by the reference implementation: float32 sums of the same inputs."""
    hidden, weight, target, _ = problem.inputs
    if drop_mass is None:
        lse, target_logit, mean, _ = reference.forward(hidden, weight, target, 0, 1.0, -100, True)
        return target_logit - lse, mean
    return reference.backward(*_backward_arguments(problem, drop_mass))


def objection(
    results: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: str, drop_mass: float | None
) -> str | None:
    """Why results are wrong: log-probs and mean logits by the largest error, gradients by norm."""
    for index, (result, exact) in enumerate(zip(results, expected, strict=True)):
        difference = result.float() - exact.float()
        if drop_mass is None:
            error, tolerance = float(difference.abs().max()), LOGPROB_TOLERANCE * (1 + index)
        else:
            error, tolerance = float(difference.norm() / exact.norm()), GRAD_TOLERANCE[dtype]
        if not error <= tolerance:
            return f"wrong: error {error:.1e} of result {index}, allowed {tolerance:.0e}"
    return None


def check(
    problem: Problem,
    name: str,
    numbers: list[tuple[int, ...]],
    dtype: str,
    expected: tuple[Tensor, ...],
) -> dict[tuple[int, ...], str | None]:
    """Candidate -> None, or why it is out: it does not compile, has no room, or is wrong."""
    run, drop_mass = PASSES[name]
    verdicts: dict[tuple[int, ...], str | None] = {}
    for candidate in numbers:
        try:
            results = run(problem, with_entry(name, candidate))
        except TritonError as error:
            verdicts[candidate] = f"does not run: {type(error).__name__}: {str(error)[:200]}"
            continue
        verdicts[candidate] = objection(results, expected, dtype, drop_mass)
    return verdicts


@contextmanager
def events_of(kernel: str) -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """Events before and after each launch of a Triton kernel within the block."""
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def enter(metadata) -> None:
        if metadata.get()["name"] == kernel:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            pairs.append((start, end))
            start.record()

    def leave(metadata) -> None:
        if metadata.get()["name"] == kernel:
            pairs[-1][1].record()

    runtime = knobs.runtime
    runtime.launch_enter_hook.add(enter)
    runtime.launch_exit_hook.add(leave)
    try:
        yield pairs
    finally:
        runtime.launch_enter_hook.remove(enter)
        runtime.launch_exit_hook.remove(leave)


def time_candidates(
    problem: Problem, name: str, numbers: list[tuple[int, ...]], repeats: int
) -> dict[tuple[int, ...], tuple[list[float], list[float]]]:
    """Candidate -> milliseconds of the kernel, and of the whole pass, in each round."""
    run, _ = PASSES[name]
    times: dict = {candidate: ([], []) for candidate in numbers}
    whole = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for round_index in range(repeats + 1):
        for candidate in numbers:
            table = with_entry(name, candidate)
            with events_of(f"{name}_kernel") as pairs:
                whole[0].record()
                run(problem, table)
                whole[1].record()
                torch.cuda.synchronize()
            if not pairs:
                raise ValueError(f"no launch of {name}_kernel was seen, so there is no time of it")
            if round_index:  # the first round warms up
                times[candidate][0].append(sum(start.elapsed_time(end) for start, end in pairs))
                times[candidate][1].append(whole[0].elapsed_time(whole[1]))
    return times


def kept_pairs(problem: Problem) -> int:
    _, _, target, _ = problem.inputs
    lse, target_logit, _, tile_lse = problem.forward
    keep, _ = reference.select_tiles(tile_lse, lse, target_logit - lse, target, DROP_MASS)
    return int(keep.sum())


def flops(problem: Problem, name: str) -> float:
    """2 THV, or 2 x 128 H for each kept pair."""
    hidden, weight, _, _ = problem.inputs
    if PASSES[name][1] == DROP_MASS:
        return 2.0 * kept_pairs(problem) * reference.TILE * hidden.shape[1]
    return 2.0 * hidden.shape[0] * weight.numel()


def measure(
    problem: Problem, name: str, kind: str, case: Case, expected: tuple[Tensor, ...], repeats: int
) -> list[dict]:
    """Rows of the report for one kernel at one shape."""
    verdicts = check(problem, name, candidates(name, kind), case.dtype, expected)
    good = [numbers for numbers, why in verdicts.items() if why is None]
    times = time_candidates(problem, name, good, repeats) if good else {}
    medians = {numbers: statistics.median(own) for numbers, (own, _) in times.items()}
    work, current = flops(problem, name), TABLE[name][kind]
    rows = []
    for numbers, why in verdicts.items():
        row = {
            **{"kernel": name, "kind": kind, "case": asdict(case), "numbers": numbers},
            **{"blocks": dict(zip(NAMES[name], numbers, strict=True))},
            **{"is_current": numbers == current, "objection": why},
        }
        if numbers in times:
            own, whole = times[numbers]
            row |= {
                "median_ms": medians[numbers],
                "range_ms": [min(own), max(own)],
                "pass_median_ms": statistics.median(whole),
                "tflops": work / medians[numbers] / 1e9,
                "ratio_to_best": medians[numbers] / min(medians.values()),
                "ratio_to_current": medians[numbers] / medians.get(current, float("nan")),
            }
        rows.append(row)
    return rows


def render(rows: list[dict], head: str) -> RichTable:
    name = rows[0]["kernel"]
    table = RichTable(title=f"{name}, {rows[0]['kind']}, {head}")
    for column in (*NAMES[name], "ms", "range", "pass ms", "TFLOP/s", "/ best", ""):
        table.add_column(column, justify="right")
    for row in rows:
        note = row["objection"] or ("in the table" if row["is_current"] else "")
        figures = ["-"] * 5
        if "median_ms" in row:
            low, high = row["range_ms"]
            figures = [
                f"{row['median_ms']:.3f}",
                f"{low:.3f} - {high:.3f}",
                f"{row['pass_median_ms']:.2f}",
                f"{row['tflops']:.0f}",
                f"{row['ratio_to_best']:.3f}",
            ]
        table.add_row(*map(str, row["numbers"]), *figures, note)
    return table


def advice(rows: list[dict]) -> list[str]:
    """For each kernel the entry with the least geometric mean of time over the heads."""
    lines = []
    for name in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == name]
        kind, current = mine[0]["kind"], TABLE[name][mine[0]["kind"]]
        num_heads = len({row["case"]["hidden_size"] for row in mine})
        means = {}
        for numbers in dict.fromkeys(row["numbers"] for row in mine):
            ratios = [
                row["ratio_to_current"]
                for row in mine
                if row["numbers"] == numbers and "ratio_to_current" in row
            ]
            if len(ratios) == num_heads:
                means[numbers] = statistics.geometric_mean(ratios)
        place = f'TABLE["{name}"]["{kind}"]'
        if not means:
            lines.append(f"{place}: no candidate ran at every head")
            continue
        best = min(means, key=means.__getitem__)
        gain = 1 - means[best]
        if best == current or gain < WORTHWHILE:
            lines.append(f"{place} stays {current}: the best of the others gains {gain:.1%}")
        else:
            lines.append(f"{place}: {current} -> {best}, {gain:.1%} less time ({num_heads} heads)")
    return lines


def tune(
    heads: tuple[str, ...],
    names: tuple[str, ...],
    num_rows: int,
    repeats: int,
    json_path: Path | None,
) -> int:
    """Check and time on the GPU; return the number of candidates that are wrong."""
    device, console = torch.device("cuda"), Console(width=130)
    kind = device_kind(torch.cuda.get_device_capability(), torch.bfloat16, True)
    if kind not in CANDIDATES["forward"]:
        raise ValueError(f"there are no candidates for {kind}, only for sm_80, sm_90 and sm_100")
    report: dict = {
        "environment": environment(device),
        "kind": kind,
        "drop_mass": DROP_MASS,
        "results": [],
        "advice": [],
    }
    for head in heads:
        hidden_size, vocab_size = HEADS[head]
        for peak in (0.0, 3.0):  # of the pairs, a few per cent must be kept
            mine = [name for name in names if (PASSES[name][1] == DROP_MASS) == (peak > 0)]
            if not mine:
                continue
            case = Case(num_rows, hidden_size, vocab_size, "bfloat16", peak=peak)
            problem = make_problem(case, device)
            expected = {mass: truth(problem, mass) for mass in {PASSES[n][1] for n in mine}}
            for name in mine:
                rows = measure(problem, name, kind, case, expected[PASSES[name][1]], repeats)
                report["results"] += rows
                report["advice"] = advice(report["results"])
                if json_path is not None:
                    json_path.write_text(json.dumps(report, indent=1) + "\n")
                console.print(render(rows, head))
            del problem, expected
    facts = report["environment"]
    console.print(
        f"{facts['device']}, torch {facts['versions']['torch']}, triton "
        f"{facts['versions']['triton']}, commit {facts['commit'][:12]}; {num_rows} rows, bfloat16, "
        f"medians of {repeats} rounds. kernels/linear_logprob/gpu_blocks.py:"
    )
    for line in report["advice"]:
        console.print(line, markup=False, highlight=False)
    return sum((row["objection"] or "").startswith("wrong") for row in report["results"])


def check_in_interpreter(names: tuple[str, ...], json_path: Path | None) -> int:
    """Check the values of every candidate on a tiny shape; return the number that is wrong."""
    rows = []
    # Partial blocks of rows and entries, two steps over H; 67 is not for TMA, as on sm_80.
    for hidden_size, kinds in ((67, ("sm_80",)), (72, ("sm_90", "sm_100"))):
        case = Case(70, hidden_size, 200, "float16")
        problem = make_problem(case, torch.device("cpu"), max_fill=1.0)
        for name in names:
            expected = truth(problem, PASSES[name][1])
            listed = [(kind, numbers) for kind in kinds for numbers in candidates(name, kind)]
            # Warps and stages, the last two numbers, make no difference to the interpreter.
            distinct = {numbers[:-2]: numbers for _, numbers in listed}
            verdicts = check(problem, name, list(distinct.values()), case.dtype, expected)
            for kind, numbers in listed:
                why = verdicts[distinct[numbers[:-2]]]
                rows.append({"kernel": name, "kind": kind, "numbers": numbers, "objection": why})
                print(f"{name} {kind} {numbers}: {why or 'ok'}", flush=True)
    if json_path is not None:
        report = {"environment": environment(torch.device("cpu")), "results": rows}
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    return sum(row["objection"] is not None for row in rows)


def launch(name: str, table: Table) -> Callable[[str, torch.dtype], None]:
    """What compile_kernels takes: the launches of a kernel in all its variants, on meta tensors."""

    def run(head: str, dtype: torch.dtype) -> None:
        hidden_size, vocab_size = COMPILED_HEADS[head]
        hidden, weight = (meta(n, hidden_size, dtype=dtype) for n in (NUM_ROWS, vocab_size))
        target, row = meta(NUM_ROWS, dtype=torch.int64), meta(NUM_ROWS, dtype=torch.float32)
        buffer = meta(vocab_size, hidden_size, dtype=torch.float32)
        shard = (hidden, weight, target, 0, 1.0)
        if name == "forward":
            for entropy in (False, True):
                gpu.forward(*shard, -100, entropy, None, table)
            return
        tile_lse = meta(-(-vocab_size // reference.TILE), NUM_ROWS, dtype=torch.float32).t()
        drop_mass = PASSES[name][1] or 0.0
        for weight_grad in (None, buffer):
            gpu_backward.backward(
                *(*shard, row, row, tile_lse, row, None, drop_mass, row, -100, None, weight_grad),
                grad_weight_dtype=dtype,
                table=table,
            )

    return run


def compile_all(names: tuple[str, ...], sms: tuple[int, ...], json_path: Path | None) -> int:
    """Compile every candidate and print what came out; return the number of bad ones."""
    binaries: list[Binary] = []
    for sm in sms:
        for name in names:
            for numbers in candidates(name, f"sm_{sm}"):
                run = launch(name, with_entry(name, numbers))
                compiled = compile_launches(run, HEAD_NAMES[0], "bfloat16", sm)
                found = [binary for binary, _ in compiled if binary.kernel == f"{name}_kernel"]
                assert found, f"no launch of {name}_kernel was seen"
                for binary in found:
                    verdict = "; ".join(binary.problems) or "ok"
                    print(
                        f"{name} sm_{sm} {numbers}: {binary.registers} registers, "
                        f"{binary.shared_bytes} B shared, {verdict}",
                        flush=True,
                    )
                binaries += found
    print_table(binaries)
    if json_path is not None:
        report = {
            "environment": environment(torch.device("cpu")),
            "kernels": [asdict(binary) for binary in binaries],
        }
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    return sum(bool(binary.problems) for binary in binaries)


def chosen(kind: str, given: list[str] | None, known: Mapping | tuple[str, ...]) -> tuple[str, ...]:
    """Those given, or all. Raises ValueError for unknown ones."""
    if unknown := set(given or ()) - set(known):
        raise ValueError(f"no {kind} {sorted(unknown)}; there are {', '.join(known)}")
    return tuple(given or known)


def main(
    kernel: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(PASSES)}")] = None,
    head: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(HEAD_NAMES)}")] = None,
    rows: Annotated[int, typer.Option(help="tokens")] = 8192,
    repeats: Annotated[int, typer.Option(help="rounds")] = 10,
    device: Annotated[str, typer.Option(help="cuda, or cpu to check values only")] = "cuda",
    compile_only: Annotated[bool, typer.Option("--compile-only", help="needs no GPU")] = False,
    sm: Annotated[list[int] | None, typer.Option(help="of --compile-only: 80, 90, 100")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    names = chosen("kernel", kernel, PASSES)
    is_interpreting = device == "cpu" and not compile_only
    if is_interpreting != IS_INTERPRETED:
        wanted = "set" if is_interpreting else "do not set"
        raise ValueError(f"{wanted} TRITON_INTERPRET=1: Triton reads it when it is imported")
    if compile_only:
        num_bad = compile_all(names, tuple(sm or ARCHITECTURES), json_path)
    elif is_interpreting:
        num_bad = check_in_interpreter(names, json_path)
    else:
        heads = chosen("head", head, HEAD_NAMES)
        num_bad = tune(heads, names, rows, repeats, json_path)
    if num_bad:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
