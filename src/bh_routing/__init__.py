"""bh-routing: as many experts as each token needs, in a pretrained Mixture-of-Experts model.

The packages in the order of the method; none imports one further down:

- `data`, `models`: a sample text and prompts; the model that comes along
- `text`: documents to windows of tokens
- `stats`: pure mathematics: statistic, null distributions, p-values, procedures
- `decision`: from a statistic and a table to the experts that are kept, and their weights
- `policies`: what decides: the contract, and the policies that come along
- `telemetry`: what is counted while a model runs
- `patching`: a model's routers: found, planned, replaced, restored
- `calibration`: what a model's routers do on a text, and what follows from it
- `support`: which engine and which path can do what
- `settings`: everything that a person can say about a routing: levels, budgets, a certified loss, one for each phase
- `integration`: a model and a policy
- `training`: losses and a loop for training under a routing
- `evaluation`: policies by name, measured on text, and reports
- `engines`: the same routing in other programs (vLLM, llama.cpp)
- `cli`: the command line

The names below are loaded when they are first used, so that `bh-routing --help` does not wait for torch.
"""

from typing import TYPE_CHECKING

from ._lazy import lazy_names
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import calibration, data, decision, errors, evaluation, models, policies, stats, text, training
    from .calibration.calibration import Calibration
    from .calibration.passes import calibrate
    from .decision.functional import benjamini_hochberg_routing, compute_routing_statistics, topk_routing
    from .decision.table import DecisionTable
    from .decision.types import RoutingDecision
    from .errors import BHRoutingError, NoRoutersError
    from .integration import BHRoutingIntegration, RoutingIntegration
    from .patching import is_patched, make_plan, unpatch
    from .policies import Kept, PValuePolicy, RoutingContext, RoutingPolicy, TablePolicy, TopKPolicy
    from .settings import RoutingSettings
    from .stats.procedures import PROCEDURES, Procedure
    from .telemetry.figures import Telemetry

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
    "RoutingSettings": "settings",
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
    "RoutingSettings",
    "TablePolicy",
    "Telemetry",
    "TopKPolicy",
    "benjamini_hochberg_routing",
    "calibrate",
    "calibration",
    "compute_routing_statistics",
    "data",
    "decision",
    "errors",
    "evaluation",
    "is_patched",
    "make_plan",
    "models",
    "policies",
    "stats",
    "text",
    "topk_routing",
    "training",
    "unpatch",
]

__getattr__, __dir__ = lazy_names(globals(), _MODULE_OF)
