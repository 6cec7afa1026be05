"""Budgets: the parameter at which a mean number of experts is met, for any rule with one; and a calibration's levels.

Shape legend: T tokens of the reservoir, E experts, C candidates (the own slots; all E when widening).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..decision.select import count_p_values
from ..decision.table import DecisionTable
from ..decision.types import Limits
from ..errors import BudgetError, InvalidParameterError, InvalidTypeError
from ..stats.procedures import Procedure
from .data import CalibrationData, some_of
from .fit import p_values, table_at
from .null_settings import NullSettings

# A level below 1 never keeps an expert whose p-value is 1; with a table, all that a router chooses is a level of its own.
HIGHEST, ALL = 1 - 1e-12, 1.0
TOLERANCE = 0.02  # how far from a budget the mean may be, relative to it


class Solution(NamedTuple):
    """A solved budget: the level (one per layer path for a budget per layer), what it selects on the
    calibration text on average, the table (None for a procedure without one), and the null's settings."""

    alpha: float | dict[str, float]
    mean_experts: float
    table: DecisionTable | None
    settings: NullSettings


class UnresolvedBudgetError(BudgetError):
    """The mean jumps over the budget: too many statistics share one p-value."""


def solve_parameter(
    kept: Callable[[float], float],
    budget: float,
    low: float,
    high: float,
    *,
    what: str = "parameter",
    where: str = "",
    limits: str = "",
    close: float = 0.0,
) -> tuple[float, float]:
    """The parameter of a rule at which it keeps a budget of experts per token, and how many it keeps there.

    Parameters
    ----------
    kept : callable
        From the parameter to the mean number of experts per token, over the tokens that the budget is meant for
        (`bh_routing.evaluation.baselines.mean_experts` takes it of any policy, over recorded routing or a
        calibration's reservoir). Monotone in either direction; a step function is fine, the nearest step is taken.
    budget : float
        Experts per token.
    low, high : float
        Where the parameter lies; halved forty times.
    what, where, limits : str
        For the errors: the parameter; whose mean it is; what else bounds it.
    close : float
        Stop as soon as a mean is so near to the budget, relative to it; 0 never stops early.

    Raises
    ------
    BudgetError
        If the mean does not come within 2 % of the budget between low and high; it tells what is reachable.

    Examples
    --------
    >>> solve_parameter(lambda x: 8 * x, 2.0, 0.0, 1.0, close=0.001)
    (0.25, 2.0)
    """
    least, most = kept(low), kept(high)
    if least > most:
        low, high, least, most = high, low, most, least  # from here on the mean rises from low to high
    tolerance = TOLERANCE * abs(budget)
    if not least - tolerance <= budget <= most + tolerance:
        raise BudgetError(
            f"no {what} selects {budget:g} experts per token{where} on average: {least:.3g} to {most:.3g} are "
            f"reachable{limits}; change the budget{' or the limits' * bool(limits)}."
        )
    for _ in range(40):
        if min(abs(most - budget), abs(least - budget)) < close * budget:
            break
        middle = (low + high) / 2
        value = kept(middle)
        if value < budget:
            low, least = middle, value
        else:
            high, most = middle, value
    found, reached = (low, least) if budget - least < most - budget else (high, most)
    if abs(reached - budget) > max(tolerance, 1e-9):
        raise UnresolvedBudgetError(
            f"no {what} comes within 2 % of {budget:g} experts per token{where}: the mean jumps from {least:.4g} to "
            f"{most:.4g} on the calibration text; change the budget, or calibrate on more text."
        )
    return found, reached


class Counter:
    """How many experts of one layer a level selects on the reservoir."""

    def __init__(
        self, data: CalibrationData, index: int, procedure: Procedure, settings: NullSettings, limits: Limits
    ) -> None:
        top_k, instead = data.layers[index].top_k, "give alpha instead, or calibrate again with a reservoir"
        logits_TE, own_TK = data.kept_tokens("a budget is solved on", instead).layer(index, top_k)
        self.procedure, self.limits, self.num_experts = procedure, limits, data.num_experts
        p_TE = p_values(data, logits_TE, index, settings)
        widens = limits.max_k is not None and limits.max_k > top_k
        p_TC = p_TE if widens else p_TE.gather(-1, own_TK)
        self.sorted_TC = p_TC.sort(-1).values
        self.top = limits.top(self.sorted_TC.shape[-1])

    def mean(self, alpha: float) -> float:
        """Mean count at a level, after the clamp."""
        counts_T, _ = count_p_values(
            self.sorted_TC, self.procedure, alpha, self.num_experts, limits=self.limits
        )
        return float(counts_T.double().mean())


