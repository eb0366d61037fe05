"""One mini-batch trained for two steps, in one process and on every layout, from equal weights."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from hf_reference import hf_config, hf_model
from torch import Tensor

from flowrl.batch import PackedBatch, Sample
from flowrl.interface import MicroBatchResult, TokenOutputs
from flowrl.kernels.segment_mean import segment_sum
from flowrl.megatron.layout import Layout, initialize
from flowrl.megatron.model import build_chunks, wrap
from flowrl.megatron.optimizer import MegatronAdamW
from flowrl.megatron.policy import MegatronPolicy
from flowrl.megatron.weights import export_hf_weights, load_hf_weights
from flowrl.objectives import ObjectiveOutput
from flowrl.objectives.flow_balance import flow_balance_loss
from flowrl.objectives.grpo import grpo_loss
from flowrl.partition import PartitionNetwork, Pooling, build_partition
from flowrl.policy.optimizer import MasterAdamW, ParamGroup
from flowrl.policy.torch_policy import TorchPolicy

VOCABULARY = 301  # three tiles of the head; no multiple of 2
HIDDEN = 16
TEMPERATURE = 0.7
LR, Z_LR, WEIGHT_DECAY, WARMUP_STEPS, MAX_GRAD_NORM = 3e-3, 1e-2, 0.1, 3, 1.0
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Case:
    """What is trained; every field changes the numbers that one process gives as well."""

    kind: str = "llama"
    tied: bool = False
    objective: str = "flow_balance"
    entropy_coeff: float = 0.01
    detach_z: bool = False
    pooling: Pooling = "without_last"
    has_partition: bool = True
    z_dropout: float = 0.0  # drawn otherwise in one process
    drop_mass: float = 0.0
    num_samples: int = 11
    num_steps: int = 2  # of the optimiser; 0 leaves the gradients
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Spread:
    """How it is spread over ranks; nothing here may change the numbers."""

    num_ranks: int
    layout: Layout = field(default_factory=Layout)
    max_tokens: int = 40
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute: str | None = None


@dataclass
class Outcome:
    """All that is compared, gradients and weights by HF name, those of Z as `partition.*`."""

    frozen_logprobs: list[Tensor]  # of a pass without gradient, before the first step
    results: list[MicroBatchResult]  # of the first step; a single one
    gradients: dict[str, Tensor]  # of the first step
    grad_norms: list[float]
    weights: dict[str, Tensor]  # after the last step


def make_samples(num_samples: int) -> list[Sample]:
    """Ragged lengths, shared prompts, an empty response, one token to the longest allowed."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    lengths = [(9, 7), (5, 1), (5, 4), (1, 2), (3, 6), (12, 11), (2, 0), (9, 8), (4, 13), (7, 3)]
    samples = []
    prompts: dict[int, list[int]] = {}
    for number in range(num_samples):
        num_prompt, num_response = lengths[number % len(lengths)]
        prompt = prompts.setdefault(num_prompt, tokens(num_prompt))
        old, ref, rollout = -3 - 4 * torch.rand(3, num_response, generator=generator)
        samples.append(
            Sample(
                prompt,
                tokens(num_response),
                rollout.tolist(),
                group_id=num_prompt,
                reward=(-1) ** number * 0.2 * (number + 1),
                old_logprobs=old,
                ref_logprobs=ref,
                advantages=torch.randn(num_response, generator=generator),
                vargrad_log_z=0.3 * number,
            )
        )
    return samples


