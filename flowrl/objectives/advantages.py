"""Token advantages of the baselines, from rewards to what grpo_loss takes.

Everything here is a constant of the loss: no gradients, float64 inside, the dtype of the input
outside. All of it is for the whole batch of a rollout, before that is split into micro-batches or
over ranks, and looks at values, so it belongs on the CPU. "Tokens" are those of the mask: what lies
between two of them, such as a tool's output, is as if it were not there.

GRPO's advantage is flowrl.rewards.group_normalize, Dr. GRPO's is group_center; both per sequence
and given to its tokens by spread_to_tokens.
"""

import torch

from flowrl.kernels._packed import check_packed, check_same


@torch.no_grad()
def group_center(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Return r - mean of its group: Dr. GRPO's advantage (arXiv 2503.20783, section 3).

    A group of one keeps its reward, as in group_normalize and verl. rewards: [B] float32 or
    float64. group_ids: [B] integer, in any order. Raises ValueError for wrong shapes and dtypes.
    """
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be floating point of shape [B], got {rewards.dtype} "
            f"{list(rewards.shape)}"
        )
    if group_ids.shape != rewards.shape or group_ids.is_floating_point():
        raise ValueError(
            f"group_ids must be integers of shape {list(rewards.shape)}, "
            f"got {group_ids.dtype} {list(group_ids.shape)}"
        )
    _, group, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    values = rewards.double()
    # Relative to the group's minimum, so that equal rewards give exactly 0.
    lowest = torch.zeros_like(counts, dtype=torch.float64)
    lowest = lowest.scatter_reduce(0, group, values, "amin", include_self=False)[group]
    shifted = values - lowest
    means = torch.zeros_like(counts, dtype=torch.float64).index_add(0, group, shifted) / counts
    centered = shifted - means[group]
    return torch.where(counts[group] == 1, values, centered).to(rewards.dtype)


@torch.no_grad()
def spread_to_tokens(
    values: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Return [N]: each sequence's value at its tokens, 0 under the mask.

    values: [B]. loss_mask: [N] bool, int or float. cu_seqlens: [B + 1] int32 or int64.
    Raises ValueError for wrong shapes and dtypes.
    """
    mask, cu_seqlens = check_packed(loss_mask, cu_seqlens, loss_mask.shape[0], values.device)
    _check_per_sequence("values", values, cu_seqlens)
    spread = torch.repeat_interleave(values, cu_seqlens.diff(), output_size=mask.shape[0])
    return torch.where(mask, spread, 0.0)


@torch.no_grad()
def token_rewards(
    scores: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> torch.Tensor:
    """Return [N]: the score at the sequence's last token, less the KL penalty at every token:

        r_t = [t is last] score - kl_coef (log pi_old - log pi_ref)_t

    arXiv 2203.02155, Eq. 2, per token; the estimate is k1, verl's kl_penalty `kl`.
    scores: [B]. loss_mask: [N]. cu_seqlens: [B + 1]. old_logprobs, ref_logprobs: [N], needed when
    kl_coef != 0. A sequence with an empty mask has nowhere to put its score.
    Raises ValueError for wrong shapes and dtypes, or log-probs that are missing.
    """
    mask, cu_seqlens = check_packed(loss_mask, cu_seqlens, loss_mask.shape[0], scores.device)
    _check_per_sequence("scores", scores, cu_seqlens)
    kept, ids, _ = _kept_tokens(mask, cu_seqlens)
    rewards = torch.zeros(len(kept), dtype=torch.float64, device=scores.device)
    is_last = torch.ones_like(ids, dtype=torch.bool)
    is_last[:-1] = ids[1:] != ids[:-1]
    rewards[is_last] = scores.double()[ids[is_last]]
    if kl_coef != 0:
        if old_logprobs is None or ref_logprobs is None:
            raise ValueError(f"kl_coef is {kl_coef}: give old_logprobs and ref_logprobs, or 0")
        _check_tokens(mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
        rewards -= kl_coef * (old_logprobs[kept].double() - ref_logprobs[kept].double())
    return _scatter(rewards, kept, mask, scores.dtype)


@torch.no_grad()
def gae(
    values: torch.Tensor,
    rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (advantages [N], returns [N]) by generalised advantage estimation:

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t

    arXiv 1506.02438, Eq. 16, with V = 0 after the last token, also of a truncated response
    (as in verl). Both are 0 under the mask; the advantages are not whitened yet.
    values, rewards: [N] float32 or float64, one dtype; see token_rewards. loss_mask: [N].
    cu_seqlens: [B + 1]. gamma, lam in [0, 1].
    Raises ValueError for wrong shapes, dtypes and values.
    """
    _check_discount("gamma", gamma)
    _check_discount("lam", lam)
    mask, cu_seqlens = check_packed(loss_mask, cu_seqlens, loss_mask.shape[0], values.device)
    _check_tokens(mask, values=values, rewards=rewards)
    kept, ids, longest = _kept_tokens(mask, cu_seqlens)
    value = values[kept].double()
    next_value = torch.zeros_like(value)
    next_value[:-1] = torch.where(ids[1:] == ids[:-1], value[1:], 0.0)
    delta = rewards[kept].double() + gamma * next_value - value
    advantages = _discounted_sums(delta, ids, longest, gamma * lam)
    returns = advantages + value
    return (
        _scatter(advantages, kept, mask, values.dtype),
        _scatter(returns, kept, mask, values.dtype),
    )


@torch.no_grad()
def masked_whiten(values: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Return (x - mean) / sqrt(variance + 1e-8) over all tokens of the batch, 0 under the mask.

    verl's masked_whiten: unbiased variance, epsilon inside the root. A single token gives 0, where
    verl raises. values, loss_mask: [N]. Raises ValueError for wrong shapes and dtypes.
    """
    if loss_mask.shape != values.shape:
        raise ValueError(
            f"loss_mask must have values' shape {list(values.shape)}, got {list(loss_mask.shape)}"
        )
    mask = loss_mask != 0
    _check_tokens(mask, values=values)
    kept = values[mask].double()
    white = torch.zeros_like(kept)
    if len(kept) > 1:
        white = (kept - kept.mean()) * (kept.var(correction=1) + 1e-8).rsqrt()
    return _scatter(white, mask, mask, values.dtype)


@torch.no_grad()
def reinforce_pp_advantages(
    rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float = 1.0,
) -> torch.Tensor:
    """Return [N]: rewards-to-go, normalised over all tokens of the batch:

        R_t = sum over s >= t of gamma^(s - t) r_s,   A = masked_whiten(R)

    arXiv 2501.03262, section on REINFORCE++: with r from token_rewards and gamma 1, R_t is the
    score less kl_coef times the KL of the tokens from t on. verl's reinforce_plus_plus.
    rewards: [N] float32 or float64. loss_mask: [N]. cu_seqlens: [B + 1]. gamma in [0, 1].
    Raises ValueError for wrong shapes, dtypes and values.
    """
    _check_discount("gamma", gamma)
    mask, cu_seqlens = check_packed(loss_mask, cu_seqlens, loss_mask.shape[0], rewards.device)
    _check_tokens(mask, rewards=rewards)
    kept, ids, longest = _kept_tokens(mask, cu_seqlens)
    returns = _discounted_sums(rewards[kept].double(), ids, longest, gamma)
    return masked_whiten(_scatter(returns, kept, mask, torch.float64), mask).to(rewards.dtype)


@torch.no_grad()
def reinforce_pp_baseline_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Return [N]: the reward less its group's mean, normalised over all tokens of the batch.

    arXiv 2501.03262, section on REINFORCE++ with baseline; verl's reinforce_plus_plus_baseline, so
    that a long response weighs more in mean and variance, and a group of one keeps its reward.
    rewards: [B] float32 or float64. group_ids: [B] integer. loss_mask: [N]. cu_seqlens: [B + 1].
    Raises ValueError for wrong shapes and dtypes.
    """
    spread = spread_to_tokens(group_center(rewards, group_ids), loss_mask, cu_seqlens)
    return masked_whiten(spread, loss_mask)


def overlong_penalty(
    lengths: torch.Tensor,
    max_response_length: int,
    overlong_buffer_len: int,
    penalty_factor: float = 1.0,
) -> torch.Tensor:
    """Return [B] float64, to be added to the rewards before they are normalised:

        penalty_factor times  0                            for |y| <= L - C
                              ( (L - C) - |y| ) / C        up to |y| = L
                              -1                           beyond

    The soft punishment of DAPO (arXiv 2503.14476, Eq. 13), L = max_response_length and
    C = overlong_buffer_len. lengths: [B] integer. Raises ValueError for a buffer that does not fit.
    """
    if not 0 < overlong_buffer_len <= max_response_length:
        raise ValueError(
            f"overlong_buffer_len must be in [1, max_response_length = {max_response_length}], "
            f"got {overlong_buffer_len}"
        )
    excess = lengths.double() - (max_response_length - overlong_buffer_len)
    return -penalty_factor * (excess / overlong_buffer_len).clamp(0.0, 1.0)


def _kept_tokens(
    mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return (positions of the mask's M tokens, their sequences [M], the most in a sequence)."""
    num_sequences = cu_seqlens.shape[0] - 1
    sequences = torch.arange(num_sequences, device=mask.device)
    ids = torch.repeat_interleave(sequences, cu_seqlens.diff(), output_size=mask.shape[0])
    kept = mask.nonzero()[:, 0]
    counts = torch.bincount(ids[kept], minlength=1)
    return kept, ids[kept], int(counts.max())


def _discounted_sums(
    values: torch.Tensor, ids: torch.Tensor, longest: int, discount: float
) -> torch.Tensor:
    """Return [M]: sum over s >= t within the sequence of discount^(s - t) values_s.

    Every pass doubles the span that a sum covers: 17 passes for 128k tokens, not 128k steps.
    """
    sums, span = values, 1
    while span < longest:
        ahead = torch.zeros_like(sums)
        ahead[:-span] = torch.where(ids[span:] == ids[:-span], sums[span:], 0.0)
        sums = sums + discount**span * ahead
        span *= 2
    return sums


def _scatter(
    values: torch.Tensor, where: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return [N] in `dtype`: the values at `where` (indices or mask), 0 elsewhere."""
    result = torch.zeros(mask.shape[0], dtype=dtype, device=values.device)
    result[where] = values.to(dtype)
    return result


def _check_discount(name: str, discount: float) -> None:
    if not 0 <= discount <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {discount}")


def _check_per_sequence(name: str, values: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    if values.shape != (cu_seqlens.shape[0] - 1,) or not values.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape [{cu_seqlens.shape[0] - 1}], one per sequence "
            f"of cu_seqlens, got {values.dtype} {list(values.shape)}"
        )


def _check_tokens(mask: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors are [N] as the mask and of one floating dtype."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name} must have the mask's shape {list(mask.shape)}, got {list(tensor.shape)}"
            )
        check_same(name, tensor, first, tensors[first])
