"""Rules by which the tokens of a decoding step share what they load. They look at batch mates, not at later tokens.

Shape legend: B sequences, S steps, T = B S tokens, E experts, K slots per token.

Elsewhere (in a prompt) each of them is the model's own routing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..._words import WeightRule
from ...calibration.loads import draw_steps
from ...decision.price import Step
from ...decision.select import Kept, not_finite
from ...decision.types import RoutingDecision
from ...errors import BudgetError, InvalidParameterError
from ...policies import RoutingContext, RoutingPolicy, check_within
from ...stats.pvalues import at_least_float32
from ...stats.statistic import LOG_SCORES
from ..routing_log import RoutingLog

if TYPE_CHECKING:
    from ..workbench import Workbench


class BatchRule(RoutingPolicy):
    """The experts that a step loads are chosen by all its tokens, and each token takes its best among them.

    Class attributes
    ----------------
    source, inspired : str
        As in `Baseline`.
    takes_others : bool
        Whether a token fills up its slots with loaded experts that the router did not select for it.
    """

    source: ClassVar[str] = ""
    inspired: ClassVar[str] = ""
    takes_others: ClassVar[bool] = True
    batch_invariant = False

    @abstractmethod
    def load(self, scores_BSE: Tensor) -> Tensor:
        """bool [S, E], what each step loads; scores of tokens that do not count (padding) are 0."""

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        for context in contexts:
            if self.takes_others and not context.can_widen:
                raise InvalidParameterError(
                    f"{self.name} chooses experts that router {context.path} did not select, and this family does not tell "
                    "their scores; use a family with plain softmax or sigmoid scores."
                )

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        step = context.step
        if step is None:
            keep_TK = torch.ones_like(own_experts_TK, dtype=torch.bool)
            kept = Kept(keep_TK, keep_TK.sum(-1), keep_TK.sum(-1))
            return self.shrink(kept, logits_TE, own_weights_TK, own_experts_TK, context)
        lost_T = not_finite(logits_TE).squeeze(-1)
        scores_TE = LOG_SCORES[context.score_func](at_least_float32(logits_TE)).exp() * context.route_scale
        priced_T = ~lost_T if step.priced_T is None else step.priced_T & ~lost_T
        counts_T = priced_T if context.mask_T is None else priced_T & context.mask_T
        batch, steps = step.shape
        voting_TE = scores_TE.masked_fill(~counts_T.unsqueeze(-1), 0.0)
        loaded_SE = self.load(voting_TE.view(batch, steps, -1))
        loaded_TE = loaded_SE.expand(batch, steps, -1).reshape(scores_TE.shape)
        own_TE = torch.zeros_like(loaded_TE).scatter(1, own_experts_TK, True)
        allowed_TE = torch.where(priced_T.unsqueeze(-1), loaded_TE, own_TE)
        if not self.takes_others:
            keep_TK = (allowed_TE & own_TE).gather(1, own_experts_TK)
            kept = Kept(keep_TK, keep_TK.sum(-1), keep_TK.sum(-1))
            return self.shrink(kept, logits_TE, own_weights_TK, own_experts_TK, context)
        ranked_TE = scores_TE.masked_fill(~allowed_TE, -1.0)
        best_TK, experts_TK = ranked_TE.topk(own_experts_TK.shape[-1], dim=-1)
        keep_TK = best_TK >= 0.0
        kept = Kept(keep_TK, keep_TK.sum(-1), keep_TK.sum(-1))
        return self.widen(kept, best_TK, experts_TK, own_weights_TK, own_experts_TK, context, ~lost_T)


def _best(scores_BSE: Tensor, k: int) -> Tensor:
    """bool [S, E]: among the k best of any token that counts."""
    if k == 0:
        return torch.zeros(scores_BSE.shape[1:], dtype=torch.bool, device=scores_BSE.device)
    best_BSk = scores_BSE.topk(k, dim=-1).indices
    mine_BSE = torch.zeros_like(scores_BSE, dtype=torch.bool).scatter(-1, best_BSk, True)
    return (mine_BSE & (scores_BSE > 0.0)).any(0)


class OpportunisticPolicy(BatchRule):
    """The k0 best experts of every token are loaded, and every token fills up to k from what is loaded.

    Parameters
    ----------
    k0 : int
        Experts that each token is sure of.

    Source: Oncescu et al. (2025), "Opportunistic Expert Activation", arXiv:2511.02237, in its simplified form: the number
    of sure experts is the same for every token, and a token takes any loaded expert, in order of its score.
    """

    name = "oea"
    source = "Oncescu et al. 2025, OEA, arXiv:2511.02237"

    def __init__(self, k0: int, *, weights: WeightRule = "model") -> None:
        super().__init__(weights=weights)
        if isinstance(k0, bool) or not isinstance(k0, int) or k0 < 1:
            raise InvalidParameterError(f"k0 must be a whole number of at least 1, got {k0!r}.")
        self.k0 = k0

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        super().bind(contexts)
        for context in contexts:
            check_within(self.k0, context, "k0")

    def load(self, scores_BSE: Tensor) -> Tensor:
        return _best(scores_BSE, self.k0)

    @classmethod
    def of(
        cls, bench: Workbench, k0: int | None = None, loads: float | None = None, **fixed: Any
    ) -> OpportunisticPolicy:
        """The rule with this k0, or with the k0 at which a layer reads a mean number of experts in steps of the streams.

        Raises
        ------
        BudgetError
            If none comes within 2 %; it tells what each reads.
        """
        if loads is None:
            assert k0 is not None
            return cls(k0, **fixed)
        found = {}
        for k0 in range(1, bench.top_k + 1):
            policy = cls(k0, **fixed)
            found[k0] = mean_loads(policy, bench.log, bench.streams)
            if abs(found[k0] - loads) <= 0.02 * loads:
                return policy
        told = ", ".join(f"{value:.1f} at k0={k0}" for k0, value in found.items())
        raise BudgetError(
            f"oea reads as many experts as its whole number k0 says, for {bench.streams} sequences {told}; got loads={loads:g}."
        )

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"k0": self.k0}


class SharedExpertsPolicy(BatchRule):
    """The k0 best experts of every token, then those with the largest summed scores, up to m; each token takes its best k of them.

    Parameters
    ----------
    loads : int
        m, the experts that a step loads at most (unless the k0 best of its tokens are more).
    k0 : int
        Experts that each token is sure of.

    Source: "XShare" (2026), arXiv:2602.07265, as its implementation for vLLM describes it (pull request 35551): demand is added up
    over the batch, experts of low demand are masked, then top-k.
    """

    name = "xshare"
    source = "XShare 2026, arXiv:2602.07265"
    inspired = "from the abstract and the description of its implementation"

    def __init__(self, loads: float, k0: int = 1, *, weights: WeightRule = "model") -> None:
        super().__init__(weights=weights)
        if isinstance(loads, bool) or loads != int(loads) or loads < 1:
            raise InvalidParameterError(f"{self.name} loads a whole number of experts, got loads={loads!r}.")
        if isinstance(k0, bool) or not isinstance(k0, int) or k0 < 0:
            raise InvalidParameterError(f"k0 must be a whole number of at least 0, got {k0!r}.")
        self.loads, self.k0 = int(loads), k0

    def load(self, scores_BSE: Tensor) -> Tensor:
        first_SE = _best(scores_BSE, self.k0)
        demand_SE = scores_BSE.sum(0).masked_fill(first_SE, torch.inf)
        most = min(self.loads, demand_SE.shape[-1])
        chosen_SE = torch.zeros_like(first_SE).scatter(-1, demand_SE.topk(most, dim=-1).indices, True)
        return first_SE | (chosen_SE & (demand_SE > 0.0))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"loads": self.loads, "k0": self.k0}


class BatchTopKPolicy(SharedExpertsPolicy):
    """The experts with the largest summed scores, m of them; of its own choice a token keeps what is among them.

    A token may keep none, and has nothing then.

    Source: McDanel et al. (2026), "MoE-Spec", arXiv:2602.16052, with truncation; there it serves the verification of drafts.
    """

    name = "batchtopk"
    source = "McDanel et al. 2026, MoE-Spec, arXiv:2602.16052"
    inspired = "for the tokens of different sequences, in place of those of a draft"
    takes_others = False

    def __init__(self, loads: float, *, weights: WeightRule = "model") -> None:
        super().__init__(loads, 0, weights=weights)


def mean_loads(policy: RoutingPolicy, log: RoutingLog, streams: int, tokens: int = 1 << 14) -> float:
    """Experts that a policy reads in a layer and step of so many sequences on average, on recorded routing."""
    steps = max(16, tokens // streams)
    token_MB = draw_steps(log, streams, steps)
    contexts = [
        replace(c, can_widen=True, step=Step(shape=(streams, steps), tokens=streams)) for c in log.contexts
    ]
    policy.bind(contexts)
    total = 0.0
    for context in contexts:
        logits_TE, weights_TK, own_TK = (x[token_MB.T.reshape(-1)] for x in log.layer(context.index))
        experts_TK = policy.decide(logits_TE, weights_TK, own_TK, context).experts_TK
        step_T1 = torch.arange(steps).repeat(streams).unsqueeze(-1)
        read_SE = torch.zeros(steps, context.empty + 1, dtype=torch.bool)
        read_SE[step_T1.expand_as(experts_TK), experts_TK] = True
        total += float(read_SE[:, : context.empty].sum(-1).double().mean())
    return total / len(contexts)