def make_objective(case: Case) -> Callable[..., ObjectiveOutput]:
    """The objective of the case, as the training loop would build it."""

    def flow_balance(batch: PackedBatch, outputs: TokenOutputs, log_z: Tensor | None):
        assert batch.old_logprobs is not None and batch.ref_logprobs is not None
        output = flow_balance_loss(
            outputs.logprobs,
            batch.old_logprobs.to(outputs.logprobs),
            batch.ref_logprobs.to(outputs.logprobs),
            batch.loss_mask,
            batch.cu_seqlens,
            batch.rewards.to(outputs.logprobs),
            (batch.vargrad_log_z if log_z is None else log_z).to(outputs.logprobs),
            weighting="clip",
            reduce_sums=batch.reduce_sums,
        )
        if case.entropy_coeff == 0:
            return output
        entropy, _ = segment_sum(outputs.entropy[:, None], batch.cu_seqlens, batch.loss_mask)
        if batch.reduce_sums is not None:
            entropy = batch.reduce_sums(entropy)
        return replace(output, loss_sum=output.loss_sum - case.entropy_coeff * entropy.sum())

    def grpo(batch: PackedBatch, outputs: TokenOutputs, log_z: Tensor | None):
        assert batch.old_logprobs is not None and batch.advantages is not None
        assert batch.ref_logprobs is not None
        output = grpo_loss(
            outputs.logprobs,
            batch.old_logprobs.to(outputs.logprobs),
            batch.advantages.to(outputs.logprobs),
            batch.loss_mask,
            batch.cu_seqlens,
            ref_logprobs=batch.ref_logprobs.to(outputs.logprobs),
            entropy=outputs.entropy,
            kl_coef=0.1,
            entropy_coeff=case.entropy_coeff,
            clip_high=3.0,  # wide: a token within rounding of the border could fall on either side
            ratio="sequence" if case.objective == "gspo" else "token",
            loss_agg_mode="seq-mean-token-mean" if case.objective == "gspo" else "token-mean",
            reduce_sums=batch.reduce_sums,
        )
        return replace(output, normalizer=7.5) if case.objective == "constant" else output

    return flow_balance if case.objective == "flow_balance" else grpo


def make_partition(case: Case) -> PartitionNetwork | None:
    if not case.has_partition:
        return None
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return build_partition(HIDDEN, 3, case.z_dropout, seed=5).to(dtype)


def make_model(case: Case) -> Any:
    """Half the usual spread of the matrices, so that float32 loses little on the way down."""
    model = hf_model(hf_config(case.kind, tied=case.tied, vocab_size=VOCABULARY), case.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim > 1 else 1.0)
    model.generation_config.eos_token_id = [2, 7]  # as of an instruct model: 7 stands there alone
    return model


def _train(
    policy: Any, case: Case, read: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]
) -> Outcome:
    """The steps; `read` returns all (gradients, weights) that this process can see."""
    samples, objective = make_samples(case.num_samples), make_objective(case)
    frozen_logprobs = policy.logprobs(samples)
    results = policy.accumulate_gradients(samples, objective)
    gradients = {name: value.clone() for name, value in read()[0].items()}
    grad_norms = []
    for step in range(case.num_steps):
        if step > 0:
            policy.accumulate_gradients(samples, objective)
        grad_norm, is_applied = policy.optimizer.step(step)
        assert is_applied
        grad_norms.append(grad_norm)
    return Outcome(frozen_logprobs, results, gradients, grad_norms, read()[1])


def build_torch_policy(case: Case) -> TorchPolicy:
    """The policy of one process."""
    model, partition = make_model(case), make_partition(case)
    model.set_attn_implementation("flowrl_packed")
    groups = [ParamGroup(list(model.named_parameters()), LR)]
    if partition is not None:
        named = [(f"partition.{n}", p) for n, p in partition.named_parameters()]
        groups.append(ParamGroup(named, Z_LR))
    optimizer = MasterAdamW(
        groups,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_STEPS,
        max_grad_norm=MAX_GRAD_NORM,
    )
    return TorchPolicy(
        model,
        partition,
        optimizer,
        TEMPERATURE,
        max_tokens=1000,
        pooling=case.pooling,
        detach_z=case.detach_z,
        drop_mass=case.drop_mass,
    )


@cache
def one_process(case: Case) -> Outcome:
    """TorchPolicy's outcome."""
    policy = build_torch_policy(case)

    def read() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters = policy.optimizer.parameters
        return (
            {name: policy.optimizer.main_grads[p] for name, p in parameters.items()},
            {name: p.detach().clone() for name, p in parameters.items()},
        )

    return _train(policy, case, read)


def build_policy(case: Case, spread: Spread) -> MegatronPolicy:
    """The same weights on this rank's part of a layout."""
    initialize(spread.layout, timeout_s=60)
    model = make_model(case)
    chunks = build_chunks(
        model.config,
        spread.layout,
        case.dtype,
        partition=make_partition(case),
        recompute=spread.recompute,
    )
    load_hf_weights(chunks, model.state_dict().items())
    wrapped = wrap(
        chunks,
        distributed_optimizer=spread.distributed_optimizer,
        overlap_grad_reduce=spread.overlap_grad_reduce,
        overlap_param_gather=spread.overlap_param_gather,
    )
    optimizer = MegatronAdamW(
        wrapped,
        lr=LR,
        z_lr=Z_LR,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_STEPS,
        max_grad_norm=MAX_GRAD_NORM,
    )
    return MegatronPolicy(
        wrapped,
        optimizer,
        spread.layout,
        TEMPERATURE,
        max_tokens=spread.max_tokens,
        pooling=case.pooling,
        detach_z=case.detach_z,
        drop_mass=case.drop_mass,
    )


