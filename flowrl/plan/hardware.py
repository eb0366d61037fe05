"""The GPUs that a plan may ask for, by their data sheets."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Limits of one GPU; rates are peaks in one direction, without sparsity."""

    name: str
    memory_bytes: float  # what CUDA reports as the total
    bf16_flops: float  # per second
    memory_bandwidth: float  # bytes per second, as are the next two
    link_bandwidth: float  # to a GPU of the same node
    network_bandwidth: float  # to another node, one network card per GPU


GPUS = {
    "a100-80": Gpu("A100 80 GB SXM", 79.2 * GIB, 312e12, 2.04e12, 300e9, 25e9),
    "h100": Gpu("H100 80 GB SXM", 79.2 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200 141 GB SXM", 139.8 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu("B200 180 GB SXM", 178.4 * GIB, 2250e12, 7.7e12, 900e9, 50e9),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name. Raises ValueError for one that is not in the table."""
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: choose one of {', '.join(GPUS)}")
    return GPUS[name]
