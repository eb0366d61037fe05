r"""Mathematical equality by the math-verify package: the reward of evaluation runs.

math-verify gives text of digits and operators, and nothing else, to sympy's evaluator; LaTeX goes
through a grammar. So model text runs no code, but `9**9**9` may take any time or memory: call this
only in a worker that is killed when late. Its own time-outs use signal.alarm, which fails outside
the main thread and turns answers into zeros; they are switched off.
"""

import functools
import logging
from typing import Any


@functools.cache
def _package() -> Any:
    import math_verify

    # It warns, once a process, that its time-outs are off, which is what is meant.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def warm_up() -> None:
    """Imports the package (about a second), so that no request pays for it."""
    _package()


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> float:
    r"""1.0 if the response's final answer equals the ground truth, else 0.0.

    The ground truth is wrapped in \boxed{} unless it has one; the response is searched, as a whole,
    for LaTeX and for plain expressions.

    Raises ValueError if the ground truth cannot be parsed (every answer would score 0).
    """
    package = _package()
    gold_text = str(ground_truth)
    if "\\boxed" not in gold_text:
        gold_text = f"\\boxed{{{gold_text}}}"
    latex, plain = package.LatexExtractionConfig(), package.ExprExtractionConfig()
    gold = package.parse(gold_text, extraction_config=[latex], parsing_timeout=None)
    if not gold:
        raise ValueError(
            f"ground_truth {ground_truth!r} cannot be parsed as mathematics; use the reward "
            "'exact' or correct the row"
        )
    found = package.parse(solution_str, extraction_config=[plain, latex], parsing_timeout=None)
    return float(package.verify(gold, found, timeout_seconds=None))
