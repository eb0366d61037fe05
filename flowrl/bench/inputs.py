"""Inputs of the head's benchmark: Gaussian logits, peaked ones, or those of a real model.

The distribution of the logits decides how much of the backward `drop_mass` may leave out, so it is
part of every result. Peaked logits fall off with the token's rank, like those of a language model,
with a few likely tokens on top. Real ones are SmolLM2's on responses that it sampled itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Hidden size and vocabulary of heads in use.
HEADS = {
    "smollm2-135m": (576, 49152),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
    "llama-3-8b": (4096, 128256),
    "qwen2.5-32b": (5120, 152064),
}
SMOLLM2 = "builtin:smollm2-135m-instruct"
RESPONSE_LENGTH = 64
PROMPTS = (
    "What is 17 * 23? Think step by step.",
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "Solve for x: 3x + 7 = 22.",
    "List five uses of a paperclip.",
    "Write a Python function that reverses a string.",
    "A train travels 60 miles in 1.5 hours. What is its average speed?",
    "Summarise the plot of Romeo and Juliet.",
)


@dataclass(frozen=True)
class Case:
    """One shape and one distribution; `states` names a file of `sample_states`."""

    num_rows: int
    hidden_size: int
    vocab_size: int
    dtype: str = "float32"
    logit_std: float = 3.0
    peak: float = 0.0
    states: str | None = None
    temperature: float = 1.0  # of the sampling, with `states` only
    entropy: float = 0.0  # mean nats that peaked logits are scaled to; 0: as they are

    @property
    def distribution(self) -> str:
        if self.states is not None:
            return f"SmolLM2 at temperature {self.temperature:g}"
        if self.peak > 0:
            scaled = f" scaled to {self.entropy:g} nats" if self.entropy > 0 else ""
            return f"peaked, fall {self.peak:g}{scaled}"
        return f"Gaussian, std {self.logit_std:g}"


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden [T, H], weight [V, H], target [T] and the gradients [T] of the log-probs.

    A sampling temperature is folded into the hidden states, since not every rival takes one.
    """
    generator = torch.Generator(device).manual_seed(0)
    if case.states is not None:
        hidden, weight, target = _load_states(case)
    elif case.peak > 0:
        hidden, weight, target = _peaked(case, generator)
        if case.entropy > 0:
            hidden *= _scale_for(case.entropy, hidden[:: -(-case.num_rows // 256)], weight)
    else:
        hidden, weight, target = _gaussian(case, generator)
        weight *= case.logit_std
    dtype = getattr(torch, case.dtype)
    grad = torch.randn(case.num_rows, device=device, generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device), grad


def _gaussian(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    options = {"generator": generator, "device": generator.device}
    hidden = torch.randn(case.num_rows, case.hidden_size, **options)
    weight = torch.randn(case.vocab_size, case.hidden_size, **options)
    target = torch.randint(case.vocab_size, (case.num_rows,), **options)
    return hidden, weight.div_(case.hidden_size**0.5), target


def _peaked(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that fall by `peak` nats per factor e of the rank beyond 64, and six likely tokens."""
    hidden, weight, target = _gaussian(case, generator)
    fall = case.peak * (torch.arange(case.vocab_size, device=generator.device) / 64).log1p()
    hidden *= 0.5
    hidden[:, 0], weight[:, 0] = 1, -fall
    for order in range(6):
        skewed = torch.rand(case.num_rows, generator=generator, device=generator.device) ** 4
        tokens = (skewed * case.vocab_size).long() if order else target
        lift = 12 - 2 * order + 0.8 * fall[tokens]
        hidden[:, 1:] += lift[:, None] * weight[tokens, 1:]
    return hidden, weight, target


def _scale_for(entropy: float, hidden: Tensor, weight: Tensor) -> float:
    """The factor by which logits of this mean entropy in nats come from those of `hidden`."""
    logits = hidden @ weight.t()
    low, high = 1e-3, 1e3
    for _ in range(40):
        middle = (low * high) ** 0.5
        logprobs = (logits * middle).log_softmax(-1)
        is_flatter = float(-(logprobs.exp() * logprobs).sum(-1).mean()) > entropy
        low, high = (middle, high) if is_flatter else (low, middle)
    return middle


def _load_states(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    assert case.states is not None
    saved = torch.load(case.states, weights_only=True)
    if case.temperature not in saved["states"]:
        raise ValueError(
            f"{case.states} has states of temperatures {sorted(saved['states'])}, none of "
            f"{case.temperature:g}; delete it to have them sampled"
        )
    hidden, target = saved["states"][case.temperature]
    num_saved = len(target)
    if case.num_rows > num_saved:
        raise ValueError(f"{case.states} holds {num_saved} rows, not {case.num_rows}; delete it")
    hidden = hidden[: case.num_rows] / case.temperature
    return hidden, saved["weight"], target[: case.num_rows]


def sample_states(
    path: Path, num_rows: int, temperatures: Sequence[float], device: torch.device, cache: Path
) -> None:
    """Save SmolLM2's states on responses that it sampled, `num_rows` tokens per temperature.

    The file holds the head's weight [V, H] and, for each temperature, hidden [T, H], the post-norm
    states, and target [T], the tokens drawn from softmax(hidden weight^T / temperature).
    """
    from flowrl.policy.forward import output_weight
    from flowrl.policy.pretrained import load_model, load_tokenizer, resolve_model_path
    from flowrl.rollout import SamplingParams
    from flowrl.rollout.transformers import TransformersEngine

    home = resolve_model_path(SMOLLM2, cache)
    # The weights are bfloat16, in which a CPU without AMX is three times slower than in float32.
    model = load_model(home, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    engine = TransformersEngine(model, load_tokenizer(home))
    prompts = []
    for text in PROMPTS:
        chat = engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        assert isinstance(chat, str)
        prompts.append(engine.tokenizer.encode(chat, add_special_tokens=False))
    model.set_attn_implementation("sdpa")  # the packed one needs a plan
    states = {}
    for temperature in temperatures:
        params = SamplingParams(n=2, temperature=temperature, max_tokens=RESPONSE_LENGTH)
        hidden, target, seed = [], [], 0
        while sum(map(len, target)) < num_rows:
            groups = engine.generate(prompts, params, seed)
            seed += 1
            for prompt, group in zip(prompts, groups, strict=True):
                for response in group:
                    ids = torch.tensor([prompt + response.token_ids], device=device)
                    with torch.no_grad():
                        output = model.base_model(input_ids=ids, use_cache=False)
                    hidden.append(output.last_hidden_state[0, len(prompt) - 1 : -1].float().cpu())
                    target.append(ids[0, len(prompt) :].cpu())
        states[temperature] = (torch.cat(hidden)[:num_rows], torch.cat(target)[:num_rows])
    torch.save({"weight": output_weight(model).detach().float().cpu(), "states": states}, path)
