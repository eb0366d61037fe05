"""The `flowrl` command."""

import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, cast

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
    from flowrl.device import with_resolved_dtype
    from flowrl.summary import describe, dry_run_report, summarise
    from flowrl.train import train as run_training

    settings = with_resolved_dtype(settings)
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
    source: Annotated[
        str | None, typer.Argument(help="a run directory, a checkpoint, an HF folder or name")
    ] = None,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="the task and settings; default: the run's own config")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="benchmarks, as in aime24,math500 (docs/evaluation.md)")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the benchmarks' files")] = None,
    n: Annotated[int, typer.Option(help="sampled responses per prompt")] = 16,
    temperature: Annotated[float, typer.Option(help="of sampling")] = 0.6,
    top_p: Annotated[float, typer.Option(help="nucleus mass of sampling")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="per response")] = 8192,
    seed: Annotated[int, typer.Option(help="of sampling and of shuffled choices")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="also decode greedily")] = False,
    limit: Annotated[int | None, typer.Option(help="first prompts of each task only")] = None,
    prompt_template: Annotated[
        Path | None, typer.Option(help="file: wording of the benchmarks around {question}")
    ] = None,
    chat_template: Annotated[
        bool | None, typer.Option(help="default: if the tokenizer has one")
    ] = None,
    engine: Annotated[str, typer.Option(help="transformers or vllm")] = "transformers",
    servers: Annotated[
        str | None, typer.Option(help="with vllm: http://a:8000,http://b:8000 of `flowrl serve`")
    ] = None,
    weight_dir: Annotated[
        Path | None, typer.Option(help="folder that servers on other machines see as well")
    ] = None,
    server_timeout: Annotated[
        float, typer.Option(help="seconds that a server has for a response")
    ] = 600.0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    max_num_seqs: Annotated[int, typer.Option(help="sequences decoded together")] = 256,
    output: Annotated[Path | None, typer.Option(help="default: evals/<model>")] = None,
    regrade: Annotated[
        Path | None, typer.Option(help="folder of an evaluation: grade its responses again")
    ] = None,
    num_workers: Annotated[int, typer.Option(help="processes of each grader")] = 2,
    timeout: Annotated[float, typer.Option(help="seconds a grader has for a response")] = 30.0,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint that rates diversity")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="its model")] = None,
    judge_key_file: Annotated[Path | None, typer.Option(help="holds its key")] = None,
) -> None:
    """Judge a model on --tasks; or a trained policy on its own held-out prompts, without --tasks.

    With --tasks: avg@n, pass@k and maj@k by two graders, and diversity, with 95 % intervals.
    """
    if servers is not None and (tasks is None or engine != "vllm"):
        raise ValueError("--servers generates for --tasks with --engine vllm: give both")
    if tasks is None and regrade is None:
        if source is None:
            raise ValueError("name a run directory, or a model and --tasks")
        _evaluate_held_out(Path(source), overrides or [], config)
        return
    if overrides or config:
        raise ValueError("--tasks and --regrade take options, no --config and no key=value")
    if (judge_url is None) != (judge_model is None):
        raise ValueError("--judge-url and --judge-model belong together: give both or neither")
    from flowrl.device import resolve_device, resolve_dtype
    from flowrl.evaluation.engine import Servers, find_model, fingerprint
    from flowrl.evaluation.grade import GradingSettings
    from flowrl.evaluation.judge import JudgeSettings
    from flowrl.evaluation.run import evaluate as run_evaluation
    from flowrl.evaluation.run import regrade as grade_again
    from flowrl.evaluation.settings import EvalSettings, load_settings
    from flowrl.evaluation.show import render
    from flowrl.policy.pretrained import load_tokenizer

    grading = GradingSettings(num_workers, timeout)
    judge = None
    if judge_url is not None and judge_model is not None:
        key = None if judge_key_file is None else judge_key_file.read_text("utf-8").strip()
        judge = JudgeSettings(judge_url, judge_model, key)
    if regrade is not None:
        if source is not None or tasks is not None:
            raise ValueError("--regrade takes model and tasks from its folder: name neither")
        settings = load_settings(regrade)
        if data is not None:
            settings = replace(settings, data=str(data))
        folder, groups = regrade, grade_again(regrade, settings, grading, judge)
    else:
        if source is None or tasks is None:
            raise ValueError("--tasks needs a model: flowrl eval MODEL --tasks ...")
        model = find_model(source)
        if chat_template is None:
            chat_template = load_tokenizer(str(model)).chat_template is not None
        settings = EvalSettings(
            model=source,
            fingerprint=fingerprint(model),
            tasks=tuple(tasks.split(",")),
            data=None if data is None else str(data),
            n=n,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            greedy=greedy,
            limit=limit,
            template=None if prompt_template is None else prompt_template.read_text("utf-8"),
            chat_template=chat_template,
            engine=cast(Literal["transformers", "vllm"], engine),
            dtype=resolve_dtype(dtype, resolve_device(device)),
            max_num_seqs=max_num_seqs,
        )
        folder = output or Path("evals") / f"{Path(source).name}-{settings.fingerprint[:8]}"
        served = None
        if servers is not None:
            served = Servers(tuple(servers.split(",")), weight_dir, server_timeout)
        groups = run_evaluation(folder, settings, model, device, grading, judge, served)
    console = Console()
    if not console.is_terminal:
        console.width = 110  # what the tables like; into a file nothing needs to be folded
    console.print(render(groups, settings.model))
    console.print(f"results  {folder}", markup=False, highlight=False, soft_wrap=True)


def _evaluate_held_out(source: Path, overrides: list[str], config: Path | None) -> None:
    own_config = source / "config.yaml"
    if config is None and not own_config.exists():
        raise ValueError(
            f"{source} is no run directory (no config.yaml); name a --config, or --tasks"
        )
    settings = load_config(config or own_config, overrides)
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


@app.command("serve")
def serve_rollouts(
    config: ConfigPath,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="settings as key=value; after --, arguments of vLLM's own"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="address to listen on; whoever reaches it controls the server")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="as in rollout.servers")] = 8000,
) -> None:
    """Start a vLLM server for `flowrl train` with rollout.servers and `flowrl eval --servers`."""
    arguments = arguments or []
    own = [argument.startswith("-") for argument in arguments]
    first = own.index(True) if any(own) else len(arguments)
    # A trainer's file serves as it is: that this is a server, and which, are said by the command.
    told = ["rollout.engine=vllm", f"rollout.servers=[http://{host}:{port}]"]
    settings = load_config(config, [*told, *arguments[:first]])
    from flowrl.rollout.serve import serve

    serve(settings, host, port, arguments[first:])


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
