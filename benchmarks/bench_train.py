"""One training step end to end: our head against materialised logits, on a random model.

    python benchmarks/bench_train.py                                    # tiny, on the CPU
    python benchmarks/bench_train.py --size qwen2.5-0.5b --device cuda  # 16384 packed tokens

A step is FlowRL's with one mini-batch: a frozen pass for the reference's log-probs, forward and
backward of the policy, and the optimiser. Both variants run flowrl/policy's trunk, objective and
optimiser; the other one replaces the head by F.linear, a float32 log_softmax and a gather. Loss
and gradient norm have to agree, with each other and with the policy's own, before anything is
timed. MFU counts 2 FLOPs a parameter and token of a forward pass, attention included, and three
forward passes for forward and backward, for both variants alike: what is recomputed counts nothing.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from flowrl.batch import PackedBatch, Sample, micro_batches
from flowrl.bench.measure import environment
from flowrl.config import load_config
from flowrl.interface import Objective, TokenOutputs, normalizer_count
from flowrl.kernels.linear_logprob import live_implementation
from flowrl.partition import pool_prompt_states
from flowrl.parts import build_policy
from flowrl.plan.hardware import GPUS
from flowrl.plan.sizes import KNOWN_MODELS, ModelSizes
from flowrl.plan.step_time import layer_flops
from flowrl.policy.attention import NAME as PACKED_ATTENTION
from flowrl.policy.forward import head_outputs, output_weight, trunk_states
from flowrl.policy.torch_policy import TorchPolicy
from flowrl.train import flow_objective

SIZES = {
    "tiny": ModelSizes("qwen2", 2048, 64, 128, 2, 4, 2, 16, True),
    "qwen2.5-0.5b": KNOWN_MODELS["qwen2.5-0.5b"],
    "qwen2.5-1.5b": KNOWN_MODELS["qwen2.5-1.5b"],
}
# Relative, of loss and gradient norm. F.linear rounds bfloat16 logits, by 2^-9 of each.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
ENTROPY_ROWS = 1024  # of the materialised head's entropy, so that it takes no third [T, V]

Head = Callable[[TorchPolicy, PackedBatch, Tensor, bool], TokenOutputs]
Clock = Callable[[str], AbstractContextManager]


def own_head(policy: TorchPolicy, batch: PackedBatch, hidden: Tensor, trains: bool) -> TokenOutputs:
    """The policy's own, as its update and its frozen passes call it."""
    weight_grad = policy.optimizer.main_grads[output_weight(policy.model)]
    return head_outputs(
        policy.model,
        batch,
        hidden,
        policy.temperature,
        with_entropy=trains,
        drop_mass=policy.drop_mass if trains else 0.0,
        weight_grad=weight_grad if trains else None,
    )


def materialised_head(
    policy: TorchPolicy, batch: PackedBatch, hidden: Tensor, trains: bool
) -> TokenOutputs:
    """Logits of all response tokens in the dtype of the model, log_softmax in float32."""
    response = batch.response_mask.nonzero()[:, 0]
    logits = F.linear(hidden[batch.trunk_rows[response - 1]], output_weight(policy.model))
    if policy.temperature != 1:
        logits.div_(policy.temperature)
    logprobs = logits.log_softmax(dim=1, dtype=torch.float32)
    chosen = logprobs.gather(1, batch.input_ids[response][:, None]).squeeze(1)
    zeros = chosen.new_zeros(len(batch.input_ids))
    entropy = zeros
    if trains:
        with torch.no_grad():
            parts = [-(part.exp() * part).sum(1) for part in logprobs.split(ENTROPY_ROWS)]
        entropy = zeros.index_put((response,), torch.cat(parts))
    return TokenOutputs(zeros.index_put((response,), chosen), entropy, hidden, None)


HEADS: dict[str, Head] = {"flowrl": own_head, "materialised": materialised_head}


def no_clock(phase: str) -> AbstractContextManager:
    return nullcontext()


def frozen_pass(policy: TorchPolicy, samples: Sequence[Sample], head: Head) -> None:
    """What the reference model of the same size costs."""
    policy.model.eval()
    with torch.no_grad():
        for _, batch in micro_batches(samples, policy.max_tokens, policy.device):
            head(policy, batch, trunk_states(policy.model, batch), False)


def accumulate(
    policy: TorchPolicy,
    samples: Sequence[Sample],
    objective: Objective,
    head: Head,
    clock: Clock = no_clock,
) -> float:
    """TorchPolicy.accumulate_gradients with any head, cut at the hidden states; the loss sum."""
    policy.model.train()
    total = 0.0
    for _, batch in micro_batches(samples, policy.max_tokens, policy.device):
        with clock("trunk forward"):
            hidden = trunk_states(policy.model, batch)
        with clock("head forward"):
            states = hidden.detach().requires_grad_()
            outputs = head(policy, batch, states, True)
            assert policy.partition is not None
            pooled = pool_prompt_states(states, batch, policy.pooling, policy.detach_z)
            output = objective(batch, outputs, policy.partition(pooled))
            loss = output.loss_sum / normalizer_count(output.normalizer, samples)
        with clock("head backward"):
            loss.backward()
        with clock("trunk backward"):
            hidden.backward(states.grad)
        total += float(output.loss_sum.detach())
    return total


