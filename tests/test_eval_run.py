"""`flowrl eval --tasks` from end to end, on a model of 0.2 M parameters that writes sums."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from eval_samples import write_rows
from torch import Tensor
from training_samples import cli, refused

from flowrl.evaluation import grade
from flowrl.evaluation.engine import build_engine, find_model, fingerprint
from flowrl.evaluation.generations import (
    Generation,
    generate,
    keep_whole_batches,
    plan_batches,
    read_generations,
)
from flowrl.evaluation.grade import GradingSettings
from flowrl.evaluation.results import powers_of_two
from flowrl.evaluation.run import evaluate, regrade
from flowrl.evaluation.settings import EvalSettings, keep_settings, load_settings
from flowrl.evaluation.tasks import load_task
from flowrl.policy.pretrained import load_tokenizer
from flowrl.policy.tiny import EOS
from flowrl.rollout import Response, SamplingParams

FILES = {
    "settings.json",
    "generations.jsonl",
    "grades.jsonl",
    "disagreements.jsonl",
    "results.json",
    "pass_at_k.png",
}
OPTIONS = ("--tasks", "sums", "--n", "6", "--temperature", "1.0", "--top-p", "1.0", "--greedy")
SMALL = ("--max-tokens", "6", "--max-num-seqs", "12", "--dtype", "float32", "--device", "cpu")
SPEED = ("--num-workers", "1")


def settings_of(model: Path, **changes: object) -> EvalSettings:
    values = EvalSettings(
        model=str(model),
        fingerprint=fingerprint(model),
        tasks=("sums",),
        data=None,
        n=6,
        temperature=1.0,
        top_p=1.0,
        max_tokens=6,
        seed=0,
        greedy=True,
        limit=None,
        template=None,
        chat_template=False,
        engine="transformers",
        dtype="float32",
        max_num_seqs=12,
    )
    return replace(values, **changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def evaluated(tiny_sums: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("eval") / "out"
    code, out, err = cli("eval", tiny_sums, *OPTIONS, *SMALL, *SPEED, "--output", folder)
    assert code == 0, err
    return folder, out


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_everything_is_written(evaluated: tuple[Path, str], tiny_sums: Path) -> None:
    folder, out = evaluated
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    assert f"results  {folder}" in out
    for heading in ("avg@6", "pass@6", "maj@6", "greedy", "effective", "2-grams", "BLEU"):
        assert heading in out
    generations = read_generations(folder / "generations.jsonl")
    assert len(generations) == 4 * 7
    for g in generations:
        assert g.task == "sums" and g.model == fingerprint(tiny_sums)
        assert 1 <= g.num_tokens <= 6 and g.logprob_sum <= 0
        assert g.prompt.endswith("=") and g.finish_reason in ("stop", "length")


def test_figures_are_those_of_the_responses(evaluated: tuple[Path, str]) -> None:
    """Every figure once more, from generations.jsonl alone."""
    folder, _ = evaluated
    by_prompt: dict[str, list[Generation]] = {}
    greedy = []
    for g in read_generations(folder / "generations.jsonl"):
        if g.decoding == "greedy":
            greedy.append(g)
        else:
            by_prompt.setdefault(g.prompt, []).append(g)

    def is_right(g: Generation) -> bool:
        a, _, b = g.response.partition("+")
        is_sum = a.isdigit() and b.isdigit() and a[0] != "0" and b[0] != "0"
        return is_sum and int(a) + int(b) == int(g.prompt.rstrip("="))

    groups = list(by_prompt.values())
    (group,) = results_of(folder)["groups"]
    assert (group["num_prompts"], group["num_samples"]) == (4, 6)
    correct = [sum(map(is_right, own)) for own in groups]
    assert 0 < sum(correct) < 24  # otherwise what follows says nothing
    found = group["graders"]["expression"]
    assert found["avg"]["mean"] == pytest.approx(sum(correct) / 24)
    for k in (1, 2, 4, 6):
        expected = [1 - math.comb(6 - c, k) / math.comb(6, k) for c in correct]
        assert found["pass_at"][str(k)]["mean"] == pytest.approx(sum(expected) / 4)
    majority = 0.0
    for own in groups:
        votes = Counter(g.response for g in own)
        winners = [g for g in own if votes[g.response] == max(votes.values())]
        majority += sum(map(is_right, winners)) / len(winners) / 4
    assert found["majority_at"]["6"]["mean"] == pytest.approx(majority)
    assert found["greedy"]["mean"] == pytest.approx(sum(map(is_right, greedy)) / 4)
    distinct = [len({g.response for g in own if is_right(g)}) for own in groups]
    assert group["diversity"]["distinct_correct_answers"]["mean"] == sum(distinct) / 4
    tokens = [g.num_tokens for own in groups for g in own]
    assert group["mean_tokens"] == pytest.approx(sum(tokens) / 24)
    cut = [g.finish_reason == "length" for own in groups for g in own]
    assert group["truncated"] == pytest.approx(sum(cut) / 24)


@pytest.mark.parametrize("kept_bytes", [900, -40], ids=str)
def test_killed_run_continues_to_the_same_generations(
    evaluated: tuple[Path, str], tiny_sums: Path, tmp_path: Path, kept_bytes: int
) -> None:
    whole = (evaluated[0] / "generations.jsonl").read_bytes()
    path = tmp_path / "generations.jsonl"
    path.write_bytes(whole[:kept_bytes])  # torn anywhere
    settings, tokenizer = settings_of(tiny_sums), load_tokenizer(str(tiny_sums))
    batches = plan_batches([load_task("sums", settings)], settings)
    generate(
        path,
        batches,
        lambda length: build_engine(settings, tiny_sums, tokenizer, "cpu", length),
        tokenizer,
        settings,
        None,
    )
    assert path.read_bytes() == whole


def test_killed_run_continues_to_the_same_table(
    evaluated: tuple[Path, str], tiny_sums: Path, tmp_path: Path
) -> None:
    folder, first_out = evaluated
    whole = (folder / "generations.jsonl").read_bytes()
    (tmp_path / "settings.json").write_bytes((folder / "settings.json").read_bytes())
    (tmp_path / "generations.jsonl").write_bytes(whole[: len(whole) // 2])
    code, out, err = cli("eval", tiny_sums, *OPTIONS, *SMALL, *SPEED, "--output", tmp_path)
    assert code == 0, err
    assert results_of(tmp_path) == results_of(folder)
    assert out.replace(str(tmp_path), str(folder)) == first_out


class CountingEngine:
    """Two tokens for every prompt; interrupted after `num_calls` calls."""

    weight_version = 0

    def __init__(self, num_calls: int) -> None:
        self.num_calls = num_calls

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[list[Response]]:
        if self.num_calls == 0:
            raise KeyboardInterrupt
        self.num_calls -= 1
        ids = [seed % 10, EOS]
        return [[Response(ids, [-1.0, -0.5], "stop", 0)] * params.n for _ in prompts]

    def publish(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise AssertionError("an evaluation publishes nothing")

    def close(self) -> None:
        pass


def test_batches_are_written_as_they_come(tiny_sums: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_sums)
    tasks = [load_task("sums", settings)]
    batches = plan_batches(tasks, settings)
    assert [(len(b.prompts), b.params.n, b.decoding) for b in batches] == [
        *[(2, 6, "sample")] * 2,
        (4, 1, "greedy"),
    ]
    assert len({b.seed for b in batches}) == 3
    tokenizer, path = load_tokenizer(str(tiny_sums)), tmp_path / "generations.jsonl"
    for num_calls, num_lines in ((1, 12), (1, 24), (5, 28)):
        engine = CountingEngine(num_calls)
        with suppress(KeyboardInterrupt):
            generate(path, batches, lambda _, e=engine: e, tokenizer, settings, None)
        assert len(read_generations(path)) == num_lines
    first = read_generations(path)[0]
    assert (first.logprob_sum, first.num_tokens, first.seed) == (-1.5, 2, batches[0].seed)

    def no_engine(num_tokens: int) -> CountingEngine:
        raise AssertionError("nothing is left to generate")

    generate(path, batches, no_engine, tokenizer, settings, None)


def test_generations_of_other_prompts_are_refused(
    evaluated: tuple[Path, str], tiny_sums: Path, tmp_path: Path
) -> None:
    path = tmp_path / "generations.jsonl"
    path.write_bytes((evaluated[0] / "generations.jsonl").read_bytes())
    settings = settings_of(tiny_sums)
    prompts = load_task("sums", settings)
    own, batches = fingerprint(tiny_sums), plan_batches([prompts], settings)
    assert keep_whole_batches(path, batches, own) == 3
    with pytest.raises(ValueError, match="line 1: is of .*the prompts have changed"):
        keep_whole_batches(path, plan_batches([prompts[::-1]], settings), own)
    with pytest.raises(ValueError, match=r"line 25: is of .*there are no such prompts"):
        keep_whole_batches(path, batches[:2], own)
    with pytest.raises(ValueError, match=f"line 1: is by model '{own}' with seed .*, not by 'x'"):
        keep_whole_batches(path, batches, "x")
    others = plan_batches([prompts], replace(settings, seed=3))
    with pytest.raises(
        ValueError, match=f"with seed {batches[0].seed}, not .*{others[0].seed}: name"
    ):
        keep_whole_batches(path, others, own)
    path.write_bytes(b"{}\n")
    with pytest.raises(ValueError, match="line 1: not a generation"):
        read_generations(path)


def test_settings_protect_the_generations(evaluated: tuple[Path, str], tiny_sums: Path) -> None:
    folder, _ = evaluated
    settings = settings_of(tiny_sums)
    assert load_settings(folder) == settings
    with pytest.raises(ValueError, match="temperature 1.0 -> 0.5, seed 0 -> 3"):
        keep_settings(folder, replace(settings, model="moved", temperature=0.5, seed=3))
    message = refused("eval", tiny_sums, *OPTIONS, "--seed", "1", *SMALL, "--output", folder)
    assert "seed 0 -> 1" in message and "--output" in message


def test_generations_need_their_settings(tiny_sums: Path, tmp_path: Path) -> None:
    (tmp_path / "generations.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"generations without their settings.json: restore it"):
        keep_settings(tmp_path, settings_of(tiny_sums))
    path = tmp_path / "settings.json"
    for text, message in (
        ("{", r"settings.json: cannot be read as JSON"),
        ("[]", r"settings.json: holds \[\]: restore it"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_settings(tmp_path)
    values = asdict(settings_of(tiny_sums))
    for change in ({"n": "x"}, {"tasks": 3}, {"top_p": 2.0}):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(
            ValueError, match=r"settings.json: .*; restore it, or remove the folder"
        ):
            load_settings(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": math.inf}, "--temperature is inf: give a number above 0"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"max_num_seqs": 0}, "--max-num-seqs is 0: give 1 or more"),
        ({"max_num_seqs": -3}, "--max-num-seqs is -3"),
    ],
)
def test_settings_out_of_range(tiny_sums: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(tiny_sums, **change)


def test_graders_are_tried_before_anything_is_generated(
    tiny_sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--num-workers is 0: give 1 or more"):
        GradingSettings(num_workers=0)
    for timeout_s in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"--timeout is {timeout_s}: give a number of seconds"):
            GradingSettings(timeout_s=timeout_s)
    missing = {"expression": f"{tmp_path / 'grader.py'}:compute_score"}
    monkeypatch.setattr(grade, "FUNCTIONS", missing)
    with pytest.raises(ValueError, match=r"there is no file .*grader.py"):
        evaluate(
            tmp_path / "out",
            settings_of(tiny_sums),
            tiny_sums,
            "cpu",
            GradingSettings(num_workers=1),
        )
    assert not (tmp_path / "out").exists()


def test_regrading_needs_no_model(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    folder, first_out = evaluated
    for name in ("settings.json", "generations.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    code, out, err = cli("eval", "--regrade", tmp_path, *SPEED)
    assert code == 0, err
    assert results_of(tmp_path) == results_of(folder)
    assert out.replace(str(tmp_path), str(folder)) == first_out
    path = tmp_path / "generations.jsonl"
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:13])
    path.write_bytes(kept)
    assert "holds 1 of 3 batches" in refused("eval", "--regrade", tmp_path)
    assert path.read_bytes() == kept


def math_folder(tiny_sums: Path, folder: Path) -> EvalSettings:
    """Responses of our own to two problems whose answers are 4 and 27."""
    write_rows(folder, "aime24", ".jsonl")
    settings = settings_of(tiny_sums, tasks=("aime24",), data=str(folder), n=4, greedy=False)
    responses = {
        "2024-I-1": ["Answer: 4", r"The answer is \boxed{4}.", "Answer: 5", "Answer: 5.0"],
        "2024-I-2": ["Answer: 27", r"Answer: \boxed{27}", "no", "Answer: 28"],
    }
    lines = []
    keep_settings(folder, settings)
    prompts = load_task("aime24", settings)
    (batch,) = plan_batches([prompts], settings)
    for prompt in prompts:
        for sample, response in enumerate(responses[prompt.prompt_id]):
            place = {"task": "aime24", "prompt_id": prompt.prompt_id, "decoding": "sample"}
            made = {"sample": sample, "prompt": "", "prompt_hash": prompt.hash, "seed": batch.seed}
            end = {"response": response, "finish_reason": "stop", "num_tokens": 3}
            by = {"logprob_sum": -1.0, "model": settings.fingerprint}
            lines.append(json.dumps({**place, **made, **end, **by}))
    (folder / "generations.jsonl").write_text("\n".join(lines) + "\n")
    return settings


def test_two_graders_side_by_side(tiny_sums: Path, tmp_path: Path) -> None:
    settings = math_folder(tiny_sums, tmp_path)
    (group,) = regrade(tmp_path, settings, GradingSettings(num_workers=1))
    assert group.note == "2 of 30 items"
    verify, dapo = group.graders["math_verify"], group.graders["dapo_math"]
    assert list(group.graders) == ["math_verify", "dapo_math"]
    assert (verify.avg.mean, dapo.avg.mean) == (0.5, 0.375)
    # 5 and 5.0 are one answer to math-verify: a tie of 2 and 2; "no" does not vote.
    assert verify.majority_at[4].mean == (0.5 + 1) / 2
    # To DAPO's rule 4, 5 and 5.0 are three, and the box without "Answer:" is none.
    assert dapo.majority_at[4].mean == pytest.approx((1 / 3 + 1) / 2)
    assert (verify.no_answer, dapo.no_answer) == (1 / 8, 2 / 8)
    assert verify.pass_at[2].mean == pytest.approx(1 - 1 / 6)
    rows = [json.loads(line) for line in (tmp_path / "disagreements.jsonl").open()]
    assert [(r["prompt_id"], r["sample"], r["ground_truth"]) for r in rows] == [
        ("2024-I-1", 1, "4")
    ]
    assert rows[0]["grades"] == {
        "math_verify": {"is_correct": True, "answer": "4"},
        "dapo_math": {"is_correct": False, "answer": None},
    }
    assert group.diversity["effective_answers"].mean == pytest.approx(
        (2 + math.exp(math.log(3) - 2 / 3 * math.log(2))) / 2
    )


def test_sources_of_a_file_are_shown_apart(tiny_sums: Path, tmp_path: Path) -> None:
    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"{number}="}],
            "reward_model": {"ground_truth": str(number)},
        }
        for source, number in (("sums", 17), ("addition", 18), ("sums", 19))
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = cli(
        "eval", tiny_sums, "--tasks", file, "--n", "2", *SMALL, *SPEED, "--output", tmp_path / "out"
    )
    assert code == 0, err
    groups = results_of(tmp_path / "out")["groups"]
    assert [g["source"] for g in groups] == ["all", "addition", "sums"]
    assert [g["num_prompts"] for g in groups] == [3, 1, 2]
    whole, addition, sums = [
        g["graders"][name]["avg"]["mean"]
        for g, name in zip(groups, ("by prompt", "numeric", "expression"), strict=True)
    ]
    assert whole == pytest.approx((addition + 2 * sums) / 3)
    assert "  addition" in out and "  sums" in out


def test_find_model_and_fingerprint(tiny_sums: Path, tmp_path: Path) -> None:
    assert find_model(str(tiny_sums)) == tiny_sums
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_sums.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert fingerprint(copy) == fingerprint(tiny_sums)
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert fingerprint(copy) != fingerprint(tiny_sums)
    (copy / "README.md").write_text("Not read.")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        before = fingerprint(copy)
        with (copy / name).open("a") as file:
            file.write(" ")
        assert fingerprint(copy) != before, name
    checkpoint = tmp_path / "global_step_3"
    checkpoint.mkdir()
    copy.rename(checkpoint / "hf")
    assert find_model(str(checkpoint)) == checkpoint / "hf"
    with pytest.raises(ValueError, match="is no model"):
        find_model(str(tmp_path))
    with pytest.raises(ValueError, match="is no folder"):
        find_model("./nowhere")


def test_what_cannot_be_done_is_refused(tiny_sums: Path, tmp_path: Path) -> None:
    def message(*options: str) -> str:
        return refused("eval", tiny_sums, *options, *SMALL, "--output", tmp_path / "out")

    assert "no end: give --limit" in message("--tasks", "reasoning_gym/gcd")
    assert "did you mean 'math500'" in message("--tasks", "math50")
    assert "name its folder with --data" in message("--tasks", "aime24")
    assert "name each task once" in message("--tasks", "sums,sums")
    assert "--n is 0" in message("--tasks", "sums", "--n", "0")
    assert "belong together" in message("--tasks", "sums", "--judge-model", "m")
    both = "--servers generates for --tasks with --engine vllm: give both"
    assert both in message("--tasks", "sums", "--servers", "http://x:1")
    assert both in message("--engine", "vllm", "--servers", "http://x:1")
    served = ("--tasks", "sums", "--engine", "vllm", "--servers")
    assert "--servers has 'x:1': give http" in message(*served, "http://x:1,x:1")
    assert "--server-timeout is 0.0" in message(*served, "http://x:1", "--server-timeout", "0")
    long = ("--tasks", "sums", "--max-tokens", "5000")
    out = ("--output", tmp_path / "long")
    assert "over the model's" in refused("eval", tiny_sums, *long, "--dtype", "float32", *out)
    # Nothing was generated, so the folder takes other settings.
    keep_settings(tmp_path / "long", settings_of(tiny_sums))
    assert load_settings(tmp_path / "long") == settings_of(tiny_sums)
    assert "needs a model" in refused("eval", "--tasks", "sums")
    assert "name a run directory" in refused("eval")
    assert "holds no evaluation" in refused("eval", "--regrade", tmp_path)
    assert not (tmp_path / "out").exists()


def test_powers_of_two() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(6) == [1, 2, 4, 6]
    assert powers_of_two(16) == [1, 2, 4, 8, 16]


def test_engine_is_the_one_that_is_named(tiny_sums: Path) -> None:
    settings = settings_of(tiny_sums)
    engine = build_engine(settings, tiny_sums, load_tokenizer(str(tiny_sums)), "cpu", 9)
    assert type(engine).__name__ == "TransformersEngine"
    engine.close()
