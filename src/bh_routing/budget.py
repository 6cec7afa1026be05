"""A budget of experts per token, solved for the level that meets it on a calibration's own tokens.

Shape legend: T tokens of the reservoir, E experts, C candidates (the own slots; all E when widening).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from .errors import BudgetError, CalibrationError
from .procedures import Procedure, count_passing
from .routing import Clamp, clamp_counts
from .statistic import DecisionTable

if TYPE_CHECKING:
    from .calibration import Calibration
    from .calibration_parts import NullSettings


class Solution(NamedTuple):
    """A solved budget: the level (one per layer path for a budget per layer), what it selects on the
    calibration text on average, the table (None for a procedure without one), and the null's settings."""

    alpha: float | dict[str, float]
    mean_experts: float
    table: DecisionTable | None
    settings: NullSettings


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
        min_k: int,
        max_k: int | None,
        clamp: Clamp,
    ) -> None:
        reservoir, layer = calibration.reservoir, calibration.layers[index]
        if reservoir is None or reservoir.num == 0:
            raise CalibrationError(
                "a budget is solved on the calibration's tokens, and this calibration holds none; give alpha "
                "instead, or calibrate again with a reservoir."
            )
        self.procedure, self.min_k, self.clamp = procedure, min_k, clamp
        fitted = calibration.fit(settings)
        p_TE = calibration._p_values(reservoir.logits_NLE[:, index], index, settings.statistic, fitted)
        own_TK = reservoir.experts_NLK[:, index, : layer.top_k].long()
        widens = max_k is not None and max_k > layer.top_k
        p_TC = p_TE if widens else p_TE.gather(-1, own_TK)
        if not widens and not procedure.has_table:
            self.all_TE = torch.ones_like(p_TE).scatter(-1, own_TK, p_TC).sort(-1).values
        elif not procedure.has_table:
            self.all_TE = p_TE.sort(-1).values
        self.sorted_TC = p_TC.sort(-1).values
        num = self.sorted_TC.shape[-1]
        self.top = num if max_k is None else min(max_k, num)
        self.num_experts = calibration.num_experts

    def mean(self, alpha: float) -> float:
        """Mean count at a level, after the clamp."""
        if not self.procedure.has_table:
            raw_T = self.procedure.rejection_counts(self.all_TE, alpha)
            return float(raw_T.clamp(self.min_k, self.top).double().mean())
        critical_E = self.procedure.critical_values(alpha, self.num_experts)
        passes_TC = self.sorted_TC <= critical_E[: self.sorted_TC.shape[-1]]
        raw_T = count_passing(passes_TC, self.procedure.rule or "step_up")
        return float(clamp_counts(passes_TC, raw_T, self.min_k, self.top, self.clamp).double().mean())


def bisect(counters: list[Counter], budget: float, where: str, min_k: int) -> tuple[float, float]:
    """The level whose mean count is nearest to the budget, and that mean."""

    def mean(log_alpha: float) -> float:
        return sum(c.mean(math.exp(log_alpha)) for c in counters) / len(counters)

    low, high = math.log(1e-300), math.log1p(-1e-12)
    least, most = mean(low), mean(high)
    tolerance = 0.02 * abs(budget)
    if not least - tolerance <= budget <= most + tolerance:
        raise BudgetError(
            f"no level between 0 and 1 selects {budget:g} experts per token in {where} on average: on the "
            f"calibration text {least:.3g} to {most:.3g} are reachable with min_k={min_k} and max_k="
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
