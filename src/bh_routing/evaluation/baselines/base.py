"""What the rules share: scores of the router's own choice in order, a count, and the solver for a budget.

Shape legend: T tokens, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..._words import WeightRule
from ...calibration.budget import solve_parameter
from ...decision.select import Kept
from ...decision.types import RoutingDecision
from ...errors import BudgetError, InvalidParameterError
from ...policies import RoutingContext, RoutingPolicy, check_within
from ...stats.pvalues import at_least_float32
from ...stats.statistic import LOG_SCORES

if TYPE_CHECKING:
    from ..routing_log import RoutingLog


class Ordered(NamedTuple):
    """A router's own choice by descending score (ties by slot): ``scores_TK``, and ``order_TK``, the slots."""

    scores_TK: Tensor
    order_TK: Tensor


class Baseline(RoutingPolicy):
    """A rule over the routing scores of the router's own choice.

    Class attributes
    ----------------
    source : str
        Where the rule was published.
    inspired : str
        In what it differs from the published rule; empty if in nothing.
    shown : tuple of str
        Attributes that `describe` tells beside the name and the weight rule.
    """

    source: ClassVar[str] = ""
    inspired: ClassVar[str] = ""
    shown: ClassVar[tuple[str, ...]] = ()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {name: getattr(self, name) for name in self.shown}

    @abstractmethod
    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        """Which of the ordered slots to keep, bool [T, K]; at least one for every token."""

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        kept = self.choose(logits_TE, own_experts_TK, context)
        return self.shrink(kept, logits_TE, own_weights_TK, own_experts_TK, context)

    def choose(self, logits_TE: Tensor, own_experts_TK: Tensor, context: RoutingContext) -> Kept:
        """What is kept of the router's own slots, before the weights."""
        scores_TK = own_scores(logits_TE, own_experts_TK, context)
        scores_TK, order_TK = scores_TK.sort(dim=-1, descending=True, stable=True)
        keep_TK = self.keep(Ordered(scores_TK, order_TK), logits_TE, context)
        counts_T = keep_TK.sum(-1)
        return Kept(torch.zeros_like(keep_TK).scatter(-1, order_TK, keep_TK), counts_T, counts_T)


class MeanK(Baseline):
    """A rule whose parameter is the mean number of experts per token, k >= 1, at most the router's own.

    Raises
    ------
    InvalidParameterError
        For another k, here or where it is bound.
    """

    shown: ClassVar[tuple[str, ...]] = ("k",)

    def __init__(self, k: float, *, weights: WeightRule = "model") -> None:
        super().__init__(weights=weights)
        if isinstance(k, bool) or not isinstance(k, (int, float)) or not k >= 1:
            raise InvalidParameterError(f"k must be at least 1, got {k!r}.")
        self.k = float(k)

    @classmethod
    def for_budget(cls, budget: float, log: RoutingLog, **fixed: Any) -> Baseline:
        """The rule at a mean number of experts per token."""
        return cls(check_budget(budget, min(c.top_k for c in log.contexts), cls.name), **fixed)

    def share(self, context: RoutingContext) -> float:
        """Mean number of experts per token in a layer."""
        return self.k

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        for context in contexts:
            check_within(self.share(context), context)


def own_scores(logits_TE: Tensor, own_experts_TK: Tensor, context: RoutingContext) -> Tensor:
    """Routing scores (softmax probabilities over all E, or sigmoids) of the router's own choice, [T, K]."""
    log_TE = LOG_SCORES[context.score_func](at_least_float32(logits_TE))
    return log_TE.gather(-1, own_experts_TK).exp()


def first(counts_T: Tensor, num: int) -> Tensor:
    """The first so many slots of each token, at least one, bool [T, num]."""
    return torch.arange(num, device=counts_T.device) < counts_T.clamp(1, num).unsqueeze(-1)


def mean_experts(policy: RoutingPolicy, log: RoutingLog) -> float:
    """Mean number of experts that a policy keeps on recorded routing, over tokens and layers."""
    policy.bind(log.contexts)
    total = 0.0
    for context in log.contexts:
        decision = policy.decide(*log.layer(context.index), context)
        total += float(decision.counts_T.double().mean())
    return total / len(log.contexts)


def solve(
    make: Callable[[float], RoutingPolicy],
    log: RoutingLog,
    budget: float,
    low: float,
    high: float,
    what: str,
) -> RoutingPolicy:
    """The policy ``make(x)``, low <= x <= high, whose mean number of experts is nearest to a budget.

    Parameters
    ----------
    make : callable
        From the parameter to the policy; the mean must be monotone in it, in either direction.
    log : RoutingLog
        Recorded routing that the mean is taken over.
    what : str
        The rule and its parameter, for the error.

    Raises
    ------
    BudgetError
        If no value comes within 2 % of the budget; it tells what is reachable.
    """

    x, _ = solve_parameter(
        lambda x: mean_experts(make(x), log), budget, low, high, what=f"value of {what}", close=0.002
    )
    return make(x)


def check_budget(budget: float, most: float, what: str) -> float:
    """The budget as a float, or `BudgetError` unless it lies between one expert and the router's own number."""
    if not 1.0 <= budget <= most:
        raise BudgetError(
            f"{what} can keep 1 to {most:g} experts per token on average, got a budget of {budget:g}."
        )
    return float(budget)
