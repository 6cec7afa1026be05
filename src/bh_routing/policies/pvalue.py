"""Any procedure on p-values computed for every token.

Shape legend: T tokens, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..decision.select import Kept, keep_by_p_values
from ..decision.types import Clamp, RoutingDecision, WeightRule, check_temperature
from ..errors import InvalidParameterError
from ..stats.procedures import Procedure, check_alpha, get_procedure
from ..stats.pvalues import P_VALUES, at_least_float32
from .base import CountPolicy, RoutingContext


class PValuePolicy(CountPolicy):
    """Any procedure on p-values computed for every token: the general path.

    Parameters
    ----------
    pvalues : str or callable
        ``"robust"``, ``"softmax"``, ``"batch"``, or ``f(logits_TE, context) -> p_TE`` (calibrated p-values).
    procedure : str
        A key of `bh_routing.stats.procedures.PROCEDURES`.
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
        if isinstance(pvalues, str) and pvalues not in P_VALUES:
            raise InvalidParameterError(
                f"unknown pvalues={pvalues!r}; expected one of {', '.join(map(repr, P_VALUES))} or a callable."
            )
        self.pvalues = pvalues
        self.procedure = get_procedure(procedure)
        self.alpha = check_alpha(alpha)
        self.temperature = check_temperature(temperature)
        self._critical: dict[str, Tensor] = {}

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        super().bind(contexts)
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
        """p-values of all E experts, [T, E]."""
        if not isinstance(self.pvalues, str):
            return self.pvalues(logits_TE, context)
        x_TE = at_least_float32(logits_TE)
        return P_VALUES[self.pvalues](x_TE if self.temperature == 1.0 else x_TE / self.temperature)

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        p_TE = self.p_values(logits_TE, context)
        if self._widens(context):
            # Order by logit first, so that equal p-values keep the order of the statistic.
            order_TE = logits_TE.argsort(dim=-1, descending=True, stable=True)
            kept = self._keep(p_TE.gather(-1, order_TE), context)
            keep_TE = torch.zeros_like(kept.keep_TK).scatter(-1, order_TE, kept.keep_TK)
            by_p_TE = order_TE.gather(-1, p_TE.gather(-1, order_TE).argsort(dim=-1, stable=True))
            # a statistic whose order is that of by_p_TE
            place_TE = torch.zeros_like(by_p_TE).scatter(
                -1, by_p_TE, torch.arange(by_p_TE.shape[-1], 0, -1, device=p_TE.device).expand_as(by_p_TE)
            )
            return self._widened(
                Kept(keep_TE, kept.counts_T, kept.raw_counts_T),
                place_TE,
                logits_TE,
                own_weights_TK,
                own_experts_TK,
                context,
            )
        if not self.procedure.has_table:
            # Adaptive procedures estimate from all E p-values; the experts that are no candidates count as 1.
            p_TE = torch.ones_like(p_TE).scatter(-1, own_experts_TK, p_TE.gather(-1, own_experts_TK))
        kept = self._keep(p_TE.gather(-1, own_experts_TK), context, p_TE)
        return self.shrink(kept, logits_TE, own_weights_TK, own_experts_TK, context)

    def _keep(self, p_TK: Tensor, context: RoutingContext, p_TE: Tensor | None = None) -> Kept:
        p_TK = p_TK.nan_to_num(1.0)
        if self.procedure.has_table:
            return keep_by_p_values(
                p_TK,
                self._critical[context.path],
                rule=self.procedure.rule or "step_up",
                min_k=self.min_k,
                max_k=self.max_k,
                clamp=self.clamp,
            )
        everything_TE = (p_TK if p_TE is None else p_TE).nan_to_num(1.0)
        raw_T = self.procedure.rejection_counts(everything_TE.double().sort(-1).values, self.alpha)
        num = p_TK.shape[-1]
        counts_T = raw_T.clamp(self.min_k, num if self.max_k is None else min(self.max_k, num))
        order_TK = p_TK.argsort(dim=-1, stable=True)
        first_TK = torch.arange(num, device=p_TK.device) < counts_T.unsqueeze(-1)
        return Kept(torch.zeros_like(first_TK).scatter(-1, order_TK, first_TK), counts_T, raw_T)

    def describe(self) -> dict[str, Any]:
        how = self.pvalues if isinstance(self.pvalues, str) else "calibrated"
        return super().describe() | {
            "pvalues": how,
            "procedure": self.procedure.name,
            "alpha": self.alpha,
            "temperature": self.temperature,
        }
