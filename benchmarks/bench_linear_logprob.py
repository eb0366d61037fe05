"""The language-model head against its rivals: `flowrl bench kernels` as a script.

    python benchmarks/bench_linear_logprob.py --rows 512 --rows 1024 --json results.json
    python benchmarks/bench_linear_logprob.py --peak 3 --drop-mass 0.001953125
    python benchmarks/bench_linear_logprob.py --temperature 0.5 --drop-mass 0.001953125

flowrl/bench/ has the variants, the inputs and how the figures are taken; docs/kernels.md explains.
"""

import typer

from flowrl.cli import bench_head

if __name__ == "__main__":
    typer.run(bench_head)
