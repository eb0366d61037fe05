"""vLLM engines over random models, and what these should say, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_model import CONFIGS, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3MoeConfig

from flowrl.rollout import Response, SamplingParams
from flowrl.rollout.vllm_engine import VllmEngine
from flowrl.settings import RolloutConfig


def need_vllm() -> None:
    """Skip the calling module where vLLM is not installed."""
    found = find_spec("vllm")  # the folder of these tests is found as well, but has no origin
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed: make vllm", allow_module_level=True)


@contextmanager
def vllm_engine(
    folder: Path, dtype: str = "float32", max_model_len: int = 256, **settings: object
) -> Iterator[VllmEngine]:
    """An engine that is closed on leaving; a process has room for one at a time."""
    engine = VllmEngine(
        str(folder),
        AutoTokenizer.from_pretrained(folder),
        RolloutConfig.model_validate({"engine": "vllm", **settings}),
        dtype=dtype,
        max_model_len=max_model_len,
    )
    try:
        yield engine
    finally:
        engine.close()


def random_weights(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Other weights of the same names and shapes, norms and biases too, a few nats of spread."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_matrix = parameter.ndim > 1
        weights[name] = (0.2 * noise if is_matrix else 1 + 0.2 * noise).to(parameter.dtype)
    return weights


def set_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def write_model(
    folder: Path, kind: str = "llama", *, tied: bool = True, vocab_size: int = 16
) -> PreTrainedModel:
    """An HF folder with two layers of width 128; heads of 32, vLLM's smallest on a CPU."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = {**CONFIGS, "qwen3_moe": Qwen3MoeConfig}[kind](
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
        **(experts if kind == "qwen3_moe" else {}),
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    set_weights(model, random_weights(model, seed=0))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval()


def processed(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probs of the distribution that is sampled from: tempered, cut, renormalised."""
    if params.temperature > 0:
        logits = logits / params.temperature
    if params.top_k > 0:
        kth = logits.topk(params.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        is_cut = torch.zeros_like(before, dtype=torch.bool)
        is_cut.scatter_(-1, order, before >= params.top_p)
        logits = logits.masked_fill(is_cut, -torch.inf)
    return logits.log_softmax(-1)


@torch.no_grad()
def expected_logprobs(
    model: PreTrainedModel, prompt: list[int], response: Response, params: SamplingParams
) -> Tensor:
    """Log-probs [|y|] of a response, in the model's dtype."""
    ids = torch.tensor([[*prompt, *response.token_ids]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    logprobs = processed(logits, params)
    return logprobs.gather(-1, torch.tensor(response.token_ids)[:, None])[:, 0]


def largest_error(
    model: PreTrainedModel,
    prompts: list[list[int]],
    groups: list[list[Response]],
    params: SamplingParams,
) -> float:
    """The largest |log-prob error| of an engine's responses against the model, in its dtype."""
    errors = [
        (torch.tensor(r.logprobs) - expected_logprobs(model, prompt, r, params)).abs().max()
        for prompt, group in zip(prompts, groups, strict=True)
        for r in group
    ]
    return float(torch.stack(errors).max())


def assert_exact(
    exact: PreTrainedModel,
    plain: PreTrainedModel,
    prompts: list[list[int]],
    groups: list[list[Response]],
    params: SamplingParams,
) -> None:
    """An engine's log-probs are as far from float64 as PyTorch's in its dtype, plus 1e-5."""
    plain_errors = [
        expected_logprobs(plain, prompt, r, params) - expected_logprobs(exact, prompt, r, params)
        for prompt, group in zip(prompts, groups, strict=True)
        for r in group
    ]
    bound = float(torch.cat(plain_errors).abs().max()) + 1e-5
    assert largest_error(exact, prompts, groups, params) <= bound
