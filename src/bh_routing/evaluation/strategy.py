"""A routing rule in the form of the original experiments, for notebooks that hold one; new rules are `RoutingPolicy`.

Shape legend: T tokens, E experts, K slots of the router's own choice, C slots of the rule.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pad

from .._words import WeightRule
from ..decision.select import Kept, not_finite
from ..decision.types import RoutingDecision
from ..errors import InvalidInputError
from ..policies import RoutingContext, RoutingPolicy
from ..stats.pvalues import at_least_float32


class RoutingStrategy(RoutingPolicy):
    """``route(logits) -> (indices, weights)``: it may choose experts that the model did not.

    ``max_k`` is the most experts that it returns per token, where that is more than the model's own top-k.

    Examples
    --------
    >>> class Best(RoutingStrategy):
    ...     name = "best"
    ...     def route(self, logits):
    ...         weights, indices = logits.softmax(-1).topk(2)
    ...         return indices, weights
    """

    name = "strategy"
    weights: WeightRule = "model"  # a notebook's __init__ need not call ours
    max_k: ClassVar[int | None] = None

    @abstractmethod
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and weights [T, C] for float32 logits [T, E]; -1 is an empty slot, weights are used as they are."""

    def slots(self, context: RoutingContext) -> int:
        return max(context.top_k, self.max_k or 0)

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        logits_TE, slots, name = at_least_float32(logits_TE), self.slots(context), type(self).__name__
        indices_TC, weights_TC = self.route(logits_TE)
        if indices_TC.shape != weights_TC.shape or indices_TC.shape[:-1] != logits_TE.shape[:-1]:
            raise InvalidInputError(
                f"{name}.route must return indices and weights of the shape [{logits_TE.shape[0]}, slots], got "
                f"{tuple(indices_TC.shape)} and {tuple(weights_TC.shape)}."
            )
        more = slots - indices_TC.shape[-1]
        if more < 0:
            raise InvalidInputError(
                f"{name}.route returned {indices_TC.shape[-1]} slots, more than {slots}; set max_k to the most that "
                "it returns."
            )
        indices_TC = pad(indices_TC.long(), (0, more), value=-1)
        counts_T = (indices_TC >= 0).sum(-1)
        return self.widen(
            Kept(indices_TC >= 0, counts_T, counts_T),
            pad(weights_TC, (0, more)),
            indices_TC,
            own_weights_TK,
            own_experts_TK,
            replace(context, route_norm="none"),  # the rule's weights are used as they are
            ~not_finite(logits_TE).squeeze(-1),
        )

    def describe(self) -> dict[str, Any]:
        return {"policy": self.name}
