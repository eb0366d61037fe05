"""Built-in tasks, reasoning-gym, tokenisation and the sampler."""

import json
import os
import time
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flowrl.tasks import (
    Prompt,
    PromptSampler,
    gym,
    load_prompts,
    sums_answers,
    tokenize_prompts,
)
from flowrl.tasks.arithmetic import arithmetic_space
from flowrl.tasks.few_shot import split_space
from flowrl.tasks.gym_worker import answer_request
from flowrl.tasks.letter_count import WORDS
from flowrl.tasks.permutation import fixed_permutation


def content(prompt: Prompt) -> str:
    assert len(prompt.messages) == 1
    assert prompt.messages[0]["role"] == "user"
    return prompt.messages[0]["content"]


def operands(prompts: list[Prompt]) -> set[tuple[int, int]]:
    return {(p.extra_info["a"], p.extra_info["b"]) for p in prompts}


def shown_operands(prompts: list[Prompt], sign: str) -> set[tuple[int, int]]:
    lines = {line for p in prompts for line in content(p).splitlines()[:-1]}
    texts = {line.split("=")[0] for line in lines}
    return {(int(t.split(sign)[0]), int(t.split(sign)[1])) for t in texts}


def both_orders(pairs: set[tuple[int, int]]) -> set[tuple[int, int]]:
    return pairs | {(b, a) for a, b in pairs}


def test_permutation_is_pinned():
    # A change of these values changes every split and every epoch: never "fix" the test.
    assert fixed_permutation(8, "a").tolist() == [2, 0, 1, 7, 4, 5, 6, 3]
    assert sorted(fixed_permutation(1000, "b").tolist()) == list(range(1000))
    assert fixed_permutation(0, "c").tolist() == []


@pytest.mark.parametrize(
    ("task", "digits", "sign"),
    [
        ("addition", (1, 1), "+"),
        ("addition", (2, 2), "+"),
        ("addition", (1, 2), "+"),
        ("multiplication", (2, 1), "*"),
        ("multiplication", (2, 2), "*"),
    ],
    ids=["add-1-1", "add-2-2", "add-1-2", "mul-2-1", "mul-2-2"],
)
def test_splits_partition_all_operand_pairs(task, digits, sign):
    options = {"digits": list(digits)}
    train = load_prompts(task, "train", options=options)
    val = load_prompts(task, "val", options=options, seed=7)
    space = {
        (a, b)
        for a in range(10 ** (digits[0] - 1), 10 ** digits[0])
        for b in range(10 ** (digits[1] - 1), 10 ** digits[1])
    }
    sections = split_space(arithmetic_space(task, digits).class_of, 0.2)
    assert sum(map(len, sections.values())) == len(space)
    assert len(operands(train)) == len(train) == len(sections["train"])
    assert len(operands(val)) == len(val) == len(sections["val"])
    examples = space - operands(train) - operands(val)
    assert len(examples) == len(sections["examples"])
    assert both_orders(operands(train)).isdisjoint(both_orders(operands(val)))
    shown = shown_operands(train + val, sign)
    assert shown <= examples
    assert both_orders(shown).isdisjoint(operands(train) | operands(val))


def test_split_ignores_seed_and_count():
    val = operands(load_prompts("multiplication", "val"))
    for seed in range(5):
        train = load_prompts("multiplication", "train", seed=seed, count=100)
        assert len(operands(train)) == 100
        assert operands(train).isdisjoint(val)


def test_seed_orders_and_never_rewrites_a_question():
    first = load_prompts("addition", "train", seed=0)
    second = load_prompts("addition", "train", seed=1)
    assert first != second
    by_text = {content(p): p for p in first}
    assert {content(p): p for p in second} == by_text
    assert load_prompts("addition", "train", seed=1, count=9) == second[:9]


def test_every_ground_truth_is_right():
    for p in load_prompts("addition", "train", options={"digits": (2, 2)}, count=500):
        assert p.ground_truth == str(p.extra_info["a"] + p.extra_info["b"])
        lines = content(p).split("\n")
        assert lines[-1] == f"{p.extra_info['a']}+{p.extra_info['b']}="
        for line in lines[:-1]:
            left, result = line.split("=")
            assert sum(map(int, left.split("+"))) == int(result)


def test_exact_completion_prompt():
    prompt = load_prompts("multiplication", "val", count=1)[0]
    assert prompt == Prompt(
        data_source="multiplication",
        messages=[{"role": "user", "content": "56*8=448\n36*4=144\n63*7=441\n88*4="}],
        ground_truth="352",
        ability="reasoning",
        style="rule",
        extra_info={"split": "val", "index": 705, "a": 88, "b": 4, "stop": "\n"},
    )


