"""The import name that existing notebooks use for the experiments; everything is in `bh_routing.evaluation`."""

from typing import Any, NoReturn

from bh_routing.errors import DatasetError
from bh_routing.evaluation.runner import RoutingExperimentRunner
from bh_routing.evaluation.strategy import RoutingStrategy
from bh_routing.models.loading import load_model


def load_dataset(name: str, **settings: Any) -> NoReturn:
    """Data sets are lm-evaluation-harness' business: says how to run it, and what the runner takes."""
    raise DatasetError(
        f"data set {name!r} is not loaded here any more: run its task with `bh-routing lm-eval MODEL --tasks TASK` "
        "(bh_routing.evaluation.lm_eval.evaluate in Python); RoutingExperimentRunner takes texts, {'name': text}."
    )


__all__ = ["RoutingExperimentRunner", "RoutingStrategy", "load_dataset", "load_model"]
