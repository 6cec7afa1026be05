"""Measuring what a routing costs and saves: perplexity, experts and time on a text; experiments with many policies."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compare import Measured, compare
from .perplexity import cut_windows, perplexity, window_losses

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


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
