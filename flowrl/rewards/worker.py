"""The process in which reward functions run: one request in, one reply out, until end of file.

Started by `pool.py` as a script, since `-m` would need flowrl on the path before the parent's path
is known. A message is an 8-byte length and a body. Requests are pickled, for the parent is
trusted. Replies are JSON: this process has handled model text, so the parent unpickles nothing of
it.
"""

import ctypes
import json
import math
import os
import pickle
import random
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

HEADER = struct.Struct(">Q")
MESSAGE_CHARACTERS = 1000
PR_SET_PDEATHSIG = 1


# What a reward function may raise while its process goes on. Any other error, one that a package
# defines, ends the process, after its message has been sent.
ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError),
    *(LookupError, NameError, OSError, ReferenceError, RuntimeError, StopIteration, SyntaxError),
    *(SystemExit, TypeError, ValueError, Warning),
)


def main() -> None:
    requests, replies = _take_pipes()
    hello = pickle.loads(_read(requests))
    _die_with_parent(hello["parent_pid"])
    _limit_memory(hello["memory_limit_bytes"])
    sys.path[:] = hello["sys_path"]
    _send_uncaught(replies, _refuse)
    try:
        function = _load(hello["function"])
    except SystemExit as error:  # the one error of the user's file that no hook sees
        _write(replies, _refuse(error))
        return
    _send_uncaught(replies, lambda error: _fail("exception", error, is_last=True))
    _write(replies, {"ready": True, "message": ""})
    own_pid = os.getpid()
    while body := _read(requests):
        reply = _answer(function, body)
        if os.getpid() != own_pid:
            os._exit(0)  # a child that the function forked and that returned from it
        _write(replies, reply)


def _send_uncaught(
    replies: BinaryIO, to_message: Callable[[BaseException], dict[str, Any]]
) -> None:
    """Makes an error that ends this process its last message."""
    own_pid = os.getpid()

    def hook(_kind: type[BaseException], error: BaseException, _trace: object) -> None:
        if os.getpid() == own_pid:  # not in a child that the function forked
            _write(replies, to_message(error))

    sys.excepthook = hook


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Moves the two pipes away from descriptors 0 and 1, which belong to the user's function.

    What it prints goes to standard error and what it reads is empty; no message is spoilt.
    """
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _die_with_parent(parent_pid: int) -> None:
    """Asks Linux for a SIGKILL when the thread that started this process ends.

    End of file would be noticed only between requests, which a hanging one never reaches.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the call
        os._exit(1)


def _limit_memory(limit_bytes: int) -> None:
    """Caps written memory, so that 9**9**9 ends this process and not the machine; 0: no cap.

    RLIMIT_DATA, not RLIMIT_AS: address space that is reserved but never written (CUDA, the arenas
    of malloc on a machine of many cores) does not count.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit_bytes:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _load(name: str) -> Callable[..., Any]:
    # Only now is the path the parent's.
    from flowrl.rewards.builtin import WARM_UPS
    from flowrl.rewards.loading import load_reward

    function = load_reward(name)
    if name in WARM_UPS:
        WARM_UPS[name]()
    return function


def _answer(function: Callable[..., Any], body: bytes) -> dict[str, Any]:
    """Runs one request; an error of the function is this request's failure, and is reported."""
    try:
        request = pickle.loads(body)
        # A function that draws must not depend on which worker it runs in.
        random.seed(request["solution_str"].encode("utf-8", "surrogatepass"))
        returned = function(**request)
    except MemoryError as error:
        # What else failed to allocate is unknown: a fresh process is safer.
        return _fail("crash", error, is_last=True)
    except ERRORS as error:
        return _fail("exception", error, is_last=False)
    reply = {"failure": None, "message": "", "is_last": False}
    try:
        score, extra = _read_score(returned)
        encoded = json.loads(json.dumps(extra, default=_plain))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        message = str(error)[:MESSAGE_CHARACTERS]
        return reply | {"score": None, "extra": {}, "failure": "invalid", "message": message}
    return reply | {"score": score, "extra": encoded}


def _fail(failure: str, error: BaseException, is_last: bool) -> dict[str, Any]:
    """The reply that gives an error's type, text and place; is_last: replace this process."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    message = f"{type(error).__name__}: {error}"[:MESSAGE_CHARACTERS] + place
    reply = {"score": None, "extra": {}, "failure": failure}
    return reply | {"message": message, "is_last": is_last}


def _refuse(error: BaseException) -> dict[str, Any]:
    """The reply of a process that could not load the reward function.

    A ValueError is meant for the user as it is; others need their traceback.
    """
    text = str(error)
    if not isinstance(error, ValueError):
        text = "".join(traceback.format_exception(error))[-4 * MESSAGE_CHARACTERS :]
    return {"ready": False, "message": text}


def _read_score(returned: Any) -> tuple[float, dict[str, Any]]:
    """The finite score and the extras in what a reward function returned.

    Anything with __float__ is a number (bool, numpy and torch scalars, Fraction, Decimal); a string
    is not, even "1.0".
    """
    extra: dict[str, Any] = {}
    value = returned
    if isinstance(returned, dict):
        if "score" not in returned:
            raise ValueError(
                f"the reward function returned a dict without 'score': {sorted(map(str, returned))}"
            )
        extra = {str(key): item for key, item in returned.items() if key != "score"}
        value = returned["score"]
    if not hasattr(value, "__float__"):
        raise ValueError(
            f"the reward function returned {_short(value)} of type {type(value).__name__}; "
            "return a number or a dict with 'score'"
        )
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"the reward function returned {score}; return a finite number")
    return score, extra


def _plain(value: Any) -> Any:
    """JSON for extras that are no JSON: numbers of numpy and torch, else their text."""
    if hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0:
        return float(value)
    return _short(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _read(stream: BinaryIO) -> bytes:
    """The next message, or b"" at the end of the file."""
    header = stream.read(HEADER.size)
    return stream.read(HEADER.unpack(header)[0]) if len(header) == HEADER.size else b""


def _write(stream: BinaryIO, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    stream.write(HEADER.pack(len(body)) + body)
    stream.flush()


if __name__ == "__main__":
    main()
