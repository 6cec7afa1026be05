"""bh-routing: as many experts as each token needs, in a pretrained Mixture-of-Experts model.

The names below are loaded when they are first used, so that `bh-routing --help` does not wait for torch.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .calibration import Calibration
    from .collect import calibrate
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

_MODULE_OF = {
    "Calibration": "calibration",
    "calibrate": "collect",
    "BHRoutingError": "errors",
    "NoRoutersError": "errors",
    "BHRoutingIntegration": "integration",
    "RoutingIntegration": "integration",
    "is_patched": "patching",
    "make_plan": "patching",
    "unpatch": "patching",
    "PValuePolicy": "policies",
    "RoutingContext": "policies",
    "RoutingPolicy": "policies",
    "TablePolicy": "policies",
    "TopKPolicy": "policies",
    "PROCEDURES": "procedures",
    "Procedure": "procedures",
    "RoutingDecision": "routing",
    "benjamini_hochberg_routing": "routing",
    "compute_routing_statistics": "routing",
    "topk_routing": "routing",
    "DecisionTable": "statistic",
    "Telemetry": "telemetry",
}

__all__ = [
    "PROCEDURES",
    "BHRoutingError",
    "BHRoutingIntegration",
    "Calibration",
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
    "calibrate",
    "compute_routing_statistics",
    "is_patched",
    "make_plan",
    "topk_routing",
    "unpatch",
]

__getattr__, __dir__ = lazy_names(globals(), _MODULE_OF)
