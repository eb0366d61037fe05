"""The built-in tiny policy, and exact probabilities by enumeration."""

import itertools
import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flowrl.policy.enumerate import exact_success, response_distribution
from flowrl.policy.pretrained import load_model
from flowrl.policy.tiny import _soft_targets, build_tiny_sums
from flowrl.tasks.sums import SumsOptions, load_sums, sums_answers

ALPHABET = "0123456789+="
EOS = 13
RIGHT_SHARE = 0.5
FEW_STEPS = 40  # enough for answers of the right form; a whole build has 420


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_sums(path, num_steps=FEW_STEPS)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def log_prob(model: PreTrainedModel, prompt: list[int], response: list[int]) -> float:
    """One response alone, token by token, in float64."""
    total = 0.0
    for position, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:position]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
    return total


def test_folder_loads_as_a_float32_llama(model: PreTrainedModel) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # 16 * 96 tied embeddings; a layer: 4 * 96 * 128 attention, 3 * 96 * 216 MLP, 2 * 96 norms.
    assert sum(p.numel() for p in model.parameters()) == 1536 + 2 * (49152 + 62208 + 192) + 96
    assert model.config.vocab_size == 16
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == EOS


@pytest.mark.parametrize("add_special_tokens", [True, False], ids=["special", "plain"])
def test_tokenizer_gives_one_token_a_character_and_nothing_else(
    tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> None:
    encoded = tokenizer("17=", add_special_tokens=add_special_tokens)
    assert dict(encoded) == {"input_ids": [1, 7, 11], "attention_mask": [1, 1, 1]}
    ids = tokenizer(ALPHABET, add_special_tokens=add_special_tokens).input_ids
    assert ids == list(range(12))


def test_tokenizer_round_trips_every_pair_of_characters(tokenizer: PreTrainedTokenizerBase) -> None:
    for first, second in itertools.product(ALPHABET, repeat=2):
        assert tokenizer.decode(tokenizer.encode(first + second)) == first + second
    assert tokenizer.decode([1, 10, 6, EOS], skip_special_tokens=True) == "1+6"


def test_tokenizer_marks_what_it_does_not_know(tokenizer: PreTrainedTokenizerBase) -> None:
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (12, 13, 14)
    assert tokenizer.encode("1 \nx2") == [1, 15, 15, 15, 2]
    assert tokenizer.chat_template is None


def test_every_prompt_and_answer_of_the_task_has_its_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for split in ("train", "val"):
        for prompt in load_sums(split, count=None, seed=0, options=None):
            for text in (prompt.messages[0]["content"], *sums_answers(int(prompt.ground_truth))):
                assert tokenizer.unk_token_id not in tokenizer.encode(text)


def test_supervision_sees_every_target_and_its_answers_evenly() -> None:
    tokens, probability, targets = _soft_targets()
    rows = {tuple(ids): p for ids, p in zip(tokens.tolist(), probability.tolist(), strict=True)}
    options = SumsOptions()
    assert sum(rows.values()) == pytest.approx(1, abs=1e-6)
    num_targets = options.high - options.low + 1
    for n in range(options.low, options.high + 1):
        right = [_padded(f"{n}={answer}") for answer in sums_answers(n)]
        total = sum(rows[row] for row in right)
        assert total == pytest.approx(RIGHT_SHARE / num_targets, rel=1e-5)
        assert all(rows[row] == pytest.approx(total / (n - 1), rel=1e-5) for row in right)
    # After "17=9+" the second number is 8 in the right share, else one of the other 15 of 1 .. 16.
    row = tokens.tolist().index(list(_padded("17=9+8")))
    wrong = (1 - RIGHT_SHARE) / 15
    expected = torch.zeros(16)
    expected[2:10] = wrong
    expected[8] = RIGHT_SHARE
    expected[1] = 8 * wrong  # 1 and 10 .. 16
    torch.testing.assert_close(targets[row, 2], expected)
    assert targets[row, 4].count_nonzero() == 0  # a pad has no target


def _padded(text: str) -> tuple[int, ...]:
    ids = [ALPHABET.index(character) for character in text] + [EOS]
    return (*ids, *[14] * (9 - len(ids)))


def test_two_builds_give_equal_weights_and_leave_the_generator_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = []
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        expected = torch.rand(1)
        torch.manual_seed(seed)
        with caplog.at_level(logging.INFO):
            build_tiny_sums(tmp_path / name, num_steps=4)
        assert torch.rand(1) == expected
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    messages = [record.message for record in caplog.records if "tiny policy" in record.message]
    assert messages[0] == "training the tiny policy by supervision, about half a minute"
    assert [message.split(",")[0] for message in messages[1:5]] == [
        f"tiny policy: {percent} % of the steps" for percent in (25, 50, 75, 100)
    ]


def test_build_refuses_no_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_steps = 0"):
        build_tiny_sums(tmp_path, num_steps=0)


def test_padding_token_in_a_response_is_trained_like_any_other(folder: Path) -> None:
    model = load_model(str(folder), torch.float32, torch.device("cpu"))
    embedding, token = model.get_input_embeddings(), model.config.pad_token_id
    assert isinstance(embedding, torch.nn.Embedding) and token is not None
    embedding(torch.tensor([token, 3, token])).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[:, 0].tolist() == [{3: 1, token: 2}.get(i, 0) for i in range(16)]


def test_log_probs_equal_those_of_each_response_alone(model: PreTrainedModel) -> None:
    prompt, responses = [1, 7, 11], [[8, 10, 9, EOS], [1, 0, 10, 7, EOS], [3], []]
    with torch.no_grad():
        expected = [log_prob(model, prompt, response) for response in responses]
    result = response_distribution(model, prompt, responses)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, torch.tensor(expected).double(), rtol=0, atol=2e-5)
    assert result[3] == 0


