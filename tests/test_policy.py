"""The packed forward and its gradients against transformers' own, one sequence at a time."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny_model import random_model
from torch import Tensor
from transformers import PreTrainedModel

from flowrl.batch import PackedBatch, Sample, pack, response_values
from flowrl.interface import Objective, TokenOutputs
from flowrl.objectives import ObjectiveOutput
from flowrl.objectives.flow_balance import flow_balance_loss
from flowrl.partition import Pooling, build_partition
from flowrl.policy.attention import packed_attention, plan_attention
from flowrl.policy.forward import forward_tokens, output_weight, token_logprobs
from flowrl.policy.optimizer import MasterAdamW, ParamGroup
from flowrl.policy.torch_policy import TorchPolicy

TEMPERATURE = 0.7
VOCABULARY = 300  # three tiles of the head, the last one ragged
BETA = 15.0


def make_samples() -> list[Sample]:
    """Ragged lengths, prompts shared by several sequences, and two identical sequences."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    first, second = tokens(5), tokens(9)
    third = first[:3]  # the beginning of another prompt is another prompt
    twin = tokens(4)
    pairs = [(first, tokens(1)), (second, tokens(7)), (first, twin), (first, tokens(3))]
    pairs += [(tokens(1), tokens(2)), (third, tokens(6)), (first, twin), (second, tokens(8))]
    samples = []
    for number, (prompt, response) in enumerate(pairs):
        old, ref, rollout = -2 - 3 * torch.rand(3, len(response), generator=generator)
        samples.append(
            Sample(
                prompt,
                response,
                rollout.tolist(),
                group_id=number,
                reward=(-1) ** number * 0.3 * number,
                old_logprobs=old,
                ref_logprobs=ref,
            )
        )
    return samples


def hf_forward(
    model: PreTrainedModel, sample: Sample, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies of the response [|y|], and the prompt's states [P, H]."""
    input_ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    output = model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    first = len(sample.prompt_ids)
    logprobs = (output.logits[0, first - 1 : -1] / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, input_ids[0, first:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return chosen, entropy, output.hidden_states[-1][0, :first]


def twins(kind: str, tied: bool, num_key_value_heads: int, dtype: torch.dtype = torch.float64):
    """The same model with packed attention and with transformers' plain one."""
    packed, plain = (
        random_model(
            kind,
            tied=tied,
            dtype=dtype,
            num_key_value_heads=num_key_value_heads,
            vocab_size=VOCABULARY,
            attention=attention,
        )
        for attention in ("flowrl_packed", "sdpa")  # `eager` rounds to float32
    )
    return packed, plain


MODELS = pytest.mark.parametrize(
    ("kind", "tied", "num_key_value_heads"),
    [
        ("llama", False, 2),
        ("llama", True, 4),
        ("qwen2", True, 1),
        ("qwen2", False, 2),
        ("qwen3", False, 2),
        ("qwen3", True, 1),
    ],
    ids=lambda value: str(value),
)


@MODELS
def test_packed_forward_and_gradients_equal_one_sequence_at_a_time(
    kind: str, tied: bool, num_key_value_heads: int
) -> None:
    packed, plain = twins(kind, tied, num_key_value_heads)
    samples = make_samples()
    batch = pack(samples)
    assert len(batch.trunk_ids) < len(batch.input_ids)
    outputs = forward_tokens(packed, batch, TEMPERATURE, with_entropy=True)
    truth = [hf_forward(plain, s) for s in samples]
    for packed_values, column in ((outputs.logprobs, 0), (outputs.entropy, 1)):
        for value, expected in zip(
            response_values(batch, packed_values), [row[column] for row in truth], strict=True
        ):
            torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-12)
        assert packed_values[batch.prompt_mask].abs().max() == 0
    for number, (_, _, states) in enumerate(truth):
        rows = batch.trunk_rows[int(batch.cu_seqlens[number]) :][: len(states)]
        torch.testing.assert_close(outputs.hidden[rows], states, rtol=0, atol=1e-12)

    coefficients = torch.linspace(-1, 2, len(batch.input_ids), dtype=torch.float64)
    (coefficients * (outputs.logprobs + 0.3 * outputs.entropy)).sum().backward()
    cut = response_values(batch, coefficients)
    terms = [
        (c * (lp + 0.3 * entropy)).sum() for c, (lp, entropy, _) in zip(cut, truth, strict=True)
    ]
    torch.stack(terms).sum().backward()
    expected_grads = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in packed.named_parameters():
        expected = expected_grads[name]
        assert parameter.grad is not None and expected is not None
        bound = 1e-12 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=bound, msg=name)


def test_float32_forward_is_as_close_to_float64_as_float32_allows() -> None:
    packed, _ = twins("qwen3", False, 2, torch.float32)
    _, plain = twins("qwen3", False, 2, torch.float64)
    plain.load_state_dict(packed.state_dict())
    samples = make_samples()
    batch = pack(samples)
    values = response_values(batch, token_logprobs(packed, batch, TEMPERATURE))
    for value, s in zip(values, samples, strict=True):
        assert value.dtype == torch.float32
        expected = hf_forward(plain, s)[0].detach()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-5)


