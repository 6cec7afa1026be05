"""The selection rule, in PyTorch: order, compare rank by rank, count, clamp, keep. It is written here and nowhere else.

Shape legend: T tokens, E experts, K candidates (the router's own slots; all E when widening).

`rank_by_table` compares a statistic with thresholds, `rank_by_p_values` p-values with critical values (the definition);
the public functions, the policies and the budget solver call them. `decide_by_table` is the reference of three twins:
the fused kernel (`bh_routing.decision.select_triton`), one token on the host (`bh_routing.decision.select_one_token`)
and vLLM's operation, which calls those. A twin returns the same counts and the same sets wherever a statistic is
further than 8 units in the last place from its threshold.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..stats.procedures import Procedure, Rule, count_passing
from ..stats.statistic import full_statistic
from .types import DEFAULT_LIMITS, Limits, PlainRule, RoutingDecision, TableSettings
from .weights import apply_weight_rule


def not_finite(logits_TE: Tensor) -> Tensor:
    """bool [T, 1]: tokens with a logit that is NaN or +infinite, or without one above -infinity (a masked expert)."""
    highest_T1 = logits_TE.amax(-1, keepdim=True)  # NaN where any is
    return (highest_T1 - highest_T1) != 0


def seen_finite(logits_TE: Tensor) -> bool:
    """Whether every logit is finite, looked at where that makes nobody wait: in memory, and not while compiling."""
    return logits_TE.is_cpu and not torch.compiler.is_compiling() and isfinite(logits_TE.sum().item())


class Kept(NamedTuple):
    """What a decision keeps, as `bh_routing.RoutingPolicy.shrink` takes it.

    Attributes
    ----------
    keep_TK : Tensor
        bool, which of the candidates (in `shrink`: the router's own slots).
    counts_T : Tensor
        int64, how many.
    raw_counts_T : Tensor
        int64, what the procedure itself called for, before any clamp.
    """

    keep_TK: Tensor
    counts_T: Tensor
    raw_counts_T: Tensor


class Ranking(NamedTuple):
    """The selection rule's answer: the first ``counts_T`` of ``order_TK`` are kept.

    ``order_TK``: positions of the candidates, most significant first. ``raw_counts_T``: before the clamp.
    """

    order_TK: Tensor
    counts_T: Tensor
    raw_counts_T: Tensor

    @property
    def first_TK(self) -> Tensor:
        """bool in the order of significance: the first ``counts_T``."""
        return torch.arange(self.order_TK.shape[-1], device=self.order_TK.device) < self.counts_T.unsqueeze(
            -1
        )

    def kept(self) -> Kept:
        """The same in the candidates' own order."""
        first_TK = self.first_TK
        keep_TK = torch.zeros_like(first_TK).scatter(-1, self.order_TK, first_TK)
        return Kept(keep_TK, self.counts_T, self.raw_counts_T)


def rank_by_table(
    statistic_TK: Tensor,
    thresholds_E: Tensor,
    *,
    rule: Rule = "step_up",
    limits: Limits = DEFAULT_LIMITS,
) -> Ranking:
    """Order the candidates by the statistic (ties by position), compare rank by rank, count, clamp.

    Parameters
    ----------
    statistic_TK : Tensor
        float32 (or float64) statistic of the candidates, in the router's own slot order.
    thresholds_E : Tensor
        float32 [E], or [T, E] where each token has its own; the first K are used: experts that are no candidates count
        as p = 1.
    """
    sorted_TK, order_TK = statistic_TK.sort(dim=-1, descending=True, stable=True)
    passes_TK = sorted_TK >= thresholds_E[..., : sorted_TK.shape[-1]]
    return Ranking(order_TK, *count_ranks(passes_TK, rule, limits))


def rank_by_p_values(
    p_TK: Tensor,
    procedure: Procedure,
    alpha: float,
    num_experts: int,
    *,
    ties_TK: Tensor | None = None,
    critical_E: Tensor | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Ranking:
    """The definition: order the candidates by p-value, let the procedure judge them, count, clamp.

    Parameters
    ----------
    p_TK : Tensor
        p-values of the candidates; NaN counts as 1, and so do the experts that are no candidates.
    ties_TK : Tensor, optional
        Of equal p-values the one with the larger value comes first; then the position decides.
    critical_E : Tensor, optional
        As in `count_p_values`.
    """
    p_TK = p_TK.nan_to_num(1.0)
    if ties_TK is None:
        sorted_TK, order_TK = p_TK.sort(dim=-1, stable=True)
    else:
        by_ties_TK = ties_TK.argsort(dim=-1, descending=True, stable=True)
        sorted_TK, order_TK = p_TK.gather(-1, by_ties_TK).sort(dim=-1, stable=True)
        order_TK = by_ties_TK.gather(-1, order_TK)
    counts = count_p_values(sorted_TK, procedure, alpha, num_experts, critical_E=critical_E, limits=limits)
    return Ranking(order_TK, *counts)


def rank_top(statistic_TK: Tensor, k: int) -> Ranking:
    """The k candidates with the largest statistic (ties by position)."""
    order_TK = statistic_TK.argsort(dim=-1, descending=True, stable=True)
    counts_T = torch.full(order_TK.shape[:-1], k, dtype=torch.int64, device=order_TK.device)
    return Ranking(order_TK, counts_T, counts_T)


def count_p_values(
    sorted_TK: Tensor,
    procedure: Procedure,
    alpha: float,
    num_experts: int,
    *,
    critical_E: Tensor | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[Tensor, Tensor]:
    """(counts_T, raw_counts_T) of a procedure on the candidates' p-values in ascending order.

    Parameters
    ----------
    sorted_TK : Tensor
        p-values of K candidates among ``num_experts`` experts, the others of which count as p = 1. They are compared
        in float64.
    critical_E : Tensor, optional
        The procedure's critical values where they are at hand.
    """
    num = sorted_TK.shape[-1]
    if procedure.rule is None:  # it adapts: all E p-values are looked at before any is judged
        raw_T = procedure.rejection_counts(pad(sorted_TK, (0, num_experts - num), value=1.0), alpha)
        return _within(raw_T, limits, limits.top(num)), raw_T
    if critical_E is None:
        critical_E = procedure.critical_values(alpha, num_experts).to(sorted_TK.device)
    passes_TK = sorted_TK.double() <= critical_E[:num]
    return count_ranks(passes_TK, procedure.rule, limits)


def count_ranks(passes_TK: Tensor, rule: Rule, limits: Limits) -> tuple[Tensor, Tensor]:
    """(counts_T, raw_counts_T) from which ranks pass: the rule's own count, and the same within the limits."""
    top = limits.top(passes_TK.shape[-1])
    raw_T = counts_T = count_passing(passes_TK, rule)
    if limits.clamp == "inside":
        counts_T = torch.minimum(raw_T, count_passing(passes_TK[..., :top], "step_up"))
    return _within(counts_T, limits, top), raw_T


def _within(counts_T: Tensor, limits: Limits, top: int) -> Tensor:
    if isinstance(limits.min_k, Tensor):
        return torch.maximum(counts_T, limits.min_k).clamp(max=top)
    return counts_T.clamp(limits.min_k, top)


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
    """From logits and the router's own choice to the decision that keeps some of its slots, in its own order.

    Parameters
    ----------
    logits_TE, own_weights_TK, own_experts_TK : Tensor
        What the router returned. A logit of -inf is a masked expert: its p-value is 1. Tokens with NaN or +inf keep the
        router's own choice.
    thresholds_E, offset_E, slope_DE, center_D : Tensor
        One row of a `bh_routing.DecisionTable`, float32. The thresholds may be [T, E], a row for each token, with a
        ``min_k`` for each in ``how.limits``.
    """
    statistic_TE = full_statistic(
        logits_TE, offset_E, how.statistic, how.score_func, how.temperature, slope_DE, center_D
    )
    own_TK = statistic_TE.gather(-1, own_experts_TK)
    kept = rank_by_table(own_TK, thresholds_E, rule=how.rule, limits=how.limits).kept()
    return keep_own(
        kept, not_finite(logits_TE), own_weights_TK, own_experts_TK, weights=how.weights, empty=how.empty
    )


def keep_own(
    kept: Kept,
    lost_T1: Tensor | None,
    own_weights_TK: Tensor,
    own_experts_TK: Tensor,
    *,
    weights: PlainRule,
    empty: int,
    shared_TK: Tensor | None = None,
    resident_E: Tensor | None = None,
) -> RoutingDecision:
    """The decision that keeps these of the router's own slots, and all of them where ``lost_T1`` (None: nowhere)."""
    counts_T = kept.counts_T
    if lost_T1 is None:
        dropped_TK, lost_T = ~kept.keep_TK, torch.zeros_like(counts_T, dtype=torch.bool)
    else:
        dropped_TK, lost_T = ~(kept.keep_TK | lost_T1), lost_T1.squeeze(-1)
        counts_T = counts_T.masked_fill(lost_T, own_experts_TK.shape[-1])
    return RoutingDecision(
        weights_TK=apply_weight_rule(own_weights_TK, dropped_TK, weights),
        experts_TK=own_experts_TK.masked_fill(dropped_TK, empty),
        counts_T=counts_T,
        raw_counts_T=kept.raw_counts_T,
        dropped_TK=dropped_TK,
        own_weights_TK=own_weights_TK,
        own_experts_TK=own_experts_TK,
        empty=empty,
        fallback_T=lost_T,
        in_place=True,
        shared_TK=shared_TK,
        resident_E=resident_E,
    )
