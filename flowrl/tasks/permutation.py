"""Permutations that are the same on every machine and with every version of numpy."""

import hashlib

import numpy as np


def fixed_permutation(size: int, label: str) -> np.ndarray:
    """Permute 0 .. size-1 as `label` says; int64 [size].

    The order sorts raw Philox words. numpy promises the streams of its bit generators but not
    those of `Generator.permutation`, and torch promises neither.
    """
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(size)
    return np.argsort(words, kind="stable")