def test_temperature_divides_the_logits() -> None:
    packed, plain = twins("llama", False, 2)
    samples = make_samples()[:2]
    batch = pack(samples)
    for temperature in (0.25, 1.0, 3.0):
        values = response_values(batch, token_logprobs(packed, batch, temperature))
        for value, s in zip(values, samples, strict=True):
            expected = hf_forward(plain, s, temperature)[0].detach()
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    packed, _ = twins("llama", False, 2)
    samples = make_samples()
    together = response_values(pack(samples), token_logprobs(packed, pack(samples), TEMPERATURE))
    for value, s in zip(together, samples, strict=True):
        (alone,) = response_values(pack([s]), token_logprobs(packed, pack([s]), TEMPERATURE))
        torch.testing.assert_close(value, alone, rtol=0, atol=1e-13)


# The update


def flow_objective(
    batch: PackedBatch, outputs: TokenOutputs, log_z: Tensor | None
) -> ObjectiveOutput:
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None
    return flow_balance_loss(
        outputs.logprobs,
        batch.old_logprobs,
        batch.ref_logprobs,
        batch.loss_mask,
        batch.cu_seqlens,
        batch.rewards,
        batch.vargrad_log_z if log_z is None else log_z,
        beta=BETA,
        weighting="clip",
    )


def make_policy(
    model: PreTrainedModel,
    *,
    max_tokens: int = 1000,
    detach_z: bool = True,
    pooling: Pooling = "all",
    drop_mass: float = 0.0,
    has_partition: bool = True,
) -> TorchPolicy:
    groups = [ParamGroup(list(model.named_parameters()), 1e-3)]
    partition = build_partition(16, 3, 0.0, seed=5) if has_partition else None
    if partition is not None:
        named = [(f"partition.{n}", p) for n, p in partition.named_parameters()]
        groups.append(ParamGroup(named, 1e-3))
    optimizer = MasterAdamW(
        groups, betas=(0.9, 0.999), weight_decay=0.1, warmup_steps=0, max_grad_norm=1.0
    )
    return TorchPolicy(
        model, partition, optimizer, TEMPERATURE, max_tokens, pooling, detach_z, drop_mass
    )


