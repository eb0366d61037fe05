"""Where in a response the program stands, and whether what it printed or returned is right."""

import math
import re
from decimal import Decimal
from itertools import zip_longest
from typing import Any

LANGUAGES = {"", "python", "python3", "py", "py3", "python 3"}
FENCE = "```"

# Of a number with a decimal point, absolute below 1 and relative above, as Codeforces' usual
# checker has it.
TOLERANCE = 1e-6
NUMBER = re.compile(r"[-+]?(?:[0-9]+(\.[0-9]*)?|(\.[0-9]+))(e[-+]?[0-9]{1,4})?", re.IGNORECASE)
MAX_NUMBER_CHARACTERS = 400
TOKEN = re.compile(r"\S+")


def extract_program(solution_str: str) -> str | None:
    """The last complete fenced block that is marked as Python or not marked; None without one.

    A block that is marked as Python goes before a later one without a mark, which may be an example
    of output. What stands before the last `</think>` is not searched. A block that is not closed is
    a response that was cut off.
    """
    text = solution_str.rpartition("</think>")[2]
    blocks: dict[bool, str] = {}
    language, lines = None, []
    for line in text.splitlines():
        mark = line.strip()
        if language is None:
            if mark.startswith(FENCE):
                language, lines = mark.removeprefix(FENCE).strip().lower(), []
        elif mark == FENCE:
            if language in LANGUAGES:
                blocks[language != ""] = "\n".join(lines) + "\n"
            language = None
        else:
            lines.append(line)
    return blocks.get(True, blocks.get(False))


def same_output(printed: str, expected: str) -> bool:
    """Whether two texts have the same tokens, whatever space and lines lie between them.

    Tokens are the same if they are equal as text, or as numbers: exactly if the expected one is an
    integer, within TOLERANCE if it has a decimal point or an exponent. Case matters, order matters.
    """
    # One after the other: what a program prints may be all that it is allowed to.
    pairs = zip_longest(TOKEN.finditer(printed), TOKEN.finditer(expected))
    return all(
        token is not None and wanted is not None and _same_token(token[0], wanted[0])
        for token, wanted in pairs
    )


def _same_token(token: str, wanted: str) -> bool:
    if token == wanted:
        return True
    if max(len(token), len(wanted)) > MAX_NUMBER_CHARACTERS:
        return False
    match = NUMBER.fullmatch(wanted)
    if match is None or NUMBER.fullmatch(token) is None:
        return False
    if any(match.groups()):
        return _is_close(float(token), float(wanted))
    return Decimal(token) == Decimal(wanted)


def same_value(returned: Any, expected: Any) -> bool:
    """Whether a returned value is the expected one, which JSON gave.

    Equality of Python, except that a tuple is a list, a key of a dict is its text as in JSON, and a
    float may differ by TOLERANCE.
    """
    if isinstance(expected, list):
        return (
            isinstance(returned, (list, tuple))
            and len(returned) == len(expected)
            and all(map(same_value, returned, expected))
        )
    if isinstance(expected, dict):
        if not isinstance(returned, dict):
            return False
        by_text = {str(key): value for key, value in returned.items()}
        by_expected_text = {str(key): value for key, value in expected.items()}
        return by_text.keys() == by_expected_text.keys() and all(
            same_value(value, by_expected_text[key]) for key, value in by_text.items()
        )
    if isinstance(expected, float) and isinstance(returned, (int, float)):
        try:
            return returned == expected or _is_close(float(returned), expected)
        except OverflowError:  # an integer beyond the floats
            return False
    return returned == expected


def _is_close(number: float, wanted: float) -> bool:
    difference = abs(number - wanted)
    return math.isfinite(difference) and difference <= TOLERANCE * max(1.0, abs(wanted))
