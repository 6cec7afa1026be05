"""The registry of routing policies by name: parameters, how each is built, where it was published.

`ENTRIES` is the only list of the names. Every entry takes a budget, ``experts=4``: its parameter is then solved on
calibration text, so that all can be compared at the same mean number of experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..decision.compensation import check_strength
from ..errors import BudgetError, InvalidParameterError
from ..integration import BHRoutingIntegration, RoutingIntegration
from ..policies import PValuePolicy, RoutingPolicy, TopKPolicy
from ..stats.procedures import PROCEDURES
from . import baselines
from .baselines import allocate, solve
from .baselines.tokenwise import whole_budget
from .workbench import CompensatedIntegration, Workbench

Converter = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name of the registry.

    Attributes
    ----------
    summary, source : str
        One line for people; where the rule was published.
    parameters : dict
        Name -> (converter from text, one line of help); ``experts`` is the budget.
    needs : tuple of str
        Exactly one of them must be given (empty: nothing must).
    build : callable
        ``build(bench, parameters) -> RoutingIntegration``.
    """

    summary: str
    source: str = ""
    parameters: dict[str, tuple[Converter, str]]
    needs: tuple[str, ...] = ()
    build: Callable[[Workbench, dict[str, Any]], RoutingIntegration]


# --------------------------------------------------------------------------------------------- converters


def _strength(text: str) -> bool | float:
    words = {"true": True, "yes": True, "false": False, "no": False}
    try:
        return words[text.lower()] if text.lower() in words else float(text)
    except ValueError:
        raise ValueError("expected true, false or a strength from 0 to 1") from None


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split("/")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split("/")]


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_BUDGET = {"experts": (float, "budget: mean number of experts per token")}
_WEIGHTS = {"weights": (str, "model, preserve or sum")}
_COMPENSATION = {
    "compensation": (_strength, "add back what dropped experts add on average: true, false or 0 to 1")
}
_COMMON: dict[str, tuple[Converter, str]] = _BUDGET | _WEIGHTS | _COMPENSATION  # type: ignore[operator]
SOLVED = ("alpha", "k", "p", "t", "q", "scale", "thresholds")  # what a budget takes the place of


# ----------------------------------------------------------------------------------------------- builders


def _integrate(
    bench: Workbench, policy: RoutingPolicy, compensation: bool | float = False
) -> RoutingIntegration:
    strength = check_strength(compensation)
    if strength == 0.0:
        return RoutingIntegration(bench.model, policy, collect_stats=bench.collect_stats)
    means = {} if bench.calibration is None else bench.calibration.mean_outputs(strength)
    if not means:
        raise InvalidParameterError(
            f"compensation={json.dumps(compensation)} needs the experts' mean outputs: give a calibration that holds them."
        )
    return CompensatedIntegration(bench.model, policy, means=means, collect_stats=bench.collect_stats)


def _from_policy(
    make: Callable[[Workbench, dict[str, Any]], RoutingPolicy],
) -> Callable[[Workbench, dict[str, Any]], RoutingIntegration]:
    """A builder from a function that makes the policy; ``compensation`` is taken out first."""

    def build(bench: Workbench, parameters: dict[str, Any]) -> RoutingIntegration:
        rest = dict(parameters)
        compensation = rest.pop("compensation", False)
        return _integrate(bench, make(bench, rest), compensation)

    return build


def _top_k(bench: Workbench, p: dict[str, Any], **fixed: Any) -> RoutingPolicy:
    k = p.get("k")
    if "experts" in p:
        k = whole_budget(p["experts"], bench.top_k, "topk")
    return TopKPolicy(k, **({"weights": p["weights"]} if "weights" in p else {}) | fixed)


