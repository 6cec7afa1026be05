"""A routing rule in the form of the original experiments, ``route(logits) -> (indices, weights)``, as a policy.

Shape legend: T tokens, E experts, K slots of the router's own choice, C slots of the decision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..decision.types import RoutingDecision
from ..errors import InvalidInputError
from ..policies import RoutingContext, RoutingPolicy
from ..stats.pvalues import at_least_float32


class RoutingStrategy(ABC):
    """Base class of one's own routing rules; only `route` must be written.

    Class attributes
    ----------------
    name : str
        Stands in results and tables.
    max_k : int or None
        The most experts it returns per token; None: the model's own top-k.
    causal : bool
        False if the choice for a token looks at other tokens.

    Examples
    --------
    >>> class Best(RoutingStrategy):
    ...     name = "best"
    ...     def route(self, logits):
    ...         weights, indices = logits.softmax(-1).topk(2)
    ...         return indices, weights
    """

    name: ClassVar[str] = "strategy"
    max_k: int | None = None
    causal: ClassVar[bool] = True

    @abstractmethod
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Parameters
        ----------
        logits : Tensor
            [T, E], float32.

        Returns
        -------
        indices, weights : Tensor
            [T, C] each; a slot with index -1 is empty. Weights are used as they are.
        """

    def describe(self) -> dict[str, Any]:
        """Settings, for records."""
        return {}


class StrategyPolicy(RoutingPolicy):
    """A `RoutingStrategy` behind the policy contract. It may choose experts that the model did not."""

    name = "strategy"

    def __init__(self, strategy: RoutingStrategy) -> None:
        super().__init__()
        self.strategy = strategy
        self.causal = strategy.causal  # type: ignore[misc]

    def slots(self, context: RoutingContext) -> int:
        return max(context.top_k, self.strategy.max_k or 0)

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        wide = self.slots(context)
        logits_TE = at_least_float32(logits_TE)
        finite_T = torch.isfinite(logits_TE.sum(-1))
        indices_TC, weights_TC = self.strategy.route(logits_TE)
        if indices_TC.shape != weights_TC.shape or indices_TC.shape[:-1] != logits_TE.shape[:-1]:
            raise InvalidInputError(
                f"{type(self.strategy).__name__}.route must return indices and weights of the shape "
                f"[{logits_TE.shape[0]}, slots], got {tuple(indices_TC.shape)} and {tuple(weights_TC.shape)}."
            )
        if indices_TC.shape[-1] > wide:
            raise InvalidInputError(
                f"{type(self.strategy).__name__}.route returned {indices_TC.shape[-1]} slots, more than {wide}; set "
                "max_k to the most that it returns."
            )
        used_TC = indices_TC >= 0
        more = wide - indices_TC.shape[-1]
        experts_TC = pad(
            indices_TC.long().masked_fill(~used_TC, context.empty), (0, more), value=context.empty
        )
        weights_TC = pad(weights_TC.to(own_weights_TK.dtype).masked_fill(~used_TC, 0.0), (0, more))
        extra = wide - own_experts_TK.shape[-1]
        finite_T1 = finite_T.unsqueeze(-1)
        experts_TC = torch.where(finite_T1, experts_TC, pad(own_experts_TK, (0, extra), value=context.empty))
        weights_TC = torch.where(finite_T1, weights_TC, pad(own_weights_TK, (0, extra)))
        counts_T = (experts_TC != context.empty).sum(-1)
        return RoutingDecision(
            weights_TK=weights_TC,
            experts_TK=experts_TC,
            counts_T=counts_T,
            raw_counts_T=counts_T,
            dropped_TK=~(own_experts_TK.unsqueeze(-1) == experts_TC.unsqueeze(-2)).any(-1),
            own_weights_TK=own_weights_TK,
            own_experts_TK=own_experts_TK,
            empty=context.empty,
            fallback_T=~finite_T,
        )

    def describe(self) -> dict[str, Any]:
        return {"policy": self.strategy.name} | self.strategy.describe()
