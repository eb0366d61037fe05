"""Write parallel_equality.md: train every row of the matrix and tabulate its errors.

`python docs/generate_parallel_equality.py` takes minutes; tests/megatron/test_parallel_matrix.py
holds the same rows to their bounds. Exits 1 when a cell exceeds its bound.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "megatron")]

import megatron.core  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from critic_cases import CRITIC_ROWS, measure_critic  # noqa: E402
from parallel_matrix import BOUNDS, ROWS, Row, measure  # noqa: E402

Measure = Callable[[Row], dict[str, float]]

PAGE = ROOT / "docs" / "parallel_equality.md"
COLUMNS = (
    "loss",
    "sequences",
    "log-probs",
    "entropy",
    "gradients",
    "grad norm",
    "weights",
    "Z",
    "Z gradients",
    "Z weights",
)

CRITIC_COLUMNS = (
    "loss",
    "values",
    "gradients",
    "grad norm",
    "weights",
    "head gradients",
    "head weights",
)

HEAD = """\
# A step is the same on every layout

<!-- Written by docs/generate_parallel_equality.py: edit that, not this. -->

The Megatron policy, on every layout of tensor (TP), sequence (SP), pipeline (PP), virtual pipeline
(VPP), context (CP), expert (EP) and data (DP) parallelism, against the policy of one process in
float64, on the same ragged samples in several micro-batches. EP ranks are those of TP, CP and DP:
they share the experts, and each has tokens of its own. Largest relative error in the Euclidean
norm, over ranks and, for gradients and weights, over the parameters by their HF names:

- **loss** of the mini-batch; **sequences**: residual, weight and the other values per sequence
- **log-probs** of the training pass and of the pass without gradient; **entropy** per token
- **gradients** after all reductions; **grad norm** of {num_steps} updates
- **weights** after {num_steps} updates of AdamW with clipping, warm-up and weight decay
- **Z**, its gradients and its weights: those of the partition network

Unless the row says otherwise Z's gradient flows into the trunk, the loss has an entropy term and
no mass of the head is dropped. The bound is {single:.0e}, and {double:.0e} for the rows in float64,
whose gradients are gathered in float32. One process in float32 is itself up to 6e-6 away from
float64. Losses, log-probs and norms are moreover equal bitwise on all ranks of a run.

The test also breaks each scale factor on purpose - summed or plain backward over CP and TP, counts
of sequences, micro-batches and ranks, the marks that Megatron reads - and requires an error above
1e-3, which none of them shows in the loss.

Measured on a CPU with gloo: PyTorch {torch}, megatron-core {megatron}, transformers {transformers}.

"""

CRITIC = """\
## The critic of PPO

PPO's policy is trained as GRPO's is, on other advantages. Its critic, a trunk with a value head,
against the critic of one process in the same way: the **values** of a pass without gradient, equal
bitwise on all ranks, and the gradients and weights of the trunk and of the **head**. Some tokens do
not count in the loss, among them all of one response.

"""


def tabulate(rows: Iterable[Row], measure: Measure, columns: tuple[str, ...]) -> tuple[str, bool]:
    """A table, and whether all of it is within the bounds."""
    lines = [
        "| model | training | layout | " + " | ".join(columns) + " |",
        "|---|---|---|" + "--:|" * len(columns),
    ]
    is_within = True
    for row in rows:
        table = measure(row)
        assert set(table) <= set(columns)
        is_within &= all(value <= BOUNDS[row.case.dtype] for value in table.values())
        cells = [f"{table[name]:.1e}" if name in table else "" for name in columns]
        lines.append(f"| {row.model} | {row.training} | {row.layout} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n", is_within


def main() -> int:
    policy, is_policy_within = tabulate(ROWS, measure, COLUMNS)
    critic, is_critic_within = tabulate(CRITIC_ROWS, measure_critic, CRITIC_COLUMNS)
    head = HEAD.format(
        num_steps=2,
        single=BOUNDS[torch.float32],
        double=BOUNDS[torch.float64],
        torch=torch.__version__.partition("+")[0],
        megatron=megatron.core.__version__,
        transformers=transformers.__version__,
    )
    PAGE.write_text(head + policy + "\n" + CRITIC + critic, encoding="utf-8")
    return 0 if is_policy_within and is_critic_within else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
