"""Token log-probs of a packed batch, without the logits."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flowrl.batch import PackedBatch
from flowrl.interface import TokenOutputs
from flowrl.kernels.linear_logprob import linear_logprob
from flowrl.policy.attention import plan_attention

# Settings of transformers' configs by which some models scale or bend their logits.
LOGIT_CHANGES = (
    "logit_scale",
    "logits_scaling",
    "final_logit_softcapping",
    "lm_head_multiplier",
)


def output_weight(model: PreTrainedModel) -> torch.nn.Parameter:
    """The language-model head's weight [V, H], tied to the embedding or not."""
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear) and isinstance(head.weight, torch.nn.Parameter)
    if head.bias is not None:
        raise ValueError(f"{type(model).__name__} has a head with a bias, which is not supported")
    for name in LOGIT_CHANGES:
        if getattr(model.config, name, None) not in (None, 1):
            raise ValueError(
                f"{type(model).__name__} changes its logits by {name} = "
                f"{getattr(model.config, name)}, which is not supported"
            )
    return head.weight


def trunk_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Run the trunk on all tokens: post-norm hidden states [U, H]."""
    return model.base_model(
        input_ids=batch.trunk_ids[None],
        position_ids=batch.trunk_positions[None],
        use_cache=False,
        plan=plan_attention(batch, model.dtype),
    ).last_hidden_state[0]


def head_outputs(
    model: PreTrainedModel,
    batch: PackedBatch,
    hidden: Tensor,
    temperature: float,
    *,
    with_entropy: bool = False,
    drop_mass: float = 0.0,
    memory_budget: int = 0,
    weight_grad: Tensor | None = None,
) -> TokenOutputs:
    """Run the head on response tokens, from the trunk's states [U, H].

    The log-prob of token i comes from the state of token i - 1, of softmax(logits / temperature),
    the distribution the rollout sampled from. `weight_grad`, a float32 buffer [V, H], receives the
    head's weight gradient in place of autograd, which would round it to the weight's dtype.
    """
    response = batch.response_mask.nonzero()[:, 0]  # never 0: a sequence starts with its prompt
    weight = output_weight(model)
    dropped_mass = None
    if drop_mass > 0:
        dropped_mass = torch.zeros(len(response), device=hidden.device)
    chosen, entropy = linear_logprob(
        hidden[batch.trunk_rows[response - 1]],
        weight,
        batch.input_ids[response],
        temperature=temperature,
        entropy=with_entropy,
        drop_mass=drop_mass,
        memory_budget=memory_budget,
        dropped_mass=dropped_mass,
        weight_grad=weight_grad,
    )
    zeros = chosen.new_zeros(len(batch.input_ids))
    return TokenOutputs(
        logprobs=zeros.index_put((response,), chosen),
        entropy=zeros if entropy is None else zeros.index_put((response,), entropy),
        hidden=hidden,
        dropped_mass=dropped_mass,
    )


def forward_tokens(
    model: PreTrainedModel,
    batch: PackedBatch,
    temperature: float,
    *,
    with_entropy: bool = False,
    drop_mass: float = 0.0,
    memory_budget: int = 0,
    weight_grad: Tensor | None = None,
) -> TokenOutputs:
    """Run the trunk on all tokens and the head on response tokens only, see `head_outputs`."""
    return head_outputs(
        model,
        batch,
        trunk_states(model, batch),
        temperature,
        with_entropy=with_entropy,
        drop_mass=drop_mass,
        memory_budget=memory_budget,
        weight_grad=weight_grad,
    )


@torch.no_grad()
def token_logprobs(model: PreTrainedModel, batch: PackedBatch, temperature: float) -> Tensor:
    """Log-probs [N] float32 of a frozen pass (old or reference policy)."""
    return forward_tokens(model, batch, temperature).logprobs
