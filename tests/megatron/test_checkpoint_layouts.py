"""A checkpoint continues under any layout, or in one process, as if nothing had happened."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import megatron.core.optimizer
import pytest
import torch
from harness import run_ranks
from parallel_cases import Case, Spread, build_torch_policy, make_partition
from parts_samples import build_parts, run_state, save_step, train_steps
from safetensors.torch import load_file
from tiny_model import tiny_tokenizer
from torch import Tensor
from transformers import GenerationConfig

from flowrl.checkpoint import (
    TENSORS_FILE,
    Checkpoint,
    latest_checkpoint,
    load_training_state,
    save_checkpoint,
)
from flowrl.main_rank import is_main_rank
from flowrl.megatron.experts import file_tensors
from flowrl.megatron.layout import Layout
from flowrl.megatron.optimizer_state import training_tensors

STEPS_BEFORE, STEPS = 2, 4

ONE_RANK = Spread(1)
TP2_SP = Spread(2, Layout(tensor=2, sequence_parallel=True))
DP2 = Spread(2, distributed_optimizer=True)
TP2_PP2 = Spread(4, Layout(tensor=2, pipeline=2))
PP2_VPP2 = Spread(2, Layout(pipeline=2, virtual_pipeline=2))
PP2_DP2 = Spread(4, Layout(pipeline=2), distributed_optimizer=True)

Figures = list[tuple[float, float]]


@dataclass
class Continued:
    """What a run does after a checkpoint: (loss, gradient norm) of each step."""

    figures: Figures
    state: dict
    tensors: dict[str, Tensor]  # all that the checkpoint has to hold, read back
    published: dict[str, Tensor]  # the engine's weights; the main rank has it


def interrupted(rank: int, case: Case, spread: Spread, run_dir: Path) -> Figures:
    """Train, save, and train on without a stop."""
    parts = build_parts(case, spread)
    train_steps(parts.policy, case, 0, STEPS_BEFORE)
    save_step(parts, run_dir, STEPS_BEFORE)
    figures = train_steps(parts.policy, case, STEPS_BEFORE, STEPS)
    parts.close()
    return figures


def interrupted_in_one_process(case: Case, run_dir: Path) -> Figures:
    policy = build_torch_policy(case)
    train_steps(policy, case, 0, STEPS_BEFORE)
    save_checkpoint(
        run_dir,
        STEPS_BEFORE,
        model=policy.model,
        tokenizer=tiny_tokenizer(),
        tensors=policy.optimizer.state_tensors(),
        state=run_state(STEPS_BEFORE),
        keep=1,
    )
    return train_steps(policy, case, STEPS_BEFORE, STEPS)


def continued(rank: int, case: Case, spread: Spread, checkpoint: Checkpoint) -> Continued:
    parts = build_parts(case, spread)
    state = parts.load(checkpoint)
    assert parts.engine.weight_version == STEPS_BEFORE
    tensors = {name: tensor.clone() for name, tensor in training_tensors(parts.policy)}
    engine = parts.engine.engine
    published = engine.weights if is_main_rank() else {}  # pyright: ignore
    figures = train_steps(parts.policy, case, STEPS_BEFORE, STEPS)
    parts.close()
    return Continued(figures, state, tensors, published)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Checkpoint, Figures]]:
    """The checkpoint of a layout (None: of one process), and how that run went on."""
    made: dict[tuple[Case, Spread | None], tuple[Checkpoint, Figures]] = {}

    def save(case: Case, spread: Spread | None) -> tuple[Checkpoint, Figures]:
        if (case, spread) not in made:
            run_dir = tmp_path_factory.mktemp("run")
            if spread is None:
                figures = interrupted_in_one_process(case, run_dir)
            else:
                figures = run_ranks(spread.num_ranks, interrupted, case, spread, run_dir)[0]
            checkpoint = latest_checkpoint(run_dir)
            assert checkpoint is not None
            made[case, spread] = checkpoint, figures
        return made[case, spread]

    return save


EP2 = Spread(2, Layout(expert=2), distributed_optimizer=True)
TP2_SP_EP2 = Spread(2, Layout(tensor=2, expert=2, sequence_parallel=True))

UNTIED, TIED, EXPERTS = Case(), Case(tied=True), Case("qwen3_moe")
ROUTES = {
    "TP2 PP2 to one rank": (UNTIED, TP2_PP2, ONE_RANK),
    "TP2 PP2 to DP2, distributed optimiser": (UNTIED, TP2_PP2, DP2),
    "DP2, distributed optimiser, to TP2 SP": (UNTIED, DP2, TP2_SP),
    "tied: TP2 SP to PP2 DP2, distributed optimiser": (TIED, TP2_SP, PP2_DP2),
    "tied: PP2 DP2, distributed optimiser, to PP2 VPP2": (TIED, PP2_DP2, PP2_VPP2),
    "tied: PP2 DP2, distributed optimiser, to one process": (TIED, PP2_DP2, None),
    "tied: one process to TP2 PP2": (TIED, None, TP2_PP2),
    "experts: DP2 EP2, distributed optimiser, to one process": (EXPERTS, EP2, None),
    "experts: one process to DP2": (EXPERTS, None, replace(DP2, distributed_optimizer=False)),
    "bfloat16: DP2, distributed optimiser, to TP2 SP": (
        Case(dtype=torch.bfloat16),
        DP2,
        TP2_SP,
    ),
    "experts in bfloat16: DP2 EP2, distributed optimiser, to TP2 SP EP2": (
        Case("qwen3_moe_apart", dtype=torch.bfloat16),
        EP2,
        TP2_SP_EP2,
    ),
    "experts in bfloat16: one process to DP2 EP2, distributed optimiser": (
        Case("qwen3_moe_apart", dtype=torch.bfloat16),
        None,
        EP2,
    ),
}


def continued_in_one_process(case: Case, checkpoint: Checkpoint) -> Continued:
    policy = build_torch_policy(case)
    tensors, state = load_training_state(checkpoint)
    policy.optimizer.load_state_tensors(tensors)
    restored = {name: value.clone() for name, value in policy.optimizer.state_tensors().items()}
    published = {name: value.clone() for name, value in policy.named_weights()}
    return Continued(train_steps(policy, case, STEPS_BEFORE, STEPS), state, restored, published)


@pytest.mark.parametrize(("case", "source", "target"), ROUTES.values(), ids=ROUTES.keys())
def test_continues_equally(
    case: Case, source: Spread | None, target: Spread | None, saved: Callable
) -> None:
    checkpoint, straight = saved(case, source)
    if target is None:
        outcomes = [continued_in_one_process(case, checkpoint)]
    else:
        outcomes = run_ranks(target.num_ranks, continued, case, target, checkpoint)
    stored = load_file(checkpoint.path / TENSORS_FILE)
    # The steps after a load repeat the reduction order of another layout, so not the last bit;
    # bfloat16 weights moreover round an update that differs in float32's last bits.
    bound = 1e-5 if case.dtype == torch.float32 else 2e-2
    for outcome in outcomes:
        assert outcome.state["step"] == STEPS_BEFORE
        assert outcome.tensors.keys() == stored.keys()
        for name, tensor in stored.items():
            assert torch.equal(outcome.tensors[name], tensor), name
        for figures, expected in zip(outcome.figures, straight, strict=True):
            assert figures == pytest.approx(expected, rel=bound)
    weights = load_file(checkpoint.hf / "model.safetensors")
    published = dict(
        part
        for name, weight in outcomes[0].published.items()
        for part in file_tensors(name, weight)
    )
    for name, weight in weights.items():
        assert torch.equal(published[name], weight), name


def test_checkpoint_holds_z_and_every_count(saved: Callable) -> None:
    checkpoint, _ = saved(UNTIED, TP2_PP2)
    stored = load_file(checkpoint.path / TENSORS_FILE)
    partition = make_partition(UNTIED)
    assert partition is not None
    for name, parameter in partition.named_parameters():
        assert stored[f"master.partition.{name}"].shape == parameter.shape
        assert not torch.equal(stored[f"master.partition.{name}"], parameter)
        assert stored[f"exp_avg.partition.{name}"].abs().max() > 0
    counts = {float(value) for name, value in stored.items() if name.startswith("step.")}
    assert counts == {STEPS_BEFORE}


def test_hf_folder_is_that_of_one_process(saved: Callable) -> None:
    alone, spread = saved(UNTIED, None)[0].hf, saved(UNTIED, DP2)[0].hf
    names = {path.name for path in alone.iterdir()}
    assert {path.name for path in spread.iterdir()} == names
    assert "generation_config.json" in names
    for name in names - {"model.safetensors"}:
        assert (spread / name).read_text() == (alone / name).read_text(), name
    assert json.loads((spread / "config.json").read_text())["dtype"] == "float32"
    assert GenerationConfig.from_pretrained(spread).eos_token_id == [2, 7]


class GroupCountingAdam(torch.optim.Optimizer):
    """AdamW that counts its updates as the FusedAdam of Transformer Engine and Apex do."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, capturable=False):
        assert adam_w_mode and not capturable  # megatron-core passes it from 0.17 on
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (first, second), lr = group["betas"], group["lr"]
            corrections = 1 - first ** group["step"], 1 - second ** group["step"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].lerp_(parameter.grad**2, 1 - second)
                scale = (state["exp_avg_sq"] / corrections[1]).sqrt() + group["eps"]
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.sub_(lr / corrections[0] * state["exp_avg"] / scale)


