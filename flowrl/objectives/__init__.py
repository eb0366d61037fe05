"""The objectives by name: pure functions of tensors, each returning an ObjectiveOutput."""

from collections.abc import Callable

from flowrl.objectives.flow_balance import flow_balance_loss
from flowrl.objectives.grpo import grpo_loss
from flowrl.objectives.output import ObjectiveOutput
from flowrl.objectives.ppo import ppo_policy_loss
from flowrl.objectives.reinforce_pp import reinforce_pp_loss

__all__ = ["OBJECTIVES", "ObjectiveOutput"]

OBJECTIVES: dict[str, Callable[..., ObjectiveOutput]] = {
    "flow_balance": flow_balance_loss,
    "grpo": grpo_loss,
    "ppo": ppo_policy_loss,
    "reinforce_pp": reinforce_pp_loss,
}
