"""`builtin:tiny-sums`: a small Llama, made by supervision, that answers "N=" with "a+b".

Its answers can be listed, so success and diversity are exact numbers and not estimates. It starts
where RL has something to do: for N in 10 .. 30 a third of its samples are right, and its right
answers to a prompt are nearly equally likely.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from flowrl.policy.enumerate import exact_success

logger = logging.getLogger(__name__)

# 16 tokens, so that tensor parallelism splits the vocabulary evenly. <bos> is there for tools that
# start from nothing: neither supervision nor the tokenizer puts it before a prompt.
VOCABULARY = [*"0123456789+=", "<bos>", "<eos>", "<pad>", "<unk>"]
BOS, EOS, PAD = 12, 13, 14
TARGETS = range(10, 31)
PROMPT_TOKENS, ANSWER_TOKENS = 3, 6  # "17=", and at most "12+18" with <eos>

# Success rises towards 1 - WRONG_SHARE and is stopped on the way: 0.340 with 17.9 of 19 answers in
# use. Another seed gives 0.325, so another machine's rounding should not move it far.
WRONG_SHARE = 0.5
NUM_STEPS = 420
BATCH_SIZE = 64
LEARNING_RATE = 4e-3
SEED = 0


def build_tiny_sums(folder: Path, *, num_steps: int = NUM_STEPS, seed: int = SEED) -> None:
    """Train the tiny policy and write model and tokenizer to `folder`, for `from_pretrained`.

    Takes 8 to 14 s of one core, and no more than one. The weights (float32) repeat bitwise on one
    kind of processor, whatever the thread count. Raises ValueError when num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: give at least 1")
    logger.warning("training the tiny policy by supervision, about half a minute")
    tokenizer = _tokenizer()
    model = _untrained_model(seed)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step's products are small: threads would mostly wait
    try:
        _supervise(model, num_steps, seed)
    finally:
        torch.set_num_threads(num_threads)
    results = [exact_success(model, tokenizer, target) for target in TARGETS]
    success, effective = (sum(column) / len(results) for column in zip(*results, strict=True))
    logger.info("tiny policy: success %.3f, %.1f answers in use of 19", success, effective)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and nothing added, with or without special tokens asked for."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    characters = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()  # the default puts spaces between words
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _untrained_model(seed: int) -> PreTrainedModel:
    """A Llama of 0.22 M parameters: 2 layers, hidden 96, tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=216,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=32,  # vLLM's attention on CPU takes no smaller one
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,  # 1 / sqrt(hidden); with 0.05 success after 480 steps fell by 0.08
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _corrupted_data() -> Iterator[tuple[list[int], float]]:
    """Every example "N=a+b<eos>" as ids, with its probability.

    N and a are uniform, a + b = N with probability 1 - WRONG_SHARE, and else b is uniform over the
    other numbers of 1 .. N-1.
    """
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    for target in TARGETS:
        for a in range(1, target):
            for b in range(1, target):
                share = 1 - WRONG_SHARE if a + b == target else WRONG_SHARE / (target - 2)
                text = [ids[character] for character in f"{target}={a}+{b}"]
                yield [*text, EOS], share / (target - 1) / len(TARGETS)


def _soft_targets() -> tuple[Tensor, Tensor, Tensor]:
    """The data as tensors: ids [R, 9], probability [R], next-token distributions [R, 6, 16].

    The distribution at a position is the data's own, over all examples that share the text before
    it. Cross-entropy with it has the same expectation as with the next token, and far less noise:
    plain labels, half of them wrong, gave success 0.21 after 1000 steps.
    """
    data = list(_corrupted_data())
    mass: dict[tuple[int, ...], list[float]] = {}
    for ids, probability in data:
        for end in range(PROMPT_TOKENS, len(ids)):
            following = mass.setdefault(tuple(ids[:end]), [0.0] * len(VOCABULARY))
            following[ids[end]] += probability
    places = {prefix: place for place, prefix in enumerate(mass)}
    nothing = len(places)  # a row of zeros, for the pads behind <eos>
    table = torch.tensor([*mass.values(), [0.0] * len(VOCABULARY)], dtype=torch.float64)
    table = (table / table.sum(-1, keepdim=True).clamp(min=1e-300)).float()
    place = torch.full((len(data), ANSWER_TOKENS), nothing)
    tokens = torch.full((len(data), PROMPT_TOKENS + ANSWER_TOKENS), PAD)
    for row, (ids, _) in enumerate(data):
        tokens[row, : len(ids)] = torch.tensor(ids)
        ends = range(PROMPT_TOKENS, len(ids))
        place[row, : len(ends)] = torch.tensor([places[tuple(ids[:end])] for end in ends])
    return tokens, torch.tensor([probability for _, probability in data]), table[place]


def _learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to zero."""
    warm_up = min(1, (step + 1) / max(1, num_steps // 20))
    return LEARNING_RATE * warm_up * (1 + math.cos(math.pi * step / num_steps)) / 2


def _supervise(model: PreTrainedModel, num_steps: int, seed: int) -> None:
    """Minimise the cross-entropy of the answers, batch by batch."""
    tokens, probability, targets = _soft_targets()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    for step in range(num_steps):
        rows = torch.multinomial(probability, BATCH_SIZE, replacement=True, generator=generator)
        logits = model(input_ids=tokens[rows, :-1], use_cache=False).logits
        logprobs = logits[:, PROMPT_TOKENS - 1 :].log_softmax(-1)
        loss = -(targets[rows] * logprobs).sum() / targets[rows].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, num_steps)
        optimizer.step()
        if (step + 1) * 4 // num_steps > step * 4 // num_steps:
            percent = 100 * (step + 1) // num_steps
            logger.info("tiny policy: %d %% of the steps, loss %.3f", percent, loss.item())
    model.eval()
