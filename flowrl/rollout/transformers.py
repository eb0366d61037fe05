"""Rollouts by transformers in the training process.

Prompts are left-padded and prefilled once; the cache is then repeated for the n responses of a
prompt, and rows that have finished leave the batch.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.policy.forward import output_weight
from flowrl.rollout import Response, SamplingParams

STOP_SLACK = 16  # tokens decoded beyond the longest stop string, for tokens without text


def sample_tokens(
    logits: Tensor, params: SamplingParams, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one token per row of `logits` [R, V]; return ids [R] and log-probs [R] float32.

    The log-prob is that of the truncated, renormalised distribution when top_p or top_k cut it.
    """
    logits = logits.float()
    if params.temperature == 0:
        logprobs = logits.log_softmax(-1)
        ids = logits.argmax(-1)
        return ids, logprobs.gather(-1, ids[:, None])[:, 0]
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        is_cut = torch.ones_like(logits, dtype=torch.bool)
        is_cut.scatter_(-1, logits.topk(params.top_k, -1).indices, False)
        logits = logits.masked_fill(is_cut, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        is_cut = torch.zeros_like(mass_before, dtype=torch.bool)
        is_cut.scatter_(-1, order, mass_before >= params.top_p)
        logits = logits.masked_fill(is_cut, -torch.inf)
    logprobs = logits.log_softmax(-1)
    # The Gumbel trick: argmax(log p + Gumbel noise) is a draw from p.
    noise = torch.empty_like(logprobs).exponential_(generator=generator).log_()
    ids = (logprobs - noise).argmax(-1)
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


class TransformersEngine:
    """Generates with the training process's own model, so publishing copies nothing."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_num_seqs: int = 256,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.max_num_seqs = max_num_seqs
        self.weight_version = 0
        eos = model.generation_config.eos_token_id if model.generation_config else None
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = {eos} if isinstance(eos, int) else set(eos or ())

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[list[Response]]:
        if any(len(p) == 0 for p in prompts):
            raise ValueError("a prompt has no tokens; generation needs at least one")
        generator = torch.Generator(device=self.model.device).manual_seed(seed)
        prompts_at_once = max(1, self.max_num_seqs // params.n)
        responses: list[list[Response]] = []
        trained_with = self.model.config._attn_implementation
        assert trained_with is not None
        was_training = self.model.training
        self.model.eval()
        self.model.set_attn_implementation("sdpa")  # the packed one has no cache
        try:
            for first in range(0, len(prompts), prompts_at_once):
                chunk = prompts[first : first + prompts_at_once]
                responses += self._generate_chunk(chunk, params, generator)
        finally:
            self.model.set_attn_implementation(trained_with)
            self.model.train(was_training)
        return responses

    @torch.no_grad()  # not inference_mode: a rope buffer made here would break the backward
    def _generate_chunk(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        generator: torch.Generator,
    ) -> list[list[Response]]:
        device = self.model.device
        longest = max(len(p) for p in prompts)
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            attention_mask[row, longest - len(prompt) :] = 1
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(input_ids, attention_mask, cache)
        cache.batch_repeat_interleave(params.n)
        logits = logits.repeat_interleave(params.n, 0)
        attention_mask = attention_mask.repeat_interleave(params.n, 0)

        num_rows = len(prompts) * params.n
        token_ids: list[list[int]] = [[] for _ in range(num_rows)]
        logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        has_stopped = [False] * num_rows
        active = list(range(num_rows))
        for position in range(params.max_tokens):
            ids, chosen = sample_tokens(logits, params, generator)
            for row, token, logprob in zip(active, ids.tolist(), chosen.tolist(), strict=True):
                token_ids[row].append(token)
                logprobs[row].append(logprob)
                has_stopped[row] = self._is_end(token_ids[row], params.stop)
            kept = [place for place, row in enumerate(active) if not has_stopped[row]]
            if not kept or position + 1 == params.max_tokens:
                break
            if len(kept) < len(active):
                keep = torch.tensor(kept, device=device)
                cache.batch_select_indices(keep)
                ids, attention_mask = ids[keep], attention_mask[keep]
                active = [active[place] for place in kept]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(kept), 1)], 1)
            logits = self._forward(ids[:, None], attention_mask, cache)
        flat = [
            Response(ids, lps, "stop" if stopped else "length", self.weight_version)
            for ids, lps, stopped in zip(token_ids, logprobs, has_stopped, strict=True)
        ]
        return [flat[i : i + params.n] for i in range(0, num_rows, params.n)]

    def _forward(self, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        hidden = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return F.linear(hidden, output_weight(self.model))

    def _is_end(self, ids: list[int], stop: tuple[str, ...]) -> bool:
        if ids[-1] in self.eos_ids:
            return True
        if not stop:
            return False
        longest = max(len(text.encode()) for text in stop)  # a token is one byte or more
        tail = self.tokenizer.decode(ids[-(longest + STOP_SLACK) :])
        return any(text in tail for text in stop)

    def begin(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> Callable[[], list[list[Response]]]:
        """Sample at once, since trainer and engine share the process."""
        responses = self.generate(prompts, params, seed)
        return lambda: responses

    def publish(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights; those that already share storage with the engine's cost nothing.

        Raises ValueError, before anything is copied, for names or shapes that are not the model's.
        """
        own = dict(self.model.named_parameters())
        weights = dict(named_weights)
        wrong = own.keys() ^ weights.keys()
        wrong |= {n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape}
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights are missing, unknown or of another shape than the model's, "
                f"first {min(wrong)}"
            )
        with torch.no_grad():
            for name, weight in weights.items():
                if own[name].data_ptr() != weight.data_ptr():
                    own[name].copy_(weight)
        self.weight_version = version

    def close(self) -> None:
        del self.model
