"""The `flowrl` command."""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flowrl.config import config_keys, dump_config, load_config

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
    describe(settings)
    run = run_training(settings)
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