def test_exact_templated_and_chat_prompts():
    template = "Q: {a} times {b}\nA: {c}.\n"
    prompt = load_prompts(
        "multiplication", "val", count=1, options={"template": template, "num_shots": 1}
    )[0]
    assert content(prompt) == "Q: 56 times 8\nA: 448.\nQ: 88 times 4\nA: "
    assert prompt.extra_info["stop"] == ".\n"
    prompt = load_prompts(
        "multiplication",
        "val",
        count=1,
        options={"template": template, "num_shots": 1, "style": "chat"},
    )[0]
    assert prompt.messages == [
        {"role": "user", "content": "Q: 56 times 8\nA:"},
        {"role": "assistant", "content": "448"},
        {"role": "user", "content": "Q: 88 times 4\nA:"},
    ]
    assert prompt.extra_info["stop"] == ""


def test_letter_count_splits_by_word_and_counts_right():
    train, val = (load_prompts("letter_count", split) for split in ("train", "val"))
    train_words = {p.extra_info["b"] for p in train}
    val_words = {p.extra_info["b"] for p in val}
    examples = set(WORDS) - train_words - val_words
    assert len(WORDS) == len(set(WORDS))
    assert train_words.isdisjoint(val_words)
    assert len(examples) == len(WORDS) // 8
    for p in train + val:
        asked, word = p.extra_info["a"], p.extra_info["b"]
        assert p.ground_truth == str(sum(letter == asked for letter in word))
        assert content(p).endswith(f'\nThe letter "{asked}" in "{word}": ')
        assert all(line.split('"')[3] in examples for line in content(p).split("\n")[:-1])
    assert {p.ground_truth for p in train} >= {"0", "1", "2", "3"}


def test_sums_are_enumerable():
    train, val = (load_prompts("sums", split) for split in ("train", "val"))
    assert sorted(p.extra_info["target"] for p in train + val) == list(range(10, 31))
    assert (len(train), len(val)) == (17, 4)
    assert val[0].messages == [{"role": "user", "content": "20="}]
    assert val[0].ground_truth == "20"
    assert sums_answers(4) == ["1+3", "2+2", "3+1"]
    assert sum(len(sums_answers(n)) for n in range(10, 31)) == 19 * 21
    assert len(load_prompts("sums", "train", options={"val_fraction": 0})) == 21


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("multiplicaton", {}, "unknown task 'multiplicaton'; did you mean 'multiplication'"),
        ("addition", {"num_shot": 3}, "no option 'num_shot'; did you mean 'num_shots'"),
        ("addition", {"digits": 2}, "digits is 2: give two counts"),
        ("addition", {"digits": [2, True]}, r"digits is \[2, True\]: give two counts"),
        ("addition", {"digits": [10**9, 1]}, r"digits is \[1000000000, 1\], more than 6"),
        ("addition", {"num_shots": -1}, "num_shots is -1: give a whole number from 0 to 64"),
        ("addition", {"digits": [1, 1], "num_shots": 30}, "num_shots is 30, .* only 8 questions"),
        ("addition", {"style": "raw"}, "style is 'raw': give 'completion' or 'chat'"),
        ("addition", {"val_fraction": 1}, "val_fraction is 1: give a number from 0"),
        ("addition", {"template": "{a}+{b}="}, r"fields \['a', 'b'\]: write"),
        ("addition", {"template": "{c}={a}+{b}"}, r"fields \['c', 'a', 'b'\]: write"),
        ("addition", {"template": "{a.real}+{b}={c}"}, r"fields \['a.real', 'b', 'c'\]"),
        ("addition", {"template": "{a:>9}+{b}={c}"}, "format specification: write"),
        ("addition", {"template": "{a}+{b}={c"}, "expected '}' before end of string: write"),
        ("addition", {"template": 5}, "template is 5: write"),
        ("addition", ["digits"], r"options of task 'addition' are \['digits'\]: give a mapping"),
        ("letter_count", {"digits": [1, 1]}, "'letter_count' has no option 'digits'"),
        ("sums", {"low": 20, "high": 19}, "high is 19: give a whole number from 20"),
        ("sums", {"val_fraction": 0.01}, "val split of 'sums' is empty with val_fraction 0.01"),
        ("addition", {"val_fraction": 0}, "val split of 'addition' is empty with val_fraction 0"),
    ],
)
def test_task_errors_name_the_value(task, options, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(task, "val", options=options)


def test_argument_errors():
    with pytest.raises(ValueError, match="split is 'test': give 'train' or 'val'"):
        load_prompts("sums", "test")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="count is 0: give a whole number from 1"):
        load_prompts("sums", "val", count=0)
    with pytest.raises(ValueError, match="seed is -1: give a whole number from 0"):
        load_prompts("sums", "val", seed=-1)
    with pytest.raises(ValueError, match=r"'sums' reads no files, got \['a.jsonl'\]"):
        load_prompts("sums", "val", files=["a.jsonl"])


