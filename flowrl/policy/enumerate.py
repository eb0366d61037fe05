"""Exact probabilities of listed responses, for tasks whose right answers can all be listed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@torch.no_grad()
def response_distribution(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs of `responses` [R] after one prompt, all in one teacher-forced pass.

    log pi(y | x) = sum_t log softmax(logits_t / temperature)[y_t], over exactly the tokens given:
    a response that ends has to carry its end token. An empty response has log-prob 0.

    Returns [R] float64 on the model's device; softmax and sums are float64, the logits have the
    model's own precision. Raises ValueError for an empty prompt or a temperature that is not > 0.
    """
    if len(prompt_ids) == 0:
        raise ValueError("prompt_ids is empty: the first token needs a token to follow")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature}: give a finite number > 0")
    num_steps = max((len(response) for response in responses), default=0)
    if num_steps == 0:
        return torch.zeros(len(responses), dtype=torch.float64, device=model.device)
    # Pads stand to the right of all that counts, so the causal mask alone hides them.
    tokens = torch.zeros(len(responses), num_steps, dtype=torch.int64)
    is_real = torch.zeros_like(tokens, dtype=torch.bool)
    for row, response in enumerate(responses):
        tokens[row, : len(response)] = torch.tensor(response, dtype=torch.int64)
        is_real[row, : len(response)] = True
    tokens, is_real = tokens.to(model.device), is_real.to(model.device)
    prompt = torch.tensor(prompt_ids, device=model.device).expand(len(responses), -1)
    logits = _logits(model, torch.cat([prompt, tokens[:, :-1]], 1), num_steps)
    logprobs = (logits.double() / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[..., None])[..., 0]
    return chosen.masked_fill(~is_real, 0).sum(-1)


def _logits(model: PreTrainedModel, input_ids: Tensor, num_last: int) -> Tensor:
    """Logits [R, num_last, V] of the last positions, without dropout, of a padded batch."""
    trained_with, was_training = model.config._attn_implementation, model.training
    assert trained_with is not None
    model.eval()
    model.set_attn_implementation("sdpa")  # the packed one knows no rows
    try:
        return model(input_ids=input_ids, use_cache=False, logits_to_keep=num_last).logits
    finally:
        model.set_attn_implementation(trained_with)
        model.train(was_training)


def exact_success(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    temperature: float = 1.0,
) -> tuple[float, float]:
    """Success and diversity of a policy on the prompt "n=" of the task `sums`, with no sampling.

    Over the n - 1 right answers y = "a+b" followed by the end token, with p = pi(y | "n="):
    success = sum p, and the effective number of answers is exp(-sum q log q), q = p / sum p. It is
    n - 1 when all are equally likely and 1 when the policy knows a single one.

    Each answer counts in the tokenization that `tokenizer` gives it. Raises ValueError for n < 2 or
    a tokenizer without an end token.
    """
    if n < 2:
        raise ValueError(f"n = {n}: a sum of two positive numbers is at least 2")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no answer ever ends: set one")
    answers = [
        [*tokenizer.encode(f"{a}+{n - a}", add_special_tokens=False), tokenizer.eos_token_id]
        for a in range(1, n)
    ]
    prompt = tokenizer.encode(f"{n}=", add_special_tokens=False)
    logprobs = response_distribution(model, prompt, answers, temperature)
    log_success = logprobs.logsumexp(0)
    log_share = logprobs - log_success
    return log_success.exp().item(), (-(log_share.exp() * log_share).sum()).exp().item()
