"""Weights of the kept experts: the model's own, masked, then the weight rule.

Shape legend: T tokens, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._words import WeightRule
from ..stats.pvalues import at_least_float32
from .types import PlainRule, RouteNorm

_MODEL_RULES: dict[RouteNorm, PlainRule] = {"none": "own", "renormalised": "preserve", "unknown": "sum"}


def plain_rule(rule: WeightRule, route_norm: RouteNorm) -> PlainRule:
    """What a weight rule does to the kept weights in a model of this ``route_norm``.

    ``model`` does as the model does: it leaves them where the model does not renormalise, keeps the row's sum where
    it does (for a renormalising router that is the renormalisation over the selected, any scaling factor included),
    and makes a sum of 1 for a mock that states nothing.
    """
    return _MODEL_RULES[route_norm] if rule == "model" else rule


def apply_weight_rule(
    own_weights_TK: Tensor, dropped_TK: Tensor, rule: PlainRule, candidates_TC: Tensor | None = None
) -> Tensor:
    """Weights of the kept slots, -0.0 in dropped ones, [T, K] (or [T, C]) in the dtype of the router's own weights.

    Parameters
    ----------
    rule : "own", "preserve" or "sum"
        ``own`` leaves the kept weights as they are, ``preserve`` keeps the row's sum, ``sum`` makes it 1. Except
        under ``sum``, a row of which nothing was dropped is returned bit for bit.
    candidates_TC : Tensor, optional
        The weights that ``dropped_TK`` refers to, where they are not those of the router's own slots.
    """
    weights_TK = own_weights_TK if candidates_TC is None else candidates_TC
    masked_TK = weights_TK.masked_fill(dropped_TK, -0.0)
    if rule == "own":
        return masked_TK
    total_T1 = at_least_float32(masked_TK).sum(-1, keepdim=True)
    target_T1 = torch.ones_like(total_T1)
    if rule == "preserve":
        target_T1 = at_least_float32(own_weights_TK).sum(-1, keepdim=True)
    usable_T1 = total_T1 > 0
    # A denominator of 0 would leave its NaN in the gradient, chosen or not.
    factor_T1 = torch.where(usable_T1, target_T1 / torch.where(usable_T1, total_T1, 1.0), 1.0)
    rescaled_TK = (at_least_float32(masked_TK) * factor_T1).to(weights_TK.dtype)
    if rule == "preserve" and candidates_TC is None:
        return torch.where(dropped_TK.any(-1, keepdim=True), rescaled_TK, masked_TK)
    return rescaled_TK
