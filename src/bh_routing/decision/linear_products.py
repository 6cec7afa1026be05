"""The products of a linear compensation with many tokens: three ways to the same sum over dropped pairs.

Shape legend: T tokens, E experts, K slots of the router's own choice, H hidden size, Q regressors, P dropped pairs.

    sum over the dropped experts e of a token    w_e phi' maps_e,    maps_EQH of 16 bits, phi_TQ of float64

A fourth, `OneToken`, is for single tokens. `LinearCompensation` (`bh_routing.decision.compensation`) chooses among them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm

from .types import RoutingDecision

_SUM = 0  # the mode of `torch.embedding_bag`

# Up to so many dropped pairs per expert of the layer it is faster not to convert maps (docs/performance.md).
FEW = 2


def looped(
    maps_EQH: Tensor,
    regressors: Callable[[], Tensor],
    decision: RoutingDecision,
    few: torch.dtype | None = None,
) -> Tensor | None:
    """One product per expert that was dropped, in float32.

    ``few`` is None where a gradient is asked for; otherwise the dtype that the sum will have. If that is the maps',
    few pairs take a weighted sum over rows instead, which rounds it: it converts no map.
    """
    tokens, slots = decision.dropped_TK.shape
    num, wide, hidden = maps_EQH.shape
    pair_P = (decision.dropped_TK & (decision.own_experts_TK < num)).flatten().nonzero().squeeze(-1)
    if not pair_P.numel():
        return None
    expert_P = decision.own_experts_TK.flatten()[pair_P]
    summed = few == maps_EQH.dtype and len(pair_P) <= FEW * num
    if not summed:
        expert_P, order_P = expert_P.sort(stable=True)
        pair_P = pair_P[order_P]
    token_P = pair_P.div(slots, rounding_mode="floor")
    x_PQ = decision.own_weights_TK.flatten()[pair_P].unsqueeze(-1) * regressors()[token_P]
    if summed:
        row_P2Q = expert_P.unsqueeze(-1) * wide + torch.arange(wide, device=expert_P.device).repeat(2)
        start_T = token_P.bincount(minlength=tokens).cumsum(0).roll(1)
        start_T[0] = 0
        return summed_rows(maps_EQH.flatten(0, 1), row_P2Q, x_PQ, 2 * wide * start_T)
    x_PQ = x_PQ.float()
    out_TH = x_PQ.new_zeros(tokens, hidden)
    with torch.autocast("cpu", enabled=False):
        parts, start = [], 0
        for expert, count in enumerate(expert_P.bincount().tolist()):
            if count:
                parts.append(x_PQ[start : start + count] @ maps_EQH[expert].float())
                start += count
    return out_TH.index_add(0, token_P, torch.cat(parts))


def summed_rows(table_NH: Tensor, row_P2Q: Tensor, factor_PQ: Tensor, start_T: Tensor) -> Tensor:
    """A sum over rows per token, in float32, rounded to the table's dtype once.

    A factor of 16 bits would be rounded: each comes in two, itself rounded and what that left over, for the same row.

    Parameters
    ----------
    table_NH : Tensor
    row_P2Q : Tensor
        int64: the rows of each pair twice, one after the other.
    factor_PQ : Tensor
        float64.
    start_T : Tensor
        int64, where each token's rows start.
    """
    high_PQ = factor_PQ.to(table_NH.dtype)
    both_P2Q = torch.cat((high_PQ, (factor_PQ - high_PQ).to(table_NH.dtype)), -1)
    # Not by its name in torch.nn.functional, whose checks cost as much as an operation.
    out_TH, *_ = torch.embedding_bag(
        table_NH, row_P2Q.view(-1), start_T, False, _SUM, False, both_P2Q.view(-1)
    )
    return out_TH


def weighted_rows(maps_EQH: Tensor, phi_TQ: Tensor, decision: RoutingDecision) -> Tensor:
    """Compiled for a CPU: a weighted sum over the rows of all experts' maps, 0 for those that were kept."""
    tokens, _ = decision.dropped_TK.shape
    num, wide, _ = maps_EQH.shape
    weight_TK = decision.dropped_weights_TK.double()
    factor_TN = (weight_TK.unsqueeze(-1) * phi_TQ.unsqueeze(1)).reshape(tokens, -1)
    first_TK1 = (decision.own_experts_TK.clamp(max=num - 1) * wide).unsqueeze(-1)
    row_TN = (first_TK1 + torch.arange(wide, device=first_TK1.device)).reshape(tokens, -1)
    table = maps_EQH.flatten(0, 1)
    return embedding_bag(row_TN, table, per_sample_weights=factor_TN.to(table.dtype), mode="sum").float()


