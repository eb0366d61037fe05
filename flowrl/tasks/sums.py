"""The enumerable task: given "N=", write any "a+b" with a + b = N and a, b >= 1.

Its N - 1 ordered answers can be listed, so the distribution over answers that a policy has learned
can be computed exactly: with N in 10 .. 30 there are 19 answers on average.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowrl.tasks.few_shot import Split
from flowrl.tasks.options import check_int, check_val_fraction, parse_options
from flowrl.tasks.permutation import fixed_permutation
from flowrl.tasks.prompts import Prompt


@dataclass(frozen=True)
class SumsOptions:
    """N runs over low .. high, both included; `val_fraction` of the Ns is held out."""

    low: int = 10
    high: int = 30
    val_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_int("low", self.low, 2, 100_000)
        check_int("high", self.high, self.low, 100_000)
        check_val_fraction(self.val_fraction)


def sums_answers(target: int) -> list[str]:
    """All right answers for N = target: "1+{N-1}" .. "{N-1}+1", N - 1 of them."""
    return [f"{a}+{target - a}" for a in range(1, target)]


def load_sums(
    split: Split, *, count: int | None, seed: int, options: Mapping[str, Any] | None
) -> list[Prompt]:
    """At most `count` prompts; the ground truth is N in digits. The split ignores `seed`."""
    parsed = parse_options(SumsOptions, options, "sums")
    num_targets = parsed.high - parsed.low + 1
    targets = parsed.low + fixed_permutation(num_targets, "sums/split/1")
    num_val = round(parsed.val_fraction * num_targets)
    members = targets[:num_val] if split == "val" else targets[num_val:]
    if len(members) == 0:
        raise ValueError(
            f"{split} split of 'sums' is empty with val_fraction {parsed.val_fraction} of "
            f"{num_targets} targets: change val_fraction, or widen low .. high"
        )
    order = members[fixed_permutation(len(members), f"sums/order/{seed}")[:count]]
    return [
        Prompt(
            data_source="sums",
            messages=[{"role": "user", "content": f"{target}="}],
            ground_truth=str(target),
            ability="reasoning",
            extra_info={"split": split, "index": target, "target": target},
        )
        for target in order.tolist()
    ]
