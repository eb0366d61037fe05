"""The trainer's probabilities against the rollout engine's: importance weights and rejection.

Both compute the same weights' probabilities in other kernels and dtypes, so what the engine sampled
is slightly off-policy. With rho_t = pi_old(y_t) / pi_rollout(y_t) of a response's tokens, pi_old by
the trainer, the ratio of token t is by `level`

    token      rho_t
    sequence   the product of the sequence's rho (the importance ratio of the whole response)
    geometric  exp(mean of log rho over the sequence), which does not grow with the length

Everything here is a constant of the loss: no gradients, float64 inside, for whole sequences. A
log-prob of the engine that is not finite, or a NaN of the trainer, leaves its token, and at the
other levels its sequence, without a ratio: the weight is then 0 and the token is rejected.
"""

import math

import torch

from flowrl.kernels._packed import check_packed, check_same

LEVELS = ("token", "sequence", "geometric")


@torch.no_grad()
def truncated_importance_weights(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    level: str = "token",
    threshold: float = 2.0,
) -> torch.Tensor:
    """Return [N]: min(ratio, threshold) of every token, 0 under the mask and where there is none.

    Truncated importance sampling (https://fengyao.notion.site/off-policy-rl), verl's rollout_is:
    factors of what each token, or sequence, adds to the loss.
    old_logprobs, rollout_logprobs: [N] packed tokens, both float32 or both float64. loss_mask: [N]
    bool, int or float. cu_seqlens: [B + 1] int32 or int64. threshold: > 0, may be math.inf.
    Raises ValueError for wrong shapes, dtypes and options.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be > 0, got {threshold}: use math.inf for no bound")
    log_ratio = _log_ratio(old_logprobs, rollout_logprobs, loss_mask, cu_seqlens, level)
    weights = log_ratio.clamp(max=math.log(threshold)).exp()
    return torch.where(log_ratio.isnan(), 0.0, weights).to(old_logprobs.dtype)


@torch.no_grad()
def kept_tokens(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    level: str = "token",
    low: float = 0.5,
    high: float = 2.0,
) -> torch.Tensor:
    """Return [N] bool: the mask's tokens whose ratio is in [low, high], to take its place.

    `token` with truncated weights above `high` is IcePop (arXiv 2510.18855, the function M(k));
    verl's rollout_rs. The other levels keep or reject whole sequences. Arguments and errors as in
    truncated_importance_weights; 0 <= low <= high, high > 0.
    """
    if not (0 <= low <= high and high > 0):
        raise ValueError(f"the range must have 0 <= low <= high and high > 0, got {low} and {high}")
    log_ratio = _log_ratio(old_logprobs, rollout_logprobs, loss_mask, cu_seqlens, level)
    log_low = math.log(low) if low > 0 else -math.inf
    return (log_ratio >= log_low) & (log_ratio <= math.log(high))  # false for NaN


def effective_sample_size(log_ratios: torch.Tensor) -> float:
    """Return (sum rho)^2 / (M sum rho^2) in (0, 1] for log rho [M]: 1 when all are equal.

    The share of independent samples of pi_old that would say as much. 0 without any sample.
    """
    if len(log_ratios) == 0:
        return 0.0
    log_ratios = log_ratios.double()
    sum_, squares = log_ratios.logsumexp(0), (2 * log_ratios).logsumexp(0)
    return float((2 * sum_ - squares).exp()) / len(log_ratios)


def _log_ratio(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    level: str,
) -> torch.Tensor:
    """Return [N] float64: the log ratio of every token, NaN under the mask and where unknown."""
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}: use one of {', '.join(LEVELS)}")
    mask, cu_seqlens = check_packed(loss_mask, cu_seqlens, len(loss_mask), old_logprobs.device)
    for name, tensor in (("old_logprobs", old_logprobs), ("rollout_logprobs", rollout_logprobs)):
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name} must have the mask's shape {list(mask.shape)}, got {list(tensor.shape)}"
            )
        check_same(name, tensor, "old_logprobs", old_logprobs)
    old, rollout = old_logprobs.double(), rollout_logprobs.double()
    is_known = mask & rollout.isfinite() & (old < math.inf)  # -inf of the trainer is a ratio of 0
    log_ratio = torch.where(is_known, old - rollout, math.nan)
    if level == "token":
        return log_ratio
    # Selected, not multiplied: what is under the mask must not reach the sum.
    columns = torch.stack([torch.where(mask, log_ratio, 0.0), mask.double()], dim=1)
    log_ratios, num_tokens = torch.segment_reduce(
        columns, "sum", offsets=cu_seqlens, unsafe=True
    ).unbind(dim=1)
    if level == "geometric":
        log_ratios = log_ratios / num_tokens.clamp(min=1)
    spread = torch.repeat_interleave(log_ratios, cu_seqlens.diff(), output_size=mask.shape[0])
    return torch.where(mask, spread, math.nan)
