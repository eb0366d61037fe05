"""Lets Megatron-core, which asks for CUDA by name in many places, run on a CPU.

Measured with megatron-core 0.16.1 and gloo: about 6 us more per torch call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites device="cuda", .cuda() and the name of a tensor's type."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers sort parameters by names such as "torch.cuda.FloatTensor".
            return func(args[0]).replace("torch.", "torch.cuda.")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": CPU}
        return func(*args, **kwargs)


def _splits_on_host(
    dispatcher: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: Tensor
) -> Tensor:
    """Give the exchange its numbers of tokens, which on a GPU a stream of its own copies here."""
    sent, received = dispatcher.input_splits, dispatcher.output_splits
    if point == dispatcher.cuda_dtoh_point and sent is not None and received is not None:
        dispatcher.input_splits, dispatcher.output_splits = sent.numpy(), received.numpy()
    return tokens_per_expert


@functools.cache
def enable_cpu() -> None:
    """Make Megatron's CUDA calls mean the CPU, in this process; no effect where CUDA exists.

    Only the calling thread is served, which is all that Megatron uses. Dropout draws from the one
    CPU generator: there is no separate state per tensor-parallel rank.
    """
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: CPU  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.synchronize = lambda device=None: None
    # 0.19 asks before every gradient sync, for events that only CUDA graphs record.
    torch.cuda.current_stream = lambda device=None: CPU  # pyright: ignore
    # Recomputation restores the generators around the second forward pass.
    random._get_cuda_rng_state = lambda clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, graph_safe=False: torch.set_rng_state(state)
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = CPU  # pyright: ignore  # else it makes a stream
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = (  # pyright: ignore
        _splits_on_host
    )
    _CudaMeansCpu().__enter__()