def continued_and_saved(
    rank: int, spread: Spread, checkpoint: Checkpoint, run_dir: Path
) -> Figures:
    """Steps after a checkpoint by an Adam that counts in its groups, and a checkpoint of them."""
    # The names under which Megatron imports FusedAdam where it is installed.
    megatron.core.optimizer.Adam = GroupCountingAdam
    megatron.core.optimizer.distrib_optimizer.Adam = GroupCountingAdam
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = False
    parts = build_parts(UNTIED, spread)
    parts.load(checkpoint)
    figures = train_steps(parts.policy, UNTIED, STEPS_BEFORE, STEPS)
    save_step(parts, run_dir, STEPS)
    parts.close()
    return figures


@pytest.mark.parametrize("spread", [TP2_SP, DP2], ids=["TP2 SP", "DP2, distributed optimiser"])
def test_an_adam_that_counts_in_its_groups_continues_equally(
    spread: Spread, saved: Callable, tmp_path: Path
) -> None:
    checkpoint, straight = saved(UNTIED, None)
    for outcome in run_ranks(2, continued_and_saved, spread, checkpoint, tmp_path):
        for figures, expected in zip(outcome, straight, strict=True):
            assert figures == pytest.approx(expected, rel=1e-5)
    stored = load_file(tmp_path / "checkpoints" / f"global_step_{STEPS}" / TENSORS_FILE)
    assert {float(value) for name, value in stored.items() if name.startswith("step.")} == {STEPS}


def other_reference(rank: int, checkpoint: Checkpoint) -> str:
    parts = build_parts(UNTIED, ONE_RANK)
    with pytest.raises(ValueError) as caught:
        replace(parts, reference_fingerprint="of another").load(checkpoint)
    parts.close()
    return str(caught.value)


def test_checkpoint_against_another_reference_is_refused(saved: Callable) -> None:
    checkpoint, _ = saved(UNTIED, TP2_PP2)
    (message,) = run_ranks(1, other_reference, checkpoint)
    assert "of the reference" in message and "of another" in message
