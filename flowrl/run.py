"""Everything a training run holds, built from its configuration or from its last checkpoint."""

import logging
import signal
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.background_save import BackgroundSave
from flowrl.checkpoint import STATE_FILE, latest_checkpoint
from flowrl.config import cache_dir, dump_config, is_megatron
from flowrl.console import TrainingConsole
from flowrl.device import with_resolved_dtype
from flowrl.files import only_writer, write_whole
from flowrl.interface import Policy
from flowrl.lookahead import Lookahead
from flowrl.metrics import MetricsWriter, Timer
from flowrl.parts import Parts, build_torch
from flowrl.policy.pretrained import load_tokenizer, resolve_model_path
from flowrl.rewards import RewardScorer
from flowrl.rollout import RolloutEngine, SamplingParams
from flowrl.rollout.verification import NUM_PROBES, agreement, check_agreement
from flowrl.settings import Config
from flowrl.tasks import PromptSampler, Split, TokenizedPrompt, load_prompts, tokenize_prompts

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts of a run. `step` counts finished training steps."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    parts: Parts
    train_prompts: list[TokenizedPrompt]
    val_prompts: list[TokenizedPrompt]
    lookahead: Lookahead
    sampling: SamplingParams
    val_sampling: SamplingParams
    writer: MetricsWriter
    console: TrainingConsole
    resources: ExitStack  # what leaving the run frees, last things first
    background: BackgroundSave | None = None  # None: the loop itself writes checkpoints
    save_timings: dict[str, float] = field(default_factory=dict)
    step: int = 0

    @property
    def policy(self) -> Policy:
        return self.parts.policy

    @property
    def engine(self) -> RolloutEngine:
        return self.parts.engine

    @property
    def rewards(self) -> RewardScorer:
        return self.parts.rewards

    def publish(self, version: int) -> None:
        """Hand the policy's weights to the engine, and see that it samples from them."""
        self.engine.publish(self.policy.named_weights(), version)
        verify_engine(self.config, self.parts, self.train_prompts, version)

    def is_due(self, frequency: int) -> bool:
        """Whether something done every `frequency` steps (-1: only at the end) is due now."""
        is_last = self.step == self.config.trainer.total_training_steps
        return is_last or (frequency > 0 and self.step % frequency == 0)

    def log(self, metrics: dict[str, float]) -> None:
        """Record the metrics of the finished step and show them.

        The row of a step is written before its checkpoint, whose time is thus in the next row.
        """
        if metrics:
            metrics = metrics | self.save_timings
            self.save_timings.clear()
            self.writer.write(self.step, metrics)
            self.console.step(self.step, metrics)
            if self.parts.is_main:
                warn_of_skipped_updates(self.step, metrics)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        with self.resources:
            self._finish_background(error)

    def _finish_background(self, error: BaseException | None) -> None:
        if self.background is None:
            return
        try:
            self.background.wait()  # a run that fails keeps the checkpoint that it was writing
        except (OSError, ValueError, RuntimeError) as save_error:
            if error is None:
                raise
            logger.error("%s", save_error)  # what ended the run is told by the run


def train_sampling(config: Config) -> SamplingParams:
    """How training responses are sampled."""
    rollout = config.rollout
    return SamplingParams(
        n=rollout.n,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=config.data.max_response_length,
        stop=tuple(rollout.stop),
    )


def val_sampling(config: Config) -> SamplingParams:
    """How held-out responses are sampled."""
    sampling, validation = train_sampling(config), config.validation
    temperature = validation.temperature or sampling.temperature
    return replace(sampling, n=validation.n, temperature=temperature)


def load_split(
    config: Config, split: Split, tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedPrompt]:
    """The training or held-out prompts, tokenised and within the length limit."""
    data = config.data
    files = data.train_files if split == "train" else data.val_files
    if data.task == "files" and not files:
        return []
    prompts = load_prompts(
        data.task,
        split,
        files=files,
        count=data.train_max_samples if split == "train" else data.val_max_samples,
        seed=0,  # the set is the same for every training seed; only its order changes
        options=data.task_options,
    )
    tokenized, num_dropped = tokenize_prompts(
        prompts,
        tokenizer,
        data.max_prompt_length,
        chat_template=data.chat_template,
        truncation="filter" if data.filter_overlong_prompts else data.truncation,
    )
    if num_dropped:
        logger.warning(
            "%d of %d %s prompts exceed data.max_prompt_length = %d and were dropped",
            num_dropped,
            len(prompts),
            split,
            data.max_prompt_length,
        )
    return tokenized


