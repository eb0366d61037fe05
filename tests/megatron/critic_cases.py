"""PPO's critic trained for two steps, in one process and on every layout, from equal weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from harness import run_ranks
from parallel_cases import (
    BETAS,
    HIDDEN,
    LR,
    MAX_GRAD_NORM,
    WARMUP_STEPS,
    WEIGHT_DECAY,
    Case,
    Spread,
    make_model,
    make_samples,
    relative,
    worst,
)
from parallel_matrix import EXPERT_LAYOUTS, LAYOUTS, Row
from torch import Tensor, nn

from flowrl.baselines import value_objective
from flowrl.batch import PackedBatch, Sample
from flowrl.config import load_config
from flowrl.interface import Critic, ValueObjective
from flowrl.megatron.critic import MegatronCritic, critic_name
from flowrl.megatron.layout import initialize
from flowrl.megatron.model import build_chunks, wrap
from flowrl.megatron.optimizer import MegatronAdamW
from flowrl.megatron.weights import export_hf_weights, load_hf_weights, own_parameters
from flowrl.objectives.output import ObjectiveOutput
from flowrl.policy.critic import TorchCritic, build_value_head
from flowrl.policy.optimizer import MasterAdamW, ParamGroup

HEAD = "critic.head."
TOKEN_MEAN = Case(objective="token-mean", has_partition=False)


@dataclass
class CriticOutcome:
    """All that is compared, by the names of a checkpoint."""

    values: list[Tensor]  # before the first step
    loss: float  # of the first step
    gradients: dict[str, Tensor]  # of the first step
    grad_norms: list[float]
    weights: dict[str, Tensor]  # after the last step


def value_samples(case: Case) -> list[Sample]:
    """Samples with values, returns and tokens that do not count, one whole response among them."""
    generator = torch.Generator().manual_seed(3)
    samples = make_samples(case.num_samples)
    for number, sample in enumerate(samples):
        length = len(sample.response_ids)
        sample.values, sample.returns = torch.randn(2, length, generator=generator)
        if number % 4 == 1:
            share = 0.0 if number == 1 else 0.6
            sample.loss_mask = torch.rand(length, generator=generator) < share
    return samples


def make_value_objective(case: Case) -> ValueObjective:
    """The loop's own; `case.objective` is its loss_agg_mode."""
    config = load_config(
        None,
        [
            "model.path=model",
            "data.task=sums",
            "algorithm.objective=ppo",
            f"actor.loss_agg_mode={case.objective}",
        ],
    )
    inner = value_objective(config)

    def objective(batch: PackedBatch, values: Tensor) -> ObjectiveOutput:
        assert batch.values is not None and batch.returns is not None
        known = {"values": batch.values.to(values), "returns": batch.returns.to(values)}
        return inner(replace(batch, **known), values)

    return objective


def make_value_head(case: Case) -> nn.Linear:
    """A head with a bias that matters."""
    head = build_value_head(HIDDEN, seed=5)
    with torch.no_grad():
        head.weight.mul_(4)
        head.bias.fill_(0.3)
    return head.to(torch.promote_types(case.dtype, torch.float32))


def build_torch_critic(case: Case) -> TorchCritic:
    """The critic of one process."""
    model, head = make_model(case), make_value_head(case)
    model.set_attn_implementation("flowrl_packed")
    named = [(f"critic.{n}", p) for n, p in model.base_model.named_parameters()]
    named += [(f"critic.head.{n}", p) for n, p in head.named_parameters()]
    optimizer = MasterAdamW(
        [ParamGroup(named, LR)],
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_STEPS,
        max_grad_norm=MAX_GRAD_NORM,
    )
    return TorchCritic(model, head, optimizer, max_tokens=1000, device=torch.device("cpu"))


def build_critic(case: Case, spread: Spread) -> MegatronCritic:
    """The same weights on this rank's part of a layout, whose groups exist."""
    model = make_model(case)
    chunks = build_chunks(
        model.config,
        spread.layout,
        case.dtype,
        value_head=make_value_head(case),
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
        z_lr=LR,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_STEPS,
        max_grad_norm=MAX_GRAD_NORM,
    )
    return MegatronCritic(wrapped, optimizer, spread.layout, spread.max_tokens)


def _train(
    critic: Critic, case: Case, read: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]
) -> CriticOutcome:
    """The steps; `read` returns all (gradients, weights) that this process can see."""
    frozen = value_samples(case)
    critic.set_values(frozen)
    samples, objective = value_samples(case), make_value_objective(case)
    loss = critic.accumulate_gradients(samples, objective)
    gradients = {name: value.clone() for name, value in read()[0].items()}
    grad_norms = []
    for step in range(case.num_steps):
        if step > 0:
            critic.accumulate_gradients(samples, objective)
        grad_norm, is_applied = critic.optimizer.step(step)
        assert is_applied
        grad_norms.append(grad_norm)
    values = [sample.values for sample in frozen if sample.values is not None]
    return CriticOutcome(values, loss, gradients, grad_norms, read()[1])


@cache
def one_process(case: Case) -> CriticOutcome:
    """TorchCritic's outcome."""
    critic = build_torch_critic(case)

    def read() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters = critic.optimizer.parameters
        return (
            {name: critic.optimizer.main_grads[p] for name, p in parameters.items()},
            {name: p.detach().clone() for name, p in parameters.items()},
        )

    return _train(critic, case, read)


