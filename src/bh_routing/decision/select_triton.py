"""The decision from a table as one Triton kernel: one pass over the logits, everything else in registers.

Shape legend: T tokens, E experts (at most `MOST_EXPERTS`), K slots of the router's own choice; R a rank.

The PyTorch reference is `bh_routing.decision.select.decide_by_table`, with the same arguments and result. Counts and
sets are the same wherever a statistic is further than 8 units in the last place from its threshold; on logits for
which the arithmetic is exact they are always the same. On a machine without a GPU the kernel runs in Triton's
interpreter (``TRITON_INTERPRET=1`` before Triton is imported).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import InvalidInputError
from ..stats.statistic import TOKEN_BOUND
from .types import RoutingDecision, TableSettings
from .weights import apply_weight_rule

MOST_EXPERTS = 512
SCORE_FUNCS = ("softmax", "sigmoid")

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _decide(  # type: ignore[no-untyped-def]  # Triton reads no annotations but constexpr
    logits_ptr,
    own_weights_ptr,
    own_experts_ptr,
    thresholds_ptr,
    offset_ptr,
    slope_ptr,
    center_ptr,
    slope_by_logit,  # strides
    slope_by_expert,
    weights_ptr,
    experts_ptr,
    counts_ptr,
    raw_counts_ptr,
    dropped_ptr,
    lost_ptr,
    tokens,
    temperature,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EMPTY: tl.constexpr,
    SCORE_FUNC: tl.constexpr,  # "logit": the logit itself; else the log of the score
    TEMPERED: tl.constexpr,
    STEP_DOWN: tl.constexpr,
    MIN_K: tl.constexpr,
    TOP: tl.constexpr,
    INSIDE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    FOLLOWS: tl.constexpr,  # whether sizes follow the token
    BOUND: tl.constexpr,
):
    t_T = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    e_E = tl.arange(0, BLOCK_E)
    k_K = tl.arange(0, BLOCK_K)
    row_T1 = (t_T < tokens)[:, None]
    slot_1K = (k_K < SLOTS)[None, :]
    mask_TE = row_T1 & (e_E < EXPERTS)[None, :]
    mask_TK = row_T1 & slot_1K

    x_TE = tl.load(logits_ptr + t_T[:, None] * EXPERTS + e_E[None, :], mask=mask_TE, other=0.0).to(tl.float32)
    highest_T = tl.max(tl.where(mask_TE, x_TE, float("-inf")), 1)
    lost_T = (tl.abs(highest_T) == float("inf")) | (tl.max((x_TE != x_TE).to(tl.int32), 1) > 0)

    at_TK = t_T[:, None] * SLOTS + k_K[None, :]
    own_TK = tl.load(own_experts_ptr + at_TK, mask=mask_TK, other=0)
    x_TK = tl.load(logits_ptr + t_T[:, None] * EXPERTS + own_TK, mask=mask_TK, other=0.0).to(tl.float32)
    if FOLLOWS:  # in float64, as in the reference
        center_E = tl.load(center_ptr + e_E, mask=e_E < EXPERTS, other=0.0).to(tl.float64)
        z_TE = tl.where((tl.abs(x_TE) < float("inf")) & mask_TE, x_TE.to(tl.float64) - center_E[None, :], 0.0)
        slope_at_TKE = own_TK[:, :, None] * slope_by_expert + e_E[None, None, :] * slope_by_logit
        slope_TKE = tl.load(
            slope_ptr + slope_at_TKE, mask=mask_TK[:, :, None] & mask_TE[:, None, :], other=0.0
        )
        told_TK = tl.sum(z_TE[:, None, :] * slope_TKE.to(tl.float64), 2)
        told_TK = tl.minimum(tl.maximum(told_TK, -BOUND), BOUND).to(tl.float32)
    if TEMPERED:
        x_TE = tl.div_rn(x_TE, temperature)
        x_TK = tl.div_rn(x_TK, temperature)
    if SCORE_FUNC == "softmax":
        x_TE = tl.where((e_E < EXPERTS)[None, :], x_TE, float("-inf"))
        top_T1 = tl.max(x_TE, 1)[:, None]
        x_TK = x_TK - top_T1 - tl.log(tl.sum(tl.exp(x_TE - top_T1), 1))[:, None]
    elif SCORE_FUNC == "sigmoid":  # min(x, 0) - log1p(exp(-|x|)), the latter after Kahan
        small_TK = tl.exp(-tl.abs(x_TK))
        one_TK = 1.0 + small_TK
        rest_TK = one_TK - 1.0
        log_TK = tl.where(
            rest_TK == 0.0,
            small_TK,
            tl.log(one_TK) * tl.div_rn(small_TK, tl.where(rest_TK == 0.0, 1.0, rest_TK)),
        )
        x_TK = tl.minimum(x_TK, 0.0) - log_TK
    offset_TK = tl.load(offset_ptr + own_TK, mask=mask_TK, other=0.0)
    s_TK = x_TK + offset_TK
    if FOLLOWS:
        s_TK = s_TK + told_TK
    s_TK = tl.where(slot_1K, s_TK, float("-inf"))

    # Rank by comparing all pairs: ties keep the order of the slots.
    before_KK = (k_K[None, :] < k_K[:, None])[None, :, :]
    mine_TK1, other_T1K = s_TK[:, :, None], s_TK[:, None, :]
    ahead_TKK = (other_T1K > mine_TK1) | ((other_T1K == mine_TK1) & before_KK)
    rank_TK = tl.sum(ahead_TKK.to(tl.int32), 2)
    threshold_TK = tl.load(thresholds_ptr + rank_TK, mask=mask_TK & (rank_TK < SLOTS), other=float("inf"))
    pass_TK = (s_TK >= threshold_TK) & slot_1K
    passed_TK = tl.where(pass_TK, rank_TK + 1, 0)
    if STEP_DOWN:
        raw_T = tl.min(tl.where(pass_TK | (k_K >= SLOTS)[None, :], SLOTS, rank_TK), 1)
    else:
        raw_T = tl.max(passed_TK, 1)
    count_T = raw_T
    if INSIDE:
        count_T = tl.minimum(raw_T, tl.max(tl.where(rank_TK < TOP, passed_TK, 0), 1))
    count_T = tl.minimum(tl.maximum(count_T, MIN_K), TOP)
    count_T = tl.where(lost_T, SLOTS, count_T)
    drop_TK = (rank_TK >= count_T[:, None]) & ~lost_T[:, None]

    own_weight_TK = tl.load(own_weights_ptr + at_TK, mask=mask_TK, other=0.0)
    weight_TK = tl.where(drop_TK, -0.0, own_weight_TK)
    if WEIGHTS != "own":
        kept_TK = weight_TK.to(tl.float32)
        total_T = tl.sum(kept_TK, 1)
        if WEIGHTS == "preserve":
            target_T = tl.sum(own_weight_TK.to(tl.float32), 1)
        else:
            target_T = tl.full((BLOCK_T,), 1.0, tl.float32)
        factor_T = tl.where(total_T > 0, tl.div_rn(target_T, tl.where(total_T > 0, total_T, 1.0)), 1.0)
        if WEIGHTS == "preserve":  # a row of which nothing is dropped stays as it is
            factor_T = tl.where(count_T == SLOTS, 1.0, factor_T)
        weight_TK = kept_TK * factor_T[:, None]

    row_T = t_T < tokens
    tl.store(weights_ptr + at_TK, weight_TK.to(own_weight_TK.dtype), mask=mask_TK)
    tl.store(experts_ptr + at_TK, tl.where(drop_TK, EMPTY, own_TK), mask=mask_TK)
    tl.store(dropped_ptr + at_TK, drop_TK, mask=mask_TK)
    tl.store(counts_ptr + t_T, count_T.to(tl.int64), mask=row_T)
    tl.store(raw_counts_ptr + t_T, raw_T.to(tl.int64), mask=row_T)
    tl.store(lost_ptr + t_T, lost_T, mask=row_T)


@torch.library.custom_op("bh_routing::decide_by_table", mutates_args=())
def _operation(
    logits_TE: Tensor,
    own_weights_TK: Tensor,
    own_experts_TK: Tensor,
    thresholds_E: Tensor,
    offset_E: Tensor,
    empty: int,
    score_func: str,
    temperature: float,
    rule: str,
    min_k: int,
    max_k: int,
    clamp: str,
    weights: str,
    slope_DE: Tensor | None = None,
    center_D: Tensor | None = None,
) -> Results:
    tokens, num_experts = logits_TE.shape
    slots = own_experts_TK.shape[1]
    results = _results(own_weights_TK, own_experts_TK)
    if tokens == 0:
        return results
    block_e, block_k = triton.next_power_of_2(num_experts), triton.next_power_of_2(slots)
    follows = slope_DE is not None and center_D is not None
    # A size that follows the token takes a product for each pair, over all logits.
    block_t = max(1, min(512 // block_e, 1024 // block_k**2, 2048 // (block_e * block_k) if follows else 512))
    _decide[(triton.cdiv(tokens, block_t),)](
        logits_TE.contiguous(),
        own_weights_TK.contiguous(),
        own_experts_TK.contiguous(),
        thresholds_E,
        offset_E,
        slope_DE if follows else offset_E,
        center_D if follows else offset_E,
        *(slope_DE.stride() if slope_DE is not None else (0, 0)),
        *results,
        tokens,
        temperature,
        EXPERTS=num_experts,
        SLOTS=slots,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=block_k,
        EMPTY=empty,
        SCORE_FUNC=score_func,
        TEMPERED=temperature != 1.0,
        STEP_DOWN=rule == "step_down",
        MIN_K=min_k,
        TOP=max_k,
        INSIDE=clamp == "inside",
        WEIGHTS=weights,
        FOLLOWS=follows,
        BOUND=TOKEN_BOUND,
        num_warps=1,
        enable_fp_fusion=False,  # every step is rounded, as in the reference
    )
    return results


def _results(own_weights_TK: Tensor, own_experts_TK: Tensor) -> Results:
    """Room for weights, experts, counts, raw counts, dropped and lost."""
    counts_T = own_experts_TK.new_empty(own_experts_TK.shape[0])
    dropped_TK = torch.empty(own_experts_TK.shape, dtype=torch.bool, device=own_experts_TK.device)
    return (
        own_weights_TK.new_empty(own_weights_TK.shape),
        own_experts_TK.new_empty(own_experts_TK.shape),
        counts_T,
        torch.empty_like(counts_T),
        dropped_TK,
        torch.empty_like(counts_T, dtype=torch.bool),
    )


@_operation.register_fake
def _(logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, *settings: Any) -> Results:
    return _results(own_weights_TK, own_experts_TK)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.save_for_backward(inputs[1], output[4])
    ctx.weights, ctx.inputs = inputs[12], len(inputs)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_TK: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    """The reference's own gradient with respect to the router's own weights; the sets are constants."""
    own_weights_TK, dropped_TK = ctx.saved_tensors
    with torch.enable_grad():
        own_TK = own_weights_TK.detach().requires_grad_()
        weights_TK = apply_weight_rule(own_TK, dropped_TK, ctx.weights)
        (own_grad_TK,) = torch.autograd.grad(weights_TK, own_TK, grad_TK)
    return (None, own_grad_TK, *([None] * (ctx.inputs - 2)))


_operation.register_autograd(_backward, setup_context=_save)


def supports(num_experts: int, statistic: str, score_func: str) -> bool:
    """Whether the kernel computes this decision; the others take the PyTorch path."""
    return num_experts <= MOST_EXPERTS and (statistic == "logit" or score_func in SCORE_FUNCS)


def runs_on(device: torch.device) -> bool:
    """Whether the kernel can run there: on a GPU, and anywhere in Triton's interpreter."""
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


