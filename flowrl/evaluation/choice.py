r"""Multiple choice: the letter that a response names last."""

import re
from typing import Any

# "Answer: B", "the answer is option B", "**Answer:** \boxed{\text{B}}"; or a box that begins with
# a letter, as \boxed{B: 25}. What may stand before the letter, bounded, since without a bound a
# response of many "\boxed{" takes minutes:
_OPENING = (
    r"(?:[\s*_$(\[{]|\\[(\[]|(?i:option|choice)\b"
    r"|\\(?:boxed|text|textbf|textrm|mathrm|mathbf|mathsf|boldsymbol|bm|bf|rm)\b){0,24}"
)
NAMED = re.compile(
    rf"(?i:answer|choice|option)[\s*_]*(?:(?i:is)\s*:?|:){_OPENING}([A-D])(?![A-Za-z])"
)
BOXED = re.compile(rf"\\boxed\s*\{{{_OPENING}([A-D])[:)\s}}.$]")


def last_letter(response: str) -> str:
    r"""The letter A to D after the last "Answer:" or in the last \boxed{}, "" if there is none."""
    found = [(m.start(1), m[1]) for m in (*NAMED.finditer(response), *BOXED.finditer(response))]
    return max(found)[1] if found else ""


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> dict[str, Any]:
    """1.0 if the letter that the response names last is the ground truth, else 0.0.

    Returns score and pred, the letter, "" if none is named.
    """
    pred = last_letter(solution_str)
    return {"score": float(pred == str(ground_truth).strip()), "pred": pred}
