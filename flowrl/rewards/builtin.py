"""The names of the built-in rewards. Imports none of the packages that they need."""

from collections.abc import Callable
from typing import Any

from flowrl.rewards import auto, code, gym, math_verify

REWARDS: dict[str, Callable[..., Any]] = {**auto.BY_NAME, "auto": auto.compute_score}

# Called once in a new worker, before it takes requests, whose time is limited.
WARM_UPS: dict[str, Callable[[], None]] = {
    "auto": auto.warm_up,
    "code": code.warm_up,
    "gym": gym.warm_up,
    "math_verify": math_verify.warm_up,
}
