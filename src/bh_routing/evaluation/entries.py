"""The registry of routing policies by name: parameters, how each is built, where it was published.

`POLICIES` is the only list of the names; an own rule is added as ``POLICIES["mine"] = Entry(...)``. Every entry takes
a budget, ``experts=4``: its parameter is then solved on calibration text, so that all can be compared at the same mean
number of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BudgetError, InvalidParameterError
from ..integration import BHRoutingIntegration, RoutingIntegration
from ..policies import RoutingPolicy, TopKPolicy
from ..settings import TEXT_OPTIONS, RoutingSettings
from ..stats.procedures import PROCEDURES
from . import baselines
from .baselines import allocate, solve
from .baselines.base import check_budget
from .baselines.tokenwise import whole_budget
from .workbench import Workbench

Converter = Callable[[str], Any]
Builder = Callable[[Workbench, dict[str, Any]], RoutingIntegration]
Maker = Callable[[Workbench, dict[str, Any]], RoutingPolicy]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name of the registry.

    Attributes
    ----------
    summary, source : str
        One line for people; where the rule was published.
    inspired : str
        In what it differs from the published rule; empty if in nothing.
    parameters : dict
        Name -> (converter from text, one line of help); ``experts`` is the budget.
    needs : tuple of str
        Exactly one of them must be given (empty: nothing must).
    build : callable
        ``build(bench, parameters) -> RoutingIntegration``.
    """

    summary: str
    source: str = ""
    inspired: str = ""
    parameters: dict[str, tuple[Converter, str]]
    needs: tuple[str, ...] = ()
    build: Builder


# --------------------------------------------------------------------------------------------- parameters


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split("/")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split("/")]


def _of_settings(*names: str) -> dict[str, tuple[Converter, str]]:
    return {name: (TEXT_OPTIONS[name].read, TEXT_OPTIONS[name].help) for name in names}


_BUDGET, _WEIGHTS, _COMPENSATION = (_of_settings(name) for name in ("experts", "weights", "compensation"))
_SHARED = _of_settings("loads", "weights", "compensation")
_COMMON = _BUDGET | _WEIGHTS | _COMPENSATION
_CALIBRATED = _of_settings(*(name for name in TEXT_OPTIONS if name not in ("mode", "procedure")))
_LEVEL = _of_settings("alpha", "experts", "min_k", "max_k", "clamp", "temperature", "weights")
_OWN_K = {"k": (int, "experts per token (default: the model's own)")}
SOLVED = ("alpha", "k", "p", "t", "q", "scale", "thresholds")  # what a budget takes the place of


# ----------------------------------------------------------------------------------------------- builders


def _from_policy(make: Maker) -> Builder:
    """A builder from a function that makes the policy; ``compensation`` is taken out first."""

    def build(bench: Workbench, parameters: dict[str, Any]) -> RoutingIntegration:
        rest = dict(parameters)
        found = RoutingSettings(compensation=rest.pop("compensation", False)).compensations(bench.calibration)
        return RoutingIntegration(
            bench.model, make(bench, rest), compensations=found, collect_stats=bench.collect_stats
        )

    return build


def _top_k(bench: Workbench, p: dict[str, Any], **fixed: Any) -> RoutingPolicy:
    k = p.get("k")
    if "experts" in p:
        k = whole_budget(p["experts"], bench.top_k, "topk")
    return TopKPolicy(k, **({"weights": p["weights"]} if "weights" in p else {}) | fixed)


def _simple(policy: Any, parameter: str) -> Builder:
    """A rule with one parameter and a `for_budget`."""

    def make(bench: Workbench, p: dict[str, Any]) -> RoutingPolicy:
        rest = dict(p)
        made: RoutingPolicy
        if (budget := rest.pop("experts", None)) is not None:
            made = policy.for_budget(budget, bench.log, **rest)
        elif policy is baselines.DynamicSkippingPolicy:
            made = policy.from_log(bench.log, **rest)
        else:
            made = policy(rest.pop(parameter), **rest) if parameter in rest else policy(**rest)
        return made

    return _from_policy(make)


