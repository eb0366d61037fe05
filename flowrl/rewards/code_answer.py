"""Where in a response the program stands, and whether what it printed or returned is right."""

import math
import re
from decimal import Decimal
from itertools import zip_longest
from typing import Any

LANGUAGES = {"", "python", "python3", "py", "py3"}
FENCE = "```"
# With what stands before it: the markers of a list, whose text is indented as far.
OPENING = re.compile(r"((?:[ \t]*(?:[-*+]|[0-9]{1,9}[.)])(?=[ \t]))*[ \t]*)```([^`]*)")

# Of a number with a decimal point, absolute below 1 and relative above, as Codeforces' usual
# checker has it.
TOLERANCE = 1e-6
NUMBER = re.compile(r"[-+]?(?:[0-9]+(\.[0-9]*)?|(\.[0-9]+))(e[-+]?[0-9]{1,4})?", re.IGNORECASE)
LEADING_ZERO = re.compile(r"[-+]?0[0-9]")
MAX_NUMBER_CHARACTERS = 400
TOKEN = re.compile(r"\S+")


def extract_program(solution_str: str) -> str | None:
    """The last complete fenced block that is marked as Python or not marked; None without one.

    A block that is marked as Python goes before a later one without a mark, which may be an example
    of output. The mark is the first word after the fence. Lines lose as much space at their start
    as the fence has, as Markdown has it. What stands before the last `</think>` is not searched. A
    block that is not closed is a response that was cut off.
    """
    text = solution_str.rpartition("</think>")[2]
    blocks: dict[bool, str] = {}
    language, width, lines = None, 0, []
    for ended_line in text.split("\n"):  # splitlines() would also cut inside of strings
        line = ended_line.removesuffix("\r")
        if language is None:
            if opening := OPENING.fullmatch(line):
                language = "".join(opening[2].split()[:1]).lower()
                width, lines = len(opening[1]), []
        elif line.strip() == FENCE:
            if language in LANGUAGES:
                blocks[language != ""] = "\n".join(lines) + "\n"
            language = None
        else:
            indentation = len(line) - len(line.lstrip(" \t"))
            lines.append(line[min(width, indentation) :])
    return blocks.get(True, blocks.get(False))


def same_output(printed: str, expected: str) -> bool:
    """Whether two texts have the same tokens, whatever space and lines lie between them.

    Tokens are the same if they are equal as text, or as numbers: exactly if the expected one is an
    integer, within TOLERANCE if it has a decimal point or an exponent. With a leading zero it is a
    row of digits and no number. Case matters, order matters.
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
    if match is None or NUMBER.fullmatch(token) is None or LEADING_ZERO.match(wanted):
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
