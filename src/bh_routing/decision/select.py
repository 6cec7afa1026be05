"""The decision from a table, in PyTorch: which of a token's candidates to keep, and how many.

Shape legend: T tokens, E experts, K candidates (the router's own slots; all E when widening).

This is the reference of the fused kernel in `bh_routing.decision.select_triton`, which returns the same counts and
the same sets wherever a statistic is further than 8 units in the last place from its threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..stats.procedures import Rule, count_passing
from ..stats.pvalues import at_least_float32
from ..stats.statistic import full_statistic
from .types import Clamp, PlainRule, RoutingDecision
from .weights import apply_weight_rule


def not_finite(logits_TE: Tensor) -> Tensor:
    """bool [T, 1]: tokens with a logit that is NaN or infinite (or whose sum is)."""
    total_T1 = at_least_float32(logits_TE).sum(-1, keepdim=True)
    return (total_T1 - total_T1) != 0


def clamp_counts(
    passes_TK: Tensor, procedure_counts_T: Tensor, min_k: int, max_k: int, clamp: Clamp
) -> Tensor:
    """Counts after the clamp to [min_k, max_k].

    ``after``: the procedure's count, clamped. ``inside``: the largest rank within max_k that passes (the same
    for a step-down rule), then at least min_k.
    """
    if clamp == "inside":
        ranks = torch.arange(1, passes_TK.shape[-1] + 1, device=passes_TK.device)
        procedure_counts_T = torch.minimum(
            procedure_counts_T, (passes_TK & (ranks <= max_k)).mul(ranks).amax(-1)
        )
    return procedure_counts_T.clamp(min_k, max_k)


class Kept(NamedTuple):
    """What a decision keeps: ``keep_TK`` bool over the candidates, ``counts_T`` and ``raw_counts_T`` int64."""

    keep_TK: Tensor
    counts_T: Tensor
    raw_counts_T: Tensor


def decide_by_table(
    logits_TE: Tensor,
    own_weights_TK: Tensor,
    own_experts_TK: Tensor,
    thresholds_E: Tensor,
    offset_E: Tensor,
    *,
    empty: int,
    statistic: str = "logprob",
    score_func: str = "softmax",
    temperature: float = 1.0,
    rule: Rule = "step_up",
    min_k: int = 1,
    max_k: int | None = None,
    clamp: Clamp = "after",
    weights: PlainRule = "own",
) -> RoutingDecision:
    """From logits and the router's own choice to the decision that keeps some of its slots, in its own order.

    Parameters
    ----------
    logits_TE, own_weights_TK, own_experts_TK : Tensor
        What the router returned.
    thresholds_E, offset_E : Tensor
        float32 [E], one row of a `bh_routing.DecisionTable`.
    empty : int
        The index that dropped slots get.
    statistic, score_func, temperature
        As in `bh_routing.stats.statistic.base_statistic`.
    rule, min_k, max_k, clamp
        As in `keep_by_table`.
    weights : "own", "preserve" or "sum"
        As in `bh_routing.decision.weights.apply_weight_rule`.

    Notes
    -----
    Tokens with non-finite logits keep the router's own choice.
    """
    statistic_TE = full_statistic(logits_TE, offset_E, statistic, score_func, temperature)
    kept = keep_by_table(
        statistic_TE.gather(-1, own_experts_TK),
        thresholds_E,
        rule=rule,
        min_k=min_k,
        max_k=max_k,
        clamp=clamp,
    )
    return keep_own(kept, not_finite(logits_TE), own_weights_TK, own_experts_TK, weights=weights, empty=empty)


def keep_own(
    kept: Kept,
    lost_T1: Tensor,
    own_weights_TK: Tensor,
    own_experts_TK: Tensor,
    *,
    weights: PlainRule,
    empty: int,
) -> RoutingDecision:
    """The decision that keeps these of the router's own slots, and all of them where ``lost_T1``."""
    lost_T = lost_T1.squeeze(-1)
    return drop_own(
        ~(kept.keep_TK | lost_T1),
        kept.counts_T.masked_fill(lost_T, own_experts_TK.shape[-1]),
        kept.raw_counts_T,
        lost_T,
        own_weights_TK,
        own_experts_TK,
        weights=weights,
        empty=empty,
    )


def drop_own(
    dropped_TK: Tensor,
    counts_T: Tensor,
    raw_counts_T: Tensor,
    lost_T: Tensor,
    own_weights_TK: Tensor,
    own_experts_TK: Tensor,
    *,
    weights: PlainRule,
    empty: int,
) -> RoutingDecision:
    """The decision that drops these of the router's own slots."""
    if weights == "own":
        weights_TK = own_weights_TK.masked_fill(dropped_TK, 0.0)
    else:
        weights_TK = apply_weight_rule(own_weights_TK, ~dropped_TK, weights, "none")
    return RoutingDecision(
        weights_TK=weights_TK,
        experts_TK=own_experts_TK.masked_fill(dropped_TK, empty),
        counts_T=counts_T,
        raw_counts_T=raw_counts_T,
        dropped_TK=dropped_TK,
        own_weights_TK=own_weights_TK,
        own_experts_TK=own_experts_TK,
        empty=empty,
        fallback_T=lost_T,
    )


def keep_by_table(
    statistic_TK: Tensor,
    thresholds_E: Tensor,
    *,
    rule: Rule = "step_up",
    min_k: int = 1,
    max_k: int | None = None,
    clamp: Clamp = "after",
) -> Kept:
    """Order the candidates by the statistic (ties by position), compare rank by rank, take the count.

    Parameters
    ----------
    statistic_TK : Tensor
        float32 (or float64) statistic of the candidates, in the router's own slot order.
    thresholds_E : Tensor
        float32 [E]; the first K are used: experts that are no candidates count as p = 1.
    min_k, max_k : int
        The clamp; ``max_k=None`` means K.
    """
    num = statistic_TK.shape[-1]
    top = num if max_k is None else min(max_k, num)
    sorted_TK, order_TK = statistic_TK.sort(dim=-1, descending=True, stable=True)
    passes_TK = sorted_TK >= thresholds_E[:num]
    raw_T = count_passing(passes_TK, rule)
    return _keep(passes_TK, order_TK, raw_T, min_k, top, clamp)


def keep_by_p_values(
    p_TK: Tensor,
    critical_E: Tensor,
    *,
    rule: Rule = "step_up",
    min_k: int = 1,
    max_k: int | None = None,
    clamp: Clamp = "after",
) -> Kept:
    """The definition: order by p-value (ties by position), compare with the critical values in float64."""
    num = p_TK.shape[-1]
    top = num if max_k is None else min(max_k, num)
    sorted_TK, order_TK = p_TK.double().sort(dim=-1, stable=True)
    passes_TK = sorted_TK <= critical_E[:num].double()
    return _keep(passes_TK, order_TK, count_passing(passes_TK, rule), min_k, top, clamp)


def _keep(passes_TK: Tensor, order_TK: Tensor, raw_T: Tensor, min_k: int, max_k: int, clamp: Clamp) -> Kept:
    counts_T = clamp_counts(passes_TK, raw_T, min_k, max_k, clamp)
    first_TK = torch.arange(order_TK.shape[-1], device=order_TK.device) < counts_T.unsqueeze(-1)
    return Kept(torch.zeros_like(first_TK).scatter(-1, order_TK, first_TK), counts_T, raw_T)