def _entropy(bench: Workbench, p: dict[str, Any]) -> RoutingPolicy:
    rest = dict(p)
    if (budget := rest.pop("experts", None)) is not None:
        return baselines.EntropyPolicy.for_budget(budget, bench.log, **rest)
    if "ks" not in rest or "thresholds" not in rest:
        raise InvalidParameterError(
            "entropy needs ks and thresholds (entropy:ks=2/4/8,thresholds=0.5/0.7), or experts."
        )
    return baselines.EntropyPolicy(**rest)


def _layer_total(budget: float, bench: Workbench, what: str) -> float:
    """Experts per token added over layers, for a mean per layer."""
    tops = [context.top_k for context in bench.plan.contexts]
    return check_budget(budget, sum(tops) / len(tops), what) * len(tops)


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


def _bh(calibrated: bool = True, **fixed: Any) -> Builder:
    """The settings that the parameters say, with some given beforehand."""

    def build(bench: Workbench, parameters: dict[str, Any]) -> RoutingIntegration:
        said = {TEXT_OPTIONS[name].field or name: value for name, value in parameters.items()}
        settings = RoutingSettings.from_dict({"collect_stats": bench.collect_stats} | fixed | said)
        calibration = bench.calibration if calibrated and "pvalues" not in said else None
        if calibration is None and settings.experts_per_token is not None:
            return _uncalibrated(bench, settings)
        return BHRoutingIntegration(bench.model, calibration=calibration, **settings.to_dict())

    return build


def _uncalibrated(bench: Workbench, settings: RoutingSettings) -> RoutingIntegration:
    """A procedure on p-values of the token itself, its level solved on recorded routing."""
    what = f"{settings.procedure}'s level with {settings.pvalues} p-values"

    def make(log_alpha: float) -> RoutingPolicy:
        return settings.with_level(alpha=10.0**log_alpha).policy()

    policy = solve(make, bench.log, settings.experts_per_token, -12.0, -1e-9, what)  # type: ignore[arg-type]
    return RoutingIntegration(bench.model, policy, collect_stats=bench.collect_stats)


def _rule(
    summary: str,
    rule: type[baselines.Baseline | baselines.BatchRule],
    build: Builder | None = None,
    *,
    common: dict[str, tuple[Converter, str]] = _COMMON,
    needs: tuple[str, ...] = (),
    exact: bool = False,
    **parameters: tuple[Converter, str],
) -> Entry:
    """The entry of a published rule, whose own parameter is the first of these; ``exact``: as it was published."""
    return Entry(
        summary=summary,
        source=rule.source,
        inspired="" if exact else rule.inspired,
        parameters=common | parameters,
        needs=needs,
        build=build or _simple(rule, next(iter(parameters))),
    )


_FULL = Entry(
    summary="the model's own routing", parameters={}, build=_from_policy(lambda bench, p: TopKPolicy())
)
_TOP_K = Entry(
    summary="the k best experts with the model's own weights",
    source="Shazeer et al. 2017",
    parameters=_COMMON | {"k": (int, "experts per token")},
    needs=("k", "experts"),
    build=_from_policy(_top_k),
)
_REGULAR = Entry(
    summary="top-k, weights as the model makes them",
    source="the original OLMoE routing experiments",
    parameters=_BUDGET | _OWN_K,
    build=_from_policy(_top_k),
)
_ORIGINAL = Entry(
    summary="the original design: BH on 1 - softmax probability, weights made to sum to 1",
    source="the original design",
    parameters=_LEVEL,
    build=_bh(calibrated=False, pvalues="softmax", weights="sum"),
)