def test_gym_splits_are_disjoint_and_scorable():
    # Only 200 questions exist, so an overlap would show.
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = "reasoning_gym/chain_sum"
    train = load_prompts(task, "train", count=60, seed=3, options=options)
    val = load_prompts(task, "val", count=30, seed=4, options=options)
    assert (len(train), len(val)) == (60, 30)
    assert len({content(p) for p in train} | {content(p) for p in val}) == 90
    for p in train + val:
        expression = p.extra_info["entry"]["metadata"]["expression"]
        a, sign, b = expression.split()
        assert p.ground_truth == str(int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert expression in content(p)
        assert p.data_source == task
        assert p.extra_info["dataset"] == "chain_sum"
        assert p.extra_info["options"] == options
        assert json.loads(json.dumps(p.extra_info)) == p.extra_info


def test_gym_repeats_under_any_hash_seed(monkeypatch):
    # ransom_note follows the order of a set of letters.
    runs = []
    for hash_seed, count in (("1", 20), ("2", 5)):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        runs.append(load_prompts("reasoning_gym/ransom_note", "train", count=count))
    assert runs[0][:5] == runs[1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chan_sum", {}, "unknown data set 'chan_sum'; did you mean 'chain_sum'"),
        ("chain_sum", {"min_terms": -2}, "'min_terms': -2.*min_terms must be positive"),
    ],
    ids=["data-set", "value"],
)
def test_gym_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(f"reasoning_gym/{name}", "val", count=2, options=options)


def test_gym_worker_refuses_what_cannot_work():
    request = {"name": "chain_sum", "split": "val", "count": 2, "seed": 0, "options": {}}
    answer = answer_request({**request, "options": {"min_term": 2}})
    assert (answer["kind"], answer["unknown"]) == ("option", "min_term")
    assert "min_terms" in answer["known"]
    # Its scorer compares tuples, which JSON turns into lists.
    answer = answer_request({**request, "name": "rearc"})
    assert "scorer does not recognise entries" in answer["error"]


def test_gym_worker_that_hangs_is_killed_in_time(monkeypatch, tmp_path):
    worker = tmp_path / "sleeper.py"
    worker.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(gym, "WORKER", worker)
    monkeypatch.setattr(gym, "START_S", 5.0)
    monkeypatch.setattr(gym, "QUESTION_S", 0.5)
    started_at = time.monotonic()
    message = r"'reasoning_gym/gcd': reasoning-gym made no questions within 7 s: ask for easier"
    with pytest.raises(ValueError, match=message):
        load_prompts("reasoning_gym/gcd", "train", count=4)
    assert 7 <= time.monotonic() - started_at < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_gym_needs_a_count():
    with pytest.raises(ValueError, match="'reasoning_gym/chain_sum' has no end: give count"):
        load_prompts("reasoning_gym/chain_sum", "train")


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    words = ["[unk]", "<s>", "<user>", "<assistant>", "one", "two", "three", "four", "five"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[unk]", bos_token="<s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def user(*contents: str, role: str = "user") -> Prompt:
    return Prompt("test", [{"role": role, "content": text} for text in contents], "1")


def test_chat_template_and_verbatim_tokens():
    prompts = [user("one two"), user("three", " four")]
    tokenized, num_dropped = tokenize_prompts(prompts, word_tokenizer(), 10, chat_template=True)
    # No <s> from the tokenizer: special tokens are the template's business.
    assert [t.token_ids for t in tokenized] == [[2, 4, 5, 3], [2, 6, 2, 7, 3]]
    assert [t.prompt for t in tokenized] == prompts
    assert num_dropped == 0
    tokenized, _ = tokenize_prompts(prompts, word_tokenizer(None), 10, chat_template=False)
    assert [t.token_ids for t in tokenized] == [[1, 4, 5], [1, 6, 7]]


@pytest.mark.parametrize(
    ("truncation", "expected", "dropped"),
    [
        ("filter", [[1, 4]], 1),
        ("left", [[6, 7, 8], [1, 4]], 0),
        ("right", [[1, 4, 5], [1, 4]], 0),
        ("middle", [[1, 7, 8], [1, 4]], 0),
    ],
)
def test_overlong_prompts(truncation, expected, dropped):
    prompts = [user("one two three four five"), user("one")]
    tokenized, num_dropped = tokenize_prompts(
        prompts, word_tokenizer(), 3, chat_template=False, truncation=truncation
    )
    assert [t.token_ids for t in tokenized] == expected
    assert num_dropped == dropped


def test_tokenisation_errors():
    def tokenize(prompts, length=3, chat_template=False, tokenizer=None, truncation="error"):
        return tokenize_prompts(
            prompts,
            tokenizer or word_tokenizer(),
            length,
            chat_template=chat_template,
            truncation=truncation,
        )

    long = user("one two three four five")
    with pytest.raises(ValueError, match="prompt 1 has 6 tokens, over max_prompt_length 3"):
        tokenize([user("one"), long])
    with pytest.raises(ValueError, match="all 2 prompts .* min 6, median 6, max 6"):
        tokenize([long, long], truncation="filter")
    with pytest.raises(ValueError, match="no chat template: set data.chat_template=false"):
        tokenize([long], chat_template=True, tokenizer=word_tokenizer(None))
    with pytest.raises(ValueError, match="'role': 'system'.*template refuses it: no system"):
        tokenize([user("one", role="system")], chat_template=True)
    with pytest.raises(ValueError, match="truncation is 'up': give"):
        tokenize([long], truncation="up")
    with pytest.raises(ValueError, match="max_prompt_length is 0: give 1 or more"):
        tokenize([long], length=0)
    with pytest.raises(ValueError, match="prompts is empty"):
        tokenize([])
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[unk]": 0}, unk_token="[unk]"))
    )
    with pytest.raises(ValueError, match="prompt 0, '', has no tokens"):
        tokenize([user("")], tokenizer=bare)


