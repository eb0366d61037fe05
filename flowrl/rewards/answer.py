"""Where in a response the answer stands."""


def first_part(solution_str: str, extra_info: dict | None) -> str:
    """The stripped response up to what a base model, which does not end itself, adds to it.

    Cut before the first `extra_info["stop"]` (a string that ends the answers of a few-shot prompt)
    and, if `extra_info["first_line"]` is true, after the first non-empty line.
    """
    info = extra_info or {}
    text = solution_str.strip()
    if info.get("stop"):
        text = text.partition(info["stop"])[0]
    if info.get("first_line"):
        text = text.partition("\n")[0]
    return text.strip()


def answer_text(solution_str: str, extra_info: dict | None) -> str:
    """The stripped part of a response that is taken for its answer.

    The content of the last complete `<answer>...</answer>` if there is one, else `first_part`.
    """
    end = solution_str.rfind("</answer>")
    start = solution_str.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return solution_str[start + len("<answer>") : end].strip()
    return first_part(solution_str, extra_info)
