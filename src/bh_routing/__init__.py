"""bh-routing: as many experts as each token needs, in a pretrained Mixture-of-Experts model."""

from .errors import BHRoutingError, NoRoutersError
from .procedures import PROCEDURES, Procedure
from .routing import (
    RoutingDecision,
    benjamini_hochberg_routing,
    compute_routing_statistics,
    topk_routing,
)

__version__ = "0.1.0"

__all__ = [
    "PROCEDURES",
    "BHRoutingError",
    "NoRoutersError",
    "Procedure",
    "RoutingDecision",
    "benjamini_hochberg_routing",
    "compute_routing_statistics",
    "topk_routing",
]
