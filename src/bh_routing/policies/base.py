"""The policy contract, what the policies that decide a count share, and top-k.

Shape legend: T tokens, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._words import Clamp, Phase, WeightRule, check_word
from ..decision.price import Step
from ..decision.select import Kept, Ranking, keep_own, not_finite, rank_top
from ..decision.types import Limits, RouteNorm, RoutingDecision, check_k
from ..decision.weights import apply_weight_rule, plain_rule
from ..errors import InvalidParameterError
from ..stats.pvalues import at_least_float32
from ..stats.statistic import LOG_SCORES
from .checks import check_within


@dataclass(frozen=True, kw_only=True)
class RoutingContext:
    """What a policy may know beside the logits. One per patched router; the call-specific part is replaced.

    Attributes
    ----------
    path : str
        The router's module path.
    index : int
        Its position among the patched routers, 0..L-1.
    num_experts : int
        E, the width of the logits.
    empty : int
        The index an empty slot carries (``experts.num_experts``).
    top_k : int
        K, the router's own number of slots.
    route_norm : "none", "renormalised" or "unknown"
        Whether the model rescales the selected scores to a constant sum.
    score_func : str
        How logits become scores: a key of `bh_routing.stats.statistic.LOG_SCORES`.
    route_scale : float
        A weight that is not renormalised is its score times this.
    can_widen : bool
        Whether scores of experts beyond the router's own choice are known (plain softmax or sigmoid).
    device : torch.device
        Where the router's weights are.
    expert_bytes : int
        What one of its experts takes in memory; 0 where that is not known.
    shape : (B, S) or None
        The batch's shape, where the model's forward told it.
    mask_T : Tensor or None
        bool [T], False for padding tokens, where known.
    phase : "prefill", "decode" or None
        ``"decode"``: one token of each sequence, after others in a cache. ``decode_T``, bool [T]: where a call has both.
    step : Step or None
        Which tokens are decoded together, one of each sequence, and share what they load; None in a prompt.
    level_T : Tensor or None
        int64 [T], the row of each token's own level (`bh_routing.policies.LevelsPolicy`); 0: the default. None: all of them.
    """

    path: str
    index: int
    num_experts: int
    empty: int
    top_k: int
    route_norm: RouteNorm = "unknown"
    score_func: str = "softmax"
    route_scale: float = 1.0
    can_widen: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    expert_bytes: int = 0
    shape: tuple[int, int] | None = None
    mask_T: Tensor | None = None
    phase: Phase | None = None
    decode_T: Tensor | None = None
    step: Step | None = None
    level_T: Tensor | None = None


class RoutingPolicy(ABC):
    """Decides, for every token of a layer, which experts run.

    A policy is bound to the routers of one model with `bind`, which allocates what it needs on their devices;
    `decide` then must not synchronise with a GPU.

    Class attributes
    ----------------
    causal : bool
        False if the decision for a token looks at other tokens of its sequence (refused by ``generate``).
    batch_invariant : bool
        False if it looks at the other sequences of the batch: the same prompt in another batch may get another answer.
    """

    name: ClassVar[str] = "policy"
    causal: ClassVar[bool] = True
    batch_invariant: ClassVar[bool] = True

    def __init__(self, *, weights: WeightRule = "model") -> None:
        check_word("weights", weights, WeightRule)
        self.weights: WeightRule = weights

    def bind(self, contexts: Iterable[RoutingContext]) -> None:  # noqa: B027 - most policies hold nothing
        """Check that the policy fits these routers and allocate its buffers. Raises; changes no model."""

    def reset(self) -> None:  # noqa: B027 - most policies draw nothing
        """Start anew: a policy that draws random numbers draws the same ones again."""

    def slots(self, context: RoutingContext) -> int:
        """Slots per token in the decision, K' (more than the router's own K only when widening)."""
        return context.top_k

    @abstractmethod
    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        """Decide for one call of one router.

        Parameters
        ----------
        logits_TE : Tensor
            Router logits in the model's dtype.
        own_weights_TK, own_experts_TK : Tensor
            The router's own choice, float and int64.
        """

    def describe(self) -> dict[str, Any]:
        """The policy's settings, for records and for people."""
        return {"policy": self.name, "weights": self.weights}

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.describe().items() if k != "policy")
        return f"{type(self).__name__}({settings})"

    def shrink(
        self,
        kept: Kept,
        logits_TE: Tensor,
        own_weights_TK: Tensor,
        own_experts_TK: Tensor,
        context: RoutingContext,
    ) -> RoutingDecision:
        """Make the decision that keeps these of the router's own slots, in the router's own order.

        Tokens with NaN or +inf among their logits keep the router's own choice.
        """
        return keep_own(
            kept,
            not_finite(logits_TE),
            own_weights_TK,
            own_experts_TK,
            weights=plain_rule(self.weights, context.route_norm),
            empty=context.empty,
        )

    def widen(
        self,
        kept: Kept,
        scores_TC: Tensor,
        experts_TC: Tensor,
        own_weights_TK: Tensor,
        own_experts_TK: Tensor,
        context: RoutingContext,
        finite_T: Tensor,
    ) -> RoutingDecision:
        """Make the decision over C candidates that are not the router's own slots (C >= K).

        Tokens with NaN or +inf among their logits keep the router's own choice.
        """
        pad = scores_TC.shape[-1] - own_weights_TK.shape[-1]
        weights_TC = apply_weight_rule(
            own_weights_TK,
            ~kept.keep_TK,
            plain_rule(self.weights, context.route_norm),
            scores_TC.to(own_weights_TK.dtype),
        )
        experts_TC = experts_TC.masked_fill(~kept.keep_TK, context.empty)
        own_weights_TC = torch.nn.functional.pad(own_weights_TK, (0, pad))
        own_experts_TC = torch.nn.functional.pad(own_experts_TK, (0, pad), value=context.empty)
        finite_T1 = finite_T.unsqueeze(-1)
        experts_TC = torch.where(finite_T1, experts_TC, own_experts_TC)
        still_TK = (own_experts_TK.unsqueeze(-1) == experts_TC.unsqueeze(-2)).any(-1)
        return RoutingDecision(
            weights_TK=torch.where(finite_T1, weights_TC, own_weights_TC),
            experts_TK=experts_TC,
            counts_T=torch.where(finite_T, kept.counts_T, own_experts_TK.shape[-1]),
            raw_counts_T=kept.raw_counts_T,
            dropped_TK=~still_TK,
            own_weights_TK=own_weights_TK,
            own_experts_TK=own_experts_TK,
            empty=context.empty,
            fallback_T=~finite_T,
        )


