r"""Functions that run in reward workers, where math-verify may take any time: grades and classes.

Both are reward functions in form, so that flowrl.rewards.RewardPool limits and isolates them.
"""

from typing import Any

from flowrl.rewards import math_verify


def _package() -> Any:
    import math_verify as package  # its stubs know no time-out of None

    return package


def _parse(text: str, *, has_prose: bool) -> list[Any]:
    """math-verify's extraction, as flowrl.rewards.math_verify reads responses and ground truths."""
    package = _package()
    latex, plain = package.LatexExtractionConfig(), package.ExprExtractionConfig()
    configs = [plain, latex] if has_prose else [latex]
    return package.parse(text, extraction_config=configs, parsing_timeout=None)


math_verify.warm_up()  # at import, so in the worker, before a request's time starts


def grade(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> dict[str, Any]:
    """The score of flowrl.rewards.math_verify and pred, the text that it took for the answer."""
    score = math_verify.compute_score(data_source, solution_str, ground_truth, extra_info)
    found = _parse(solution_str, has_prose=True)
    texts = [item for item in found if isinstance(item, str)]
    return {"score": score, "pred": texts[0] if texts else ""}


def classify(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> dict[str, Any]:
    r"""Groups the answers extra_info["answers"] (texts): "classes" has a number for each.

    Two answers share a class if math-verify finds one equal to the other in either direction (its
    equality is not symmetric), compared with the class's first member, or if their texts are equal.
    """
    package = _package()
    answers = (extra_info or {})["answers"]
    first_texts: list[str] = []
    first_parsed: list[list[Any]] = []
    classes = []
    for text in answers:
        parsed = _parse(f"\\boxed{{{text}}}", has_prose=False)
        for number, (other_text, other) in enumerate(zip(first_texts, first_parsed, strict=True)):
            is_same = text == other_text or (
                package.verify(other, parsed, timeout_seconds=None)
                or package.verify(parsed, other, timeout_seconds=None)
            )
            if is_same:
                classes.append(number)
                break
        else:
            classes.append(len(first_texts))
            first_texts.append(text)
            first_parsed.append(parsed)
    return {"score": 0.0, "classes": classes}