def gradients(
    policy: TorchPolicy, samples: list[Sample], objective: Objective = flow_objective
) -> dict[str, Tensor]:
    policy.accumulate_gradients(samples, objective)
    optimizer = policy.optimizer
    return {name: optimizer.main_grads[p].clone() for name, p in optimizer.parameters.items()}


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5
) -> None:
    """Within `relative` of the largest entry of the same tensor, and of everything if it is 0."""
    assert actual.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, value in expected.items():
        bound = relative * max(float(value.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(
            actual[name].double(), value.double(), rtol=0, atol=bound, msg=name
        )


def written_out(
    model: PreTrainedModel,
    samples: list[Sample],
    detach_z: bool,
    pooling: Pooling,
    weighting: Callable[[Tensor], Tensor] = lambda s: s.clamp(0.8, 1.2),
) -> dict[str, Tensor]:
    """Gradients of Eq. 6 by autograd in float64, sequence by sequence, from the plain model."""
    model = copy.deepcopy(model).double()
    partition = build_partition(16, 3, 0.0, seed=5).double()
    loss = torch.zeros((), dtype=torch.float64)
    for s in samples:
        logprobs, _, states = hf_forward(model, s)
        kept = states if pooling == "all" else states[:-1]
        pooled = kept.mean(0) if len(kept) else torch.zeros(16, dtype=torch.float64)
        log_z = partition((pooled.detach() if detach_z else pooled)[None])[0]
        assert s.old_logprobs is not None and s.ref_logprobs is not None
        old, ref = s.old_logprobs.double(), s.ref_logprobs.double()
        weight = weighting((logprobs.detach() - old).sum().exp())
        residual = log_z + logprobs.mean() - BETA * s.reward - ref.mean()
        loss = loss + weight * residual**2
    (loss / len(samples)).backward()
    named = [*model.named_parameters()]
    named += [(f"partition.{n}", p) for n, p in partition.named_parameters()]
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("pooling", ["all", "without_last"])
@pytest.mark.parametrize("detach_z", [True, False], ids=["detached", "through"])
def test_gradient_is_that_of_the_written_formula(
    tied: bool, pooling: Pooling, detach_z: bool
) -> None:
    packed, plain = twins("llama", tied, 2, torch.float32)
    policy = make_policy(packed, detach_z=detach_z, pooling=pooling)
    assert_close(
        gradients(policy, make_samples()), written_out(plain, make_samples(), detach_z, pooling)
    )


def test_z_reaches_the_trunk_only_when_not_detached() -> None:
    def z_only(batch: PackedBatch, outputs: TokenOutputs, log_z: Tensor | None):
        assert log_z is not None
        return ObjectiveOutput(log_z.square().sum(), "sequences", {})

    for detach_z in (True, False):
        packed, _ = twins("llama", False, 2, torch.float32)
        grads = gradients(make_policy(packed, detach_z=detach_z), make_samples(), z_only)
        largest = max(float(g.abs().max()) for n, g in grads.items() if n.startswith("model."))
        assert (largest == 0.0) if detach_z else (largest > 1e-3)
        assert grads["lm_head.weight"].abs().max() == 0
        assert grads["partition.layers.0.weight"].abs().max() > 1e-3


def test_gradients_do_not_depend_on_micro_batches_or_sharing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = make_samples()
    whole = gradients(make_policy(random_model(vocab_size=VOCABULARY), detach_z=False), samples)
    for max_tokens in (17, 25, 60):
        policy = make_policy(
            random_model(vocab_size=VOCABULARY), max_tokens=max_tokens, detach_z=False
        )
        results = policy.accumulate_gradients(samples, flow_objective)
        assert len(results) > 1
        assert max(len(r.batch.input_ids) for r in results) <= max_tokens
        assert sum(r.batch.num_sequences for r in results) == len(samples)
        optimizer = policy.optimizer
        split = {name: optimizer.main_grads[p] for name, p in optimizer.parameters.items()}
        assert_close(split, whole)

    def without_sharing(samples: list[Sample]) -> tuple[Tensor, Tensor]:
        num_tokens = sum(s.num_tokens for s in samples)
        return torch.arange(num_tokens), torch.ones(num_tokens, dtype=torch.bool)

    monkeypatch.setattr("flowrl.batch._share_prompts", without_sharing)
    policy = make_policy(random_model(vocab_size=VOCABULARY), detach_z=False)
    assert_close(gradients(policy, samples), whole)


def test_order_of_samples_changes_nothing() -> None:
    samples = make_samples()
    forwards = gradients(make_policy(random_model(vocab_size=VOCABULARY)), samples)
    backwards = gradients(make_policy(random_model(vocab_size=VOCABULARY)), samples[::-1])
    assert_close(backwards, forwards)


def test_results_carry_what_the_metrics_need() -> None:
    packed, plain = twins("llama", False, 2, torch.float32)
    samples = make_samples()
    policy = make_policy(packed)
    (result,) = policy.accumulate_gradients(samples, flow_objective)
    assert policy.partition is not None and result.log_z is not None
    for s, value, entropy, log_z in zip(
        samples,
        response_values(result.batch, result.logprobs),
        response_values(result.batch, result.entropy),
        result.log_z,
        strict=True,
    ):
        logprobs, expected_entropy, states = hf_forward(plain, s)
        torch.testing.assert_close(value, logprobs.detach(), rtol=0, atol=5e-5)
        torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=0, atol=5e-5)
        torch.testing.assert_close(log_z, policy.partition(states.mean(0)[None])[0])
    assert not result.logprobs.requires_grad and not result.log_z.requires_grad


def test_logprobs_come_back_in_the_order_of_the_samples() -> None:
    packed, plain = twins("llama", False, 2, torch.float32)
    samples = make_samples()
    policy = make_policy(packed, max_tokens=20)
    other = random_model(vocab_size=VOCABULARY, seed=9)
    for value, s in zip(policy.logprobs(samples), samples, strict=True):
        torch.testing.assert_close(value, hf_forward(plain, s)[0].detach(), rtol=0, atol=5e-5)
        assert not value.requires_grad
    for value, s in zip(policy.logprobs(samples, other), samples, strict=True):
        expected = response_values(pack([s]), token_logprobs(other, pack([s]), TEMPERATURE))[0]
        torch.testing.assert_close(value, expected, rtol=0, atol=5e-5)


def test_weight_grad_buffer_receives_what_autograd_would_return() -> None:
    batch = pack(make_samples())
    plain, buffered = (random_model(vocab_size=VOCABULARY, tied=True) for _ in range(2))
    coefficients = torch.linspace(-1, 2, len(batch.input_ids))
    (coefficients * forward_tokens(plain, batch, 1.0).logprobs).sum().backward()
    buffer = torch.full_like(output_weight(buffered), 2.0, requires_grad=False)
    outputs = forward_tokens(buffered, batch, 1.0, weight_grad=buffer)
    (coefficients * outputs.logprobs).sum().backward()
    expected, embedding = output_weight(plain).grad, output_weight(buffered).grad
    assert expected is not None and embedding is not None
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(buffer - 2 + embedding, expected, rtol=0, atol=bound)
    assert (buffer - 2).abs().max() > 0.1 and embedding.abs().max() > 0.1


def test_gradient_checkpointing_changes_no_gradient() -> None:
    samples = make_samples()
    expected = gradients(make_policy(random_model(vocab_size=VOCABULARY)), samples)
    model = random_model(vocab_size=VOCABULARY)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    recomputed = gradients(make_policy(model), samples)
    for name, value in expected.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_bfloat16_gradients_gather_in_float32() -> None:
    samples = make_samples()
    model = random_model(vocab_size=VOCABULARY, dtype=torch.bfloat16)
    exact = random_model(vocab_size=VOCABULARY)
    exact.load_state_dict(model.state_dict())
    expected = gradients(make_policy(exact), samples)["lm_head.weight"]
    policy = make_policy(model, max_tokens=17)
    actual = gradients(policy, samples)["lm_head.weight"]
    assert actual.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())
    # The operands carry 8 bits; a sum rounded to bfloat16 would also have only 8 bits itself.
    assert float((actual - expected).norm() / expected.norm()) < 0.05
    assert not torch.equal(actual, actual.bfloat16().float())