def decide_by_table(
    logits_TE: Tensor,
    own_weights_TK: Tensor,
    own_experts_TK: Tensor,
    thresholds_E: Tensor,
    offset_E: Tensor,
    how: TableSettings,
    slope_DE: Tensor | None = None,
    center_D: Tensor | None = None,
) -> RoutingDecision:
    """`bh_routing.decision.select.decide_by_table`, fused.

    Raises
    ------
    InvalidInputError
        For what the kernel does not compute (see `supports`), or logits in float64.
    """
    num_experts, slots = logits_TE.shape[1], own_experts_TK.shape[1]
    if not supports(num_experts, how.statistic, how.score_func) or logits_TE.dtype == torch.float64:
        raise InvalidInputError(
            f"the fused decision serves at most {MOST_EXPERTS} experts, the statistic 'logit' or the scores "
            f"{' and '.join(SCORE_FUNCS)}, and logits of at most 32 bits; got {num_experts} experts, {how.statistic!r} of "
            f"{how.score_func!r} and {logits_TE.dtype}. Use backend='torch'."
        )
    weights_TK, experts_TK, counts_T, raw_counts_T, dropped_TK, lost_T = _operation(
        logits_TE,
        own_weights_TK,
        own_experts_TK,
        thresholds_E,
        offset_E,
        how.empty,
        "logit" if how.statistic == "logit" else how.score_func,
        float(how.temperature),
        how.rule,
        how.limits.min_k,
        how.limits.top(slots),
        how.limits.clamp,
        how.weights,
        slope_DE,
        center_D,
    )
    return RoutingDecision(
        weights_TK=weights_TK,
        experts_TK=experts_TK,
        counts_T=counts_T,
        raw_counts_T=raw_counts_T,
        dropped_TK=dropped_TK,
        own_weights_TK=own_weights_TK,
        own_experts_TK=own_experts_TK,
        empty=how.empty,
        fallback_T=lost_T,
        in_place=True,
    )


__all__ = ["MOST_EXPERTS", "SCORE_FUNCS", "decide_by_table", "runs_on", "supports"]
