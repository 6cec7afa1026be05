"""The import name that existing notebooks use for the experiments; everything is in `bh_routing.evaluation`."""

from bh_routing.cli.loading import load_model
from bh_routing.evaluation.datasets import Dataset, load_dataset
from bh_routing.evaluation.runner import RoutingExperimentRunner
from bh_routing.evaluation.strategy import RoutingStrategy, StrategyPolicy

__all__ = [
    "Dataset",
    "RoutingExperimentRunner",
    "RoutingStrategy",
    "StrategyPolicy",
    "load_dataset",
    "load_model",
]
