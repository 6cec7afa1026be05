"""Any procedure on p-values computed for every token.

Shape legend: T tokens, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._words import Clamp, WeightRule
from ..decision.select import rank_by_p_values
from ..decision.types import RoutingDecision, check_temperature
from ..stats.procedures import Procedure, check_alpha, get_procedure
from ..stats.pvalues import P_VALUES, at_least_float32, check_p_values, method_of
from .base import CountPolicy, RoutingContext


class PValuePolicy(CountPolicy):
    """Any procedure on p-values computed for every token: the general path.

    Parameters
    ----------
    pvalues : str or callable
        ``"robust"``, ``"softmax"``, ``"batch"``, or ``f(logits_TE, context) -> p_TE`` (calibrated p-values).
    procedure : str or Procedure
        A key of `bh_routing.PROCEDURES`, or your own.
    alpha : float
    temperature : float
        Divides the logits first. Warned about where it cannot change a decision.
    """

    name = "p-values"

    def __init__(
        self,
        pvalues: str | Callable[[Tensor, RoutingContext], Tensor] = "robust",
        *,
        procedure: str | Procedure = "bh",
        alpha: float = 0.05,
        temperature: float = 1.0,
        min_k: int = 1,
        max_k: int | None = None,
        clamp: Clamp = "after",
        weights: WeightRule = "model",
    ) -> None:
        super().__init__(min_k=min_k, max_k=max_k, clamp=clamp, weights=weights)
        if isinstance(pvalues, str):
            method_of(pvalues)
        self.pvalues = pvalues
        self.procedure = get_procedure(procedure)
        self.alpha = check_alpha(alpha)
        self.temperature = check_temperature(temperature)
        self._critical: dict[str, Tensor] = {}
        self._seen: set[str] = set()  # routers whose p-values have been looked at

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        super().bind(contexts)
        self._seen.clear()
        if self.procedure.has_table:
            self._critical = {
                c.path: self.procedure.critical_values(self.alpha, c.num_experts).to(c.device)
                for c in contexts
            }

    def set_alpha(self, alpha: float) -> None:
        """Change the level while patched, in the same buffers."""
        self.alpha = check_alpha(alpha)
        for critical_E in self._critical.values():
            critical_E.copy_(self.procedure.critical_values(self.alpha, critical_E.numel()))

    def p_values(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        """p-values of all E experts, [T, E]; yours are checked, their values at the router's first decision only.

        Raises
        ------
        InvalidTypeError, InvalidInputError
            As `bh_routing.stats.pvalues.check_p_values` says.
        """
        if not isinstance(self.pvalues, str):
            first = not torch.compiler.is_compiling() and context.path not in self._seen
            p_TE = check_p_values(self.pvalues(logits_TE, context), logits_TE, values=first)
            if first:
                self._seen.add(context.path)
            return p_TE
        x_TE = at_least_float32(logits_TE)
        return P_VALUES[self.pvalues](x_TE if self.temperature == 1.0 else x_TE / self.temperature)

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        p_TE, widens = self.p_values(logits_TE, context), self._widens(context)
        ranking = rank_by_p_values(
            p_TE if widens else p_TE.gather(-1, own_experts_TK),
            self.procedure,
            self.alpha,
            context.num_experts,
            ties_TK=logits_TE if widens else None,
            critical_E=self._critical.get(context.path),
            limits=self.limits,
        )
        if widens:
            return self._widened(ranking, logits_TE, own_weights_TK, own_experts_TK, context)
        return self.shrink(ranking.kept(), logits_TE, own_weights_TK, own_experts_TK, context)

    def describe(self) -> dict[str, Any]:
        how = self.pvalues if isinstance(self.pvalues, str) else "calibrated"
        return super().describe() | {
            "pvalues": how,
            "procedure": self.procedure.name,
            "alpha": self.alpha,
            "temperature": self.temperature,
        }
