"""PPO's checkpoint goes from a layout to one process and on to another, critic and policy."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from critic_cases import (
    TOKEN_MEAN,
    build_critic,
    build_torch_critic,
    make_value_head,
    make_value_objective,
    value_samples,
)
from harness import run_ranks
from parallel_cases import Case, Spread, build_torch_policy
from parts_samples import build_parts, run_state, save_step, train_steps
from safetensors.torch import load_file
from tiny_model import tiny_tokenizer
from torch import Tensor

from flowrl.checkpoint import (
    TENSORS_FILE,
    Checkpoint,
    latest_checkpoint,
    load_training_state,
    save_checkpoint,
)
from flowrl.interface import Critic, Policy
from flowrl.megatron.layout import Layout
from flowrl.megatron_parts import MegatronParts, trained_shapes

TP2_PP2 = Spread(4, Layout(tensor=2, pipeline=2))
DP2 = Spread(2, distributed_optimizer=True)
EP2 = replace(DP2, layout=Layout(expert=2))
TP2_SP_EP2 = Spread(2, Layout(tensor=2, expert=2, sequence_parallel=True))
PP2_EP2 = Spread(4, Layout(pipeline=2, expert=2))
ROUTES = {
    "TP2 PP2 to DP2, distributed optimiser": ("llama", TP2_PP2, DP2),
    "experts: one rank to TP2 SP EP2": ("qwen3_moe", Spread(1), TP2_SP_EP2),
    "experts: TP2 SP EP2 to PP2 DP2 EP2": ("qwen3_moe", TP2_SP_EP2, PP2_EP2),
    "experts: PP2 DP2 EP2 to DP2 EP2, distributed optimiser": ("qwen3_moe", PP2_EP2, EP2),
    "experts: DP2 EP2, distributed optimiser, to one rank": ("qwen3_moe", EP2, Spread(1)),
}

Figures = list[tuple[float, float]]


def cases(kind: str) -> tuple[Case, Case]:
    """What policy and critic train."""
    return replace(TOKEN_MEAN, kind=kind, objective="grpo"), replace(TOKEN_MEAN, kind=kind)


def build_ppo_parts(kind: str, spread: Spread) -> MegatronParts:
    policy, critic = cases(kind)
    parts = build_parts(policy, spread)
    return replace(
        parts,
        critic=build_critic(critic, spread),
        trained_shapes=trained_shapes(parts.shapes, None, make_value_head(critic)),
    )


def ppo_steps(kind: str, policy: Policy, critic: Critic, first: int, last: int) -> Figures:
    """(loss, gradient norm) of critic and policy in turn."""
    policy_case, critic_case = cases(kind)
    samples, objective = value_samples(critic_case), make_value_objective(critic_case)
    figures = []
    for step in range(first, last):
        loss = critic.accumulate_gradients(samples, objective)
        grad_norm, is_applied = critic.optimizer.step(step)
        assert is_applied
        figures += [(loss, grad_norm), *train_steps(policy, policy_case, step, step + 1)]
    return figures


def started(rank: int, kind: str, spread: Spread, run_dir: Path) -> Figures:
    """Two steps, a checkpoint, and two more without a stop."""
    parts = build_ppo_parts(kind, spread)
    assert parts.critic is not None
    ppo_steps(kind, parts.policy, parts.critic, 0, 2)
    save_step(parts, run_dir, 2)
    figures = ppo_steps(kind, parts.policy, parts.critic, 2, 4)
    parts.close()
    return figures


def continued_in_one_process(kind: str, checkpoint: Checkpoint, run_dir: Path) -> Figures:
    """The third step, and a checkpoint of it."""
    policy_case, critic_case = cases(kind)
    policy, critic = build_torch_policy(policy_case), build_torch_critic(critic_case)
    stored, state = load_training_state(checkpoint)
    policy.optimizer.load_state_tensors(stored)
    critic.optimizer.load_state_tensors(stored)
    assert_equal(policy.optimizer.state_tensors() | critic.optimizer.state_tensors(), stored)
    figures = ppo_steps(kind, policy, critic, 2, 3)
    save_checkpoint(
        run_dir,
        3,
        model=policy.model,
        tokenizer=tiny_tokenizer(),
        tensors=policy.optimizer.state_tensors() | critic.optimizer.state_tensors(),
        state={**state, "step": 3},
        keep=2,
    )
    return figures


def continued(
    rank: int, kind: str, spread: Spread, checkpoint: Checkpoint, run_dir: Path
) -> Figures:
    """What was read is written again; then the fourth step."""
    parts = build_ppo_parts(kind, spread)
    assert parts.critic is not None
    parts.load(checkpoint)
    save_step(parts, run_dir, 3)
    figures = ppo_steps(kind, parts.policy, parts.critic, 3, 4)
    parts.close()
    return figures


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def newest(run_dir: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(("kind", "source", "target"), ROUTES.values(), ids=ROUTES.keys())
def test_ppo_continues_in_one_process_and_on_another_layout(
    kind: str, source: Spread, target: Spread, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("layout", "process", "other")]
    straight = run_ranks(source.num_ranks, started, kind, source, folders[0])[0]
    stored = load_file(newest(folders[0]).path / TENSORS_FILE)
    assert stored["master.critic.head.weight"].shape == (1, 16)
    assert stored["exp_avg.critic.head.bias"].abs().max() > 0
    assert "master.critic.embed_tokens.weight" in stored
    assert not any("critic.lm_head" in name for name in stored)
    has_experts = "exp_avg_sq.critic.layers.0.mlp.experts.gate_up_proj" in stored
    assert has_experts == (kind == "qwen3_moe")
    alone = continued_in_one_process(kind, newest(folders[0]), folders[1])
    assert alone == [pytest.approx(figures, rel=1e-5) for figures in straight[:2]]
    for figures in run_ranks(
        target.num_ranks, continued, kind, target, newest(folders[1]), folders[2]
    ):
        assert figures == [pytest.approx(expected, rel=1e-5) for expected in straight[2:]]
    assert_equal(
        load_file(newest(folders[2]).path / TENSORS_FILE),
        load_file(newest(folders[1]).path / TENSORS_FILE),
    )


def lacking(rank: int, checkpoint: Checkpoint) -> str:
    parts = build_ppo_parts("llama", DP2)
    with pytest.raises(ValueError) as caught:
        parts.load(checkpoint)
    parts.close()
    return str(caught.value)


def test_checkpoint_without_a_critic_is_refused(tmp_path: Path) -> None:
    policy = build_torch_policy(cases("llama")[0])
    save_checkpoint(
        tmp_path,
        1,
        model=policy.model,
        tokenizer=tiny_tokenizer(),
        tensors=policy.optimizer.state_tensors(),
        state=run_state(1),
        keep=1,
    )
    for message in run_ranks(2, lacking, newest(tmp_path)):
        assert f"{TENSORS_FILE} lacks " in message and "first master.critic." in message
