"""What a call of `generate` becomes for an engine that serves requests: seeds, ends, limits."""

from collections.abc import Sequence

import numpy as np
from transformers import GenerationConfig, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.rollout import SamplingParams


def config_overrides(is_cpu: bool) -> dict[str, str]:
    """What vLLM's model has otherwise than its files say: on a GPU, a head that rounds no logits.

    Its own rounds them to bfloat16, one of 20 by up to 0.06; the trainer does not. On a CPU vLLM
    would copy the weight to float32 for every token, and generate at 0.6 of the speed.
    """
    return {} if is_cpu else {"head_dtype": "float32"}


def enable_chunked_prefill(is_cpu: bool) -> bool:
    """Whether vLLM may compute a prompt in parts.

    On a CPU version 0.32 fails then, for it sets back the generator of a request that has a seed,
    and torch's for CPUs has no offset.
    """
    return not is_cpu


def request_seeds(seed: int, num_requests: int) -> list[int]:
    """One seed below 2**63 for every request, in order; they depend on nothing else."""
    state = np.random.SeedSequence(seed).generate_state(num_requests, np.uint64)
    return (state >> np.uint64(1)).tolist()


def end_token_ids(
    model_path: str, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The tokens that end a response: the model's generation config names them, or the tokenizer.

    They are those of the transformers engine, whichever the engine would choose by itself.
    """
    try:
        generation_config = GenerationConfig.from_pretrained(model_path)
    except OSError:  # a folder without one
        generation_config = GenerationConfig.from_model_config(hf_config)
    ends = generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [ends] if isinstance(ends, int) else sorted(int(end) for end in ends or ())


def check_prompts(
    prompts: Sequence[Sequence[int]], params: SamplingParams, max_model_len: int
) -> None:
    """Raise ValueError for a prompt without tokens or without room for the whole response."""
    for place, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {place} has no tokens; generation needs at least one")
        if len(prompt) + params.max_tokens > max_model_len:
            raise ValueError(
                f"prompt {place} has {len(prompt)} tokens, and with a response of up to "
                f"{params.max_tokens} exceeds rollout.max_model_len = {max_model_len}; raise it, "
                "or lower data.max_prompt_length or data.max_response_length"
            )
