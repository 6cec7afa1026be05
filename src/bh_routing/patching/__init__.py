"""Patching: discovery, contract probe, plan, apply, undo."""

from .apply import RoutingPatch, is_patched, skip_mode, unpatch
from .plan import LayerPlan, PatchPlan
from .planning import make_plan
from .watch import reached_by_text, special_ids, watch

__all__ = [
    "LayerPlan",
    "PatchPlan",
    "RoutingPatch",
    "is_patched",
    "make_plan",
    "reached_by_text",
    "skip_mode",
    "special_ids",
    "unpatch",
    "watch",
]
