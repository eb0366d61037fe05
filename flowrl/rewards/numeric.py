"""The last number of the answer, compared exactly."""

import re
from collections import deque
from fractions import Fraction
from math import gcd
from typing import Any

from flowrl.rewards.answer import answer_text

# A longer token is no answer, and int() of an unbounded one takes quadratic time.
MAX_CHARACTERS = 200

# ASCII digits only: \d would also take other scripts' digits. A minus is a sign only where no
# operand stands before it, so the last number of "12-5" is 5. Groups of three may have commas.
NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?<![\w)\]}])[-+])?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?P<decimals>\.[0-9]+)?"
    r"(?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9]))?"
    r"(?:/(?P<denominator>[0-9]+))?",
    re.ASCII,
)


def last_number(text: str) -> Fraction | None:
    """The value of the last number in a text, exactly, or None.

    Reads 12, -12, +12, 1,234, 0.5, .5, 1e3 and reduced fractions such as 3/4. "6/3" is None: it is
    a division left undone, and to accept it would pay for repeating the question.
    """
    last = deque(NUMBER.finditer(text.replace("\u2212", "-")), maxlen=1)
    if not last or len(last[0].group()) > MAX_CHARACTERS:
        return None
    match = last[0]
    value = Fraction(
        (match["sign"] or "")
        + (match["digits"].replace(",", "") or "0")
        + (match["decimals"] or "")
        + (match["exponent"] or "")
    )
    if match["denominator"] is None:
        return value
    denominator = int(match["denominator"])
    reduced = denominator > 1 and value.denominator == 1 and gcd(int(value), denominator) == 1
    return value / denominator if reduced else None


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> float:
    """1.0 if the last number of the answer (see `answer_text`) equals the ground truth, else 0.0.

    Both sides are exact fractions: "12.0" equals 12, "1,234" equals 1234, "0.5" equals 1/2, and
    0.3333 does not equal 1/3. Only one number is looked at, so hedging ("12 or 13") answers 13.

    Raises ValueError if the ground truth is not one number.
    """
    text = str(ground_truth).strip()
    truth = NUMBER.fullmatch(text.replace("\u2212", "-")) and last_number(text)
    if truth is None:
        raise ValueError(
            f"ground_truth {ground_truth!r} is not a number; use the reward 'exact' or "
            "'math_verify', or correct the row"
        )
    return float(last_number(answer_text(solution_str, extra_info)) == truth)
