"""Measuring what a routing costs and saves: perplexity, experts and time on a text; experiments with many policies."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names
from ..text import cut_windows
from .compare import Measured, compare
from .perplexity import perplexity, window_losses

if TYPE_CHECKING:
    from .paired import pareto_front, perplexity_change
    from .runner import RoutingExperimentRunner
    from .specs import make_routing, parse_policy
    from .summary import summarise
    from .usage import expert_usage, plot_usage
    from .workbench import Workbench

_MODULE_OF = {
    "pareto_front": "paired",
    "perplexity_change": "paired",
    "RoutingExperimentRunner": "runner",
    "Workbench": "workbench",
    "make_routing": "specs",
    "expert_usage": "usage",
    "plot_usage": "usage",
    "parse_policy": "specs",
    "summarise": "summary",
}

__all__ = [
    "Measured",
    "RoutingExperimentRunner",
    "Workbench",
    "compare",
    "cut_windows",
    "expert_usage",
    "make_routing",
    "pareto_front",
    "parse_policy",
    "perplexity",
    "perplexity_change",
    "plot_usage",
    "summarise",
    "window_losses",
]

__getattr__, __dir__ = lazy_names(globals(), _MODULE_OF)
