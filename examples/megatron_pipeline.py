"""A training loop of your own around Megatron-core, with flowrl's head and objective in it.

    torchrun --nproc-per-node 4 examples/megatron_pipeline.py

Tensor parallel 2 x pipeline parallel 2, on four GPUs or, where there is none, on the CPU. The model
is Megatron's, the data random. Two calls are flowrl's: `fuse_output_layer`, after which the model's
loss per token is computed without logits, and `flow_balance_loss` on what it returns.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from flowrl.megatron import Layout, fuse_output_layer, initialize, is_last_stage
from flowrl.objectives.flow_balance import flow_balance_loss

LAYOUT = Layout(tensor=2, pipeline=2)
VOCABULARY, PADDED_VOCABULARY = 101, 102  # a multiple of the tensor-parallel ranks
NUM_TOKENS, NUM_PROMPT, NUM_SEQUENCES, NUM_MICRO_BATCHES, NUM_STEPS = 16, 6, 4, 4, 3


def build_model() -> DistributedDataParallel:
    has_cuda = torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=LAYOUT.tensor,
        pipeline_model_parallel_size=LAYOUT.pipeline,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,  # gradients are summed, then divided by the global count
        finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        batch_p2p_sync=has_cuda,
        bias_dropout_fusion=has_cuda,  # on a CPU they would compile for 40 s
        bias_activation_fusion=has_cuda,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED_VOCABULARY,
        max_sequence_length=NUM_TOKENS,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    ).to(torch.cuda.current_device())  # initialize() lets this be the CPU
    fuse_output_layer(model, VOCABULARY)
    # What bfloat16 weights need, and float32 ones have anyway.
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, ddp_config, model)


def make_batch() -> dict[str, Tensor]:
    """Prompts with random responses, as rank 0 would sample, score and broadcast them."""
    tokens = torch.randint(VOCABULARY, (NUM_SEQUENCES, NUM_TOKENS))
    labels = tokens.roll(-1, dims=1)  # row i predicts token i + 1
    labels[:, : NUM_PROMPT - 1] = labels[:, -1] = -100
    batch = {
        "tokens": tokens,
        "labels": labels,
        "ref_logprobs": torch.full(labels.shape, -4.6),
        "rewards": torch.randn(NUM_SEQUENCES),
        "cu_seqlens": torch.arange(0, tokens.numel() + 1, NUM_TOKENS, dtype=torch.int32),
    }
    return {name: value.to(torch.cuda.current_device()) for name, value in batch.items()}


def loss_func(batch: dict[str, Tensor], nll: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's (sum over sequences, number of sequences, what the schedule returns)."""
    logprobs, loss_mask = -nll.flatten(), (batch["labels"] != -100).flatten()
    output = flow_balance_loss(
        logprobs,
        logprobs.detach(),  # one update per rollout: the old policy is the present one
        batch["ref_logprobs"].flatten(),
        loss_mask,
        batch["cu_seqlens"],
        batch["rewards"],
        torch.zeros_like(batch["rewards"]),  # log Z: your network's, or VarGrad's
        beta=1.0,
    )
    count = torch.tensor(NUM_SEQUENCES, dtype=torch.int, device=nll.device)
    return output.loss_sum, count, output.loss_sum.detach()


def forward_step(
    batches: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    batch = next(batches)
    positions = torch.arange(NUM_TOKENS, device=batch["tokens"].device).expand_as(batch["tokens"])
    return model(batch["tokens"], positions, None, labels=batch["labels"]), partial(
        loss_func, batch
    )


def main() -> list[float]:
    """Train; the loss of every step, on all ranks."""
    initialize(LAYOUT)
    torch.manual_seed(0)
    model = build_model()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0), [model]
    )
    batches = [make_batch() for _ in range(NUM_MICRO_BATCHES)]
    losses = []
    for step in range(NUM_STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        sums = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=NUM_MICRO_BATCHES,
            seq_length=NUM_TOKENS,
            micro_batch_size=NUM_SEQUENCES,
            forward_only=False,
        )
        optimizer.step()
        loss = torch.zeros((), device=torch.cuda.current_device())
        if is_last_stage():
            loss += torch.stack(sums).sum() / (NUM_SEQUENCES * NUM_MICRO_BATCHES)
        dist.all_reduce(loss, op=dist.ReduceOp.MAX)  # the loss is >= 0, elsewhere it is 0
        losses.append(float(loss))
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
