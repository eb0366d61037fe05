"""The Megatron policy: the only part that knows Megatron-core, groups, stages and shards.

`fuse_output_layer` and `output_layer_logprob` serve any GPTModel; the rest is the whole policy and
the pieces that it is made of. docs/megatron.md shows both.
"""

from flowrl.megatron.critic import MegatronCritic
from flowrl.megatron.head import vocab_parallel_logprob
from flowrl.megatron.layout import Layout, initialize, is_last_stage
from flowrl.megatron.model import FlowModel, build_chunks, wrap
from flowrl.megatron.optimizer import MegatronAdamW
from flowrl.megatron.output_layer import fuse_output_layer, output_layer_logprob
from flowrl.megatron.policy import MegatronPolicy
from flowrl.megatron.shard import ShardedBatch, shard
from flowrl.megatron.step import StepSettings, forward_step, loss_func
from flowrl.megatron.weights import export_hf_weights, load_hf_weights

__all__ = [
    "FlowModel",
    "Layout",
    "MegatronAdamW",
    "MegatronCritic",
    "MegatronPolicy",
    "ShardedBatch",
    "StepSettings",
    "build_chunks",
    "export_hf_weights",
    "forward_step",
    "fuse_output_layer",
    "initialize",
    "is_last_stage",
    "load_hf_weights",
    "loss_func",
    "output_layer_logprob",
    "shard",
    "vocab_parallel_logprob",
    "wrap",
]
