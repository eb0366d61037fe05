"""Dynamic sampling: which groups are chosen, when it gives up, and that a resumed run repeats."""

from pathlib import Path

import pytest
from training_samples import settings, trained, training_rows, untimed_rows

from flowrl.checkpoint import latest_checkpoint, load_training_state
from flowrl.config import load_config
from flowrl.parts import step_seed
from flowrl.rewards import RewardResult
from flowrl.rollout import Response
from flowrl.sampling import Group, collect_groups, make_groups
from flowrl.settings import Config
from flowrl.tasks import Prompt, TokenizedPrompt

pytestmark = pytest.mark.timeout(300)

FILTER = "algorithm.filter_groups.enable=true"


def prompt(name: str) -> TokenizedPrompt:
    return TokenizedPrompt(Prompt("test", [{"role": "user", "content": name}], ""), [1])


def group(name: str, *scores: float, failure: str | None = None) -> Group:
    responses = [Response([2], [-1.0], "stop", 0) for _ in scores]
    results = [RewardResult(score, failure) for score in scores]
    return Group(prompt(name), responses, ["text"] * len(scores), results)


def config(*changes: str, filter_groups: bool = True) -> Config:
    overrides = settings(Path("model"), Path("run"), "data.train_batch_size=2", *changes)
    overrides.append("actor.ppo_mini_batch_size=2")
    return load_config(None, [*overrides, f"algorithm.filter_groups.enable={filter_groups}"])


def names(groups: list[Group]) -> list[str]:
    return [g.prompt.prompt.messages[0]["content"] for g in groups]


def test_groups_are_cut_in_order() -> None:
    answers = [[Response([i], [0.0], "stop", 0)] * n for i, n in enumerate((2, 3))]
    scores = [RewardResult(float(i)) for i in range(5)]
    groups = make_groups([prompt("a"), prompt("b")], answers, list("vwxyz"), scores)
    assert names(groups) == ["a", "b"]
    assert [g.texts for g in groups] == [["v", "w"], ["x", "y", "z"]]
    assert [[s.score for s in g.scores] for g in groups] == [[0, 1], [2, 3, 4]]
    assert [g.responses for g in groups] == answers


def test_without_the_filter_the_first_batch_is_taken() -> None:
    drawn = [group("a", 1, 1), group("b", 0, 1)]
    assert collect_groups(config(filter_groups=False), lambda i: [drawn][i]) == (drawn, {})


def test_groups_of_use_are_collected_in_order_and_counted() -> None:
    batches = [
        [group("a", 1, 1), group("b", 0, 0, failure="timeout")],
        [group("c", 0, 1), group("d", 1, 1)],
        [group("e", 1, 0), group("f", 0, 1)],
    ]
    groups, metrics = collect_groups(config(), lambda i: batches[i])
    assert names(groups) == ["c", "e"]
    assert metrics == pytest.approx(
        {
            "train/num_gen_batches": 3,
            "train/dropped_groups": 3 / 6,
            "train/leftover_groups": 1 / 6,
            "train/gen_score": 7 / 12,
            "reward/timeout": 2 / 12,
            "reward/crash": 0,
            "reward/exception": 0,
            "reward/invalid": 0,
        }
    )


def test_it_gives_up_after_the_limit() -> None:
    drawn = []

    def draw(batch: int) -> list[Group]:
        drawn.append(batch)
        return [group("a", 1, 1), group("b", 0, 1) if batch == 1 else group("b", 0, 0)]

    limited = config("algorithm.filter_groups.max_num_gen_batches=3")
    with pytest.raises(
        ValueError, match=r"only 1 of 6 groups differ, in 3 batches .* = 2 .* \(mean score 0.583\)"
    ):
        collect_groups(limited, draw)
    assert drawn == [0, 1, 2]


def test_the_seeds_of_further_batches_are_their_own() -> None:
    seeds = {step_seed(seed, step, i) for seed in range(9) for step in range(9) for i in range(9)}
    assert len(seeds) == 729
    assert step_seed(3, 4, 0) == step_seed(3, 4)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a group of rollout.n = 1 always does"):
        config("rollout.n=1")


DYNAMIC = (
    FILTER,
    "algorithm.objective=grpo",
    "data.train_batch_size=3",
    "actor.ppo_mini_batch_size=3",
    "algorithm.filter_groups.max_num_gen_batches=50",
    "data.val_max_samples=1",
    "trainer.val_before_train=false",
)


def test_training_sees_mixed_groups_only_and_resumes_exactly(
    tiny_sums: Path, tmp_path: Path
) -> None:
    trained(tiny_sums, tmp_path / "straight", *DYNAMIC, "trainer.total_training_steps=2")
    rows = training_rows(tmp_path / "straight")
    assert [row["flow/zero_variance_groups"] for row in rows] == [0] * 2
    num_batches = [row["train/num_gen_batches"] for row in rows]
    assert max(num_batches) > 1
    for row in rows:  # 3 groups are chosen of all
        num_groups = 3 * row["train/num_gen_batches"]
        dropped = num_groups * (row["train/dropped_groups"] + row["train/leftover_groups"])
        assert dropped == pytest.approx(num_groups - 3)
        assert row["train/gen_score"] < row["critic/score/mean"]
    checkpoint = latest_checkpoint(tmp_path / "straight")
    assert checkpoint is not None
    _, state = load_training_state(checkpoint)
    assert state["sampler"]["position"] == 3 * sum(num_batches)

    for total in (1, 2):
        trained(tiny_sums, tmp_path / "resumed", *DYNAMIC, f"trainer.total_training_steps={total}")
    # The stop after the first step also judged the policy.
    straight, resumed = (
        [{k: v for k, v in row.items() if not k.startswith("val/")} for row in found]
        for found in (untimed_rows(tmp_path / "straight"), untimed_rows(tmp_path / "resumed"))
    )
    assert [row for row in resumed if "actor/loss" in row] == [
        row for row in straight if "actor/loss" in row
    ]


def test_training_ends_with_an_error_when_no_group_is_of_use(
    tiny_sums: Path, tmp_path: Path
) -> None:
    changes = (*DYNAMIC, "trainer.total_training_steps=1", "rollout.n=2")
    with pytest.raises(ValueError, match=r"filter_groups: the scores of only 0 of 3 groups"):
        trained(
            tiny_sums,
            tmp_path,
            *changes,
            "reward.function=numeric",
            "algorithm.filter_groups.max_num_gen_batches=1",
        )
    assert latest_checkpoint(tmp_path) is None