def _simple(policy: Any, parameter: str) -> Callable[[Workbench, dict[str, Any]], RoutingPolicy]:
    """A rule with one parameter and a `for_budget`."""

    def make(bench: Workbench, p: dict[str, Any]) -> RoutingPolicy:
        rest = dict(p)
        if (budget := rest.pop("experts", None)) is not None:
            return policy.for_budget(budget, bench.log, **rest)
        return policy(rest.pop(parameter), **rest) if parameter in rest else policy(**rest)

    return make


def _naee(bench: Workbench, p: dict[str, Any]) -> RoutingPolicy:
    rest = dict(p)
    if (budget := rest.pop("experts", None)) is not None:
        return baselines.DynamicSkippingPolicy.for_budget(budget, bench.log, **rest)
    return baselines.DynamicSkippingPolicy.from_log(bench.log, **rest)


def _entropy(bench: Workbench, p: dict[str, Any]) -> RoutingPolicy:
    rest = dict(p)
    if (budget := rest.pop("experts", None)) is not None:
        rest.pop("thresholds", None)
        return baselines.EntropyPolicy.for_budget(budget, bench.log, **rest)
    if "ks" not in rest or "thresholds" not in rest:
        raise InvalidParameterError(
            "entropy needs ks and thresholds (entropy:ks=2/4/8,thresholds=0.5/0.7), or experts."
        )
    return baselines.EntropyPolicy(**rest)


def _layer_total(budget: float, bench: Workbench, what: str) -> float:
    """Experts per token added over layers, for a mean per layer."""
    tops = [context.top_k for context in bench.plan.contexts]
    mean = sum(tops) / len(tops)
    if not 1.0 <= budget <= mean:
        raise BudgetError(
            f"{what} can keep 1 to {mean:g} experts per token on average, got a budget of {budget:g}."
        )
    return budget * len(tops)


def _lexi(bench: Workbench, p: dict[str, Any]) -> RoutingPolicy:
    rest = dict(p)
    budget = rest.pop("experts")
    total = _layer_total(budget, bench, "lexi")
    whole = round(total)
    if abs(whole - total) > 0.02 * total:
        layers = len(bench.plan.contexts)
        raise BudgetError(
            f"lexi gives each of {layers} layers a whole number of experts: {budget:g} per token is "
            f"{total:g} in all; use {int(total) / layers:g} or {(int(total) + 1) / layers:g}."
        )
    return baselines.PerLayerPolicy(allocate(bench.lexi_costs, whole), rule="lexi", **rest)


def _alloc(bench: Workbench, p: dict[str, Any]) -> RoutingPolicy:
    rest = dict(p)
    total = _layer_total(rest.pop("experts"), bench, "allocmoe")
    ks: list[float] = [float(k) for k in allocate(bench.loss_costs, int(total + 1e-9))]
    if (left := total - sum(ks)) > 1e-9:  # a fraction of one expert: to the layer that gains most by one more
        gains = [
            (row[int(k) - 1] - row[int(k)] if int(k) < len(row) else float("-inf"))
            for row, k in zip(bench.loss_costs, ks, strict=True)
        ]
        ks[gains.index(max(gains))] += min(1.0, left)
    return baselines.AllocatedPolicy(ks, **rest)


def _procedure(name: str) -> Callable[[Workbench, dict[str, Any]], RoutingIntegration]:
    def build(bench: Workbench, parameters: dict[str, Any]) -> RoutingIntegration:
        rest = dict(parameters)
        calibration = bench.calibration if rest.get("pvalues") is None else None
        if calibration is None and "experts" in rest:
            return _uncalibrated(bench, rest, procedure=name)
        return BHRoutingIntegration(
            bench.model,
            alpha=rest.pop("alpha", None),
            experts_per_token=rest.pop("experts", None),
            calibration=calibration,
            procedure=name,
            collect_stats=bench.collect_stats,
            **rest,
        )

    return build


