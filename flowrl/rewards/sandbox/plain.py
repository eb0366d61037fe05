"""Plain values as JSON and back, with the types that JSON lacks.

What a program returned is text of the program's own making, so decoding builds built-in types only
and raises ValueError for everything else.
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

MAX_ITEMS = 1_000_000  # taken from an iterator, which may be endless
MAX_COLLISIONS = 100  # 1 million items are then decoded in seconds
JSON_INTEGER = 1 << 53

_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}


def encode(value: Any) -> str:
    """JSON of None, bool, int, float, complex, str, bytes, range, containers and iterators of them.

    NumPy's numbers and arrays become Python's. Raises TypeError for any other type.
    """
    return json.dumps(_tag(value))


def decode(text: str) -> Any:
    """The value of `encode`'s text. Raises ValueError for any other text."""
    try:
        return _untag(json.loads(text))
    except (TypeError, KeyError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"not an encoded value: {type(error).__name__}: {error}") from None


def _tag(value: Any) -> Any:
    if type(value).__module__ == "numpy":
        value = value.tolist()
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        is_small = abs(value) < JSON_INTEGER
        return int(value) if is_small else {"int": hex(value)}  # longer than str() may be
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, dict):
        return {"dict": [[_tag(key), _tag(item)] for key, item in value.items()]}
    for name in ("list", "tuple", "set", "frozenset"):
        if isinstance(value, _SEQUENCES[name]):  # pyright: ignore[reportArgumentType]
            return {name: [_tag(item) for item in value]}
    if isinstance(value, Iterator):
        return {"iterator": [_tag(item) for item in islice(value, MAX_ITEMS)]}
    raise TypeError(f"a {type(value).__name__} cannot leave the sandbox; return plain values")


def _untag(value: Any) -> Any:
    if not isinstance(value, (dict, list)):
        return value
    if isinstance(value, list) or len(value) != 1:
        raise ValueError("not an encoded value: a bare list or an object of several keys")
    ((name, content),) = value.items()
    if name == "int":
        return int(content, 16)
    if name == "complex":
        return complex(*content)
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "range":
        return range(*content)
    if name == "dict":
        pairs = [(_untag(key), _untag(item)) for key, item in content]
        _refuse_collisions([key for key, _ in pairs])
        return dict(pairs)
    items = [_untag(item) for item in content]
    if name in ("set", "frozenset"):
        _refuse_collisions(items)
    return _SEQUENCES[name](items)


def _refuse_collisions(keys: list[Any]) -> None:
    """Keys of one hash, of which integers are easily made, cost time by the square of their number.

    It is the time of the process that trusts nobody: a program could not use up its own.
    """
    most = max(Counter(map(hash, keys)).values(), default=0)
    if most > MAX_COLLISIONS:
        raise ValueError(f"not an encoded value: {most} keys of one hash")
