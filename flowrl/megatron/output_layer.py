"""What takes the place of a GPTModel's output layer and cross entropy: log-probs without logits.

Megatron's flow is kept: the output layer is still called, which is what its data-parallel wrapper
waits for, and its weight gets its gradient in main_grad.
"""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from flowrl.megatron.head import vocab_parallel_logprob
from flowrl.megatron.layout import tensor_group


def _output_weight(model: GPTModel) -> torch.nn.Parameter:
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    else:
        weight = model.output_layer.weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight


def output_layer_logprob(
    model: GPTModel,
    hidden: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    *,
    vocab_size: int,
    entropy: bool = False,
    drop_mass: float = 0.0,
    memory_budget: int = 0,
    dropped_mass: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the log-prob of each target under the model's output layer; see head.py.

    Where Megatron's DistributedDataParallel made a main_grad for the output weight, the backward
    adds to it and obeys grad_added_to_main_grad; else the weight gets a gradient as any other. It
    must be float32: Megatron's default for bfloat16 weights is not, grad_reduce_in_fp32=True is.

    Args:
        model: of the last pipeline stage, without its wrapper.
        hidden: [T, H] post-norm states; with sequence parallelism this rank's [T / tp, H].
        target: [T] int64, -100 in rows to skip.
        temperature: divides the logits.
        vocab_size: entries of the vocabulary; the rows of the weight that pad it are left out.
        entropy, drop_mass, memory_budget, dropped_mass, rows: as in vocab_parallel_logprob.

    Returns:
        logprob [T] and entropy [T] or None, float32, the same on all tensor-parallel ranks.

    Raises:
        ValueError: as vocab_parallel_logprob does.
    """
    parameter = _output_weight(model)
    first = len(parameter) * parallel_state.get_tensor_model_parallel_rank()
    num_entries = max(0, min(len(parameter), vocab_size - first))
    weight, weight_grad = parameter, None
    if torch.is_grad_enabled() and hasattr(parameter, "main_grad"):
        # The backward adds to main_grad itself; DDP's hook must not add autograd's zeros, except
        # where the embedding's gradient arrives with them (it sees to that itself).
        parameter.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
        weight_grad = parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]
    if num_entries < len(parameter):
        weight = parameter[:num_entries]
        weight_grad = None if weight_grad is None else weight_grad[:num_entries]
    return vocab_parallel_logprob(
        hidden,
        weight,
        target,
        temperature,
        first,
        tensor_group(),
        entropy=entropy,
        drop_mass=drop_mass,
        memory_budget=memory_budget,
        dropped_mass=dropped_mass,
        weight_grad=weight_grad,
        sequence_parallel=model.config.sequence_parallel,
        rows=rows,
    )


def _keep_states(
    hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, None]:
    return hidden, None


def _loss(
    labels: Tensor,
    hidden: Tensor,
    *,
    model: GPTModel,
    vocab_size: int,
    temperature: float,
    drop_mass: float,
    memory_budget: int,
) -> Tensor:
    """GPTModel.compute_language_model_loss: labels [b, s], states [s, b, H] -> loss [b, s]."""
    logprob, _ = output_layer_logprob(
        model,
        hidden.flatten(0, 1),
        labels.T.flatten(),
        temperature,
        vocab_size=vocab_size,
        drop_mass=drop_mass,
        memory_budget=memory_budget,
    )
    return -logprob.view(labels.shape[1], labels.shape[0]).T.contiguous()


def fuse_output_layer(
    model: GPTModel,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    drop_mass: float = 0.0,
    memory_budget: int = 0,
) -> None:
    """Make `model(..., labels=labels)` return the same loss per token [b, s] without any logits.

    -log softmax(hidden weight^T / temperature)[label]; a label of -100 gives 0 and no gradient.
    Without labels the model then returns its post-norm states [b, s, H]. A pipeline stage without
    an output layer is left as it is. Tensor and sequence parallelism, tied weights and padding of
    the vocabulary beyond `vocab_size` are taken into account.

    Raises ValueError for a model with multi-token prediction, whose layers have heads of their own,
    and for defer_embedding_wgrad_compute, which takes the weight's gradient from the output layer.
    """
    if model.config.mtp_num_layers is not None:
        raise ValueError(
            f"mtp_num_layers = {model.config.mtp_num_layers}: the heads of multi-token prediction "
            "are not replaced; build the model without them"
        )
    if model.config.defer_embedding_wgrad_compute:
        raise ValueError(
            "defer_embedding_wgrad_compute = True: Megatron would compute the output weight's "
            "gradient after the backward, from inputs that its output layer no longer keeps; set "
            "it to False"
        )
    if not model.post_process:
        return
    model.output_layer.forward = _keep_states  # pyright: ignore[reportAttributeAccessIssue]
    model.compute_language_model_loss = partial(  # pyright: ignore[reportAttributeAccessIssue]
        _loss,
        model=model,
        vocab_size=vocab_size,
        temperature=temperature,
        drop_mass=drop_mass,
        memory_budget=memory_budget,
    )