def _uncalibrated(bench: Workbench, rest: dict[str, Any], procedure: str) -> RoutingIntegration:
    """A procedure on p-values of the token itself, its level solved on recorded routing."""
    rest = dict(rest)
    budget, kind = rest.pop("experts"), rest.pop("pvalues", "robust")
    allowed = ("weights", "min_k", "max_k", "clamp", "temperature")
    if other := [key for key in rest if key not in allowed]:
        raise InvalidParameterError(f"{other[0]}={rest[other[0]]!r} needs a calibration.")

    def make(log_alpha: float) -> PValuePolicy:
        return PValuePolicy(kind, procedure=procedure, alpha=10.0**log_alpha, **rest)

    policy = solve(make, bench.log, budget, -12.0, -1e-9, f"{procedure}'s level with {kind} p-values")
    return _integrate(bench, policy)


def _original(bench: Workbench, parameters: dict[str, Any]) -> RoutingIntegration:
    rest = {"pvalues": "softmax", "weights": "sum"} | parameters
    if "experts" in rest:
        return _uncalibrated(bench, rest, procedure="bh")
    return BHRoutingIntegration(
        bench.model, alpha=rest.pop("alpha", 0.05), collect_stats=bench.collect_stats, **rest
    )


_LEVEL: dict[str, tuple[Converter, str]] = {
    "alpha": (float, "level, 0 < alpha < 1"),
    "experts": (float, "budget: mean number of experts per token"),
    "min_k": (int, "at least so many experts"),
    "max_k": (int, "at most so many"),
    "clamp": (str, "after or inside"),
    "temperature": (float, "divides the logits"),
    "weights": (str, "model, preserve or sum"),
}
_CALIBRATED: dict[str, tuple[Converter, str]] = _LEVEL | {
    "statistic": (str, "contribution, logprob or logit"),
    "size": (str, "sensitivity, deviation or output"),
    "null": (str, "unselected, all or trimmed"),
    "scope": (str, "model or layer"),
    "estimator": (str, "empirical, kde or normal"),
    "kernel": (str, "of the kde"),
    "bandwidth": (_number_or_name, "of the kde"),
    "compensation": (_strength, "add back what dropped experts add on average: true, false or 0 to 1"),
    "pvalues": (str, "robust, softmax or batch: without the calibration"),
}