def counters(
    data: CalibrationData, procedure: Procedure, settings: NullSettings, limits: Limits
) -> list[Counter]:
    """One per layer."""
    return [Counter(data, i, procedure, settings, limits) for i in range(data.num_layers)]


def _solve_level(layers: list[Counter], budget: float, where: str) -> tuple[float, float]:
    """The level at which the mean over these layers meets a budget, and that mean."""

    def kept(log_alpha: float) -> float:
        return sum(layer.mean(math.exp(log_alpha)) for layer in layers) / len(layers)

    most, whole = max(layer.top for layer in layers), sum(layer.top for layer in layers) / len(layers)
    has_table = layers[0].procedure.has_table
    if budget == whole and has_table:
        return ALL, whole
    log_alpha, mean = solve_parameter(
        kept,
        budget,
        math.log(1e-300),
        math.log(HIGHEST),
        what="level",
        where=f" in {where}",
        limits=f" with min_k={layers[0].limits.min_k} and max_k={most}" + f", and all {whole:g}" * has_table,
    )
    return math.exp(log_alpha), mean


def solve(
    data: CalibrationData,
    experts_per_token: float | Mapping[str, float],
    procedure: Procedure,
    settings: NullSettings,
    limits: Limits,
) -> Solution:
    """`Calibration.solve`, with the null extended by an exponential tail where a budget needs it."""
    budgets: float | dict[str, float]
    if isinstance(experts_per_token, Mapping):
        budgets = _budgets(data, experts_per_token)
        if not procedure.has_table:
            raise InvalidParameterError(
                f"a budget per layer needs a procedure with a decision table; {procedure.name!r} has none."
            )
    else:
        budgets = _number(experts_per_token, "experts_per_token")
    try:
        return _solve(data, budgets, procedure, settings, limits)
    except UnresolvedBudgetError:
        if settings.extended or settings.estimator not in ("empirical", "kde") or data.given is not None:
            raise
        return _solve(data, budgets, procedure, replace(settings, extended=True), limits)


def _solve(
    data: CalibrationData,
    budgets: float | dict[str, float],
    procedure: Procedure,
    settings: NullSettings,
    limits: Limits,
) -> Solution:
    layers = counters(data, procedure, settings, limits)
    if isinstance(budgets, float):
        alpha, mean = _solve_level(layers, budgets, "the model")
        table = _table(data, [alpha] * len(layers), procedure, settings) if procedure.has_table else None
        return Solution(alpha, mean, table, settings)
    solved = {
        path: _solve_level([layer], budget, f"layer {path}")
        for layer, (path, budget) in zip(layers, budgets.items(), strict=True)
    }
    alphas = {path: alpha for path, (alpha, _) in solved.items()}
    table = replace(_table(data, list(alphas.values()), procedure, settings), alpha=None)
    return Solution(alphas, sum(mean for _, mean in solved.values()) / len(layers), table, settings)


def _table(
    data: CalibrationData, alphas: list[float], procedure: Procedure, settings: NullSettings
) -> DecisionTable:
    """The decision table at one level per layer, of which `ALL` leaves nothing out."""
    table = table_at(data, [min(alpha, HIGHEST) for alpha in alphas], procedure, settings)
    whole_L1 = torch.tensor(alphas).unsqueeze(1) == ALL
    if not bool(whole_L1.any()):
        return table
    thresholds_LE = table.thresholds_LE.masked_fill(whole_L1.to(table.thresholds_LE.device), -math.inf)
    return table.with_thresholds(thresholds_LE, alpha=ALL if bool(whole_L1.all()) else None)


def _budgets(data: CalibrationData, experts_per_token: Mapping[str, float]) -> dict[str, float]:
    """One budget per router path, in the layers' order."""
    missing = [p for p in data.paths if p not in experts_per_token]
    unknown = [p for p in experts_per_token if p not in data.paths]
    if missing or unknown:
        raise BudgetError(
            "a budget per layer must name every router: "
            + (f"missing {some_of(missing)}" if missing else f"unknown {some_of(unknown)}")
            + f"; the routers are {some_of(data.paths)}."
        )
    return {p: _number(experts_per_token[p], f"experts_per_token[{p!r}]") for p in data.paths}


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(f"{name} must be a number of experts, got {value!r}.")
    return float(value)
