"""Measuring what a routing costs and saves: perplexity, experts and time on a text; experiments with many policies."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names
from ..text import cut_windows
from .compare import Measured, compare
from .perplexity import perplexity, window_losses

if TYPE_CHECKING:
    from .datasets import Dataset, load_dataset
    from .paired import pareto_front, perplexity_change
    from .runner import RoutingExperimentRunner
    from .specs import make_routing, parse_policy
    from .strategy import RoutingStrategy
    from .summary import summarise
    from .workbench import Workbench

_MODULE_OF = {
    "Dataset": "datasets",
    "load_dataset": "datasets",
    "pareto_front": "paired",
    "perplexity_change": "paired",
    "RoutingExperimentRunner": "runner",
    "Workbench": "workbench",
    "make_routing": "specs",
    "parse_policy": "specs",
    "RoutingStrategy": "strategy",
    "summarise": "summary",
}

__all__ = [
    "Dataset",
    "Measured",
    "RoutingExperimentRunner",
    "RoutingStrategy",
    "Workbench",
    "compare",
    "cut_windows",
    "load_dataset",
    "make_routing",
    "pareto_front",
    "parse_policy",
    "perplexity",
    "perplexity_change",
    "summarise",
    "window_losses",
]

__getattr__, __dir__ = lazy_names(globals(), _MODULE_OF)