def test_a_kept_softmax_changes_nothing_but_the_products() -> None:
    samples = make_samples()
    models = [random_model(vocab_size=VOCABULARY) for _ in range(2)]
    exact = gradients(make_policy(models[0]), samples)
    policy = make_policy(models[1])
    policy.memory_budget = 2**20
    keeping = gradients(policy, samples)
    for name, grad in keeping.items():
        assert (grad - exact[name]).norm() <= 1e-5 * exact[name].norm(), name
    assert not torch.equal(keeping["lm_head.weight"], exact["lm_head.weight"])  # it was kept


def test_dropped_mass_stays_within_its_bound() -> None:
    samples = make_samples()
    drop_mass = 0.3
    # Peaked logits, so that whole tiles hold less than the budget.
    models = [random_model(vocab_size=VOCABULARY) for _ in range(2)]
    for model in models:
        output_weight(model).data.mul_(6)
    exact = gradients(make_policy(models[0]), samples)
    policy = make_policy(models[1], drop_mass=drop_mass)
    (result,) = policy.accumulate_gradients(samples, flow_objective)
    assert result.dropped_mass is not None
    logprobs = result.logprobs[result.batch.loss_mask]
    budget = drop_mass * (8 * (-torch.expm1(logprobs)).clamp(min=2**-16)).clamp(max=1)
    assert (result.dropped_mass <= budget * (1 + 1e-5)).all()
    assert (result.dropped_mass > 0).any()
    grads = {
        name: policy.optimizer.main_grads[p] for name, p in policy.optimizer.parameters.items()
    }
    difference = (grads["lm_head.weight"] - exact["lm_head.weight"]).norm()
    assert 0 < difference < drop_mass * exact["lm_head.weight"].norm()


# What packed attention cannot do


def test_sliding_windows_soft_caps_and_sinks_are_refused() -> None:
    plan = plan_attention(pack(make_samples()), torch.float32)
    states = torch.zeros(1, 2, len(plan.batch.trunk_ids), 4)
    module = torch.nn.Identity()
    arguments = (module, states, states, states, None)
    assert packed_attention(*arguments, plan=plan, sliding_window=17)[0].shape[1] == states.shape[2]
    with pytest.raises(ValueError, match="17 tokens exceeds the model's sliding window of 16"):
        packed_attention(*arguments, plan=plan, sliding_window=16)
    with pytest.raises(ValueError, match="soft cap"):
        packed_attention(*arguments, plan=plan, softcap=30.0)
    with pytest.raises(ValueError, match="sinks"):
        packed_attention(*arguments, plan=plan, s_aux=torch.zeros(2))


def test_heads_that_change_their_logits_are_refused() -> None:
    model = random_model()
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear) and output_weight(model) is head.weight
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping = 30.0"):
        output_weight(model)
    model.config.final_logit_softcapping = None
    head.bias = torch.nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError, match="head with a bias"):
        output_weight(model)
