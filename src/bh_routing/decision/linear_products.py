"""The products of a linear compensation with many tokens: three ways to the same sum over dropped pairs.

Shape legend: T tokens, E experts, K slots of the router's own choice, H hidden size, Q regressors, P dropped pairs.

    sum over the dropped experts e of a token    w_e phi' maps_e,    maps_EQH of 16 bits, phi_TQ of float64

`LinearCompensation` (`bh_routing.decision.compensation`) chooses among them and has a fourth, for single tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm

from .types import RoutingDecision


def looped(maps_EQH: Tensor, regressors: Callable[[], Tensor], decision: RoutingDecision) -> Tensor | None:
    """One product per expert that was dropped, in float32."""
    tokens, slots = decision.dropped_TK.shape
    num, _, hidden = maps_EQH.shape
    pair_P = (decision.dropped_TK & (decision.own_experts_TK < num)).flatten().nonzero().squeeze(-1)
    if not pair_P.numel():
        return None
    expert_P, order_P = decision.own_experts_TK.flatten()[pair_P].sort(stable=True)
    pair_P = pair_P[order_P]
    token_P = pair_P.div(slots, rounding_mode="floor")
    weight_P1 = decision.own_weights_TK.flatten()[pair_P].unsqueeze(-1)
    x_PQ = (weight_P1 * regressors()[token_P]).float()
    out_TH = x_PQ.new_zeros(tokens, hidden)
    with torch.autocast("cpu", enabled=False):
        parts, start = [], 0
        for expert, count in enumerate(expert_P.bincount().tolist()):
            if count:
                parts.append(x_PQ[start : start + count] @ maps_EQH[expert].float())
                start += count
    return out_TH.index_add(0, token_P, torch.cat(parts))


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
