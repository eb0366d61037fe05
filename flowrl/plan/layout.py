"""How a plan divides the GPUs."""

from dataclasses import dataclass

from flowrl.settings import Config


@dataclass(frozen=True)
class PlannedLayout:
    """Ranks along each axis, and the switches that decide what a rank keeps."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    virtual_pipeline: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    expert: int = 1  # ranks of a stage that share the experts

    @property
    def num_gpus(self) -> int:
        return self.stage_gpus * self.pipeline

    @property
    def stage_gpus(self) -> int:
        """GPUs of one pipeline stage; experts are spread over all of them."""
        return self.tensor * self.context * self.data

    def __str__(self) -> str:
        text = f"tp {self.tensor} pp {self.pipeline} cp {self.context} dp {self.data}"
        if self.expert > 1:
            text += f" ep {self.expert}"
        if self.virtual_pipeline > 1:
            text += f" vpp {self.virtual_pipeline}"
        return text + " sp" * self.sequence_parallel + " recompute" * self.recompute


def configured_layout(config: Config, num_gpus: int) -> PlannedLayout:
    """The layout that `config` asks for; data parallelism takes what remains of the GPUs."""
    parallel = config.parallel
    return PlannedLayout(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        data=max(1, num_gpus // parallel.model_size),
        virtual_pipeline=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute=config.model.enable_gradient_checkpointing,
        expert=parallel.expert_model_parallel_size,
    )
