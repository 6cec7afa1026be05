"""What decides which experts run: the policy contract, BH from a table or from p-values, a price on loads, top-k.

Shape legend: T tokens, E experts, K slots of the router's own choice.

The model's own router always runs first. A policy sees its logits and its own choice and says which of the
slots to keep: ``policy.decide(logits_TE, own_weights_TK, own_experts_TK, context) -> RoutingDecision``.
"""

from __future__ import annotations

from ..decision.select import Kept
from .base import RoutingContext, RoutingPolicy, TopKPolicy
from .checks import check_decision, check_within
from .levels import LevelsPolicy
from .phases import PhasePolicy
from .price import FixedPrice, PricePolicy, Prices
from .pvalue import PValuePolicy
from .table import TablePolicy

__all__ = [
    "FixedPrice",
    "Kept",
    "LevelsPolicy",
    "PValuePolicy",
    "PhasePolicy",
    "PricePolicy",
    "Prices",
    "RoutingContext",
    "RoutingPolicy",
    "TablePolicy",
    "TopKPolicy",
    "check_decision",
    "check_within",
]