def on_ranks(rank: int, case: Case, spread: Spread, sabotage: Callable[[], None] | None) -> Outcome:
    """One rank's outcome; Z's entries are there on the last stage only."""
    policy = build_policy(case, spread)
    if sabotage is not None:
        sabotage()
    chunks = [chunk.module for chunk in policy.chunks]
    kind = torch.promote_types(case.dtype, torch.float32)

    def read() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gradients = dict(export_hf_weights(chunks, read=lambda p: p.main_grad, dtype=kind))
        weights = dict(policy.named_weights())
        partition = chunks[-1].partition
        if partition is not None:
            for name, parameter in partition.named_parameters():
                gradients[f"partition.{name}"] = parameter.main_grad
                weights[f"partition.{name}"] = parameter.detach()
        return gradients, weights

    return _train(policy, case, read)


def norm(values: Iterable[Tensor]) -> float:
    return float(torch.cat([v.detach().double().flatten() for v in values]).norm())


def relative(actual: Tensor, truth: Tensor) -> float:
    """Error in the Euclidean norm."""
    return norm([actual.double() - truth.double()]) / norm([truth])


def worst(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest error of a tensor; one of nearly nothing is measured by all of them together."""
    assert actual.keys() == truth.keys(), actual.keys() ^ truth.keys()
    floor = 1e-3 * norm(truth.values())
    return max(
        norm([actual[name].double() - value.double()]) / max(norm([value]), floor)
        for name, value in truth.items()
    )


def _agree(first: Outcome, other: Outcome) -> None:
    """What every rank is given is the same on all, to the last bit."""
    assert other.grad_norms == first.grad_norms
    a, b = first.results[0], other.results[0]
    for name in ("logprobs", "entropy", "log_z"):
        assert (vars(a)[name] is None) == (vars(b)[name] is None)
        assert vars(a)[name] is None or torch.equal(vars(a)[name], vars(b)[name])
    assert torch.equal(a.output.loss_sum, b.output.loss_sum)
    assert a.output.diagnostics.keys() == b.output.diagnostics.keys()
    for name, values in a.output.diagnostics.items():
        assert torch.equal(values, b.output.diagnostics[name])
    for mine, yours in zip(first.frozen_logprobs, other.frozen_logprobs, strict=True):
        assert torch.equal(mine, yours)


def errors(outcomes: Sequence[Outcome], truth: Outcome) -> dict[str, float]:
    """Per quantity the largest error of any rank, against one process.

    Both keep the order of the samples. Z's entries come from the ranks that hold it.
    """
    first = outcomes[0]
    for other in outcomes[1:]:
        _agree(first, other)
    actual, expected = first.results[0], truth.results[0]
    mask = expected.batch.loss_mask
    assert torch.equal(actual.batch.loss_mask, mask)
    frozen = torch.cat(first.frozen_logprobs), torch.cat(truth.frozen_logprobs)
    table = {
        "loss": relative(actual.output.loss_sum, expected.output.loss_sum),
        "sequences": worst(actual.output.diagnostics, expected.output.diagnostics),
        "log-probs": max(
            relative(actual.logprobs[mask], expected.logprobs[mask]), relative(*frozen)
        ),
        "entropy": relative(actual.entropy[mask], expected.entropy[mask]),
        "gradients": max(
            worst(_model_part(o.gradients), _model_part(truth.gradients)) for o in outcomes
        ),
        "weights": max(worst(_model_part(o.weights), _model_part(truth.weights)) for o in outcomes),
    }
    if truth.grad_norms:
        pairs = zip(first.grad_norms, truth.grad_norms, strict=True)
        table["grad norm"] = max(abs(a - b) / b for a, b in pairs)
    if expected.log_z is not None:
        assert actual.log_z is not None
        holders = [o for o in outcomes if _z_part(o.gradients)]
        assert holders
        table["Z"] = relative(actual.log_z, expected.log_z)
        table["Z gradients"] = max(
            worst(_z_part(o.gradients), _z_part(truth.gradients)) for o in holders
        )
        table["Z weights"] = max(worst(_z_part(o.weights), _z_part(truth.weights)) for o in holders)
    return table


def _model_part(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v for n, v in values.items() if not n.startswith("partition.")}


def _z_part(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v for n, v in values.items() if n.startswith("partition.")}
