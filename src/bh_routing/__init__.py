"""bh-routing: as many experts as each token needs, in a pretrained Mixture-of-Experts model.

The names below are loaded when they are first used, so that `bh-routing --help` does not wait for torch.
"""

from typing import TYPE_CHECKING

from ._lazy import lazy_names

if TYPE_CHECKING:
    from .calibration.calibration import Calibration
    from .calibration.passes import calibrate
    from .decision.functional import benjamini_hochberg_routing, compute_routing_statistics, topk_routing
    from .decision.table import DecisionTable
    from .decision.types import RoutingDecision
    from .errors import BHRoutingError, NoRoutersError
    from .integration import BHRoutingIntegration, RoutingIntegration
    from .patching import is_patched, make_plan, unpatch
    from .policies import Kept, PValuePolicy, RoutingContext, RoutingPolicy, TablePolicy, TopKPolicy
    from .stats.procedures import PROCEDURES, Procedure
    from .telemetry.figures import Telemetry

__version__ = "0.1.0"

_MODULE_OF = {
    "Calibration": "calibration.calibration",
    "calibrate": "calibration.passes",
    "BHRoutingError": "errors",
    "NoRoutersError": "errors",
    "BHRoutingIntegration": "integration",
    "RoutingIntegration": "integration",
    "is_patched": "patching",
    "make_plan": "patching",
    "unpatch": "patching",
    "Kept": "policies",
    "PValuePolicy": "policies",
    "RoutingContext": "policies",
    "RoutingPolicy": "policies",
    "TablePolicy": "policies",
    "TopKPolicy": "policies",
    "PROCEDURES": "stats.procedures",
    "Procedure": "stats.procedures",
    "RoutingDecision": "decision.types",
    "benjamini_hochberg_routing": "decision.functional",
    "compute_routing_statistics": "decision.functional",
    "topk_routing": "decision.functional",
    "DecisionTable": "decision.table",
    "Telemetry": "telemetry.figures",
}

__all__ = [
    "PROCEDURES",
    "BHRoutingError",
    "BHRoutingIntegration",
    "Calibration",
    "DecisionTable",
    "Kept",
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