POLICIES: dict[str, Entry] = {
    "full": _FULL,
    "topk": _TOP_K,
    "regular": _REGULAR,
    "normalised": replace(
        _REGULAR,
        summary="top-k, weights made to sum to 1",
        build=_from_policy(lambda bench, p: _top_k(bench, p, weights="sum")),
    ),
    "uniform": _rule(
        "top-k with equal weights", baselines.UniformPolicy, common=_BUDGET | _WEIGHTS, k=_OWN_K["k"]
    ),
    "adaptive": _rule(
        "the number of experts in proportion to the router's entropy",
        baselines.AdaptivePolicy,
        scale=(float, "0 to 1 (default 1)"),
    ),
    "topp": _rule(
        "the fewest experts that reach the probability p together",
        baselines.TopPPolicy,
        p=(float, "0 to 1"),
        needs=("p", "experts"),
    ),
    "minp": _rule(
        "experts with at least p times the largest score",
        baselines.MinPPolicy,
        p=(float, "0 to 1"),
        needs=("p", "experts"),
    ),
    "threshold": _rule(
        "experts with a routing score of at least t",
        baselines.ThresholdPolicy,
        t=(float, "0 to 1"),
        needs=("t", "experts"),
    ),
    "entropy": _rule(
        "the number of experts by bucket of the router's entropy",
        baselines.EntropyPolicy,
        _from_policy(_entropy),
        ks=(_integers, "experts per bucket, 2/4/8"),
        thresholds=(_floats, "entropies between them, as shares of log E, 0.5/0.7"),
    ),
    "naee": _rule(
        "skip experts whose score is small beside the best one",
        baselines.DynamicSkippingPolicy,
        q=(float, "quantile of the ratio on calibration text (default 0.5)"),
    ),
    "random": _rule(
        "k of the model's own experts by chance",
        baselines.RandomPolicy,
        k=(float, "experts per token"),
        seed=(int, "default 0"),
        needs=("k", "experts"),
    ),
    "seqtopk": _rule(
        "the k * S largest scores of a sequence of S tokens",
        baselines.SequenceTopKPolicy,
        k=(float, "mean experts per token"),
        needs=("k", "experts"),
    ),
    "perlayer": _rule(
        "k per layer, as given",
        baselines.PerLayerPolicy,
        common=_WEIGHTS | _COMPENSATION,
        k=(_integers, "experts per layer, 6/3/3/5"),
        needs=("k",),
        exact=True,
    ),
    "lexi": _rule(
        "k per layer from output changes on random inputs",
        baselines.PerLayerPolicy,
        _from_policy(_lexi),
        needs=("experts",),
    ),
    "allocmoe": _rule(
        "a budget given to layers by their effect on the loss, then to the tokens of a sequence",
        baselines.AllocatedPolicy,
        _from_policy(_alloc),
        needs=("experts",),
    ),
    "oea": _rule(
        "the k0 best experts of every token of a step, and each fills up from what is loaded",
        baselines.OpportunisticPolicy,
        _from_policy(lambda bench, p: baselines.OpportunisticPolicy.of(bench, **p)),
        common=_SHARED,
        needs=("k0", "loads"),
        k0=(int, "experts that each token is sure of"),
    ),
    "xshare": _rule(
        "the experts that a step's tokens want most together, and each takes its best of them",
        baselines.SharedExpertsPolicy,
        _from_policy(lambda bench, p: baselines.SharedExpertsPolicy(**p)),
        common=_SHARED,
        needs=("loads",),
        k0=(int, "experts that each token is sure of (default 1)"),
    ),
    "batchtopk": _rule(
        "of the router's own choice, the experts that a step's tokens want most together",
        baselines.BatchTopKPolicy,
        _from_policy(lambda bench, p: baselines.BatchTopKPolicy(**p)),
        common=_SHARED,
        needs=("loads",),
    ),
    "original": _ORIGINAL,
} | {
    name: Entry(
        summary=f"{name} on calibrated p-values (without a calibration: the token's own robust null)",
        source=procedure.source,
        parameters=_CALIBRATED,
        build=_bh(procedure=name),
    )
    for name, procedure in PROCEDURES.items()
}