def build_parts(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> Parts:
    """What trains and samples: in this process, or in every process that torchrun started."""
    if not is_megatron(config):
        return build_torch(config, path, tokenizer)
    with warnings.catch_warnings():  # Megatron-core names every optional package that is absent
        warnings.simplefilter("ignore")
        from flowrl.megatron_parts import build_megatron  # megatron-core is an extra

    return build_megatron(config, path, tokenizer)


def verify_engine(
    config: Config, parts: Parts, prompts: Sequence[TokenizedPrompt], version: int
) -> None:
    """Raise RuntimeError when vLLM's log-probs are not the policy's, unless told not to look.

    The transformers engine needs no look: it runs the policy's own kind of model.
    """
    if config.rollout.engine != "vllm" or not config.rollout.verify_weights:
        return
    found = agreement(
        parts.engine,
        parts.policy,
        [prompt.token_ids for prompt in prompts[:NUM_PROBES]],
        temperature=config.rollout.temperature,
        max_tokens=config.data.max_response_length,
    )
    check_agreement(found, config.model.dtype, version)


def start(config: Config) -> Run:
    """Build a run, continuing from the run directory's last checkpoint when there is one.

    Raises ValueError, before anything is trained, for whatever the configuration asks that the
    machine, the data or the checkpoint cannot give.
    """
    config = with_resolved_dtype(config)  # the run directory keeps what it was
    if config.trainer.num_threads is not None:
        torch.set_num_threads(config.trainer.num_threads)
    path = resolve_model_path(config.model.path, cache_dir())
    tokenizer = load_tokenizer(path, config.model.trust_remote_code)
    train_prompts = load_split(config, "train", tokenizer)
    val_prompts = load_split(config, "val", tokenizer)
    sampler = PromptSampler(
        len(train_prompts),
        config.data.train_batch_size,
        config.trainer.seed,
        shuffle=config.data.shuffle,
    )
    with ExitStack() as stack:  # a start that is refused leaves no process behind
        parts = build_parts(config, path, tokenizer)
        stack.callback(parts.close)
        parts.on_main(lambda: stack.enter_context(only_writer(config.run_dir)))
        checkpoint = (
            latest_checkpoint(config.run_dir) if config.trainer.resume_mode == "auto" else None
        )
        lookahead = Lookahead(
            parts.engine,
            sampler,
            train_prompts,
            train_sampling(config),
            config.trainer.seed,
            config.rollout.max_staleness,
        )
        if checkpoint is not None:  # before the writer: what is refused leaves the metrics alone
            state = parts.load(checkpoint)
            try:
                sampler.load_state_dict(state["sampler"])
                lookahead.load_state_dict(state["lookahead"])
            except ValueError as error:
                raise ValueError(f"{checkpoint.path / STATE_FILE}: {error}") from error
            logger.warning("continuing %s after step %d", config.run_dir, checkpoint.step)
        warn_of_stale_tokens(config)
        resume_step = None if checkpoint is None else checkpoint.step
        verify_engine(config, parts, train_prompts, resume_step or 0)
        loggers = config.trainer.logger if parts.is_main else []
        writer = MetricsWriter(
            config.run_dir,
            [name for name in loggers if name != "console"],
            project_name=config.trainer.project_name,
            experiment_name=config.trainer.experiment_name,
            config=config.model_dump(mode="json"),
            resume_step=resume_step,
        )
        stack.callback(writer.close)
        if parts.is_main:
            write_whole(config.run_dir / "config.yaml", dump_config(config))
        return Run(
            config=config,
            tokenizer=tokenizer,
            parts=parts,
            train_prompts=train_prompts,
            val_prompts=val_prompts,
            lookahead=lookahead,
            sampling=train_sampling(config),
            val_sampling=val_sampling(config),
            writer=writer,
            console=TrainingConsole(
                config.trainer.total_training_steps,
                first_step=resume_step or 0,
                console=None if "console" in loggers else Console(file=StringIO()),
            ),
            resources=stack.pop_all(),
            background=background_save(config),
            step=resume_step or 0,
        )


def warn_of_stale_tokens(config: Config) -> None:
    """Say so when tokens of older weights would pass for the policy's own."""
    is_weighed = config.flow.old_logprobs == "rollout" or config.algorithm.rollout_correction.is_on
    if config.rollout.max_staleness > 0 and not is_weighed:
        logger.warning(
            "rollout.max_staleness = %d, and the loss takes what older weights sampled for the "
            "policy's own; flow.old_logprobs=rollout or algorithm.rollout_correction weighs it",
            config.rollout.max_staleness,
        )


def warn_of_skipped_updates(step: int, metrics: dict[str, float]) -> None:
    """Say so when gradients were not finite: a run whose every update is skipped learns nothing."""
    for part in ("actor", "critic"):
        num_skipped = int(metrics.get(f"{part}/skipped_updates", 0))
        if num_skipped > 0:
            logger.warning(
                "step %d: %d updates of the %s skipped, since its gradient is not finite; if that "
                "goes on, look for NaN and infinity in the model's weights and logits",
                step,
                num_skipped,
                part,
            )


def background_save(config: Config) -> BackgroundSave | None:
    """Who writes checkpoints, None when the loop does. Every rank has one, the main one uses it."""
    checkpoint = config.actor.checkpoint
    return BackgroundSave(checkpoint.async_save_timeout_s) if checkpoint.async_save else None


def check_save(run: Run) -> None:
    """Raise, on every rank, the error of a checkpoint that could not be written."""
    if run.background is not None:
        run.parts.on_main(run.background.check)


def finish_save(run: Run) -> None:
    """Return when the last checkpoint is written; raises its error on every rank."""
    if run.background is not None:
        run.console.phase("saving")
        run.parts.on_main(run.background.wait)


def save(run: Run) -> Path:
    """Write a checkpoint of the finished step, or have it written; no file in it is a pickle."""
    run.console.phase("saving")
    state = {
        "step": run.step,
        "sampler": run.lookahead.sampler.state_dict(),
        "lookahead": run.lookahead.state_dict(),
        "reference_fingerprint": run.parts.reference_fingerprint,
        "torch_version": torch.__version__,
    }
    keep = run.config.trainer.max_actor_ckpt_to_keep
    with Timer("save_checkpoint", run.save_timings):
        return run.parts.save(run.config.run_dir, run.step, state, keep, run.background)


class Interrupt:
    """Turns SIGTERM and SIGINT into a flag, so that the running step ends and is saved.

    A second signal acts as usual. Use as a context manager in the main thread.
    """

    def __init__(self) -> None:
        self.is_set = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        signal.signal(number, signal.SIG_DFL)
        logger.warning("%s: saving after this step", signal.Signals(number).name)

    def __enter__(self) -> "Interrupt":
        self._previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
