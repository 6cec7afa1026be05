"""Weights of the kept experts: the model's own, masked, then the weight rule.

Shape legend: T tokens, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stats.pvalues import at_least_float32
from .types import PlainRule, RouteNorm, WeightRule

_MODEL_RULES: dict[RouteNorm, PlainRule] = {"none": "own", "renormalised": "preserve", "unknown": "sum"}


def plain_rule(rule: WeightRule | PlainRule, route_norm: RouteNorm) -> PlainRule:
    """What a weight rule does in a model of this ``route_norm``: leave the kept weights, or keep the row's sum, or make it 1."""
    if rule == "model":
        return _MODEL_RULES[route_norm]
    return rule


def apply_weight_rule(
    own_weights_TK: Tensor,
    kept_TK: Tensor,
    rule: WeightRule | PlainRule,
    route_norm: RouteNorm,
    kept_weights_TK: Tensor | None = None,
) -> Tensor:
    """Weights of the kept slots, 0 elsewhere, [T, K'] in the dtype of the router's own weights.

    ``model`` does as the model does: kept weights as they are where it does not renormalise, a row that keeps its
    sum where it does (for a renormalising router that is the renormalisation over the selected, any scaling
    factor included), a sum of 1 for a mock that states nothing. ``preserve`` keeps the row's sum,
    ``sum`` makes it 1. Except under ``sum``, a row of which nothing was dropped is returned bit for bit.
    ``kept_weights_TK``: the weights that `kept_TK` refers to where they are not the router's own slots.
    """
    weights_TK = own_weights_TK if kept_weights_TK is None else kept_weights_TK
    masked_TK = weights_TK.masked_fill(~kept_TK, 0.0)
    plain = plain_rule(rule, route_norm)
    if plain == "own":
        return masked_TK
    total_T1 = at_least_float32(masked_TK).sum(-1, keepdim=True)
    target_T1 = (
        at_least_float32(own_weights_TK).sum(-1, keepdim=True)
        if plain == "preserve"
        else torch.ones_like(total_T1)
    )
    usable_T1 = total_T1 > 0
    # A denominator of 0 would leave its NaN in the gradient, chosen or not.
    factor_T1 = torch.where(usable_T1, target_T1 / torch.where(usable_T1, total_T1, 1.0), 1.0)
    rescaled_TK = (at_least_float32(masked_TK) * factor_T1).to(weights_TK.dtype)
    if plain == "preserve" and kept_weights_TK is None:
        return torch.where(kept_TK.all(-1, keepdim=True), masked_TK, rescaled_TK)
    return rescaled_TK
