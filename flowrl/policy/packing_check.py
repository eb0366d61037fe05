"""Whether a model computes packed sequences as it does each alone, found out before training.

Attention learns the borders of the sequences from us. A layer that carries state along the row
(convolution, Mamba, linear attention) does not: it would let sequences into one another, and no
error would say so.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flowrl.batch import Sample, pack, response_values
from flowrl.policy.forward import token_logprobs

NUM_TOKENS = 4  # of each prompt and response of the probes; short, so that borders count
# Mean |difference| in nats, of a sequence packed alone and among others, and of the packed forward
# and the model's own. Sound models show 0 and 1e-5 in float32, 0 and 0.09 in bfloat16 (SmolLM2);
# models that mix sequences 0.3 to 1.
BOUNDS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.05, 0.25)}


@torch.no_grad()
def check_packing(model: PreTrainedModel, longest: int) -> None:
    """Raise ValueError for a model whose packed log-probs would not be its own.

    Args:
        model: as it trains, in evaluation mode.
        longest: tokens of the longest sequence to come.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and longest > window and "sliding_attention" in layers:
        raise ValueError(
            f"{name} attends to the last {window} tokens, which packed attention cannot: "
            f"data.max_prompt_length + data.max_response_length = {longest} must not exceed them"
        )
    samples = probes(config.vocab_size)
    bound, own_bound = BOUNDS[model.dtype]
    try:
        together = packed_logprobs(model, samples)
        alone = torch.cat([packed_logprobs(model, [sample]) for sample in samples])
    # What layers raise that take no attention function, or none of its arguments.
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{name} cannot run packed sequences: {error}") from error
    mixing = float((together - alone).abs().mean())
    if not mixing <= bound:
        raise ValueError(
            f"{name} lets packed sequences into one another: their log-probs differ by "
            f"{mixing:.2g} nats a token from those of each alone; train a model in which only "
            "attention moves anything from token to token"
        )
    difference = float((together - own_logprobs(model, samples)).abs().mean())
    if not difference <= own_bound:
        raise ValueError(
            f"{name} gives other log-probs by its own forward than by its trunk and the weight of "
            f"its head, by {difference:.2g} nats a token, so they are not trained right"
        )


def packed_logprobs(model: PreTrainedModel, samples: list[Sample]) -> Tensor:
    batch = pack(samples, model.device)
    return torch.cat(response_values(batch, token_logprobs(model, batch, temperature=1.0)))


def probes(vocab_size: int) -> list[Sample]:
    """Three short sequences of random tokens, two of them to one prompt."""
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (
        torch.randint(vocab_size, (3, NUM_TOKENS), generator=generator).tolist() for _ in range(2)
    )
    return [
        Sample(prompts[group], response, [0.0] * NUM_TOKENS, group_id=group)
        for group, response in zip((0, 0, 1), responses, strict=True)
    ]


def own_logprobs(model: PreTrainedModel, samples: list[Sample]) -> Tensor:
    """Log-probs of all response tokens by the model's own forward, sequence by sequence."""
    trained_with = model.config._attn_implementation
    assert trained_with is not None
    model.set_attn_implementation("eager")
    try:
        found = []
        for sample in samples:
            ids = torch.tensor([sample.prompt_ids + sample.response_ids], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -1 - NUM_TOKENS : -1]
            response = ids[0, -NUM_TOKENS:, None]
            found.append(logits.float().log_softmax(-1).gather(-1, response)[:, 0].cpu())
    finally:
        model.set_attn_implementation(trained_with)
    return torch.cat(found)
