"""One variant in a process of its own: python -m flowrl.bench.probe SPEC.

Prints a line of JSON per case: errors, memory, kept share. Memory of the CPU cannot be told apart
otherwise, and a library that crashes takes nothing else down.
"""

import json
import sys

import torch

from flowrl.bench.inputs import Case, make_inputs
from flowrl.bench.measure import errors, extra_mib, kept_and_dropped
from flowrl.bench.variants import all_variants


def probe(spec: dict) -> None:
    """Measure `spec["variant"]` on each of `spec["cases"]`."""
    torch.set_num_threads(spec["threads"])
    torch.set_flush_denormal(True)
    device = torch.device(spec["device"])
    variant = all_variants(device.type, spec["drop_masses"])[spec["variant"]]
    for fields in spec["cases"]:
        inputs = make_inputs(Case(**fields), device)
        torch.compiler.reset()
        run = variant.load()
        # Memory first: it grows least where nothing has been allocated yet.
        result = {
            "forward_extra_mib": extra_mib(run, inputs, backward=False),
            "extra_mib": extra_mib(run, inputs, backward=True),
        }
        result |= errors(run, inputs, variant.is_per_token)
        if variant.drop_mass > 0:
            result |= kept_and_dropped(variant, inputs)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    probe(json.loads(sys.argv[1]))