class CountPolicy(RoutingPolicy):
    """Shared by the policies that decide a count between min_k and max_k in order of a statistic."""

    def __init__(
        self,
        *,
        min_k: int = 1,
        max_k: int | None = None,
        clamp: Clamp = "after",
        weights: WeightRule = "model",
    ) -> None:
        super().__init__(weights=weights)
        check_k(min_k, max_k, least=0)
        check_word("clamp", clamp, Clamp)
        self.min_k, self.max_k, self.clamp = min_k, max_k, clamp

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        for context in contexts:
            check_k(self.min_k, self.max_k, context.num_experts, least=0)
            if self.max_k is None and self.min_k > context.top_k:
                raise InvalidParameterError(
                    f"min_k={self.min_k} is more than the {context.top_k} experts that router {context.path} "
                    "selects; lower min_k, or give max_k to widen the choice."
                )
            if self.max_k is not None and self.max_k > context.top_k and not context.can_widen:
                raise InvalidParameterError(
                    f"max_k={self.max_k} asks router {context.path} for more than the {context.top_k} experts "
                    "that it selects itself, and this family does not tell the scores of the others; "
                    f"use max_k <= {context.top_k}."
                )

    def slots(self, context: RoutingContext) -> int:
        return self.max_k if self._widens(context) else context.top_k  # type: ignore[return-value]

    def _widens(self, context: RoutingContext) -> bool:
        return self.max_k is not None and self.max_k > context.top_k

    def describe(self) -> dict[str, Any]:
        return super().describe() | self.limits._asdict()

    @property
    def limits(self) -> Limits:
        """min_k, max_k and clamp."""
        return Limits(self.min_k, self.max_k, self.clamp)

    def _widened(
        self,
        ranking: Ranking,
        logits_TE: Tensor,
        own_weights_TK: Tensor,
        own_experts_TK: Tensor,
        context: RoutingContext,
    ) -> RoutingDecision:
        """Turn a ranking of all E experts into a decision over the max_k most significant."""
        experts_TC = ranking.order_TK[:, : self.max_k]
        scores_TE = LOG_SCORES[context.score_func](at_least_float32(logits_TE)).exp() * context.route_scale
        return self.widen(
            Kept(ranking.first_TK[:, : self.max_k], ranking.counts_T, ranking.raw_counts_T),
            scores_TE.gather(-1, experts_TC),
            experts_TC,
            own_weights_TK,
            own_experts_TK,
            context,
            ~not_finite(logits_TE).squeeze(-1),
        )


class TopKPolicy(RoutingPolicy):
    """The k experts with the largest own weight, k at most the router's own (Shazeer et al. 2017).

    ``k=None`` keeps everything: the unpatched model, bit for bit.
    """

    name = "topk"

    def __init__(self, k: int | None = None, *, weights: WeightRule = "model") -> None:
        super().__init__(weights=weights)
        if k is not None:
            check_k(1, k)
        self.k = k

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        for context in contexts:
            check_within(self.k or 0, context)

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        ranking = rank_top(own_weights_TK, own_experts_TK.shape[-1] if self.k is None else self.k)
        return self.shrink(ranking.kept(), logits_TE, own_weights_TK, own_experts_TK, context)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"k": self.k}
