"""The exact comparison of examples/distribution_matching: its targets, measures and command."""

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib import image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowrl.batch import Sample, pack
from flowrl.interface import TokenOutputs
from flowrl.objectives.flow_balance import flow_balance_loss
from flowrl.policy.enumerate import exact_success
from flowrl.policy.tiny import build_tiny_sums
from flowrl.rewards import group_normalize

sys.path.append(str(Path(__file__).parents[1] / "examples" / "distribution_matching"))
exact: ModuleType = __import__("exact")
methods: ModuleType = __import__("methods")
report: ModuleType = __import__("report")
run: ModuleType = __import__("run")

# A policy over four answers, of which the first and third are right.
LENGTHS = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
IS_RIGHT = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
REF = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
GROUP_SIZE = 3


def expected_gradient(
    logprobs: Tensor, log_z: float, beta: float, weighting: str
) -> tuple[Tensor, float]:
    """Of FlowRL's loss by logits [4] and log Z, over all groups that the policy may sample.

    Every answer spreads its log-prob evenly over its tokens.
    """
    logits = logprobs.clone().requires_grad_()
    z = torch.tensor(log_z, dtype=torch.float64, requires_grad=True)
    own = logits.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(4), repeat=GROUP_SIZE):
        members = torch.tensor(group)
        lengths = LENGTHS[members].long()
        policy, ref = ((x / LENGTHS)[members].repeat_interleave(lengths) for x in (own, REF))
        out = flow_balance_loss(
            policy,
            policy.detach(),
            ref,
            torch.ones(len(ref), dtype=torch.bool),
            torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            group_normalize(IS_RIGHT[members], torch.zeros(GROUP_SIZE, dtype=torch.int64)),
            z.expand(GROUP_SIZE),
            beta=beta,
            weighting=weighting,
        )
        total = total + own.detach()[members].sum().exp() * out.loss_sum
    by_logits, by_z = torch.autograd.grad(total, (logits, z))
    return by_logits, float(by_z)


@pytest.mark.parametrize(
    ("beta", "weighting"), [(0.2, "clip"), (1.0, "raw"), (15.0, "cap"), (1.0, "cispo")]
)
def test_flow_target_is_where_the_expected_gradient_vanishes(beta: float, weighting: str) -> None:
    target = exact.flow_target(REF, IS_RIGHT, LENGTHS, beta, GROUP_SIZE)
    assert float(target.exp().sum()) == pytest.approx(1, abs=1e-12)
    right, wrong = exact.expected_rewards(float((target.exp() * IS_RIGHT).sum()), GROUP_SIZE)
    rewards = wrong + (right - wrong) * IS_RIGHT
    log_z = beta * rewards - (target - REF) / LENGTHS  # one number, if all four agree
    torch.testing.assert_close(log_z, log_z[:1].expand(4), rtol=0, atol=1e-10 * beta)
    by_logits, by_z = expected_gradient(target, float(log_z[0]), beta, weighting)
    ref_gradient, _ = expected_gradient(REF, float(log_z[0]), beta, weighting)
    scale = float(ref_gradient.abs().max())
    assert scale > 0.1 * beta
    assert float(by_logits.abs().max()) < 1e-9 * scale
    assert abs(by_z) < 1e-9 * scale


@pytest.mark.parametrize("success", [0.0, 0.3, 1.0])
def test_expected_rewards_are_means_over_all_groups(success: float) -> None:
    sums = [0.0, 0.0]
    for mine in (0, 1):
        for others in itertools.product((0, 1), repeat=3):
            rewards = torch.tensor([mine, *others], dtype=torch.float64)
            chance = math.prod(success if other else 1 - success for other in others)
            normalized = group_normalize(rewards, torch.zeros(4, dtype=torch.int64))
            sums[mine] += chance * float(normalized[0])
    assert exact.expected_rewards(success, 4) == pytest.approx((sums[1], sums[0]), abs=1e-12)


