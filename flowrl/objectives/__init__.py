"""The objectives by name: pure functions of tensors, each returning an ObjectiveOutput."""

from collections.abc import Callable

from flowrl.objectives.flow_balance import flow_balance_loss
from flowrl.objectives.output import ObjectiveOutput

__all__ = ["OBJECTIVES", "ObjectiveOutput"]

OBJECTIVES: dict[str, Callable[..., ObjectiveOutput]] = {
    "flow_balance": flow_balance_loss,
}
