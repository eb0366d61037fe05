r"""DAPO's rule for mathematics: the last `Answer:` line, normalised, compared as a string.

Source: DAPO (arXiv 2503.14476), whose prompt asks for a last line "Answer: $Answer". FlowRL
(arXiv 2509.15207) trains with it. It knows no algebra: 1/2 and 0.5 differ. Use `math_verify` for
evaluation, and expect the two to disagree on format.
"""

import re
from typing import Any

# Only the end of the response is searched, so a response cut off at the length limit is wrong.
SEARCHED_CHARACTERS = 300

ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
TEXT_GROUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
SPACING = re.compile(r"\\left|\\right|\\[!,;: ]|~|\s+")
DEGREES_AND_PERCENT = re.compile(r"\^\{?\\circ\}?|\\%|%")
FRACTION = re.compile(r"\\[dt]?frac\s*(\{[^{}]*\}|[^\s{}\\])\s*(\{[^{}]*\}|[^\s{}\\])")
ROOT = re.compile(r"\\sqrt\s*([^\s{}\[\\])")
GROUPED_NUMBER = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
TRAILING_UNIT = re.compile(
    r"(?<=[0-9})\s])\s*\b(?:square|cubic|sq|cu|units?|degrees?|dollars?|cents?|percent|mm|cm|km|m"
    r"|meters?|metres?|kilometers?|centimeters?|inch(?:es)?|feet|foot|ft|yards?|miles?|mph|hours?"
    r"|minutes?|seconds?|days?|weeks?|months?|years?|kg|grams?|liters?|people|students?|points?"
    r"|ways?)(?:\s*\^\s*\{?[23]\}?)?$",
    re.IGNORECASE,
)


def normalize_answer(text: str) -> str:
    r"""One spelling for the many of a final answer.

    Takes the content of the last \boxed{...} or $...$, what follows the last "=", and drops text
    markup, units, currency, percent and degree signs, thousands separators, spacing and the final
    full stop; \frac12, \dfrac{1}{2} and \frac{1}{2} become one.
    """
    text = _unwrap(text.strip())
    text = text.rpartition("=")[2]
    text = text.replace("\\$", "").replace("$", "")
    text = TEXT_GROUP.sub(r" \1", text)
    text = DEGREES_AND_PERCENT.sub("", text).strip().rstrip(".").strip()
    while (shorter := TRAILING_UNIT.sub("", text).strip()) != text:
        text = shorter
    text = FRACTION.sub(_braced_fraction, SPACING.sub(" ", text))
    if GROUPED_NUMBER.fullmatch(text):  # before spaces go: "1, 234" is a pair
        return text.replace(",", "")
    return ROOT.sub(r"\\sqrt{\1}", text).replace(" ", "")


def _braced_fraction(match: re.Match) -> str:
    numerator, denominator = (group.strip("{}") for group in match.groups())
    return f"\\frac{{{numerator}}}{{{denominator}}}"


def _unwrap(text: str) -> str:
    r"""The content of the last \boxed{...}, else of the last $...$, else the text."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : end]
    pairs = re.findall(r"(?<!\\)\$([^$]+)(?<!\\)\$", text)
    return pairs[-1] if pairs else text


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> dict[str, Any]:
    """+1.0 if the last `Answer:` line of the last 300 characters is the ground truth, else -1.0.

    Returns score, acc (0.0 or 1.0) and pred, the normalised answer, empty if there is no such line.
    """
    lines = ANSWER_LINE.findall(solution_str[-SEARCHED_CHARACTERS:])
    pred = normalize_answer(lines[-1]) if lines else ""
    is_right = bool(lines) and pred == normalize_answer(str(ground_truth))
    return {"score": 1.0 if is_right else -1.0, "acc": float(is_right), "pred": pred}