def test_balance_loss_vanishes_at_its_target_and_is_the_formula_elsewhere() -> None:
    beta = 2.0
    target = exact.trajectory_balance_target(REF, IS_RIGHT, beta)
    log_z = math.log(0.7 + 0.3 * math.e**2)  # 0.3 of the reference is right
    expected = REF + beta * IS_RIGHT - log_z
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-12)

    def loss(policy: Tensor, log_z: Tensor) -> Tensor:
        samples = [
            Sample(
                prompt_ids=[7, 8],
                response_ids=[1] * n,
                rollout_logprobs=[0.0] * n,
                group_id=0,
                reward=float(IS_RIGHT[i]),
                ref_logprobs=(REF[i] / n).expand(n).float(),
            )
            for i, n in enumerate(LENGTHS.int().tolist())
        ]
        batch = pack(samples)
        logprobs = torch.full((len(batch.input_ids),), torch.nan)  # prompts must not count
        spread = (policy / LENGTHS).repeat_interleave(LENGTHS.long()).float()
        logprobs = logprobs.masked_scatter(batch.loss_mask, spread)
        outputs = TokenOutputs(logprobs, logprobs, torch.empty(0), None)
        out = methods.balance_objective(beta)(batch, outputs, log_z)
        assert out.normalizer == "sequences"
        return out.loss_sum

    assert float(loss(target, torch.full((4,), log_z))) < 1e-11
    policy = torch.tensor([0.25] * 4).double().log().requires_grad_()
    z = torch.tensor([0.5, 0.0, -1.0, 2.0], requires_grad=True)
    truth = (z.double() + policy - REF - beta * IS_RIGHT).square().sum()
    value = loss(policy, z)
    assert value.item() == pytest.approx(truth.item(), rel=1e-6)
    own_gradients = torch.autograd.grad(value, (policy, z))
    true_gradients = torch.autograd.grad(truth, (policy, z))
    for own, true in zip(own_gradients, true_gradients, strict=True):
        torch.testing.assert_close(own.double(), true.double(), rtol=1e-5, atol=1e-6)


def test_answer_measures_by_hand() -> None:
    logprobs = torch.tensor([0.4, 0.2, 0.2], dtype=torch.float64).log()
    ref = torch.tensor([0.1, 0.1, 0.2], dtype=torch.float64).log()
    measures = exact.answer_measures(logprobs, ref)
    # Shares 1/2, 1/4, 1/4 against 1/4, 1/4, 1/2: entropy 1.5 bits, KL 1/2 - 1/4 bits.
    assert measures["success"] == pytest.approx(0.8)
    assert measures["effective_answers"] == pytest.approx(2**1.5)
    assert measures["kl_right"] == pytest.approx(0.25 * math.log(2))
    assert measures["pass@4"] == pytest.approx(1 - 0.2**4)
    assert measures["distinct@16"] == pytest.approx(3 - 0.6**16 - 2 * 0.8**16)


def test_cells_hold_all_mass_once(tiny_sums: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_sums)
    tokenizer = AutoTokenizer.from_pretrained(tiny_sums)
    cells = exact.cells_of(tokenizer, 12)
    assert len(set(cells.answers)) == len(cells.answers) == 11 * 11
    assert [eval(text) == 12 for text in cells.answers] == [True] * 11 + [False] * 110  # ours
    assert cells.is_right.tolist() == [1.0] * 11 + [0.0] * 111
    assert cells.lengths[:2].tolist() == [5, 5] and cells.lengths[2].item() == 4  # 1+11, 2+10, 3+9
    logprobs = exact.cell_logprobs(model, cells)
    assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert 0 < float(logprobs[-1].exp()) < 0.5
    right = exact.right_logprobs(model, cells)
    torch.testing.assert_close(right, logprobs[:11], rtol=0, atol=1e-4)
    measures = exact.answer_measures(right, right)
    expected = exact_success(model, tokenizer, 12)
    assert (measures["success"], measures["effective_answers"]) == pytest.approx(expected, rel=1e-9)
    assert measures["kl_right"] == 0


def test_equal_success_is_interpolated_at_the_first_crossing() -> None:
    curve = [{"success": s, "x": x} for s, x in ((0.4, 10.0), (0.6, 6.0), (0.5, 5.0), (0.9, 1.0))]
    assert report.at_success(curve, 0.5, "x") == pytest.approx(8)
    assert report.at_success(curve, 0.6, "x") == pytest.approx(6)
    assert report.at_success(curve, 0.75, "x") == pytest.approx(2.5)
    assert report.at_success(curve, 0.4, "x") is None  # where it started
    assert report.at_success(curve, 0.95, "x") is None
    high, low = ({"curve": curve}, {"curve": curve[:2]})
    intervals = report.equal_success([high, high], "x")
    assert intervals[0.5] == pytest.approx((8, 0, 2))
    assert intervals[0.9] == pytest.approx((1, 0, 2))
    assert report.equal_success([high, low], "x")[0.9] is None  # a seed does not get there


def test_differences_at_equal_success_are_taken_seed_by_seed() -> None:
    def record(seed: int, end: float) -> dict:
        return {
            "seed": seed,
            "curve": [{"success": 0.45, "x": 20.0}, {"success": 0.65, "x": end}],
        }

    own, rivals = [record(0, 16.0), record(1, 8.0)], [record(1, 4.0), record(0, 12.0)]
    levels = report.equal_success(own, "x", rivals)
    assert levels[0.5].mean == pytest.approx(1.0)  # a quarter of the way; 4 at its end
    assert levels[0.5].half_width == pytest.approx(0.0)
    assert levels[0.9] is None
    assert report.Interval(1.0, 2.0, 2).text("+.1f") == "+1.0 +- 2.0"