def grouped(maps_EQH: Tensor, phi_TQ: Tensor, decision: RoutingDecision) -> Tensor:
    """Sort, offsets, one grouped product over the dropped pairs; the others lie behind the last offset.

    Rows there, which the product leaves unwritten, are removed by ``where`` (0 * NaN is NaN), as in
    `bh_routing.patching.expert_math.grouped_forward`.
    """
    tokens, slots = decision.dropped_TK.shape
    num = maps_EQH.shape[0]
    group_P = decision.own_experts_TK.clamp(max=num).masked_fill(~decision.dropped_TK, num).flatten()
    sorted_P, order_P = group_P.sort()
    gone_P1 = (sorted_P < num).unsqueeze(-1)
    offsets_E = torch.searchsorted(
        sorted_P, torch.arange(num, device=sorted_P.device), right=True, out_int32=True
    )
    weight_P1 = decision.own_weights_TK.flatten()[order_P].unsqueeze(-1)
    x_PQ = torch.where(gone_P1, weight_P1 * phi_TQ[order_P // slots], 0.0).to(maps_EQH.dtype)
    y_PH = grouped_mm(x_PQ, maps_EQH, offs=offsets_E)
    y_PH = torch.where(gone_P1, y_PH, torch.zeros((), dtype=y_PH.dtype, device=y_PH.device))
    back_P = torch.empty_like(order_P).scatter_(
        0, order_P, torch.arange(order_P.numel(), device=order_P.device)
    )
    return y_PH[back_P].view(tokens, slots, -1).sum(1, dtype=torch.float32)


class OneToken(NamedTuple):
    """A linear compensation for single tokens on the host: what is made once, and Python's own numbers."""

    low: list[float]
    high: list[float]
    center: list[float]
    base_Q: Tensor  # one - mu @ whiten
    whiten_QD: Tensor
    maps: tuple[Tensor, ...]  # [Q, H] of each expert
    rows: tuple[Tensor, ...]  # int64 [2Q] of each expert: its rows in the table, twice
    table_NH: Tensor  # the maps of all experts, one below the other
    start: Tensor  # int64 [1], 0

    def product(self, decision: RoutingDecision, logits_1D: Tensor, dtype: torch.dtype) -> Tensor | None:
        """A twin of `looped` for one token, without its machinery.

        Between products that empty the caches every tensor operation costs 5 to 20 microseconds, whatever it does
        (docs/performance.md): these are as few as there could be.
        """
        gone, experts = decision.dropped_TK.tolist()[0], decision.own_experts_TK.tolist()[0]
        slots = [slot for slot, dropped in enumerate(gone) if dropped and experts[slot] < len(self.maps)]
        if not slots:
            return None
        z = logits_1D.tolist()[0]
        if not isfinite(sum(z)):  # a masked expert
            z = [x if isfinite(x) else mu for x, mu in zip(z, self.center, strict=True)]
        z = [a if x < a else b if x > b else x for x, a, b in zip(z, self.low, self.high, strict=True)]
        phi_Q = torch.addmv(self.base_Q, self.whiten_QD, _vector(z))
        weights = decision.own_weights_TK.tolist()[0]
        if dtype == self.table_NH.dtype:
            weight_P = _vector([weights[slot] for slot in slots])
            row_N = torch.cat([self.rows[experts[slot]] for slot in slots])
            return summed_rows(self.table_NH, row_N, torch.outer(weight_P, phi_Q), self.start)
        phi_1Q = phi_Q.float().unsqueeze(0)
        map_QH = torch.empty_like(self.maps[0], dtype=torch.float32)
        out_1H = map_QH.new_zeros(1, map_QH.shape[1])
        for slot in slots:
            out_1H.addmm_(phi_1Q, map_QH.copy_(self.maps[experts[slot]]), alpha=weights[slot])
        return out_1H


def _vector(values: list[float]) -> Tensor:
    """float64 [N]; a fifth of the time of `torch.tensor`."""
    return torch.frombuffer(array("d", values), dtype=torch.float64)
