"""p-values that need no calibration: each is computed from the logits at hand.

Shape legend: T tokens, E experts. Every function maps logits [T, E] to p-values [T, E] in the logits' dtype,
float32 at least (float64 stays float64). Calibrated p-values are in `bh_routing.stats.nulls`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InvalidInputError, InvalidParameterError, InvalidTypeError

SMALLER = (
    2.0**-16
)  # differences and sums of the largest floats stay finite; a power of two changes no other digit

PValues = str | Tensor | Callable[[Tensor], Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def robust_z(logits_TE: Tensor) -> Tensor:
    """The token's own robust z-scores, (logit - median) / (1.4826 MAD), [T, E].

    Where MAD = 0 (more than half of the logits tie), the mean absolute deviation times sqrt(pi/2) takes its
    place (Iglewicz & Hoaglin 1993); where that is 0 too (all logits equal) z is -inf, so that p = 1.
    Experts whose logit is -inf are masked: they are no part of the null, and have z = -inf.
    """
    x_TE = at_least_float32(logits_TE) * SMALLER
    masked_TE = x_TE == float("-inf")
    num_T1 = (~masked_TE).sum(-1, keepdim=True)
    deviation_TE = x_TE - _median(x_TE.masked_fill(masked_TE, float("inf")), num_T1)
    size_TE = deviation_TE.abs()
    mad_T1 = _median(size_TE.masked_fill(masked_TE, float("inf")), num_T1) * 1.4826
    mean_T1 = size_TE.masked_fill(masked_TE, 0.0).sum(-1, keepdim=True) / num_T1 * math.sqrt(math.pi / 2)
    spread_T1 = torch.where(mad_T1 > 0, mad_T1, mean_T1)
    safe_T1 = torch.where(spread_T1 > 0, spread_T1, torch.ones_like(spread_T1))
    return torch.where(spread_T1 > 0, deviation_TE / safe_T1, float("-inf"))


def _median(x_TE: Tensor, num_T1: Tensor) -> Tensor:
    """Median of the ``num_T1`` smallest with the two middle values averaged, [T, 1] (torch.median gives the lower one)."""
    place_T2 = torch.cat(((num_T1 - 1).clamp_min(0) // 2, (num_T1 // 2).clamp_max(x_TE.shape[-1] - 1)), -1)
    middle_T2: Tensor = x_TE.sort(-1).values.gather(-1, place_T2)
    return middle_T2.mean(-1, keepdim=True)


def robust_p_values(logits_TE: Tensor) -> Tensor:
    """P(N(0,1) >= z) with z from `robust_z`: the token is its own null, whatever else is in the batch.

    Scale and shift of the logits do not matter, so that a temperature cannot change a decision.
    """
    p_TE: Tensor = torch.special.ndtr(-robust_z(logits_TE))
    return p_TE


def softmax_p_values(logits_TE: Tensor) -> Tensor:
    """1 - softmax probability, the pseudo p-value of the original design.

    It is not a p-value: under no null is it uniform. With E = 64 experts even a strong router gives its best
    expert a probability near 0.1 to 0.3, hence "p" near 0.8, so that at any usual level nothing passes and
    `min_k` alone decides. Kept for comparison.
    """
    return 1.0 - torch.softmax(at_least_float32(logits_TE), dim=-1)


def batch_p_values(logits_TE: Tensor) -> Tensor:
    """Rank of a token's logit among the batch's logits for the same expert, (1 + #others >= it) / T.

    Depends on which other tokens are in the batch, and cannot be smaller than 1/T: for exploration, not for
    serving.
    """
    x_ET = at_least_float32(logits_TE).transpose(0, 1).contiguous()
    ascending_ET = x_ET.sort(-1).values
    below_ET = torch.searchsorted(ascending_ET, x_ET)  # left side: values strictly smaller
    num = max(1, x_ET.shape[-1])
    p_ET = ((num - below_ET) / num).to(x_ET.dtype)
    return p_ET.masked_fill(x_ET == float("-inf"), 1.0).transpose(0, 1)


P_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "robust": robust_p_values,
    "softmax": softmax_p_values,
    "batch": batch_p_values,
}


def method_of(pvalues: str) -> Callable[[Tensor], Tensor]:
    """One of `P_VALUES` by name; an unknown name raises `InvalidParameterError` with those that exist."""
    if pvalues not in P_VALUES:
        raise InvalidParameterError(
            f"unknown pvalues={pvalues!r}; expected one of {', '.join(map(repr, P_VALUES))}, a tensor of p-values, or "
            "a callable."
        )
    return P_VALUES[pvalues]


def resolve_p_values(pvalues: PValues, logits_TE: Tensor, *, values: bool = False) -> Tensor:
    """p-values [T, E] from a method's name, a tensor, or a callable of the logits; ``values`` as in `check_p_values`.

    Raises
    ------
    InvalidParameterError
        For an unknown name.
    InvalidTypeError, InvalidInputError
        As `check_p_values` says, of a tensor or of a callable's result.
    """
    if isinstance(pvalues, str):
        return method_of(pvalues)(logits_TE)
    p_TE = pvalues(logits_TE) if callable(pvalues) else pvalues
    return check_p_values(p_TE, logits_TE, values=values)


def check_p_values(p_TE: object, logits_TE: Tensor, *, values: bool) -> Tensor:
    """p-values from outside as [T, E] on the logits' device, float32 at least; 1 for masked experts (logits of -inf).

    Parameters
    ----------
    values : bool
        Also look at them: every one must lie in [0, 1]. This waits for the device.

    Raises
    ------
    InvalidTypeError, InvalidInputError
        If they are not floating point, not of the logits' shape, or not in [0, 1] (NaN is allowed beside others: it
        counts as 1).
    """
    if not isinstance(p_TE, Tensor) or not p_TE.is_floating_point():
        got = p_TE.dtype if isinstance(p_TE, Tensor) else type(p_TE).__name__
        raise InvalidTypeError(f"pvalues must give a floating-point tensor like the logits, got {got}.")
    if p_TE.numel() != logits_TE.numel() or p_TE.shape[-1] != logits_TE.shape[-1]:
        raise InvalidInputError(
            f"pvalues must have the shape of the logits, {tuple(logits_TE.shape)} up to leading dimensions, "
            f"got {tuple(p_TE.shape)}."
        )
    if values and bool(((p_TE < 0) | (p_TE > 1)).any()):
        raise InvalidInputError(
            f"p-values must lie between 0 and 1, got values from {float(p_TE.min()):g} to {float(p_TE.max()):g}; a "
            "statistic is no p-value (small ones must be the surprising ones)."
        )
    if values and p_TE.numel() and bool(p_TE.isnan().all()):
        raise InvalidInputError(
            "p-values must lie between 0 and 1, got nothing but NaN; find where they come from."
        )
    p_TE = at_least_float32(p_TE.reshape(logits_TE.shape).to(logits_TE.device))
    return p_TE.masked_fill(logits_TE == float("-inf"), 1.0)
