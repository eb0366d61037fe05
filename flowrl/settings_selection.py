"""Settings of which samples a step trains on, and with what weight (docs/objectives.md)."""

from typing import Literal

from pydantic import Field, model_validator

from flowrl.settings_base import NonNegativeFloat, PositiveFloat, PositiveInt, Section

Level = Literal["token", "sequence", "geometric"]


class RolloutCorrectionConfig(Section):
    """Correction by pi_old / pi_rollout, the trainer's probability over the rollout engine's."""

    rollout_is: Level | None = Field(
        None,
        description="weights: the ratio of each token, its product or its geometric mean over the "
        "sequence; flow_balance has no `token`",
    )
    rollout_is_threshold: PositiveFloat = Field(2.0, description="upper bound of the weights")
    rollout_rs: Level | None = Field(
        None, description="leave tokens, or sequences, out of the loss whose ratio is out of range"
    )
    rollout_rs_threshold: PositiveFloat | None = Field(
        None, description="upper end of the range; unset: `rollout_is_threshold`"
    )
    rollout_rs_threshold_lower: NonNegativeFloat | None = Field(
        None, description="lower end of the range; unset: 1 / the upper end"
    )

    @property
    def is_on(self) -> bool:
        return self.rollout_is is not None or self.rollout_rs is not None

    @property
    def kept_range(self) -> tuple[float, float]:
        """The lowest and the highest ratio that `rollout_rs` keeps."""
        high = self.rollout_rs_threshold or self.rollout_is_threshold
        low = self.rollout_rs_threshold_lower
        return (1 / high if low is None else low), high

    @model_validator(mode="after")
    def _consistent(self) -> "RolloutCorrectionConfig":
        low, high = self.kept_range
        if low > high:
            raise ValueError(
                f"ratios from {low:g} to {high:g} are none: raise rollout_rs_threshold, or lower "
                "rollout_rs_threshold_lower"
            )
        return self


class FilterGroupsConfig(Section):
    """Dynamic sampling (DAPO): only groups whose scores differ are trained on."""

    enable: bool = Field(
        False, description="draw prompts until `data.train_batch_size` groups are of use"
    )
    max_num_gen_batches: PositiveInt = Field(
        10, description="batches of `data.train_batch_size` prompts drawn before a step fails"
    )


class OverlongBufferConfig(Section):
    """The soft punishment of long responses (DAPO), added to scores before they are normalised."""

    enable: bool = Field(False, description="punish them")
    len: PositiveInt = Field(
        4096, description="tokens before `data.max_response_length` over which it grows"
    )
    penalty_factor: PositiveFloat = Field(1.0, description="the largest penalty")
