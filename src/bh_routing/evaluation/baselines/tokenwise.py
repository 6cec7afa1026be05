"""Rules that look at one token at a time.

Shape legend: T tokens, E experts, K slots of the router's own choice, J buckets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._words import WeightRule
from ...decision.types import RoutingDecision, check_k
from ...errors import InvalidParameterError
from ...policies import RoutingContext, check_within
from ...stats.pvalues import at_least_float32
from ..routing_log import RoutingLog
from .base import Baseline, MeanK, Ordered, check_budget, first, solve


class _OneNumber(Baseline):
    """A rule with one number in [0, 1] that a budget solves for."""

    parameter: ClassVar[str]

    def __init__(self, value: float, *, weights: WeightRule = "model") -> None:
        super().__init__(weights=weights)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise InvalidParameterError(f"{self.parameter} must be a number from 0 to 1, got {value!r}.")
        self.value = float(value)

    @classmethod
    def for_budget(cls, budget: float, log: RoutingLog, **fixed: Any) -> Baseline:
        """The rule at a mean number of experts per token."""
        what = f"{cls.name}'s {cls.parameter}"
        return solve(lambda x: cls(x, **fixed), log, budget, 0.0, 1.0, what)  # type: ignore[return-value]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {self.parameter: self.value}


class TopPPolicy(_OneNumber):
    """The fewest experts whose routing probabilities reach p together.

    Source: Huang et al. (2024), "Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    arXiv:2403.07652, eq. (4); there the model is trained with it and nothing caps the number.
    """

    name = "topp"
    source = "Huang et al. 2024, arXiv:2403.07652"
    inspired = "without training, at most the router's own top-k"
    parameter = "p"

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        reached_TK = own.scores_TK.cumsum(-1) >= self.value
        return first((~reached_TK).sum(-1) + 1, own.scores_TK.shape[-1])


class MinPPolicy(_OneNumber):
    """Every expert with at least p times the largest routing score.

    Source: Nguyen et al. (2024), "Turning Up the Heat: Min-p Sampling", arXiv:2407.01082, a rule for sampling
    tokens, used here on experts.
    """

    name = "minp"
    source = "Nguyen et al. 2024, arXiv:2407.01082"
    inspired = "a rule for sampling tokens, used on experts"
    parameter = "p"

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        return first((own.scores_TK >= self.value * own.scores_TK[:, :1]).sum(-1), own.scores_TK.shape[-1])


class ThresholdPolicy(_OneNumber):
    """Every expert whose routing score is at least t, and the best one. A plain baseline."""

    name = "threshold"
    source = "plain baseline"
    parameter = "t"

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        return first((own.scores_TK >= self.value).sum(-1), own.scores_TK.shape[-1])


def routing_entropy(logits_TE: Tensor) -> Tensor:
    """Entropy of the softmax routing probabilities over all experts, as a share of log E, [T]."""
    log_TE = torch.log_softmax(at_least_float32(logits_TE), -1)
    return -(log_TE.exp() * log_TE).sum(-1) / math.log(max(2, logits_TE.shape[-1]))


class EntropyPolicy(Baseline):
    """The number of experts by bucket of the router's entropy: a sure router gets few.

    Parameters
    ----------
    ks : sequence of int
        Experts per bucket, ascending, J of them.
    thresholds : sequence of float
        J - 1 entropies between the buckets, as shares of log E, ascending.

    Source: Balsamo (2026), "Entropy-Guided Dynamic Expert Selection" (Adaptive-K), preprint. A budget places the
    thresholds at equal quantiles of the recorded entropies and shifts them together, which is a choice made here.
    """

    name = "entropy"
    source = "Balsamo 2026, Adaptive-K, preprint"
    inspired = "thresholds from quantiles of the calibration text"
    shown = ("ks", "thresholds")

    def __init__(
        self, ks: Sequence[int], thresholds: Sequence[float], *, weights: WeightRule = "model"
    ) -> None:
        super().__init__(weights=weights)
        self.ks, self.thresholds = list(ks), [float(t) for t in thresholds]
        if len(self.ks) < 2 or len(self.thresholds) != len(self.ks) - 1:
            raise InvalidParameterError(
                f"entropy needs two or more ks and one threshold fewer, got {len(self.ks)} and {len(self.thresholds)}."
            )
        for k in self.ks:
            check_k(1, k)
        if list(self.ks) != sorted(self.ks) or list(self.thresholds) != sorted(self.thresholds):
            raise InvalidParameterError(
                f"entropy's ks and thresholds must ascend, got {self.ks} and {self.thresholds}."
            )
        self._held: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def for_budget(
        cls, budget: float, log: RoutingLog, *, ks: Sequence[int] | None = None, **fixed: Any
    ) -> Baseline:
        """The rule at a mean number of experts per token."""
        top = max(c.top_k for c in log.contexts)
        chosen = tuple(ks) if ks is not None else tuple(sorted({1, max(1, top // 4), max(1, top // 2), top}))
        entropies = torch.cat([routing_entropy(log.layer(c.index)[0]) for c in log.contexts])
        levels = torch.arange(1, len(chosen), dtype=entropies.dtype) / len(chosen)
        quantiles = torch.quantile(entropies[:: max(1, len(entropies) // 1_000_000)], levels).tolist()
        return solve(  # type: ignore[return-value]
            lambda shift: cls(chosen, [q + shift for q in quantiles], **fixed),
            log,
            budget,
            -1.0,
            1.0,
            "entropy's thresholds",
        )

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        devices = {c.device for c in contexts}
        self._held = {
            d: (torch.tensor(self.ks, device=d), torch.tensor(self.thresholds, device=d)) for d in devices
        }

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        ks_J, thresholds_J = self._held[context.device]
        bucket_T = torch.bucketize(routing_entropy(logits_TE), thresholds_J)
        return first(ks_J[bucket_T], own.scores_TK.shape[-1])


class AdaptivePolicy(_OneNumber):
    """From one expert to all of the router's own, in proportion to its entropy: 1 + round(s * (K - 1) * H / log E).

    The fourth strategy ("adaptive") of the original experiments, whose exact rule was not published.
    """

    name = "adaptive"
    source = "the original OLMoE routing experiments"
    inspired = "the original's exact rule is not known"
    parameter = "scale"

    def __init__(self, value: float = 1.0, *, weights: WeightRule = "model") -> None:
        super().__init__(value, weights=weights)

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        num = own.scores_TK.shape[-1]
        share_T = (self.value * routing_entropy(logits_TE)).nan_to_num(0.0)
        return first(1 + (share_T * (num - 1)).round().long(), num)


class DynamicSkippingPolicy(Baseline):
    """Skip an expert whose score is small beside the token's best: score_(i) < beta_{layer, i} * score_(1).

    beta is the q-quantile of that ratio on calibration text, per layer and rank; once one is skipped, so are the
    experts behind it.

    Source: Lu et al. (2024), "Not All Experts are Equal" (NAEE), arXiv:2402.14800, section 3.3, stated for top-2
    with the median (q = 0.5), where this is the same rule.
    """

    name = "naee"
    source = "Lu et al. 2024, arXiv:2402.14800"
    inspired = "one ratio per rank, for more than two experts"
    shown = ("q",)

    def __init__(
        self, betas: Mapping[str, Tensor], *, q: float | None = None, weights: WeightRule = "model"
    ) -> None:
        super().__init__(weights=weights)
        self.betas, self.q = dict(betas), q
        self._held: dict[str, Tensor] = {}

    @classmethod
    def from_log(
        cls, log: RoutingLog, q: float = 0.5, *, weights: WeightRule = "model"
    ) -> DynamicSkippingPolicy:
        """The rule with the q-quantiles of recorded routing."""
        if not 0.0 <= q <= 1.0:
            raise InvalidParameterError(f"q must be a number from 0 to 1, got {q!r}.")
        betas = {
            context.path: torch.quantile(ratios_TK, q, dim=0)
            for context, ratios_TK in zip(log.contexts, log.score_ratios(), strict=True)
        }
        return cls(betas, q=q, weights=weights)

    @classmethod
    def for_budget(cls, budget: float, log: RoutingLog, **fixed: Any) -> Baseline:
        """The rule at a mean number of experts per token."""
        return solve(lambda q: cls.from_log(log, q, **fixed), log, budget, 0.0, 1.0, "naee's q")  # type: ignore[return-value]

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        for context in contexts:
            if context.path not in self.betas:
                raise InvalidParameterError(
                    f"naee has no ratios for router {context.path}; record this model's own routing."
                )
            self._held[context.path] = self.betas[context.path].to(context.device)

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        passes_TK = own.scores_TK >= self._held[context.path] * own.scores_TK[:, :1]
        return first(passes_TK.long().cumprod(-1).sum(-1), own.scores_TK.shape[-1])


class RandomPolicy(MeanK):
    """A random choice of k of the router's own experts; a fraction of k is decided by chance per token.

    Seeded: the same calls in the same order give the same choice. A plain baseline.
    """

    name = "random"
    source = "plain baseline"
    shown = ("k", "seed")

    def __init__(self, k: float, *, seed: int = 0, weights: WeightRule = "model") -> None:
        super().__init__(k, weights=weights)
        self.seed = int(seed)
        self._generators: dict[str, torch.Generator] = {}

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        super().bind(contexts)
        self._generators = {c.path: torch.Generator(device=c.device) for c in contexts}
        self.reset()

    def reset(self) -> None:
        for index, generator in enumerate(self._generators.values()):
            generator.manual_seed(self.seed * 1_000_003 + index)

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        num_tokens, num = own.scores_TK.shape
        drawn_TN = torch.rand(
            num_tokens, num + 1, generator=self._generators[context.path], device=own.scores_TK.device
        )
        whole = int(self.k)
        counts_T = whole + (drawn_TN[:, -1] < self.k - whole).long()
        rank_TK = drawn_TN[:, :-1].argsort(-1).argsort(-1)
        return rank_TK < counts_T.unsqueeze(-1)


class UniformPolicy(Baseline):
    """The k best experts with equal weights: 1 / k each (``weights="sum"``), or sharing what they weighed together.

    The third strategy ("uniform weights") of the original experiments.
    """

    name = "uniform"
    source = "the original OLMoE routing experiments"
    shown = ("k",)

    def __init__(self, k: int | None = None, *, weights: WeightRule = "sum") -> None:
        super().__init__(weights=weights)
        if k is not None:
            check_k(1, k)
        self.k = k

    @classmethod
    def for_budget(cls, budget: float, log: RoutingLog, **fixed: Any) -> Baseline:
        """The rule at a whole number of experts per token."""
        return cls(whole_budget(budget, min(c.top_k for c in log.contexts), cls.name), **fixed)

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        for context in contexts:
            check_within(self.k or 0, context)

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        num = own.scores_TK.shape[-1]
        return first(torch.full_like(own.order_TK[:, 0], num if self.k is None else self.k), num)

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        decision = super().decide(logits_TE, own_weights_TK, own_experts_TK, context)
        kept_TK = ~decision.dropped_TK
        total_T1 = at_least_float32(decision.weights_TK).sum(-1, keepdim=True)
        equal_TK = (kept_TK * total_T1 / kept_TK.sum(-1, keepdim=True)).to(own_weights_TK.dtype)
        assert decision.fallback_T is not None
        weights_TK = torch.where(decision.fallback_T.unsqueeze(-1), decision.weights_TK, equal_TK)
        return replace(decision, weights_TK=weights_TK)


def whole_budget(budget: float, most: int, what: str) -> int:
    """A budget of a rule that keeps the same number for every token."""
    from ...errors import BudgetError

    budget = check_budget(budget, most, what)
    if budget != int(budget):
        raise BudgetError(
            f"{what} keeps the same whole number of experts for every token, got a budget of {budget:g}; "
            f"use {math.floor(budget)} or {math.ceil(budget)}."
        )
    return int(budget)
