"""New weights in a running vLLM, in its worker: what vLLM's own reload leaves to be done.

vLLM 0.32 buffers a layer's weights until all its elements have come, by their count. What an
attempt that failed has buffered counts as well, so the next one would silently build a layer of
two versions. And on a CPU two kinds of layers compute from packed weights that its reload does not
pack: a head that is tied to the embedding, for no weight is loaded under its own name, keeps the
old ones, and experts get the new ones as they came.
"""

# vLLM is an extra.
# pyright: reportMissingImports=false

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


def reload_weights(worker: Any, named_weights: Iterable[tuple[str, Tensor]]) -> None:
    """Replace all weights of a vLLM worker by HF names; an attempt after a failed one is whole.

    Whatever vLLM raises passes; until a call succeeds the weights may be of two versions.
    """
    with whole_reload(worker.model_runner.model, worker.model_runner.model_config):
        worker.reload_weights(weights_iterator=iter(named_weights))


@contextmanager
def whole_reload(model: nn.Module, model_config: Any) -> Iterator[None]:
    """What must come before and after vLLM's own reload of a model."""
    _forget_partial_load(model, model_config)
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is not None and isinstance(kernel.fused_experts, CPUUnquantizedExperts):
            method.moe_kernel = None  # as at the first load, the only time that experts are packed
    yield
    heads: list[Any] = [m for m in model.modules() if isinstance(m, ParallelLMHead)]
    for head in heads:
        head.quant_method.process_weights_after_loading(head)  # packs anew; else nothing


def _forget_partial_load(model: nn.Module, model_config: Any) -> None:
    """Drop what an interrupted reload has buffered, and put the layers back as they were."""
    infos = [get_layerwise_info(layer) for layer in model.modules()]
    if not any(info.can_load() for info in infos):  # the usual case: none was interrupted
        return
    for info in infos:
        info.loaded_weights.clear()
        info.load_numel = 0
    finalize_layerwise_reload(model, model_config)