def critic_on_ranks(
    rank: int, case: Case, spread: Spread, sabotage: Callable[[], None] | None
) -> CriticOutcome:
    """One rank's outcome; the head's entries are there on the last stage only."""
    initialize(spread.layout, timeout_s=60)
    critic = build_critic(case, spread)
    if sabotage is not None:
        sabotage()
    chunks = [chunk.module for chunk in critic.chunks]
    kind = torch.promote_types(case.dtype, torch.float32)

    def read() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        for chunk in critic.chunks:
            if spread.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        gradients = dict(export_hf_weights(chunks, read=lambda p: p.main_grad, dtype=kind))
        weights = dict(export_hf_weights(chunks))
        for name, parameter in own_parameters(chunks[-1]).items():
            gradients[name], weights[name] = parameter.main_grad, parameter.detach()
        return tuple(
            {critic_name(name): value for name, value in values.items()}
            for values in (gradients, weights)
        )

    return _train(critic, case, read)


def critic_errors(outcomes: Sequence[CriticOutcome], truth: CriticOutcome) -> dict[str, float]:
    """Per quantity the largest error of any rank, against one process."""
    first = outcomes[0]
    for other in outcomes[1:]:  # what every rank is given is the same, to the last bit
        assert (other.loss, other.grad_norms) == (first.loss, first.grad_norms)
        assert all(map(torch.equal, other.values, first.values))
    table = {
        "loss": abs(first.loss - truth.loss) / abs(truth.loss),
        "values": relative(torch.cat(first.values), torch.cat(truth.values)),
        "gradients": max(worst(_part(o.gradients), _part(truth.gradients)) for o in outcomes),
        "weights": max(worst(_part(o.weights), _part(truth.weights)) for o in outcomes),
    }
    if truth.grad_norms:
        pairs = zip(first.grad_norms, truth.grad_norms, strict=True)
        table["grad norm"] = max(abs(a - b) / b for a, b in pairs)
    holders = [o for o in outcomes if _part(o.gradients, True)]
    assert holders
    for name in ("gradients", "weights"):
        table[f"head {name}"] = max(
            worst(_part(vars(o)[name], True), _part(vars(truth)[name], True)) for o in holders
        )
    return table


def _part(values: dict[str, Tensor], is_head: bool = False) -> dict[str, Tensor]:
    return {n: v for n, v in values.items() if n.startswith(HEAD) == is_head}


def _rows() -> list[Row]:
    rows = []

    def add(model: str, training: str, case: Case, *layouts: str, suffix: str = "", **spread):
        for layout in layouts:
            place = Spread(**{**vars((LAYOUTS | EXPERT_LAYOUTS)[layout]), **spread})
            rows.append(Row(model, training, layout + suffix, case, place))

    two = ("TP2", "TP2 SP", "PP2", "PP2 VPP2", "CP2", "DP2")
    four = ("TP2 PP2", "TP2 CP2", "TP2 SP CP2", "TP2 DP2")
    add("Llama", "token mean", TOKEN_MEAN, "one rank", *two, *four)
    by_sequence = replace(TOKEN_MEAN, objective="seq-mean-token-mean")
    add("Llama", "sequence mean", by_sequence, "CP2")
    # Without an output weight the embedding has no copy on the last stage.
    add("Qwen2 tied", "token mean", replace(TOKEN_MEAN, kind="qwen2", tied=True), "PP2")
    add("Llama", "token mean, one sample", replace(TOKEN_MEAN, num_samples=1), "DP2", "PP2 VPP2")
    spread_state = {"distributed_optimizer": True, "suffix": ", distributed optimiser"}
    add("Llama", "token mean", TOKEN_MEAN, "TP2 SP CP2", **spread_state)
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True, **spread_state}
    overlap["suffix"] = ", distributed optimiser, all overlapped"
    add("Llama", "token mean", TOKEN_MEAN, "DP2", **overlap)
    experts = replace(TOKEN_MEAN, kind="qwen3_moe")
    add("Qwen3-MoE", "token mean", experts, "one rank", "DP2 EP2", "TP2 SP EP2", "CP2 EP2")
    add("Qwen3-MoE", "token mean", experts, "PP2 DP2 EP2", "PP2 VPP2 DP2 EP2")
    single = replace(experts, num_samples=1)
    add("Qwen3-MoE", "token mean, one sample", single, "DP2 EP2")
    add("Qwen3-MoE", "token mean", experts, "DP4 EP2", **overlap)
    exact = replace(TOKEN_MEAN, dtype=torch.float64, num_steps=0)
    add("Llama float64", "token mean", exact, "TP2 SP CP2")
    return rows


CRITIC_ROWS = _rows()


def measure_critic(row: Row, sabotage: Callable[[], None] | None = None) -> dict[str, float]:
    """The errors of one row; `sabotage` runs on every rank before the first step."""
    truth = one_process(replace(row.case, dtype=torch.float64))
    outcomes = run_ranks(row.spread.num_ranks, critic_on_ranks, row.case, row.spread, sabotage)
    table = critic_errors(outcomes, truth)
    if row.spread.distributed_optimizer:
        # A rank's main_grad is then whole only in the part that it updates.
        table = {name: value for name, value in table.items() if "gradients" not in name}
    return table
