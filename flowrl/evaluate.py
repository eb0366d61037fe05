"""Judging a policy on held-out prompts: greedy accuracy and avg@n with intervals."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.config import cache_dir
from flowrl.device import resolve_device, resolve_dtype
from flowrl.files import write_whole
from flowrl.intervals import Accuracy, bootstrap_interval
from flowrl.policy.pretrained import load_model, load_tokenizer, resolve_model_path
from flowrl.rewards import RewardPool, RewardRequest, RewardResult, RewardScorer
from flowrl.rollout import Response, RolloutEngine, SamplingParams
from flowrl.rollout.transformers import TransformersEngine
from flowrl.run import load_split, val_sampling
from flowrl.settings import Config
from flowrl.tasks import TokenizedPrompt


@dataclass(frozen=True)
class Judged:
    """One held-out response with its score."""

    prompt: str
    response: str
    is_correct: bool


@dataclass(frozen=True)
class Evaluation:
    """Accuracies by kind ("avg@n", "greedy") and the first response of every prompt."""

    accuracy: dict[str, Accuracy]
    examples: list[Judged]


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], *, is_answer: bool) -> str:
    """The text of some tokens; an answer, which the verifier reads, is without special tokens."""
    text = tokenizer.decode(token_ids, skip_special_tokens=is_answer)
    assert isinstance(text, str)
    return text


def score_responses(
    tokenizer: PreTrainedTokenizerBase,
    rewards: RewardScorer,
    prompts: Sequence[TokenizedPrompt],
    responses: Sequence[Sequence[Response]],
) -> tuple[list[str], list[RewardResult]]:
    """Texts and scores of all responses, prompt by prompt."""
    texts, requests = [], []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            texts.append(decode(tokenizer, response.token_ids, is_answer=True))
            requests.append(
                RewardRequest(
                    data_source=prompt.prompt.data_source,
                    solution=texts[-1],
                    ground_truth=prompt.prompt.ground_truth,
                    extra_info=prompt.prompt.extra_info,
                )
            )
    return texts, rewards.score(requests)


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    rewards: RewardScorer,
    prompts: Sequence[TokenizedPrompt],
    sampling: SamplingParams,
    *,
    with_greedy: bool,
    correct_threshold: float,
    seed: int,
) -> Evaluation:
    """Sample every held-out prompt `sampling.n` times, and once greedily when asked."""
    runs = {f"avg@{sampling.n}": sampling}
    if with_greedy:
        runs["greedy"] = SamplingParams(
            n=1, temperature=0.0, max_tokens=sampling.max_tokens, stop=sampling.stop
        )
    token_ids = [p.token_ids for p in prompts]
    accuracy: dict[str, Accuracy] = {}
    examples: list[Judged] = []
    for name, params in runs.items():
        texts, results = score_responses(
            tokenizer, rewards, prompts, engine.generate(token_ids, params, seed)
        )
        is_correct = [result.score >= correct_threshold for result in results]
        per_prompt = np.reshape(is_correct, (len(prompts), params.n)).mean(axis=1)
        accuracy[name] = bootstrap_interval(per_prompt.tolist())
        if not examples:
            examples = [
                Judged(
                    decode(tokenizer, prompt.token_ids, is_answer=False),
                    texts[i * params.n],
                    is_correct[i * params.n],
                )
                for i, prompt in enumerate(prompts)
            ]
    return Evaluation(accuracy, examples)


def evaluation_path(run_dir: Path, step: int) -> Path:
    """Where the held-out responses and accuracies after `step` steps are kept."""
    return run_dir / "evaluations" / f"step_{step}.json"


def save_evaluation(run_dir: Path, step: int, evaluation: Evaluation) -> None:
    """Keep the held-out responses, so that a summary never has to generate them again."""
    write_whole(evaluation_path(run_dir, step), json.dumps(asdict(evaluation), indent=1))


def load_evaluation(run_dir: Path, step: int) -> Evaluation | None:
    """What `save_evaluation` kept, or None when that step was not evaluated."""
    path = evaluation_path(run_dir, step)
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Evaluation(
        {name: Accuracy(**values) for name, values in kept["accuracy"].items()},
        [Judged(**values) for values in kept["examples"]],
    )


def evaluate_model(config: Config, path: str) -> Evaluation:
    """Judge the model at `path` on the held-out prompts of a configuration.

    Raises ValueError when there is no model or no held-out prompt.
    """
    path = resolve_model_path(path, cache_dir())
    tokenizer = load_tokenizer(path, config.model.trust_remote_code)
    prompts = load_split(config, "val", tokenizer)
    if not prompts:
        raise ValueError("there are no held-out prompts; name some in data.val_files")
    device = resolve_device(config.trainer.device)
    dtype = getattr(torch, resolve_dtype(config.model.dtype, device))
    model = load_model(path, dtype, device, config.model.trust_remote_code)
    reward = config.reward
    with RewardPool(
        reward.function, reward.num_workers, reward.timeout_s, reward.failure_score
    ) as rewards:
        return evaluate(
            TransformersEngine(model, tokenizer, config.rollout.max_num_seqs),
            tokenizer,
            rewards,
            prompts,
            val_sampling(config),
            with_greedy=config.validation.greedy,
            correct_threshold=reward.correct_threshold,
            seed=config.trainer.seed,
        )