@pytest.mark.parametrize(
    ("num_prompts", "batch_size"),
    [(10, 4), (10, 5), (7, 7), (7, 6), (5, 3), (3, 2), (1, 1), (101, 16)],
)
@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in-order"])
def test_sampler_loses_and_repeats_nothing(num_prompts, batch_size, shuffle):
    sampler = PromptSampler(num_prompts, batch_size, seed=5, shuffle=shuffle)
    batches = [sampler.next_batch() for _ in range(num_prompts * 4)]
    assert all(len(set(batch)) == batch_size for batch in batches)
    stream = [index for batch in batches for index in batch]
    epochs = [stream[i : i + num_prompts] for i in range(0, len(stream), num_prompts)]
    assert len(epochs) == 4 * batch_size
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)
    if not shuffle:
        assert stream == list(range(num_prompts)) * (4 * batch_size)
    elif num_prompts >= 10:
        assert all(a != b for a, b in pairwise(epochs))


def test_sampler_is_pinned_and_seeded():
    sampler = PromptSampler(10, 4, seed=0)
    assert [sampler.next_batch() for _ in range(3)] == [[0, 2, 1, 9], [4, 3, 6, 8], [5, 7, 2, 4]]
    assert PromptSampler(10, 4, seed=1).next_batch() != [0, 2, 1, 9]


@pytest.mark.parametrize(("num_prompts", "batch_size"), [(10, 4), (5, 3), (3, 2), (8, 4), (4, 4)])
def test_sampler_resumes_exactly(num_prompts, batch_size):
    sampler = PromptSampler(num_prompts, batch_size, seed=2)
    expected = [sampler.next_batch() for _ in range(30)]
    for done in range(25):
        fresh = PromptSampler(num_prompts, batch_size, seed=2)
        for _ in range(done):
            fresh.next_batch()
        state = json.loads(json.dumps(fresh.state_dict()))
        assert state["position"] == done * batch_size
        resumed = PromptSampler(num_prompts, batch_size, seed=2)
        resumed.load_state_dict(state)
        assert [resumed.next_batch() for _ in range(5)] == expected[done : done + 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_prompts": 11}, "has num_prompts 11, this run has 10"),
        ({"batch_size": 5}, "has batch_size 5, this run has 4"),
        ({"seed": 3}, "has seed 3, this run has 0"),
        ({"shuffle": False}, "has shuffle False, this run has True"),
        ({"position": 13}, "has position 13, not a multiple of 4"),
        ({"position": -4}, "has position -4"),
        ({"position": None}, "has position None"),
        ({"carried": [1]}, r"has carried \[1\], not 2 prompt indices"),
        ({"carried": [1, 1]}, r"has carried \[1, 1\], not 2"),
        ({"carried": [1, 10]}, r"has carried \[1, 10\], not 2"),
    ],
    ids=str,
)
def test_sampler_refuses_another_state(change, message):
    sampler = PromptSampler(10, 4, seed=0)
    for _ in range(3):
        sampler.next_batch()
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**before, **change})
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, 0), "batch_size is 4, more than the 3 prompts"),
        ((3, 0, 0), "batch_size is 0: give 1 or more"),
        ((3, 1, -1), "seed is -1: give 0 or more"),
    ],
    ids=["large", "zero", "seed"],
)
def test_sampler_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptSampler(*arguments)
