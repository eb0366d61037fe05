"""Arithmetic expressions: countdown (given numbers, given target) and sum-to-N.

Model text is read by the parser below and by nothing else. eval, and sympy's parse_expr, which is
eval underneath, would run whatever the model writes.
"""

import json
import re
from collections import Counter
from fractions import Fraction
from typing import Any

from flowrl.rewards.answer import answer_text

# With these three bounds the largest intermediate value has about 9000 digits, a few microseconds.
MAX_CHARACTERS = 1000
MAX_DEPTH = 32
MAX_DIGITS = 18

TOKEN = re.compile(r"[ \t]*([0-9]+|[-+*/()])[ \t]*", re.ASCII)


def evaluate(text: str) -> tuple[Fraction, list[int], set[str]]:
    """Value, integers and operators of an arithmetic expression.

    Grammar: integers without leading zeros, + - * / with the usual precedence, parentheses, and one
    minus before an integer or a parenthesis. There is no other unary operator, no power and no
    decimal point. At most 1000 characters, 32 nested parentheses and 18 digits an integer.

    Returns the exact value, the integers in the order of appearance and the operators used.
    Raises ValueError if the text is no such expression or divides by zero.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"expression of {len(text)} characters; at most {MAX_CHARACTERS} are read")
    tokens, position = [], 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"unexpected {text[position]!r} at character {position}")
        tokens.append(match[1])
        position = match.end()
    tokens.reverse()  # so that pop() and [-1] give the next token
    integers: list[int] = []
    operators: set[str] = set()
    value = _sum(tokens, integers, operators, 0)
    if tokens:
        raise ValueError(f"unexpected {tokens[-1]!r} after the expression")
    return value, integers, operators


def _sum(tokens: list[str], integers: list[int], operators: set[str], depth: int) -> Fraction:
    value = _product(tokens, integers, operators, depth)
    while tokens and tokens[-1] in "+-":
        operator = tokens.pop()
        operators.add(operator)
        term = _product(tokens, integers, operators, depth)
        value = value + term if operator == "+" else value - term
    return value


def _product(tokens: list[str], integers: list[int], operators: set[str], depth: int) -> Fraction:
    value = _operand(tokens, integers, operators, depth)
    while tokens and tokens[-1] in "*/":
        operator = tokens.pop()
        operators.add(operator)
        factor = _operand(tokens, integers, operators, depth)
        if operator == "/" and factor == 0:
            raise ValueError("division by zero")
        value = value * factor if operator == "*" else value / factor
    return value


def _operand(tokens: list[str], integers: list[int], operators: set[str], depth: int) -> Fraction:
    if not tokens:
        raise ValueError("the expression ends where an operand is due")
    token = tokens.pop()
    if token == "(":
        if depth == MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} nested parentheses")
        value = _sum(tokens, integers, operators, depth + 1)
        if not tokens or tokens.pop() != ")":
            raise ValueError("unbalanced parenthesis")
        return value
    if token == "-" and tokens and tokens[-1] != "-":
        operators.add(token)
        return -_operand(tokens, integers, operators, depth)
    if not token.isdecimal() or len(token) > MAX_DIGITS or (len(token) > 1 and token[0] == "0"):
        raise ValueError(f"{token[:40]!r} is not an integer of at most {MAX_DIGITS} digits")
    integers.append(int(token))
    return Fraction(integers[-1])


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> float:
    """1.0 if the answer is an expression with the target's value made of the allowed numbers.

    ground_truth: a dict (or its JSON) or, for sum-to-N, the integer N alone, with the keys
        target: the value;
        numbers: the integers, 0 or more, to be used, each as often as it is listed (countdown);
        use: "all" of the numbers (default) or "some", that is at most these;
        terms: without numbers, how many integers, all positive, the expression has (default 2);
        operators: which may occur; default "+-*/" with numbers, "+" without.
    The answer (see `answer_text`) may end in "= target". Text that is no expression scores 0.0.

    Raises ValueError if the ground truth is malformed.
    """
    truth = _read_ground_truth(ground_truth)
    expression, _, result = answer_text(solution_str, extra_info).partition("=")
    if result and result.strip() != str(truth["target"]):
        return 0.0
    try:
        value, integers, operators = evaluate(expression)
    except ValueError:
        return 0.0
    if value != truth["target"] or not operators <= truth["operators"]:
        return 0.0
    if truth["numbers"] is None:
        return float(len(integers) == truth["terms"] and all(n > 0 for n in integers))
    used, given = Counter(integers), Counter(truth["numbers"])
    return float(used == given if truth["use"] == "all" else used <= given)


def _read_ground_truth(ground_truth: Any) -> dict:
    """The ground truth with every default filled in."""
    truth = ground_truth
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except ValueError as error:
            raise ValueError(
                f"ground_truth {ground_truth!r:.200} is neither a number nor JSON ({error}); give "
                "{'target': number, 'numbers': [integers]} or the target alone"
            ) from error
    truth = truth if isinstance(truth, dict) else {"target": truth}
    numbers = truth.get("numbers")
    try:
        target = Fraction(str(truth["target"]))
        numbers = None if numbers is None else [Fraction(str(n)) for n in numbers]
        terms = int(truth.get("terms") or 2)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"ground_truth {ground_truth!r}: expected {{'target': number, 'numbers': [integers]}} "
            "or, for a sum of two terms, the target alone"
        ) from error
    if numbers is not None and any(n < 0 for n in numbers):
        # -2 and 2 would both be written with the integer 2.
        raise ValueError(
            f"ground_truth['numbers'] is {truth['numbers']}; give numbers of 0 or more"
        )
    use = truth.get("use") or "all"
    if use not in ("all", "some"):
        raise ValueError(f"ground_truth['use'] is {use!r}; choose 'all' or 'some'")
    operators = truth.get("operators") or ("+" if numbers is None else "+-*/")
    return {
        "target": target,
        "numbers": numbers,
        "terms": terms,
        "use": use,
        "operators": set(operators),
    }
