"""Rules by which the tokens of a sequence share a budget. Not causal: a token's count depends on later tokens.

Shape legend: T tokens, E experts, K slots of the router's own choice, B sequences, S tokens of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..._words import WeightRule
from ...errors import InvalidParameterError
from ...policies import RoutingContext
from .base import MeanK, Ordered


class SequenceTopKPolicy(MeanK):
    """The k * S largest routing scores of a sequence of S tokens, at least one per token.

    Where the shape of the batch is not known, all tokens of the call are one sequence. Padding takes nothing from
    the budget.

    Source: SeqTopK (2025), "Route Experts by Sequence, Not by Token", arXiv:2511.06494. There any expert may be
    taken and a cache serves decoding; here the candidates are the router's own choice, and ``generate`` refuses
    the policy.
    """

    name = "seqtopk"
    causal = False
    source = "SeqTopK 2025, arXiv:2511.06494"
    inspired = "among the router's own choice, one expert per token at least"

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        num_tokens, num = own.scores_TK.shape
        batch, length = context.shape or (1, num_tokens)
        scores_TK = own.scores_TK.nan_to_num(0.0).clone()
        scores_TK[:, 0] = float("inf")
        real_BS = torch.full((batch, 1), length, device=scores_TK.device)
        if context.mask_T is not None:
            scores_TK = scores_TK.masked_fill(~context.mask_T.unsqueeze(-1), float("-inf"))
            real_BS = context.mask_T.view(batch, length).sum(-1, keepdim=True)
        limit_B1 = (self.share(context) * real_BS).round().long()
        flat_BN = scores_TK.view(batch, length * num)
        rank_BN = flat_BN.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        keep_TK = (rank_BN < limit_B1).view(num_tokens, num)
        keep_TK[:, 0] = True
        return keep_TK


class AllocatedPolicy(SequenceTopKPolicy):
    """Budgeted allocation to layers, then to tokens: layer l keeps the k_l * S largest scores of a sequence.

    Parameters
    ----------
    ks : sequence of float
        Mean number of experts per layer, from `allocate` on `bh_routing.evaluation.profile.loss_costs`.

    Source: Liu et al. (2026), "Alloc-MoE", arXiv:2604.08133: sensitivity profiling and dynamic programming over
    layers (Alloc-L), the largest k_l * T scores over tokens (Alloc-T). Here the sensitivity is the rise of the
    loss on calibration text with one layer cut, tokens share within their sequence and not over the batch, and
    every token keeps one expert.
    """

    name = "allocmoe"
    source = "Liu et al. 2026, Alloc-MoE, arXiv:2604.08133"
    inspired = "among the router's own choice, one expert per token at least, shared within a sequence"
    shown = ("k", "ks")

    def __init__(self, ks: Sequence[float], *, weights: WeightRule = "model") -> None:
        super().__init__(sum(ks) / max(1, len(ks)), weights=weights)
        if any(k < 1 for k in ks):
            raise InvalidParameterError(f"each layer needs at least one expert, got {list(ks)}.")
        self.ks = [float(k) for k in ks]

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        if len(contexts) != len(self.ks):
            raise InvalidParameterError(
                f"allocmoe needs one k for each of the {len(contexts)} routers, got {len(self.ks)}."
            )
        super().bind(contexts)

    def share(self, context: RoutingContext) -> float:
        return self.ks[context.index]