def test_t_interval_by_hand() -> None:
    # Standard deviation 1, so 4.303 / sqrt(3).
    assert report.t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.4843, 3), rel=1e-4)
    assert math.isnan(report.t_interval([1.0]).half_width)
    with pytest.raises(ValueError, match="12 seeds: give 1 to 9"):
        report.t_interval([1.0] * 12)


def test_rate_is_chosen_by_the_mean_over_tuning_seeds() -> None:
    rows = [("grpo", 1e-4, 3.0), ("grpo", 1e-3, 9.0), ("grpo", 1e-4, 8.0), ("grpo", 1e-3, 1.0)]
    rows += [("ppo", 1e-4, 1.0), ("ppo", 1e-3, 2.0)]
    tuning = [{"method": m, "lr": lr, "curve": [{report.TUNED_FOR: x}]} for m, lr, x in rows]
    assert report.choose_rates(tuning) == {"grpo": 1e-4, "ppo": 1e-3}


def test_command_measures_two_methods_and_continues(
    tiny_sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "runs", tmp_path / "out"
    arguments = {
        "folder": folder,
        "methods": ["flow_paper", "balance"],
        "seeds": 1,
        "tuning_seeds": 1,
        "rates": [1e-3],
        "steps": 6,
        "processes": 1,
        "model": str(tiny_sums),
        "out": out,
    }
    run.main(**arguments)
    record = json.loads((out / "benchmarks/results/distribution_matching.json").read_text())
    flow, balance = record["results"]
    assert (flow["method"], balance["method"]) == ("flow_paper", "balance")
    model = AutoModelForCausalLM.from_pretrained(tiny_sums)
    tokenizer = AutoTokenizer.from_pretrained(tiny_sums)
    pairs = [exact_success(model, tokenizer, number) for number in record["trained_on"]]
    success, effective = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    for result in (flow, balance):
        curve = result["curve"]
        assert curve["step"] == [0, 5, 6]
        assert curve["success"][0] == pytest.approx(success, rel=1e-4)
        assert curve["effective_answers"][0] == pytest.approx(effective, rel=1e-4)
        assert curve["kl_right"][0] == 0 and min(curve["kl_right"][1:]) > 0.01
        assert curve["kl_target"][1] is None  # the expensive one, taken less often
        assert result["target"]["success"]["mean"] > 0.8
    assert record["environment"]["commit"] and record["num_starts"] == 1
    for name in ("distribution_training.png", "distribution_answers.png"):
        pixels = image.imread(out / "docs" / "images" / name)[:, :, :3]
        assert (pixels.max(axis=2) - pixels.min(axis=2) > 0.3).sum() > 500  # coloured ones

    # A lost run is made again, to the same numbers; the others are read.
    lost = folder / "balance_lr0.001_seed0_steps6.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    capsys.readouterr()
    run.main(**arguments)
    lines = capsys.readouterr().out
    assert "2 runs, 1 of them finished earlier" in lines and "[2/2] balance" in lines
    after = json.loads(lost.read_text())
    assert {**after, "elapsed_s": 0} == {**before, "elapsed_s": 0}


def test_every_seed_has_a_start_policy_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "build_tiny_sums", partial(build_tiny_sums, num_steps=2))
    weights = []
    for seed in (0, 1, 1):
        home = tmp_path / f"seed{seed}"
        run.start_policy(home, seed)  # the third finds what the second made
        weights.append((home / "model.safetensors").read_bytes())
    assert weights[0] != weights[1] and weights[1] == weights[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1"]


def test_runs_of_one_seed_from_several_policies_are_refused(tmp_path: Path) -> None:
    records = [{"seed": seed, "reference": str(place)} for place, seed in enumerate((0, 1, 1))]
    with pytest.raises(ValueError, match="one seed started from several policies"):
        report.write_report(records, [], tmp_path)


def test_unknown_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(run.typer.BadParameter, match="no method .'dpo'.; there are flow_paper"):
        run.main(tmp_path, ["dpo"], 1, 1, [1e-3], 1, 1, None, None)


@pytest.mark.parametrize("seeds", [0, 10, 12])
def test_seeds_without_a_quantile_are_refused_before_training(tmp_path: Path, seeds: int) -> None:
    with pytest.raises(run.typer.BadParameter, match=f"--seeds is {seeds}; give 1 to 9"):
        run.main(tmp_path, ["grpo"], seeds, 1, [1e-3], 1, 1, None, None)
    assert not list(tmp_path.iterdir())
