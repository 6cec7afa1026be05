"""Rules that give each layer its own number of experts, and the exact allocation of a budget to layers.

Shape legend: T tokens, E experts, K slots of the router's own choice, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._words import WeightRule
from ...decision.types import check_k
from ...errors import BudgetError, InvalidInputError, InvalidParameterError
from ...policies import RoutingContext, check_within
from .base import Baseline, Ordered, first


def allocate(costs: Sequence[Sequence[float]], total: int) -> list[int]:
    """Whole numbers k_l >= 1 with the sum ``total`` that minimise the sum of ``costs[l][k_l - 1]``, exactly.

    Dynamic programming over layers, as in Alloc-MoE (arXiv:2604.08133, Alloc-L). Among equal sums the earlier
    layers get fewer.

    Parameters
    ----------
    costs : sequence of sequence of float
        Per layer, the loss with 1, 2, ... experts there.
    total : int
        Experts per token, added over layers; more than the layers can use gives each all of its own.

    Raises
    ------
    BudgetError
        If ``total`` is less than one expert per layer.

    Examples
    --------
    >>> allocate([[5.0, 1.0, 0.0], [2.0, 1.9, 0.0]], 4)
    [3, 1]
    """
    if any(not row or not all(math.isfinite(c) for c in row) for row in costs):
        raise InvalidInputError("costs must be finite numbers, at least one per layer.")
    if total < len(costs):
        raise BudgetError(
            f"a budget must give each of the {len(costs)} layers one expert, got {total} in all."
        )
    total = min(total, sum(map(len, costs)))
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for i, row in enumerate(costs):
        spare = total - (len(costs) - i - 1)
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (cost, chosen) in best.items():
            for k, more in enumerate(row, start=1):
                if used + k > spare:
                    break
                candidate = (cost + more, (*chosen, k))
                if used + k not in after or candidate < after[used + k]:
                    after[used + k] = candidate
        best = after
    return list(best[total][1])


class PerLayerPolicy(Baseline):
    """The k_l experts with the largest scores in layer l.

    Parameters
    ----------
    ks : sequence of int, or mapping of router path to int
        One number per layer.
    rule : str
        How the numbers were found, for records.

    Source: Chitty-Venkata et al. (2025), "LExI: Layer-Adaptive Active Experts", arXiv:2509.02753. The numbers
    there come from an evolutionary search over output perturbations on random inputs;
    `bh_routing.evaluation.profile.lexi_costs` measures those, and `allocate` finds the exact optimum of their sum
    instead of searching.
    """

    name = "perlayer"
    source = "Chitty-Venkata et al. 2025, LExI, arXiv:2509.02753"
    inspired = "exact allocation in place of the evolutionary search"
    shown = ("ks", "rule")

    def __init__(
        self, ks: Sequence[int] | Mapping[str, int], *, rule: str = "given", weights: WeightRule = "model"
    ) -> None:
        super().__init__(weights=weights)
        self.ks: Any = dict(ks) if isinstance(ks, Mapping) else list(ks)
        for k in self.ks.values() if isinstance(self.ks, dict) else self.ks:
            check_k(1, k)
        self.rule = rule
        self._held: dict[str, int] = {}

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        if len(self.ks) != len(contexts):
            raise InvalidParameterError(
                f"perlayer needs one k for each of the {len(contexts)} routers, got {len(self.ks)}."
            )
        for context in contexts:
            k = self.ks.get(context.path) if isinstance(self.ks, dict) else self.ks[context.index]
            if k is None:
                raise InvalidParameterError(f"perlayer has no k for router {context.path}.")
            check_within(k, context)
            self._held[context.path] = k

    def keep(self, own: Ordered, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        return first(torch.full_like(own.order_TK[:, 0], self._held[context.path]), own.scores_TK.shape[-1])
