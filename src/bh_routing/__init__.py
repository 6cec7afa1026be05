"""bh-routing: as many experts as each token needs, in a pretrained Mixture-of-Experts model."""

from .errors import BHRoutingError, NoRoutersError
from .integration import BHRoutingIntegration, RoutingIntegration
from .patching import is_patched, make_plan, unpatch
from .policies import PValuePolicy, RoutingContext, RoutingPolicy, TablePolicy, TopKPolicy
from .procedures import PROCEDURES, Procedure
from .routing import (
    RoutingDecision,
    benjamini_hochberg_routing,
    compute_routing_statistics,
    topk_routing,
)
from .statistic import DecisionTable
from .telemetry import Telemetry

__version__ = "0.1.0"

__all__ = [
    "PROCEDURES",
    "BHRoutingError",
    "BHRoutingIntegration",
    "DecisionTable",
    "NoRoutersError",
    "PValuePolicy",
    "Procedure",
    "RoutingContext",
    "RoutingDecision",
    "RoutingIntegration",
    "RoutingPolicy",
    "TablePolicy",
    "Telemetry",
    "TopKPolicy",
    "benjamini_hochberg_routing",
    "compute_routing_statistics",
    "is_patched",
    "make_plan",
    "topk_routing",
    "unpatch",
]
