"""Group-normalised rewards."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowrl.rewards.normalize import group_normalize

F64 = torch.float64
CASES = json.loads((Path(__file__).parent / "vectors" / "flowrl.json").read_text())["cases"]


def test_by_hand():
    # Mean 0, unbiased standard deviation sqrt(4/3).
    rewards = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=F64)
    ids = torch.zeros(4, dtype=torch.int64)
    unbiased = group_normalize(rewards, ids, epsilon=0)
    expected = torch.tensor([math.sqrt(0.75)] * 2 + [-math.sqrt(0.75)] * 2, dtype=F64)
    torch.testing.assert_close(unbiased, expected, rtol=1e-15, atol=0)
    assert group_normalize(rewards, ids, unbiased=False, epsilon=0).tolist() == [1, 1, -1, -1]
    with_epsilon = group_normalize(rewards, ids)[0].item()
    assert with_epsilon == pytest.approx(1 / (math.sqrt(4 / 3) + 1e-6), rel=1e-14)


@pytest.mark.parametrize("case", ["A_on_policy_hand", "B_off_policy_clips"])
@pytest.mark.parametrize(
    ("variant", "unbiased", "epsilon"),
    [
        ("paper_eq6", True, 0.0),
        ("paper_eq6_population_std", False, 0.0),
        ("code_flowrl_repo_original", True, 1e-6),
    ],
)
def test_vectors(case, variant, unbiased, epsilon):
    inputs = CASES[case]["inputs"]
    rewards = torch.tensor(inputs["raw_reward"], dtype=F64)
    result = group_normalize(rewards, torch.tensor(inputs["group_id"]), unbiased, epsilon)
    expected = torch.tensor(CASES[case]["expected"][variant]["r_hat"], dtype=F64)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


def test_groups_are_found_in_any_order():
    rewards = torch.tensor([0.0, 5.0, 2.0, 5.0, 7.0, 11.0], dtype=F64)
    ids = torch.tensor([7, -3, 7, 10**12, -3, 10**12])
    result = group_normalize(rewards, ids, epsilon=0)
    half = math.sqrt(0.5)  # two members: +-1/sqrt(2), whatever their distance
    expected = torch.tensor([-half, -half, half, -half, half, half], dtype=F64)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("unbiased", [True, False])
def test_group_of_one_keeps_its_reward(unbiased):
    rewards = torch.tensor([3.0, 1.0, 2.0], dtype=F64)
    result = group_normalize(rewards, torch.tensor([4, 5, 5]), unbiased)
    assert result[0].item() == 3.0 / (1 + 1e-6)
    assert result[1].item() < 0 < result[2].item()


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_equal_rewards_give_zero(epsilon, dtype):
    # In float64 the mean of three times 0.1 is not 0.1.
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.1], dtype=dtype)
    result = group_normalize(rewards, torch.tensor([0, 0, 0, 1, 1]), epsilon=epsilon)
    assert result[:3].tolist() == [0.0, 0.0, 0.0]
    assert result[3].item() == pytest.approx(math.sqrt(0.5), rel=1e-5)


def test_float32_is_computed_in_float64():
    # In float32 the spacing at 1e4 is 1e-3, so a float32 mean would be wrong in the third digit.
    rewards = torch.tensor([10000.0, 10000.001, 10000.002, 10000.004])
    result = group_normalize(rewards, torch.zeros(4, dtype=torch.int32))
    values = rewards.double()
    expected = (values - values.mean()) / (values.std() + 1e-6)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)


def test_no_rewards():
    result = group_normalize(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert result.shape == (0,) and result.dtype == torch.float32


@pytest.mark.parametrize(
    ("rewards", "ids", "options", "message"),
    [
        ([1.0, math.nan], [0, 0], {}, r"rewards\[1\] is nan"),
        ([1.0, 2.0, -math.inf], [0, 0, 0], {}, r"rewards\[2\] is -inf"),
        ([1, 2], [0, 0], {}, "floating point"),
        ([[1.0, 2.0]], [[0, 0]], {}, r"shape \[B\]"),
        ([1.0, 2.0], [0, 0, 0], {}, r"shape \[2\]"),
        ([1.0, 2.0], [0.0, 0.0], {}, "integers"),
        ([1.0, 2.0], [0, 0], {"epsilon": -1e-6}, "epsilon .* got -1e-06"),
        ([1.0, 2.0], [0, 0], {"epsilon": math.nan}, "epsilon .* got nan"),
    ],
)
def test_errors(rewards, ids, options, message):
    with pytest.raises(ValueError, match=message):
        group_normalize(torch.tensor(rewards), torch.tensor(ids), **options)


def test_import_does_not_load_torch():
    code = "import sys, flowrl.rewards.normalize; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
