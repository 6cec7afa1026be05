"""The import name that existing notebooks use; everything is in `bh_routing`."""

try:
    from bh_routing import (
        BHRoutingIntegration,
        benjamini_hochberg_routing,
        compute_routing_statistics,
        topk_routing,
    )
except ModuleNotFoundError as error:
    if error.name != "bh_routing":
        raise
    raise ImportError(
        "Cannot import bh_routing: expected the package bh-routing beside olmoe_bh_integration.py in this Python, got "
        "none; install it there, `python -m pip install PATH_OR_WHEEL`."
    ) from error

__all__ = [
    "BHRoutingIntegration",
    "benjamini_hochberg_routing",
    "compute_routing_statistics",
    "topk_routing",
]
