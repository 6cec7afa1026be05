"""The import name that existing notebooks use; everything is in `bh_routing`."""

from bh_routing import (
    BHRoutingIntegration,
    benjamini_hochberg_routing,
    compute_routing_statistics,
    topk_routing,
)

__all__ = [
    "BHRoutingIntegration",
    "benjamini_hochberg_routing",
    "compute_routing_statistics",
    "topk_routing",
]
