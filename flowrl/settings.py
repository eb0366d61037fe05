"""Every setting of a run, with its default, its limits and its meaning.

Names follow veRL where veRL has one. `flowrl.config` reads them from YAML and the command line.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowrl.settings_base import (
    Moment,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from flowrl.settings_idle import refuse_idle_engine_settings, refuse_idle_settings
from flowrl.settings_selection import (
    FilterGroupsConfig,
    OverlongBufferConfig,
    RolloutCorrectionConfig,
)


class DataConfig(Section):
    """Where prompts come from."""

    task: str = Field("files", description="`files`, a built-in task, or `reasoning_gym/<name>`")
    task_options: dict[str, Any] = Field({}, description="options of the task (docs/tasks.md)")
    train_files: list[str] = Field([], description="parquet or jsonl files in veRL's schema")
    val_files: list[str] = Field([], description="held-out files in the same schema")
    train_batch_size: PositiveInt = Field(64, description="prompts per training step")
    train_max_samples: PositiveInt | None = Field(None, description="cap on training prompts")
    val_max_samples: PositiveInt | None = Field(256, description="cap on held-out prompts")
    max_prompt_length: PositiveInt = Field(1024, description="prompt limit in tokens")
    max_response_length: PositiveInt = Field(1024, description="response limit in tokens")
    filter_overlong_prompts: bool = Field(True, description="drop prompts over the limit")
    truncation: Literal["error", "left"] = Field(
        "error", description="what happens to an overlong prompt that is not filtered"
    )
    chat_template: bool = Field(True, description="apply the tokenizer's chat template")
    shuffle: bool = Field(True, description="draw training prompts in a seeded random order")


class ModelConfig(Section):
    """The pretrained policy."""

    path: str = Field(description="HF folder or name, `builtin:smollm2-135m-instruct`, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="compute dtype; bfloat16 keeps float32 master weights, and is what auto means "
        "where the device has instructions for it",
    )
    trust_remote_code: bool = Field(False, description="let the model folder run its own code")
    enable_gradient_checkpointing: bool = Field(False, description="recompute activations")


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="who generates: the trained model itself, or vLLM"
    )
    n: PositiveInt = Field(8, description="responses per prompt, the group size")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus mass; 1: off")
    top_k: int = Field(-1, ge=-1, description="keep the k likeliest tokens; -1: off")
    stop: list[str] = Field([], description="strings that end a response (kept in it)")
    max_staleness: NonNegativeInt = Field(
        0, description="training steps that a response may be sampled ahead; 0: none"
    )
    max_num_seqs: PositiveInt = Field(256, description="sequences decoded together")
    verify_weights: bool = Field(
        True, description="vllm: after each publication, hold its log-probs against the policy's"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="vllm: share of the GPU for its weights and KV cache"
    )
    tensor_model_parallel_size: PositiveInt = Field(
        1, description="vllm: GPUs that share its model; more than 1 only for servers"
    )
    enforce_eager: bool = Field(False, description="vllm: no CUDA graphs; on a CPU always so")
    enable_prefix_caching: bool = Field(True, description="vllm: compute a shared prompt once")
    max_model_len: PositiveInt | None = Field(
        None, description="vllm: tokens of a sequence; unset: prompt limit + response limit"
    )
    free_cache_engine: bool = Field(
        False, description="vllm: give its GPU memory back while it does not generate"
    )
    servers: list[str] = Field(
        [], description="URLs of vLLM servers; empty: vLLM runs in the trainer's process"
    )
    request_timeout_s: PositiveFloat = Field(600.0, description="servers: limit per request")
    max_retries: NonNegativeInt = Field(2, description="servers: further tries of a request")
    weight_transfer: Literal["disk", "nccl"] = Field(
        "disk", description="servers: receive weights by a folder, or over the network"
    )
    weight_dir: str | None = Field(
        None, description="servers: folder that they and the trainer see; unset: a temporary one"
    )


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: NonNegativeFloat = Field(1e-6, description="learning rate after warm-up")
    betas: tuple[Moment, Moment] = Field((0.9, 0.999), description="AdamW moments")
    weight_decay: NonNegativeFloat = Field(0.1, description="not applied to norms and biases")
    lr_warmup_steps: NonNegativeInt = Field(10, description="linear warm-up, in training steps")
    clip_grad: PositiveFloat = Field(1.0, description="global gradient norm limit")


class CheckpointConfig(Section):
    """How checkpoints are written."""

    async_save: bool = Field(
        False, description="write them in the background, from a copy in host memory"
    )
    async_save_timeout_s: PositiveFloat = Field(
        1200.0, description="limit of one such write; below `parallel.timeout_minutes`"
    )


class ActorConfig(Section):
    """How the policy is updated."""

    strategy: Literal["auto", "torch", "megatron"] = Field(
        "auto",
        description="torch: one process; megatron: many; auto: megatron under torchrun or when a "
        "size in `parallel` exceeds 1",
    )
    ppo_mini_batch_size: PositiveInt = Field(64, description="prompts per optimiser step")
    ppo_epochs: PositiveInt = Field(1, description="passes over each batch of rollouts")
    ppo_max_token_len_per_gpu: PositiveInt = Field(
        16384, description="strict cap on the packed tokens of one micro-batch"
    )
    drop_mass: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="softmax mass the head's backward may leave out; 0: exact"
    )
    memory_budget: NonNegativeInt = Field(
        0,
        description="bytes per micro-batch for the head's softmax, which saves its exact backward "
        "one product in four; unused where they do not hold it",
    )
    clip_ratio_low: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="baselines: the ratio's lower bound is 1 - clip_ratio_low"
    )
    clip_ratio_high: NonNegativeFloat = Field(
        0.2, description="baselines: the ratio's upper bound is 1 + clip_ratio_high"
    )
    clip_ratio_c: Annotated[float, Field(gt=1)] | None = Field(
        3.0, description="baselines: dual clip of negative advantages; null: off"
    )
    loss_mode: Literal["vanilla", "gspo"] = Field(
        "vanilla", description="grpo: ratio of each token, or of the sequence as in GSPO"
    )
    loss_agg_mode: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = Field("token-mean", description="baselines: how token losses become one (docs/objectives)")
    loss_scale_factor: PositiveFloat | None = Field(
        None, description="seq-mean-token-sum-norm: its constant; unset: data.max_response_length"
    )
    use_kl_loss: bool = Field(False, description="baselines: add a KL to the reference to the loss")
    kl_loss_coef: NonNegativeFloat = Field(0.001, description="its coefficient (low_var_kl)")
    entropy_coeff: float = Field(
        0.0, allow_inf_nan=False, description="baselines: weight of the entropy bonus"
    )
    optim: OptimConfig = OptimConfig()  # pyright: ignore[reportCallIssue]
    checkpoint: CheckpointConfig = CheckpointConfig()  # pyright: ignore[reportCallIssue]


class ParallelConfig(Section):
    """How Megatron spreads the policy; the ranks that are left over are data parallel."""

    tensor_model_parallel_size: PositiveInt = Field(1, description="ranks that share a layer")
    pipeline_model_parallel_size: PositiveInt = Field(1, description="stages of layers")
    virtual_pipeline_model_parallel_size: PositiveInt = Field(
        1, description="interleaved chunks per stage"
    )
    context_parallel_size: PositiveInt = Field(1, description="ranks that share a sequence")
    expert_model_parallel_size: PositiveInt = Field(
        1, description="ranks that share the experts; tensor, context and data ranks become such"
    )
    sequence_parallel: bool = Field(
        False, description="spread norms and activations over the tensor-parallel ranks as well"
    )
    use_distributed_optimizer: bool = Field(
        True, description="spread the optimiser's state over data-parallel ranks"
    )
    overlap_grad_reduce: bool = Field(True, description="reduce gradients during the backward")
    timeout_minutes: PositiveInt = Field(
        30, description="how long a rank waits for the others before the job stops"
    )

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the policy."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def num_shares(self) -> int:
        """More than 1 when anything at all is spread."""
        return self.model_size * self.expert_model_parallel_size


class RefConfig(Section):
    """The frozen reference policy."""

    offload: bool = Field(False, description="keep the reference on the CPU between uses")


class FlowConfig(Section):
    """The FlowRL objective (arXiv 2509.15207, Eq. 6)."""

    preset: Literal["paper", "original", "recipe", "cispo"] = Field(
        "paper", description="published variant; the keys below override it when set"
    )
    beta: PositiveFloat = Field(15.0, description="reward coefficient; tilt is beta*|y| nats")
    weighting: Literal["clip", "raw", "cap", "one", "cispo"] | None = Field(
        None, description="what becomes of the importance weight S; unset: the preset's"
    )
    clip_low: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="`clip` and `cispo`: lower bound 1 - clip_low; unset: the preset's"
    )
    clip_high: NonNegativeFloat | None = Field(
        None, description="`clip` and `cispo`: upper bound 1 + clip_high; unset: the preset's"
    )
    weight_cap: PositiveFloat | None = Field(
        None, description="`cap`: upper bound of S; unset: the preset's"
    )
    log_z: Literal["network", "vargrad", "none"] = Field(
        "network", description="where log Z(x) comes from"
    )
    z_num_layers: PositiveInt = Field(3, description="linear layers of the partition network")
    z_pooling: Literal["all", "without_last"] | None = Field(
        None, description="prompt tokens whose mean feeds Z; unset: the preset's"
    )
    z_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="dropout inside Z; unset: the preset's"
    )
    z_detach: bool | None = Field(
        None, description="stop Z's gradient at the hidden states; unset: the preset's"
    )
    z_lr: NonNegativeFloat | None = Field(None, description="Z's own learning rate; unset: lr")
    old_logprobs: Literal["policy", "rollout"] = Field(
        "policy",
        description="whose log-probs the weight divides by: the policy's before the update, or the "
        "rollout engine's, which saves their pass and admits top_p and top_k",
    )


class CriticOptimConfig(OptimConfig):
    """AdamW of the critic."""

    lr: NonNegativeFloat = Field(1e-5, description="learning rate after warm-up")


class CriticConfig(Section):
    """PPO's critic: a copy of the policy's model with a value head."""

    cliprange_value: PositiveFloat = Field(0.5, description="how far a value may move per batch")
    optim: CriticOptimConfig = CriticOptimConfig()  # pyright: ignore[reportCallIssue]


class AlgorithmConfig(Section):
    """Which objective is optimised."""

    objective: Literal["flow_balance", "grpo", "ppo", "reinforce_pp", "reinforce_pp_baseline"] = (
        Field("flow_balance", description="the loss and, with it, the advantage (docs/objectives)")
    )
    unbiased_std: bool = Field(True, description="ddof of the group's standard deviation")
    norm_adv_by_std_in_grpo: bool = Field(
        True, description="grpo: divide by the group's standard deviation; false: Dr. GRPO"
    )
    gamma: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="ppo, reinforce_pp: discount per token"
    )
    lam: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="ppo: lambda of GAE")
    use_kl_in_reward: bool = Field(
        False, description="ppo, reinforce_pp: take a KL to the reference off every token's reward"
    )
    kl_coef: NonNegativeFloat = Field(0.001, description="its coefficient")
    mask_truncated: bool = Field(
        False, description="leave responses that the length limit ended out of the loss"
    )
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()  # pyright: ignore[reportCallIssue]
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()  # pyright: ignore[reportCallIssue]


class RewardConfig(Section):
    """Who scores the responses."""

    function: str = Field("auto", description="a built-in name or `path/to/file.py:function`")
    num_workers: PositiveInt = Field(2, description="worker processes")
    timeout_s: PositiveFloat = Field(10.0, description="hard limit per response, seconds")
    failure_score: float = Field(0.0, allow_inf_nan=False, description="score of a failure")
    correct_threshold: float = Field(
        1.0, allow_inf_nan=False, description="scores from here on count as correct"
    )
    overlong_buffer: OverlongBufferConfig = OverlongBufferConfig()  # pyright: ignore[reportCallIssue]


class ValidationConfig(Section):
    """How held-out prompts are judged."""

    n: PositiveInt = Field(4, description="samples per held-out prompt (avg@n)")
    temperature: PositiveFloat | None = Field(None, description="unset: the rollout's")
    greedy: bool = Field(True, description="also decode greedily")


class TrainerConfig(Section):
    """The run itself."""

    total_training_steps: PositiveInt = Field(100, description="batches of rollouts to train on")
    seed: NonNegativeInt = Field(0, description="of sampling, prompt order, Z and its dropout")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the first GPU, else the CPU"
    )
    num_threads: PositiveInt | None = Field(None, description="CPU threads; unset: torch's")
    project_name: str = Field("flowrl", description="project of the wandb logger")
    experiment_name: str = Field("run", description="name of the run and of its directory")
    default_local_dir: str | None = Field(None, description="unset: `runs/<experiment_name>`")
    save_freq: int = Field(-1, ge=-1, description="steps between checkpoints; -1: at the end")
    test_freq: int = Field(-1, ge=-1, description="steps between evaluations; -1: start and end")
    val_before_train: bool = Field(True, description="evaluate before the first step")
    max_actor_ckpt_to_keep: PositiveInt = Field(2, description="older checkpoints are deleted")
    resume_mode: Literal["auto", "disable"] = Field(
        "auto", description="auto: continue from the run directory's last checkpoint"
    )
    logger: list[Literal["console", "jsonl", "tensorboard", "wandb"]] = Field(
        ["console", "jsonl", "tensorboard"], description="where metrics go"
    )


class Config(Section):
    """A whole training run."""

    data: DataConfig = DataConfig()  # pyright: ignore[reportCallIssue]
    model: ModelConfig
    rollout: RolloutConfig = RolloutConfig()  # pyright: ignore[reportCallIssue]
    actor: ActorConfig = ActorConfig()  # pyright: ignore[reportCallIssue]
    parallel: ParallelConfig = ParallelConfig()  # pyright: ignore[reportCallIssue]
    critic: CriticConfig = CriticConfig()  # pyright: ignore[reportCallIssue]
    ref: RefConfig = RefConfig()  # pyright: ignore[reportCallIssue]
    flow: FlowConfig = FlowConfig()  # pyright: ignore[reportCallIssue]
    algorithm: AlgorithmConfig = AlgorithmConfig()  # pyright: ignore[reportCallIssue]
    reward: RewardConfig = RewardConfig()  # pyright: ignore[reportCallIssue]
    validation: ValidationConfig = ValidationConfig()  # pyright: ignore[reportCallIssue]
    trainer: TrainerConfig = TrainerConfig()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        data, actor, rollout = self.data, self.actor, self.rollout
        longest = data.max_prompt_length + data.max_response_length
        spread = self.parallel.context_parallel_size  # the only thing that splits a sequence
        if longest > actor.ppo_max_token_len_per_gpu * spread:
            raise ValueError(
                f"data.max_prompt_length + data.max_response_length = {longest} exceeds "
                "actor.ppo_max_token_len_per_gpu * parallel.context_parallel_size = "
                f"{actor.ppo_max_token_len_per_gpu} * {spread}; a sequence is never split over "
                "micro-batches, so raise one of the two or shorten the limits"
            )
        if rollout.max_num_seqs < rollout.n:
            raise ValueError(
                f"rollout.max_num_seqs = {rollout.max_num_seqs} is below rollout.n = {rollout.n}; "
                "the responses to one prompt are decoded together, so raise it"
            )
        if rollout.max_num_seqs < self.validation.n:
            raise ValueError(
                f"rollout.max_num_seqs = {rollout.max_num_seqs} is below validation.n = "
                f"{self.validation.n}; the responses to one prompt are decoded together: raise it"
            )
        if data.train_batch_size % actor.ppo_mini_batch_size != 0:
            raise ValueError(
                f"data.train_batch_size = {data.train_batch_size} is not a multiple of "
                f"actor.ppo_mini_batch_size = {actor.ppo_mini_batch_size}"
            )
        if data.task == "files" and not data.train_files:
            raise ValueError("data.train_files is empty: name a file, or choose data.task")
        truncated = rollout.top_p < 1 or rollout.top_k > 0
        if truncated and self.flow.old_logprobs != "rollout":
            raise ValueError(
                f"rollout.top_p = {rollout.top_p}, rollout.top_k = {rollout.top_k}: the weight "
                "must divide by the truncated distribution that was sampled from; use top_p=1 "
                "top_k=-1, or flow.old_logprobs=rollout"
            )
        if rollout.max_model_len is not None and rollout.max_model_len < longest:
            raise ValueError(
                f"rollout.max_model_len = {rollout.max_model_len} is below data.max_prompt_length "
                f"+ data.max_response_length = {longest}; raise it, or leave it unset"
            )
        refuse_idle_settings(self)
        refuse_idle_engine_settings(self)
        self._check_selection()
        if actor.strategy == "torch" and self.parallel.num_shares > 1:
            raise ValueError(
                f"actor.strategy = torch runs in one process, but `parallel` asks for "
                f"{self.parallel.num_shares}; use actor.strategy=megatron under torchrun"
            )
        return self

    def _check_selection(self) -> None:
        """Refuse choices of samples and weights that the rest of the settings contradicts."""
        algorithm, data, buffer = self.algorithm, self.data, self.reward.overlong_buffer
        if algorithm.rollout_correction.is_on and self.flow.old_logprobs == "rollout":
            raise ValueError(
                "algorithm.rollout_correction has no effect with flow.old_logprobs = rollout: the "
                "engine's log-probs are then the old policy's, so their ratio is 1; use policy"
            )
        weighs_tokens = algorithm.rollout_correction.rollout_is == "token"
        if weighs_tokens and algorithm.objective == "flow_balance":
            raise ValueError(
                "algorithm.rollout_correction.rollout_is = token: flow_balance has one loss per "
                "sequence and no token to weigh; use sequence or geometric"
            )
        rollout, num_rounds = self.rollout, self.rollout.max_staleness
        if num_rounds > 1 and (data.max_response_length % num_rounds != 0 or rollout.stop):
            raise ValueError(
                f"rollout.max_staleness = {num_rounds} samples a response in as many parts of one "
                f"length, but data.max_response_length is {data.max_response_length} and "
                f"rollout.stop is {rollout.stop}: give a multiple of {num_rounds} and no stop "
                "strings, which may lie across two parts, or rollout.max_staleness=1"
            )
        if algorithm.filter_groups.enable and self.rollout.n == 1:
            raise ValueError(
                "algorithm.filter_groups.enable drops groups whose scores agree, and a group of "
                "rollout.n = 1 always does: raise it, or turn the filter off"
            )
        if buffer.enable and buffer.len > data.max_response_length:
            raise ValueError(
                f"reward.overlong_buffer.len = {buffer.len} exceeds data.max_response_length = "
                f"{data.max_response_length}: lower it"
            )

    def with_dtype(self, dtype: str) -> "Config":
        """A copy that computes in `dtype`."""
        model = self.model.model_copy(update={"dtype": dtype})
        return self.model_copy(update={"model": model})

    @property
    def needs_reference(self) -> bool:
        """Whether the objective reads the reference's log-probs."""
        is_flow = self.algorithm.objective == "flow_balance"
        return is_flow or self.actor.use_kl_loss or self.algorithm.use_kl_in_reward

    @property
    def run_dir(self) -> Path:
        """The directory that receives everything this run writes."""
        return Path(self.trainer.default_local_dir or f"runs/{self.trainer.experiment_name}")