ENTRIES: dict[str, Entry] = {
    "full": Entry(
        summary="the model's own routing",
        parameters={},
        build=_from_policy(lambda bench, p: TopKPolicy()),
    ),
    "topk": Entry(
        summary="the k best experts with the model's own weights",
        source="Shazeer et al. 2017",
        parameters=_COMMON | {"k": (int, "experts per token")},
        needs=("k", "experts"),
        build=_from_policy(_top_k),
    ),
    "regular": Entry(
        summary="top-k, weights as the model makes them",
        source="the original OLMoE routing experiments",
        parameters=_BUDGET | {"k": (int, "experts per token (default: the model's own)")},
        build=_from_policy(_top_k),
    ),
    "normalised": Entry(
        summary="top-k, weights made to sum to 1",
        source="the original OLMoE routing experiments",
        parameters=_BUDGET | {"k": (int, "experts per token (default: the model's own)")},
        build=_from_policy(lambda bench, p: _top_k(bench, p, weights="sum")),
    ),
    "uniform": Entry(
        summary="top-k with equal weights",
        source=baselines.UniformPolicy.source,
        parameters=_BUDGET | _WEIGHTS | {"k": (int, "experts per token (default: the model's own)")},
        build=_from_policy(_simple(baselines.UniformPolicy, "k")),
    ),
    "adaptive": Entry(
        summary="the number of experts in proportion to the router's entropy",
        source=baselines.AdaptivePolicy.source,
        parameters=_COMMON | {"scale": (float, "0 to 1 (default 1)")},
        build=_from_policy(_simple(baselines.AdaptivePolicy, "scale")),
    ),
    "topp": Entry(
        summary="the fewest experts that reach the probability p together",
        source=baselines.TopPPolicy.source,
        parameters=_COMMON | {"p": (float, "0 to 1")},
        needs=("p", "experts"),
        build=_from_policy(_simple(baselines.TopPPolicy, "p")),
    ),
    "minp": Entry(
        summary="experts with at least p times the largest score",
        source=baselines.MinPPolicy.source,
        parameters=_COMMON | {"p": (float, "0 to 1")},
        needs=("p", "experts"),
        build=_from_policy(_simple(baselines.MinPPolicy, "p")),
    ),
    "threshold": Entry(
        summary="experts with a routing score of at least t",
        parameters=_COMMON | {"t": (float, "0 to 1")},
        needs=("t", "experts"),
        build=_from_policy(_simple(baselines.ThresholdPolicy, "t")),
    ),
    "entropy": Entry(
        summary="the number of experts by bucket of the router's entropy",
        source=baselines.EntropyPolicy.source,
        parameters=_COMMON
        | {
            "ks": (_integers, "experts per bucket, 2/4/8"),
            "thresholds": (_floats, "entropies between them, as shares of log E, 0.5/0.7"),
        },
        build=_from_policy(_entropy),
    ),
    "naee": Entry(
        summary="skip experts whose score is small beside the best one",
        source=baselines.DynamicSkippingPolicy.source,
        parameters=_COMMON | {"q": (float, "quantile of the ratio on calibration text (default 0.5)")},
        build=_from_policy(_naee),
    ),
    "random": Entry(
        summary="k of the model's own experts by chance",
        parameters=_COMMON | {"k": (float, "experts per token"), "seed": (int, "default 0")},
        needs=("k", "experts"),
        build=_from_policy(_simple(baselines.RandomPolicy, "k")),
    ),
    "seqtopk": Entry(
        summary="the k * S largest scores of a sequence of S tokens",
        source=baselines.SequenceTopKPolicy.source,
        parameters=_COMMON | {"k": (float, "mean experts per token")},
        needs=("k", "experts"),
        build=_from_policy(_simple(baselines.SequenceTopKPolicy, "k")),
    ),
    "perlayer": Entry(
        summary="k per layer, as given",
        source=baselines.PerLayerPolicy.source,
        parameters=_WEIGHTS | _COMPENSATION | {"k": (_integers, "experts per layer, 6/3/3/5")},
        needs=("k",),
        build=_from_policy(_simple(baselines.PerLayerPolicy, "k")),
    ),
    "lexi": Entry(
        summary="k per layer from output changes on random inputs",
        source=baselines.PerLayerPolicy.source,
        parameters=_COMMON,
        needs=("experts",),
        build=_from_policy(_lexi),
    ),
    "allocmoe": Entry(
        summary="a budget given to layers by their effect on the loss, then to the tokens of a sequence",
        source=baselines.AllocatedPolicy.source,
        parameters=_COMMON,
        needs=("experts",),
        build=_from_policy(_alloc),
    ),
    "original": Entry(
        summary="the original design: BH on 1 - softmax probability, weights made to sum to 1",
        source="the original design",
        parameters=_LEVEL,
        build=_original,
    ),
} | {
    name: Entry(
        summary=f"{name} on calibrated p-values (without a calibration: the token's own robust null)",
        source=procedure.source,
        parameters=_CALIBRATED,
        build=_procedure(name),
    )
    for name, procedure in PROCEDURES.items()
}

INSPIRED: dict[str, str] = {
    "topp": baselines.TopPPolicy.inspired,
    "minp": baselines.MinPPolicy.inspired,
    "entropy": baselines.EntropyPolicy.inspired,
    "adaptive": baselines.AdaptivePolicy.inspired,
    "naee": baselines.DynamicSkippingPolicy.inspired,
    "seqtopk": baselines.SequenceTopKPolicy.inspired,
    "lexi": baselines.PerLayerPolicy.inspired,
    "allocmoe": baselines.AllocatedPolicy.inspired,
}
