"""Settings that the rest of the settings makes a run ignore are refused, not ignored silently."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl.settings import Config

BASELINES = ("grpo", "ppo", "reinforce_pp", "reinforce_pp_baseline")

# Keys of `rollout` that only vLLM reads, and those that only its servers read.
VLLM_SETTINGS = (
    "verify_weights",
    "gpu_memory_utilization",
    "tensor_model_parallel_size",
    "enforce_eager",
    "enable_prefix_caching",
    "max_model_len",
    "free_cache_engine",
)
SERVER_SETTINGS = ("servers", "request_timeout_s", "max_retries", "weight_transfer", "weight_dir")


def refuse_idle_settings(config: "Config") -> None:
    """Raise ValueError for a setting that nothing in the run would read.

    Those of Z, `flow` and `critic` may stay, so that one override tries another objective.
    """
    objective, actor, flow = config.algorithm.objective, config.actor, config.flow
    correction, filtering = config.algorithm.rollout_correction, config.algorithm.filter_groups
    buffer = config.reward.overlong_buffer
    token_rewards = objective in ("ppo", "reinforce_pp")
    is_baseline = objective in BASELINES
    of_baselines = f"algorithm.objective={' or '.join(BASELINES)}"
    of_token_rewards = "algorithm.objective=ppo or reinforce_pp"
    clip_weighting = flow.weighting in (None, "clip", "cispo")
    # (keys, whether they are read, what it takes)
    readers: list[tuple[str, bool, str]] = [
        (
            "actor.clip_ratio_low actor.clip_ratio_high actor.clip_ratio_c actor.use_kl_loss "
            "actor.loss_agg_mode actor.entropy_coeff",
            is_baseline,
            of_baselines,
        ),
        ("actor.loss_mode", objective == "grpo", "algorithm.objective=grpo"),
        (
            "actor.loss_scale_factor",
            is_baseline and actor.loss_agg_mode == "seq-mean-token-sum-norm",
            "actor.loss_agg_mode=seq-mean-token-sum-norm",
        ),
        ("actor.memory_budget", actor.drop_mass == 0, "actor.drop_mass=0"),
        ("actor.kl_loss_coef", actor.use_kl_loss, "actor.use_kl_loss=true"),
        (
            "algorithm.norm_adv_by_std_in_grpo",
            objective == "grpo",
            "algorithm.objective=grpo",
        ),
        ("algorithm.use_kl_in_reward algorithm.gamma", token_rewards, of_token_rewards),
        ("algorithm.lam", objective == "ppo", "algorithm.objective=ppo"),
        (
            "algorithm.kl_coef",
            config.algorithm.use_kl_in_reward,
            "algorithm.use_kl_in_reward=true",
        ),
        ("flow.clip_low flow.clip_high", clip_weighting, "flow.weighting=clip or cispo"),
        ("flow.weight_cap", flow.weighting in (None, "cap"), "flow.weighting=cap"),
        (
            "algorithm.rollout_correction.rollout_is_threshold",
            correction.is_on,
            "rollout_is or rollout_rs",
        ),
        (
            "algorithm.rollout_correction.rollout_rs_threshold "
            "algorithm.rollout_correction.rollout_rs_threshold_lower",
            correction.rollout_rs is not None,
            "algorithm.rollout_correction.rollout_rs",
        ),
        (
            "algorithm.filter_groups.max_num_gen_batches",
            filtering.enable,
            "algorithm.filter_groups.enable=true",
        ),
        (
            "reward.overlong_buffer.len reward.overlong_buffer.penalty_factor",
            buffer.enable,
            "reward.overlong_buffer.enable=true",
        ),
    ]
    for keys, is_read, needed in readers:
        for key in () if is_read else keys.split():
            *sections, name = key.split(".")
            section: Any = config
            for part in sections:
                section = getattr(section, part)
            value = getattr(section, name)
            if value != type(section).model_fields[name].default:
                raise ValueError(f"{key} = {value} has no effect here; it needs {needed}")


def refuse_idle_engine_settings(config: "Config") -> None:
    """Refuse settings that the chosen rollout engine would silently ignore."""
    rollout = config.rollout
    if rollout.engine == "transformers":
        idle = VLLM_SETTINGS + SERVER_SETTINGS
        needed = "rollout.engine=vllm"
    elif rollout.servers:
        idle, needed = ("free_cache_engine",), "vLLM in this process: leave out rollout.servers"
    else:
        idle = ("tensor_model_parallel_size", *SERVER_SETTINGS)
        needed = "rollout.engine=vllm with rollout.servers"
    for key in idle:
        value = getattr(rollout, key)
        if value != type(rollout).model_fields[key].default:
            raise ValueError(f"rollout.{key} = {value} has no effect here; it needs {needed}")
    if rollout.weight_transfer == "nccl" and rollout.weight_dir is not None:
        raise ValueError(
            f"rollout.weight_dir = {rollout.weight_dir} has no effect with "
            "rollout.weight_transfer = nccl, which needs no folder: leave it out, or use disk"
        )
