"""The decision from a table, in PyTorch: which of a token's candidates to keep, and how many.

Shape legend: T tokens, E experts, K candidates (the router's own slots; all E when widening).

This is the reference; a fused kernel must return the same counts and the same sets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..procedures import Rule, count_passing
from ..routing import Clamp, clamp_counts


class Kept(NamedTuple):
    """What a decision keeps: ``keep_TK`` bool over the candidates, ``counts_T`` and ``raw_counts_T`` int64."""

    keep_TK: Tensor
    counts_T: Tensor
    raw_counts_T: Tensor


def keep_by_table(
    statistic_TK: Tensor,
    thresholds_E: Tensor,
    *,
    rule: Rule = "step_up",
    min_k: int = 1,
    max_k: int | None = None,
    clamp: Clamp = "after",
) -> Kept:
    """Order the candidates by the statistic (ties by position), compare rank by rank, take the count.

    Parameters
    ----------
    statistic_TK : Tensor
        float32 (or float64) statistic of the candidates, in the router's own slot order.
    thresholds_E : Tensor
        float32 [E]; the first K are used: experts that are no candidates count as p = 1.
    min_k, max_k : int
        The clamp; ``max_k=None`` means K.
    """
    num = statistic_TK.shape[-1]
    top = num if max_k is None else min(max_k, num)
    sorted_TK, order_TK = statistic_TK.sort(dim=-1, descending=True, stable=True)
    passes_TK = sorted_TK >= thresholds_E[:num]
    raw_T = count_passing(passes_TK, rule)
    return _keep(passes_TK, order_TK, raw_T, min_k, top, clamp)


def keep_by_p_values(
    p_TK: Tensor,
    critical_E: Tensor,
    *,
    rule: Rule = "step_up",
    min_k: int = 1,
    max_k: int | None = None,
    clamp: Clamp = "after",
) -> Kept:
    """The definition: order by p-value (ties by position), compare with the critical values in float64."""
    num = p_TK.shape[-1]
    top = num if max_k is None else min(max_k, num)
    sorted_TK, order_TK = p_TK.double().sort(dim=-1, stable=True)
    passes_TK = sorted_TK <= critical_E[:num].double()
    return _keep(passes_TK, order_TK, count_passing(passes_TK, rule), min_k, top, clamp)


def _keep(passes_TK: Tensor, order_TK: Tensor, raw_T: Tensor, min_k: int, max_k: int, clamp: Clamp) -> Kept:
    counts_T = clamp_counts(passes_TK, raw_T, min_k, max_k, clamp)
    first_TK = torch.arange(order_TK.shape[-1], device=order_TK.device) < counts_T.unsqueeze(-1)
    return Kept(torch.zeros_like(first_TK).scatter(-1, order_TK, first_TK), counts_T, raw_T)
