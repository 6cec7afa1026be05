"""The price of loads: an expert that the tokens of a step would read is read if what they would lose without it pays for it.

Shape legend: B sequences, S steps, T = B S tokens (in the order [B, S]), E experts, K slots of the router's own choice.

Of the pairs C that a decision keeps, with drop losses h_te = exp(2 s_te), s the statistic,

    load e      if it is resident, or if   sum over (t, e) in C of max(h_te - price_pair, 0)  >=  price_load
    run (t, e)  if (t, e) in C, e is loaded and h_te >= price_pair

for each step by itself: its B tokens belong to different sequences. What a token keeps first (its ``min_k`` best) is loaded
whatever it is worth, and then serves everyone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .select import Ranking


@dataclass(frozen=True, kw_only=True)
class Step:
    """Which tokens of a call share their loads.

    Attributes
    ----------
    shape : (B, S)
        The call's tokens are B sequences at S steps: (T, 1) for one decoding step.
    tokens : int
        Sequences that a step has: the batch size in use, for which a price is solved.
    priced_T : Tensor or None
        bool: tokens that belong to a step; the others (of a prompt) keep what the decision says, and pay for nothing.
        None: all.
    """

    shape: tuple[int, int]
    tokens: int
    priced_T: Tensor | None = None


class Priced(NamedTuple):
    """Which pairs run, and who paid.

    Attributes
    ----------
    keep_TK : Tensor
        bool, the pairs that run.
    shared_TK : Tensor
        bool, those of them whose own worth would not have paid for the load.
    loaded_SE : Tensor
        bool, the experts that each step reads, resident ones included.
    """

    keep_TK: Tensor
    shared_TK: Tensor
    loaded_SE: Tensor


def price_loads(
    keep_TK: Tensor | None,
    first_TK: Tensor | None,
    loss_TK: Tensor,
    experts_TK: Tensor,
    *,
    shape: tuple[int, int],
    num_experts: int,
    price_load: Tensor | float,
    price_pair: float = 0.0,
    priced_T: Tensor | None = None,
    votes_T: Tensor | None = None,
    resident_E: Tensor | None = None,
) -> Priced:
    """Decide, for each step, which experts are loaded, and which pairs run on them.

    No host synchronisation, O(T E) like the router itself. Losses are added up in the order of the sequences, so that
    every worker that sees the same logits loads the same experts.

    Parameters
    ----------
    keep_TK, first_TK : Tensor
        bool: the pairs C (None: all), and those of them that are loaded first (the ``min_k`` best of each token; None: none);
        the latter [T, K] or [T, 1].
    loss_TK : Tensor
        float32, h >= 0: in squared units of the loss where sizes are sensitivities. Not NaN where ``keep_TK``.
    experts_TK : Tensor
        int64, below E.
    shape : (B, S)
        As in `Step`.
    price_load, price_pair : Tensor or float
        In the units of h; 0 leaves everything as it was.
    priced_T : Tensor, optional
        bool, as in `Step`.
    votes_T : Tensor, optional
        bool, False for padding and for sequences that have ended: they are served by what is loaded, and pay for nothing.
    resident_E : Tensor, optional
        bool: experts whose loads are free.
    """
    # Few operations: between products that empty the caches each costs ten microseconds, whatever it does.
    batch, steps = shape
    worth_TK = (loss_TK - price_pair).clamp_min(0.0) if price_pair else loss_TK
    if first_TK is not None:
        worth_TK = worth_TK.masked_fill(first_TK, torch.inf)
    who = [mask_T.unsqueeze(-1) for mask_T in (priced_T, votes_T) if mask_T is not None]
    asking = [keep_TK, *who] if keep_TK is not None else who
    bids_TK = worth_TK
    for mask in asking:
        bids_TK = bids_TK.masked_fill(~mask, 0.0)
    bids_TE = bids_TK.new_zeros(experts_TK.shape[0], num_experts).scatter_(1, experts_TK, bids_TK)
    loaded_SE = bids_TE.view(batch, steps, num_experts).sum(0) >= price_load
    if resident_E is not None:
        loaded_SE = loaded_SE | resident_E
    if steps == 1:
        runs_TK = loaded_SE.take(experts_TK)
    else:
        loaded_TE = loaded_SE.expand(batch, steps, num_experts).reshape(-1, num_experts)
        runs_TK = loaded_TE.gather(1, experts_TK)
    if price_pair:
        pays_TK = loss_TK >= price_pair
        runs_TK = runs_TK & (pays_TK if first_TK is None else first_TK | pays_TK)
    if priced_T is not None:
        runs_TK = runs_TK | ~priced_T.unsqueeze(-1)
    if keep_TK is not None:
        runs_TK = runs_TK & keep_TK
    shared_TK = runs_TK & (worth_TK < price_load)
    for mask in who:
        shared_TK = shared_TK & mask
    if resident_E is not None:
        shared_TK = shared_TK & ~resident_E[experts_TK]
    return Priced(runs_TK, shared_TK, loaded_SE)


def first_of(ranking: Ranking, min_k: int, lost_T1: Tensor | None) -> Tensor | None:
    """bool [T, K] in the candidates' own order: the ``min_k`` most significant; all of a token that decides nothing (``lost``).

    None where there are none of either.
    """
    if min_k == 0:
        return lost_T1
    rank_K = torch.arange(ranking.order_TK.shape[-1], device=ranking.order_TK.device)
    first_TK = (rank_K < min_k).expand_as(ranking.order_TK)
    first_TK = torch.zeros_like(first_TK).scatter(-1, ranking.order_TK, first_TK)
    return first_TK if lost_T1 is None else first_TK | lost_T1


__all__ = ["Priced", "Step", "first_of", "price_loads"]
