"""The `flowrl` command."""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flowrl.config import config_keys, dump_config, is_main_process, load_config

app = typer.Typer(
    name="flowrl",
    help="Reinforcement learning of language models that matches the reward distribution.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="settings as key=value, such as flow.beta=5 trainer.seed=1"),
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the config, the data and the reward, then stop")
    ] = False,
) -> None:
    """Train a policy; continues from the run directory's last checkpoint.

    `flowrl keys` lists every setting; docs/configuration.md explains them.
    """
    settings = load_config(config, overrides or [])
    started = time.perf_counter()
    # torch takes seconds to import, so only now.
    from flowrl.summary import describe, dry_run_report, summarise
    from flowrl.train import train as run_training

    if dry_run:
        print(dump_config(settings))
        print(dry_run_report(settings))
        return
    if is_main_process():
        describe(settings)
    run = run_training(settings)
    if run.parts.is_main:
        summarise(run, time.perf_counter() - started)


@app.command("eval")
def evaluate(
    source: Annotated[Path, typer.Argument(help="a run directory, or an HF folder with --config")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="the task and settings; default: the run's own config")
    ] = None,
) -> None:
    """Judge a trained policy on the held-out prompts: greedy and avg@n, with 95 % intervals."""
    own_config = source / "config.yaml"
    if config is None and not own_config.exists():
        raise ValueError(f"{source} is no run directory (no config.yaml); name a --config")
    settings = load_config(config or own_config, overrides or [])
    from flowrl.checkpoint import latest_checkpoint
    from flowrl.evaluate import evaluate_model
    from flowrl.summary import print_evaluation

    checkpoint = latest_checkpoint(source)
    if checkpoint is None and own_config.exists():
        raise ValueError(f"{source} is a run directory without a checkpoint; let it save one first")
    model = str(source if checkpoint is None else checkpoint.hf)
    print_evaluation(model, evaluate_model(settings, model))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a run directory or a global_step_N folder")],
    destination: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    step: Annotated[int | None, typer.Option(help="default: the latest checkpoint")] = None,
) -> None:
    """Copy a checkpoint's weights and tokenizer as a Hugging Face folder."""
    from flowrl.checkpoint import export_hf

    print(export_hf(source, destination, step))


@app.command()
def keys() -> None:
    """List every setting of the configuration."""
    print("\n".join(config_keys()))


@app.command()
def doctor() -> None:
    """Say what is installed, which kernels are live, and what is missing for what."""
    from flowrl.doctor import collect, render

    Console().print(render(collect()))


@app.command()
def plan(
    config: ConfigPath,
    gpus: Annotated[int, typer.Option(help="all GPUs of the run")],
    gpu: Annotated[str, typer.Option(help="a100-80, h100, h200 or b200")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int, typer.Option(help="with fast links between them")] = 8,
    rollout_gpus: Annotated[int, typer.Option(help="of all, those that only generate")] = 0,
    mfu: Annotated[float, typer.Option(help="share of the peak that the trainer reaches")] = 0.4,
    response_length: Annotated[
        float | None, typer.Option(help="mean in tokens; default: half of the limit")
    ] = None,
) -> None:
    """Estimate memory and time of a run, and rank the layouts that fit; needs no GPU."""
    settings = load_config(config, overrides or [])
    from flowrl.plan import make_plan
    from flowrl.plan.report import render

    made = make_plan(
        settings,
        num_gpus=gpus,
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        num_rollout_gpus=rollout_gpus,
        mfu=mfu,
        response_tokens=response_length,
    )
    Console().print(render(made))


bench = typer.Typer(help="Measure the kernels against their rivals.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("kernels")
def bench_head(
    rows: Annotated[list[int] | None, typer.Option(help="T; several: repeat")] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="whose sizes, such as smollm2-135m or qwen2.5-7b")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16")] = None,
    drop_mass: Annotated[list[float] | None, typer.Option(help="adds a variant with it")] = None,
    logit_std: Annotated[float, typer.Option(help="spread of Gaussian logits")] = 3.0,
    peak: Annotated[float, typer.Option(help="> 0: fall of the logits with the rank")] = 0.0,
    entropy: Annotated[
        list[float] | None, typer.Option(help="nats that the peaked logits are scaled to")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="SmolLM2's own states, sampled at it")
    ] = None,
    states: Annotated[
        Path | None, typer.Option(help="file of those states, made if absent")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="only these beside materialised PyTorch")
    ] = None,
    repeats: Annotated[int, typer.Option(help="timed rounds after one warm-up round")] = 7,
    threads: Annotated[int, typer.Option(help="of the CPU")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    """Time, memory and errors of the language-model head, ours and others'."""
    import torch

    from flowrl.bench.kernels import bench_kernels, make_cases
    from flowrl.config import cache_dir

    torch.set_num_threads(threads)
    where = torch.device(device)
    cases = make_cases(
        rows or [1024],
        head or ["smollm2-135m"],
        dtype or ["float32", "bfloat16"],
        logit_std=logit_std,
        peak=peak,
        entropies=entropy or [],
        temperatures=temperature or [],
        states=states,
        device=where,
        cache=cache_dir(),
    )
    bench_kernels(cases, where, drop_mass or [], variant or [], repeats, json_path=json_path)


class StderrHandler(logging.Handler):
    """Looks sys.stderr up at every record: the live table replaces it to stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def main() -> None:
    """Entry point: a wrong input is one readable line, not a traceback."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[StderrHandler()])
    logging.getLogger("flowrl").setLevel(logging.INFO)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:  # input, disk, a package to install
        typer.secho(f"error: {error}", err=True, fg="red")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
