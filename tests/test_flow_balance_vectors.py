"""The FlowRL objective against reference values of every published variant."""

import json
from pathlib import Path

import pytest
import torch

from flowrl.kernels import _native
from flowrl.kernels._triton import IS_INTERPRETED
from flowrl.objectives.flow_balance import flow_balance_loss
from flowrl.rewards.normalize import group_normalize

IMPLEMENTATIONS = [None, "reference"] + (["cpu"] if _native.load() else [])
IMPLEMENTATIONS += ["triton"] if IS_INTERPRETED else []
each_implementation = pytest.mark.parametrize(
    "implementation", IMPLEMENTATIONS, ids=[name or "dispatched" for name in IMPLEMENTATIONS]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
F64 = torch.float64
CASES = json.loads((Path(__file__).parent / "vectors" / "flowrl.json").read_text())["cases"]

# variant -> (reward normalisation, options, whether log Z is 0, whether the anchor is pi_old)
VARIANTS = {
    "paper_eq6": ({"epsilon": 0.0}, {"weighting": "clip"}, False, False),
    "paper_eq6_population_std": (
        {"unbiased": False, "epsilon": 0.0}, {"weighting": "clip"}, False, False,
    ),
    "code_flowrl_repo_original": ({}, {"weighting": "raw"}, False, False),
    "code_flowrl_repo_2025_10_04": ({}, {"weighting": "clip"}, False, False),
    "code_verl_pr4397_clamp10": ({}, {"weighting": "cap"}, False, False),
    "code_verl_pr3924_cispo": ({}, {"weighting": "cispo", "clip_high": 0.28}, False, False),
    "code_ablation_no_log_z": ({}, {"weighting": "cap"}, True, False),
    "code_dev_old_policy_no_log_z": ({}, {"weighting": "cap"}, True, True),
    "code_original_tb_no_is_beta1": ({}, {"weighting": "one", "beta": 1.0}, False, False),
}  # fmt: skip


@each_implementation
@each_dtype
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["A_on_policy_hand", "B_off_policy_clips"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_vectors(case, variant, dtype, implementation, layout):
    inputs, expected = CASES[case]["inputs"], CASES[case]["expected"][variant]
    normalisation, options, no_log_z, old_is_anchor = VARIANTS[variant]
    mask = torch.tensor(inputs["mask"], dtype=torch.bool)
    # Packed: response tokens only. Padded: the poison of the padding lies under the mask.
    select = mask if layout == "packed" else torch.ones_like(mask)

    def tokens(rows):
        return torch.tensor(rows, dtype=F64)[select].to(dtype)

    policy = tokens(inputs["log_prob"]).requires_grad_()
    old = tokens(inputs["old_log_prob"])
    ref = old if old_is_anchor else tokens(inputs["ref_log_prob"])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), select.sum(1).cumsum(0)])
    raw_rewards = torch.tensor(inputs["raw_reward"], dtype=dtype)
    rewards = group_normalize(raw_rewards, torch.tensor(inputs["group_id"]), **normalisation)
    log_z = torch.tensor(inputs["log_z"], dtype=dtype) * (not no_log_z)
    log_z.requires_grad_()

    options = {"beta": inputs["beta"], **options}
    out = flow_balance_loss(
        policy, old, ref, mask[select], cu_seqlens, rewards, log_z, **options,
        implementation=implementation,
    )  # fmt: skip
    num_sequences = len(rewards)
    grad_policy, grad_log_z = torch.autograd.grad(out.loss_sum / num_sequences, [policy, log_z])

    tolerance = {"rtol": 1e-6, "atol": 1e-8} if dtype == F64 else {"rtol": 2e-4, "atol": 1e-6}

    def same(got, name, pick=lambda x: x):
        truth = pick(torch.tensor(expected[name], dtype=F64)).to(dtype)
        torch.testing.assert_close(got, truth, **tolerance, msg=lambda text: f"{name}: {text}")

    same(rewards, "r_hat")
    same(out.mean_logprob, "avg_log_prob")
    same(out.residual, "delta")
    same(out.log_weight, "log_w")
    same(out.weight, "w")
    same(out.diagnostics["loss"], "seq_loss")
    same(out.loss_sum / num_sequences, "loss")
    same(grad_policy, "grad_log_prob", lambda x: x[select])
    if not no_log_z:
        same(grad_log_z, "grad_log_z")
    assert out.normalizer == "sequences"
    if "effective_mask" in expected:
        kept = torch.tensor(expected["effective_mask"]).sum(1)
        assert out.diagnostics["num_tokens"].tolist() == kept.tolist()
        dropped = mask.sum(1) - kept
        assert out.diagnostics["num_dropped_tokens"].tolist() == dropped.tolist()
