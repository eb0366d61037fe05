"""The example of a loop around Megatron, and the output layer that it replaces."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from harness import run_ranks
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from flowrl.megatron import Layout, fuse_output_layer, initialize

sys.path.append(str(Path(__file__).parents[2] / "examples"))
example: ModuleType = __import__("megatron_pipeline")

VOCABULARY = 22  # even: Megatron's softmax would count padding, ours does not
LAYOUTS = {
    "TP2": Layout(tensor=2),
    "PP2": Layout(pipeline=2),
    "TP2 PP2": Layout(tensor=2, pipeline=2),
}


def run_example(rank: int) -> list[float]:
    return example.main()


def test_example_trains_and_all_ranks_agree() -> None:
    losses = run_ranks(4, run_example)
    assert losses[1:] == losses[:-1]
    assert len(losses[0]) == 3
    assert losses[0][2] < losses[0][1] < losses[0][0]


def tiny_gpt(layout: Layout, tied: bool) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        batch_p2p_sync=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        init_method_std=0.3,  # logits that are not all alike
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=8,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
    )


KEEP = 2**20  # bytes, more than the softmax takes


def sum_of_masked(mask: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Megatron's own loss knows of no label to skip.
    return (loss * mask).sum(), mask.sum().int(), loss.detach() * mask


def one_step(rank: int, layout: Layout, tied: bool, is_fused: bool) -> tuple:
    """Losses [b, s] and main_grads by name of this rank, from two micro-batches."""
    initialize(layout)
    torch.manual_seed(3)
    model = tiny_gpt(layout, tied)
    if is_fused:
        fuse_output_layer(model, VOCABULARY, memory_budget=KEEP if tied else 0)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    tokens = torch.randint(VOCABULARY, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    labels, mask = tokens.roll(-1, dims=2), torch.ones(3, 8)
    mask[:, -1] = mask[0, :3] = 0
    batches = iter(zip(tokens, labels, strict=True))

    def forward_step(batches, model):
        ids, label = next(batches)
        label = label.masked_fill(mask == 0, -100) if is_fused else label
        loss = model(ids, torch.arange(8).expand_as(ids), None, labels=label)
        return loss, partial(sum_of_masked, mask)

    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=wrapped,
        num_microbatches=2,
        seq_length=8,
        micro_batch_size=3,
        forward_only=False,
    )
    return losses, {name: p.main_grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_fused_output_layer_equals_megatrons(layout: Layout, tied: bool) -> None:
    own = run_ranks(layout.model_ranks, one_step, layout, tied, False)
    fused = run_ranks(layout.model_ranks, one_step, layout, tied, True)
    for (loss, grads), (fused_loss, fused_grads) in zip(own, fused, strict=True):
        torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
        assert grads.keys() == fused_grads.keys()
        for name, grad in grads.items():
            scale = float(grad.norm())
            assert scale > 0
            assert float((fused_grads[name] - grad).norm()) < 2e-6 * scale, name


def refusals(rank: int) -> list[str]:
    initialize(Layout())
    model = tiny_gpt(Layout(), tied=False)
    messages = []
    for name, value in (("mtp_num_layers", 1), ("defer_embedding_wgrad_compute", True)):
        usual = getattr(model.config, name)
        setattr(model.config, name, value)
        with pytest.raises(ValueError) as caught:
            fuse_output_layer(model, VOCABULARY)
        messages.append(str(caught.value))
        setattr(model.config, name, usual)
    return messages


def test_models_whose_output_layer_has_other_work_are_refused() -> None:
    ((several, deferred),) = run_ranks(1, refusals)
    assert several.startswith("mtp_num_layers = 1: ") and several.endswith("without them")
    assert deferred.startswith("defer_embedding_wgrad_compute = True: ")
    assert deferred.endswith("set it to False")