def step(
    policy: TorchPolicy,
    samples: Sequence[Sample],
    objective: Objective,
    head: Head,
    clock: Clock = no_clock,
) -> None:
    with clock("frozen pass"):
        frozen_pass(policy, samples, head)
    accumulate(policy, samples, objective, head, clock)
    with clock("optimiser"):
        policy.optimizer.step(0)


def build_model(sizes: ModelSizes, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Qwen2 of these sizes, randomly initialised."""
    config = Qwen2Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        tie_word_embeddings=sizes.is_tied,
    )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=PACKED_ATTENTION, dtype=dtype
        )


def build_samples(num_tokens: int, length: int, vocab_size: int) -> list[Sample]:
    """Random sequences of one length, a quarter of it prompt; no prompt is shared."""
    if length < 4 or num_tokens < length:
        raise ValueError(f"--tokens {num_tokens} --length {length}: need tokens >= length >= 4")
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(num_tokens // length):
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        num_response = length - length // 4
        samples.append(
            Sample(
                prompt_ids=ids[: length // 4],
                response_ids=ids[length // 4 :],
                rollout_logprobs=[0.0] * num_response,
                group_id=index,
                reward=float(torch.randn((), generator=generator)),
            )
        )
    return samples


def set_logprobs(policy: TorchPolicy, samples: Sequence[Sample]) -> None:
    """Old log-probs of the policy as it is, and a reference that is somewhere else."""
    generator = torch.Generator().manual_seed(1)
    for sample, logprobs in zip(samples, policy.logprobs(samples), strict=True):
        sample.old_logprobs = logprobs
        sample.ref_logprobs = logprobs - 0.5 * torch.rand(len(logprobs), generator=generator)


def grad_norm(policy: TorchPolicy) -> float:
    """The norm of what has been accumulated, which is cleared."""
    norm = torch.nn.utils.get_total_norm(list(policy.optimizer.main_grads.values()))
    policy.optimizer.zero_grad()
    return float(norm)


def check(
    policy: TorchPolicy, samples: Sequence[Sample], objective: Objective, tolerance: float
) -> dict[str, dict[str, float]]:
    """Loss and gradient norm of the policy's own update and of each head, which must agree.

    Raises ValueError where they do not. A head without room for its logits is left out.
    """
    results = policy.accumulate_gradients(samples, objective)
    loss = sum(float(result.output.loss_sum.detach()) for result in results)
    del results
    found = {"policy": {"loss": loss, "grad_norm": grad_norm(policy)}}
    for name, head in HEADS.items():
        try:
            loss = accumulate(policy, samples, objective, head)
        except torch.cuda.OutOfMemoryError:
            policy.optimizer.zero_grad()
            continue
        found[name] = {"loss": loss, "grad_norm": grad_norm(policy)}
        for figure, value in found[name].items():
            expected = found["policy"][figure]
            if not abs(value - expected) <= tolerance * abs(expected):
                raise ValueError(
                    f"{name} gives a {figure} of {value:.6g}, the policy's own update "
                    f"{expected:.6g}; nothing was timed"
                )
    return found


def synchronised_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_steps(
    policy: TorchPolicy,
    samples: Sequence[Sample],
    objective: Objective,
    names: Sequence[str],
    repeats: int,
) -> dict[str, list[float]]:
    """Name -> seconds of a whole step, all in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(repeats + 1):
        for name in names:
            start = synchronised_s(policy.device)
            step(policy, samples, objective, HEADS[name])
            if round_index:
                times[name].append(synchronised_s(policy.device) - start)
    return times


def time_phases(
    policy: TorchPolicy, samples: Sequence[Sample], objective: Objective, head: Head, repeats: int
) -> dict[str, float]:
    """Phase -> seconds, with a synchronisation between phases: medians over steps."""
    steps: list[dict[str, float]] = []

    @contextmanager
    def clock(phase: str) -> Iterator[None]:
        start = synchronised_s(policy.device)
        yield
        steps[-1][phase] = steps[-1].get(phase, 0.0) + synchronised_s(policy.device) - start

    for _ in range(repeats):
        steps.append({})
        step(policy, samples, objective, head, clock)
    return {phase: statistics.median(one[phase] for one in steps) for phase in steps[0]}


def peak_bytes(
    policy: TorchPolicy, samples: Sequence[Sample], objective: Objective, head: Head
) -> dict[str, int] | None:
    """Memory of a step on a GPU: at its peak, and before it (weights and optimiser state)."""
    if policy.device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(policy, samples, objective, head)
    return {"before": before, "peak": torch.cuda.max_memory_allocated()}


def step_flops(sizes: ModelSizes, samples: Sequence[Sample]) -> float:
    """Of a frozen pass and an update, which are four forward passes."""
    num_tokens = sum(sample.num_tokens for sample in samples)
    matrices, attention = layer_flops(sizes, num_tokens, num_tokens / len(samples))
    num_response = sum(len(sample.response_ids) for sample in samples)
    head = 2 * num_response * sizes.vocab_size * sizes.hidden_size
    return 4 * (sizes.num_hidden_layers * (matrices + attention) + head)


def peak_flops(device: torch.device) -> float | None:
    """By the data sheet, of a GPU that flowrl.plan knows."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [gpu for key, gpu in GPUS.items() if key.split("-")[0].upper() in name]
    return known[0].bf16_flops if known else None


def render(report: dict) -> Table:
    phases = report["variants"]["flowrl"]["phases_s"]
    table = Table(title=f"{report['size']}, {report['num_tokens']} tokens, {report['dtype']}")
    for column in ("head", "s/step", "range", "tokens/s", "MFU", "peak GiB", *phases):
        table.add_column(column, justify="right")
    for name, figures in report["variants"].items():
        if "failed" in figures:
            table.add_row(name, figures["failed"])
            continue
        mfu, peak = figures["mfu"], figures["memory_bytes"]
        low, high = figures["range_s"]
        table.add_row(
            name,
            f"{figures['median_s']:.4g}",
            f"{low:.4g} - {high:.4g}",
            f"{figures['tokens_per_s']:.0f}",
            "-" if mfu is None else f"{mfu:.1%}",
            "-" if peak is None else f"{peak['peak'] / 2**30:.1f}",
            *(f"{share:.1%}" for share in figures["phase_shares"].values()),
        )
    return table


def bench(
    size: str,
    num_tokens: int,
    length: int,
    device: torch.device,
    dtype: str,
    repeats: int,
    drop_mass: float = 0.0,
    json_path: Path | None = None,
) -> dict:
    """Check, then measure both heads; the JSON is rewritten after each. Raises ValueError."""
    if size not in SIZES or dtype not in TOLERANCE:
        raise ValueError(
            f"{size} in {dtype}: there are {', '.join(SIZES)} and {', '.join(TOLERANCE)}"
        )
    torch.set_flush_denormal(True)
    sizes = SIZES[size]
    config = load_config(
        None,
        [
            *("data.task=sums", "model.path=random", f"model.dtype={dtype}", "flow.preset=paper"),
            *(f"data.max_prompt_length={length}", f"data.max_response_length={length}"),
            *(f"actor.ppo_max_token_len_per_gpu={max(num_tokens, 2 * length)}",),
            f"actor.drop_mass={drop_mass}",
        ],
    )
    policy = build_policy(config, build_model(sizes, getattr(torch, dtype), device), device)
    objective = flow_objective(config)
    samples = build_samples(num_tokens, length, sizes.vocab_size)
    set_logprobs(policy, samples)
    checked = check(policy, samples, objective, TOLERANCE[dtype])
    used = sum(sample.num_tokens for sample in samples)
    report: dict = {
        "environment": environment(device),
        "implementation": live_implementation(device.type),
        "size": size,
        "model": asdict(sizes),
        "num_parameters": sum(p.numel() for p in policy.model.parameters()),
        "num_tokens": used,
        "num_sequences": len(samples),
        "dtype": dtype,
        "drop_mass": drop_mass,
        "step_flops": step_flops(sizes, samples),
        "peak_flops": peak_flops(device),
        "checked": checked,
    }
    names = [name for name in HEADS if name in checked]
    variants: dict[str, dict] = {n: {"failed": "out of memory"} for n in HEADS if n not in names}
    report["variants"] = variants
    times = time_steps(policy, samples, objective, names, repeats)
    for name in names:
        median = statistics.median(times[name])
        phases = time_phases(policy, samples, objective, HEADS[name], repeats)
        peak = report["peak_flops"]
        ratios = [a / b for a, b in zip(times[name], times[names[-1]], strict=True)]
        variants[name] = {
            "median_s": median,
            "range_s": [min(times[name]), max(times[name])],
            "tokens_per_s": used / median,
            f"ratio_to_{names[-1]}": statistics.median(ratios),
            "mfu": None if peak is None else report["step_flops"] / median / peak,
            "memory_bytes": peak_bytes(policy, samples, objective, HEADS[name]),
            "phases_s": phases,
            "phase_shares": {k: v / sum(phases.values()) for k, v in phases.items()},
        }
        if json_path is not None:
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=150).print(render(report))
    return report


def main(
    size: Annotated[str, typer.Option(help=f"of {', '.join(SIZES)}")] = "tiny",
    tokens: Annotated[int, typer.Option(help="of a step, in one micro-batch")] = 16384,
    length: Annotated[int, typer.Option(help="of a sequence")] = 1024,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="default: bfloat16 on a GPU")] = None,
    repeats: Annotated[int, typer.Option(help="rounds")] = 5,
    drop_mass: Annotated[float, typer.Option(help="a random model's softmax is flat")] = 0.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    where = torch.device(device)
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    bench(size, tokens, length, where, dtype, repeats, drop_mass, json_path)


if __name__ == "__main__":
    typer.run(main)
