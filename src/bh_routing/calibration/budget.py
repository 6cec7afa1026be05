"""A budget of experts per token, solved for the level that meets it on a calibration's own tokens.

Shape legend: T tokens of the reservoir, E experts, C candidates (the own slots; all E when widening).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..decision.select import clamp_counts
from ..decision.table import DecisionTable
from ..decision.types import Clamp
from ..errors import BudgetError, CalibrationError, InvalidParameterError, InvalidTypeError
from ..stats.procedures import Procedure, count_passing
from .data import NullSettings, some_of

if TYPE_CHECKING:
    from .calibration import Calibration


class Solution(NamedTuple):
    """A solved budget: the level (one per layer path for a budget per layer), what it selects on the
    calibration text on average, the table (None for a procedure without one), and the null's settings."""

    alpha: float | dict[str, float]
    mean_experts: float
    table: DecisionTable | None
    settings: NullSettings


class Limits(NamedTuple):
    """What a count is clamped to."""

    min_k: int
    max_k: int | None
    clamp: Clamp


class UnresolvedBudgetError(BudgetError):
    """The mean jumps over the budget: too many statistics share one p-value."""


class Counter:
    """How many experts of one layer a level selects on the reservoir."""

    def __init__(
        self,
        calibration: Calibration,
        index: int,
        procedure: Procedure,
        settings: NullSettings,
        limits: Limits,
    ) -> None:
        reservoir, layer = calibration.reservoir, calibration.layers[index]
        if reservoir is None or reservoir.num == 0:
            raise CalibrationError(
                "a budget is solved on the calibration's tokens, and this calibration holds none; give alpha "
                "instead, or calibrate again with a reservoir."
            )
        self.procedure, self.limits = procedure, limits
        fitted = calibration.fit(settings)
        p_TE = calibration.fitted_p_values(reservoir.logits_NLE[:, index], index, settings.statistic, fitted)
        own_TK = reservoir.experts_NLK[:, index, : layer.top_k].long()
        widens = limits.max_k is not None and limits.max_k > layer.top_k
        p_TC = p_TE if widens else p_TE.gather(-1, own_TK)
        if not widens and not procedure.has_table:
            self.all_TE = torch.ones_like(p_TE).scatter(-1, own_TK, p_TC).sort(-1).values
        elif not procedure.has_table:
            self.all_TE = p_TE.sort(-1).values
        self.sorted_TC = p_TC.sort(-1).values
        num = self.sorted_TC.shape[-1]
        self.top = num if limits.max_k is None else min(limits.max_k, num)
        self.num_experts = calibration.num_experts

    def mean(self, alpha: float) -> float:
        """Mean count at a level, after the clamp."""
        if not self.procedure.has_table:
            raw_T = self.procedure.rejection_counts(self.all_TE, alpha)
            return float(raw_T.clamp(self.limits.min_k, self.top).double().mean())
        critical_E = self.procedure.critical_values(alpha, self.num_experts)
        passes_TC = self.sorted_TC <= critical_E[: self.sorted_TC.shape[-1]]
        raw_T = count_passing(passes_TC, self.procedure.rule or "step_up")
        counts_T = clamp_counts(passes_TC, raw_T, self.limits.min_k, self.top, self.limits.clamp)
        return float(counts_T.double().mean())


def bisect(counters: list[Counter], budget: float, where: str) -> tuple[float, float]:
    """The level whose mean count is nearest to the budget, and that mean."""

    def mean(log_alpha: float) -> float:
        return sum(c.mean(math.exp(log_alpha)) for c in counters) / len(counters)

    low, high = math.log(1e-300), math.log1p(-1e-12)
    least, most = mean(low), mean(high)
    tolerance = 0.02 * abs(budget)
    if not least - tolerance <= budget <= most + tolerance:
        raise BudgetError(
            f"no level between 0 and 1 selects {budget:g} experts per token in {where} on average: on the "
            f"calibration text {least:.3g} to {most:.3g} are reachable with "
            f"min_k={counters[0].limits.min_k} and max_k="
            f"{max(c.top for c in counters)}; change the budget or the limits."
        )
    while high - low > 1e-9:
        middle = (low + high) / 2
        value = mean(middle)
        if value < budget:
            low, least = middle, value
        else:
            high, most = middle, value
    alpha, reached = (low, least) if budget - least < most - budget else (high, most)
    if abs(reached - budget) > max(tolerance, 1e-9):
        raise UnresolvedBudgetError(
            f"no level meets {budget:g} experts per token in {where} within 2 %: the mean jumps from "
            f"{least:.4g} to {most:.4g} on the calibration text; change the budget, or calibrate on more text."
        )
    return math.exp(alpha), reached


def solve(
    calibration: Calibration,
    experts_per_token: float | Mapping[str, float],
    procedure: Procedure,
    settings: NullSettings,
    limits: Limits,
) -> Solution:
    """`Calibration.solve`, with the null extended by an exponential tail where a budget needs it."""
    per_layer = _budgets(calibration, experts_per_token)
    if per_layer is not None and not procedure.has_table:
        raise InvalidParameterError(
            f"a budget per layer needs a procedure with a decision table; {procedure.name!r} has none."
        )
    if per_layer is None:
        _number(experts_per_token, "experts_per_token")
    try:
        return _solve(calibration, experts_per_token, per_layer, procedure, settings, limits)
    except UnresolvedBudgetError:
        if settings.extended or settings.estimator == "normal":
            raise
        longer = replace(settings, extended=True)
        return _solve(calibration, experts_per_token, per_layer, procedure, longer, limits)


def _solve(
    calibration: Calibration,
    experts_per_token: float | Mapping[str, float],
    per_layer: dict[str, float] | None,
    procedure: Procedure,
    settings: NullSettings,
    limits: Limits,
) -> Solution:
    num = calibration.num_layers
    counters = [Counter(calibration, i, procedure, settings, limits) for i in range(num)]
    if per_layer is None:
        alpha, mean = bisect(counters, float(experts_per_token), "the model")  # type: ignore[arg-type]
        table = None
        if procedure.has_table:
            thresholds_LE = calibration.thresholds([alpha] * num, procedure, settings)
            table = calibration.table_from(thresholds_LE, alpha, procedure, settings)
        return Solution(alpha, mean, table, settings)
    solved = [
        bisect([counter], budget, f"layer {path}")
        for counter, (path, budget) in zip(counters, per_layer.items(), strict=True)
    ]
    thresholds_LE = calibration.thresholds([alpha for alpha, _ in solved], procedure, settings)
    table = calibration.table_from(thresholds_LE, None, procedure, settings)
    alphas = {path: alpha for path, (alpha, _) in zip(per_layer, solved, strict=True)}
    return Solution(alphas, sum(mean for _, mean in solved) / num, table, settings)


def _budgets(
    calibration: Calibration, experts_per_token: float | Mapping[str, float]
) -> dict[str, float] | None:
    """One budget per router path, in the layers' order; None for one budget for the model."""
    if not isinstance(experts_per_token, Mapping):
        return None
    paths = calibration.paths
    missing = [p for p in paths if p not in experts_per_token]
    unknown = [p for p in experts_per_token if p not in paths]
    if missing or unknown:
        raise BudgetError(
            "a budget per layer must name every router: "
            + (f"missing {some_of(missing)}" if missing else f"unknown {some_of(unknown)}")
            + f"; the routers are {some_of(paths)}."
        )
    return {p: _number(experts_per_token[p], f"experts_per_token[{p!r}]") for p in paths}


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(f"{name} must be a number of experts, got {value!r}.")
    return float(value)
