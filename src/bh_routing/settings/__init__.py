"""Everything that a person can say about a routing, and the policy that it means. Loads no torch."""

from .routing import COUNTED, RoutingSettings, counted, level_of
from .text import TEXT_OPTIONS

__all__ = ["COUNTED", "TEXT_OPTIONS", "RoutingSettings", "counted", "level_of"]
