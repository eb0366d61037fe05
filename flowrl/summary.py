"""What a person reads before and after a training run."""

import logging
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from flowrl.checkpoint import latest_checkpoint
from flowrl.config import cache_dir
from flowrl.console import Example, print_start, print_summary
from flowrl.device import has_fast_bfloat16, resolve_device
from flowrl.doctor import implementation_for
from flowrl.evaluate import Evaluation, load_evaluation, score_responses
from flowrl.parts import resolve_flow
from flowrl.plots import plot_run
from flowrl.policy.pretrained import load_tokenizer, resolve_model_path
from flowrl.rewards import RewardPool, auto
from flowrl.rollout import Response
from flowrl.run import Run, load_split
from flowrl.settings import Config

NUM_EXAMPLES = 3

logger = logging.getLogger(__name__)


def describe(config: Config) -> None:
    """Print what is about to run, on what, with which kernels."""
    device = resolve_device(config.trainer.device)
    head = implementation_for("linear_logprob_forward", device.type)
    if config.model.dtype == "bfloat16" and not has_fast_bfloat16(device):
        logger.warning(
            "model.dtype = bfloat16, but this machine has no instructions for it and emulates them "
            "slowly; model.dtype=auto takes float32 here"
        )
    print_start(
        {
            "model": f"{config.model.path} ({config.model.dtype})",
            "task": f"{config.data.task}, reward {config.reward.function}",
            "objective": describe_objective(config),
            "batch": f"{config.data.train_batch_size} prompts x {config.rollout.n} responses, "
            f"{config.trainer.total_training_steps} steps",
            "device": f"{device.type}, {torch.get_num_threads()} threads, head: {head}",
            "run directory": str(config.run_dir),
        }
    )


def describe_objective(config: Config) -> str:
    """The objective with the settings that make it what it is, in one line."""
    name, flow, actor = config.algorithm.objective, config.flow, config.actor
    if name == "flow_balance":
        weighting = resolve_flow(flow).weighting
        return (
            f"{name}, preset {flow.preset} (weighting {weighting}, beta {flow.beta:g}, "
            f"log Z {flow.log_z})"
        )
    kl = f", KL loss {actor.kl_loss_coef:g}" if actor.use_kl_loss else ""
    return (
        f"{name}, {actor.loss_mode} ratio in [{1 - actor.clip_ratio_low:g}, "
        f"{1 + actor.clip_ratio_high:g}], {actor.loss_agg_mode}{kl}"
    )


def examples_of(before: Evaluation | None, after: Evaluation | None) -> list[Example]:
    """A few held-out prompts, those that training repaired first."""
    if after is None:
        return []
    # By prompt: a run may continue with more held-out prompts than it began with.
    earlier_by_prompt = {} if before is None else {e.prompt: e for e in before.examples}
    pairs = []
    for judged in after.examples:
        earlier = earlier_by_prompt.get(judged.prompt)
        pairs.append(
            Example(
                prompt=judged.prompt.replace("\n", " | "),
                after=judged.response,
                is_after_correct=judged.is_correct,
                before=None if earlier is None else earlier.response,
                is_before_correct=earlier is not None and earlier.is_correct,
            )
        )
    pairs.sort(key=lambda e: e.is_before_correct or not e.is_after_correct)  # stable
    return pairs[:NUM_EXAMPLES]


def summarise(run: Run, elapsed_s: float) -> None:
    """Draw the run and print what it changed on the held-out prompts."""
    run_dir: Path = run.config.run_dir
    name = f"avg@{run.val_sampling.n}"
    before, after = load_evaluation(run_dir, 0), load_evaluation(run_dir, run.step)
    print_summary(
        # A run that continued with another validation.n has none of this name to compare.
        None if before is None else before.accuracy.get(name),
        None if after is None else after.accuracy.get(name),
        examples_of(before, after),
        plot_run(run_dir) if "jsonl" in run.config.trainer.logger else None,
        run_dir,
        elapsed_s,
    )


def print_evaluation(model: str, evaluation: Evaluation) -> None:
    """Print the accuracies of one evaluation as a table."""
    table = Table("decoding", "accuracy", "95 % interval", title=f"held-out prompts, {model}")
    for name, a in evaluation.accuracy.items():
        table.add_row(name, f"{100 * a.mean:.1f} %", f"{100 * a.low:.1f} to {100 * a.high:.1f} %")
    Console().print(table)


def dry_run_report(config: Config) -> str:
    """Load what a run would load, except the weights, and say what was found.

    Raises ValueError for whatever would stop the run.
    """
    path = resolve_model_path(config.model.path, cache_dir())
    tokenizer = load_tokenizer(path, config.model.trust_remote_code)
    train_prompts = load_split(config, "train", tokenizer)
    val_prompts = load_split(config, "val", tokenizer)
    reward = config.reward
    if reward.function == "auto":
        prompts = [p.prompt for p in (*train_prompts, *val_prompts)]
        auto.check_rows((prompt.data_source, prompt.extra_info) for prompt in prompts)
    with RewardPool(
        reward.function, reward.num_workers, reward.timeout_s, reward.failure_score
    ) as rewards:
        first = train_prompts[0]
        result = score_responses(tokenizer, rewards, [first], [[Response([], [], "length", 0)]])[1][
            0
        ]
    longest = max(len(p.token_ids) for p in train_prompts)
    checkpoint = latest_checkpoint(config.run_dir)
    start = "from the start" if checkpoint is None else f"after step {checkpoint.step}"
    return "\n".join(
        [
            f"prompts: {len(train_prompts)} for training, {len(val_prompts)} held out, "
            f"longest {longest} tokens",
            f"first prompt: {tokenizer.decode(first.token_ids)!r}",
            f"reward of an empty response: {result.score:g} {result.failure or ''}".rstrip(),
            f"would run on {resolve_device(config.trainer.device).type} {start}",
        ]
    )
