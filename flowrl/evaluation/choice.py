r"""Multiple choice: the letter that a response names last."""

import re
from typing import Any

# "Answer: B", "answer is (B)", "**Answer:** \boxed{\text{B}}"; or a box with one letter.
_TEXT = r"(?:\\(?:text|mathrm|textbf)\s*\{)?"
_LETTER = rf"[\s*$(\[]*(?:\\boxed\s*\{{)?{_TEXT}[\s*$(]*([A-Z])(?![A-Za-z])"
NAMED = re.compile(rf"(?i:answer|choice|option)\s*[*_]*\s*(?::|is)[*_]*{_LETTER}")
BOXED = re.compile(rf"\\boxed\s*\{{\s*{_TEXT}[\s(]*([A-Z])[)\s}}.]")


def last_letter(response: str) -> str:
    r"""The capital letter after the last "Answer:" or in the last \boxed{}, "" if there is none."""
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