def test_probabilities_of_all_short_strings_and_the_rest_sum_to_one(model: PreTrainedModel) -> None:
    """Strings that end within 2 tokens, and all open ones of 2 tokens, part the whole space."""
    others = [token for token in range(16) if token != EOS]
    ended = [[EOS], *([token, EOS] for token in others)]
    open_pairs = [list(pair) for pair in itertools.product(others, repeat=2)]
    for temperature in (1.0, 0.7):
        first = response_distribution(model, [1, 7, 11], ended, temperature).exp().sum()
        rest = response_distribution(model, [1, 7, 11], open_pairs, temperature).exp().sum()
        assert 0 < first < 1
        assert (first + rest).item() == pytest.approx(1, abs=1e-6)


def test_temperature_divides_the_logits(model: PreTrainedModel) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([[1, 7, 11]])).logits[0, -1].double()
    result = response_distribution(model, [1, 7, 11], [[token] for token in range(16)], 2.0)
    torch.testing.assert_close(result, (logits / 2).log_softmax(-1), rtol=0, atol=1e-5)


def test_packed_attention_and_training_mode_come_back(folder: Path, model: PreTrainedModel) -> None:
    packed = load_model(str(folder), torch.float32, torch.device("cpu")).train()
    expected = response_distribution(model, [1, 7, 11], [[8, 10, 9, EOS]])
    assert torch.equal(response_distribution(packed, [1, 7, 11], [[8, 10, 9, EOS]]), expected)
    assert packed.training
    assert packed.config._attn_implementation == "flowrl_packed"


@pytest.mark.parametrize(
    ("prompt", "temperature", "message"),
    [([], 1.0, "prompt_ids is empty"), ([1], 0.0, "temperature = 0"), ([1], math.nan, "= nan")],
    ids=["no-prompt", "greedy", "nan"],
)
def test_distribution_refuses(
    model: PreTrainedModel, prompt: list[int], temperature: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        response_distribution(model, prompt, [[1]], temperature)


def test_exact_success_counts_the_answers_of_the_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = [[*tokenizer.encode(text), EOS] for text in sums_answers(12)]
    with torch.no_grad():
        p = torch.tensor([math.exp(log_prob(model, [1, 2, 11], answer)) for answer in answers])
    share = p / p.sum()
    success, effective = exact_success(model, tokenizer, 12)
    assert success == pytest.approx(p.sum().item(), rel=1e-4)
    assert effective == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=1e-4)


def test_equal_answers_are_all_effective(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """With a zero head every token has probability 1 / 16, so counting gives the truth."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    # 5 = 1+4 = 2+3 = 3+2 = 4+1, each of 3 characters and the end.
    success, effective = exact_success(model, tokenizer, 5)
    assert success == pytest.approx(4 / 16**4, rel=1e-9)
    assert effective == pytest.approx(4, rel=1e-9)


def test_exact_success_lies_in_the_interval_of_a_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    n, num_samples = 10, 6_000
    success, _ = exact_success(model, tokenizer, n)
    generated = model.generate(
        torch.tensor([tokenizer.encode(f"{n}=")]).expand(num_samples, -1),
        do_sample=True,
        top_k=0,
        max_new_tokens=6,
    )
    texts = tokenizer.batch_decode(generated[:, 3:])
    right = {f"{answer}<eos>" for answer in sums_answers(n)}
    hits = sum(text.replace("<pad>", "") in right for text in texts)
    error = math.sqrt(success * (1 - success) / num_samples)
    assert hits > 100
    assert abs(hits / num_samples - success) < 4 * error


def test_exact_success_refuses_a_number_without_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="n = 1"):
        exact_success(model, tokenizer, 1)
