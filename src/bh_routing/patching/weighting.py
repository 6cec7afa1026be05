"""How a router makes its weights, read off its numbers: which score, and what happens to it after the selection.

Shape legend: T tokens, E experts, K slots of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..decision.types import RouteNorm
from ..stats.statistic import LOG_SCORES


class Reading(NamedTuple):
    """How a router makes its weights, as read off its numbers.

    Attributes
    ----------
    score_func : str
        A key of `bh_routing.stats.statistic.LOG_SCORES`: what the weights are made of.
    route_norm : "none", "renormalised" or "unknown"
        ``none``: a weight does not depend on which other experts were selected. ``renormalised``: a token's
        weights are scaled to a constant sum over its selected experts.
    route_scale : float
        ``none``: weight / score. ``renormalised``: the constant sum.
    joint : bool
        Weights are normalised together with something outside the selection (shared experts): ``route_norm`` is
        ``none`` then, because dropping one expert leaves the others' share alone.
    plain : bool
        The selected experts are the K largest of that very score: nothing else takes part in the choice.
    per_expert : str
        Name of the vector [E] of factors that the renormalised weights were multiplied by, "" if none.
    """

    score_func: str = "softmax"
    route_norm: RouteNorm = "unknown"
    route_scale: float = 1.0
    joint: bool = False
    plain: bool = False
    per_expert: str = ""


def read_weighting(
    logits_TE: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    vectors: Mapping[str, Tensor] | None = None,
) -> Reading:
    """Which score the weights are made of, and what happens to them after the selection.

    With r = log(weight) - log(score) for each known score: weights are left alone if r is one constant for all tokens
    and slots (the scaling factor), renormalised if r is constant within each token and the weights' sum is the
    same for all tokens (a softmax over the selected logits is that case of a softmax over all), and normalised
    jointly with something else if r is constant within each token and the sum is not. If nothing fits, each of
    `vectors` [E] is tried as a factor per expert on renormalised weights.

    Nothing is claimed (``route_norm="unknown"``) for a router whose logits are all equal, or whose weights fit
    no known score.
    """
    unknown = Reading()
    if logits_TE.shape[0] == 0 or int(experts_TK.max()) >= logits_TE.shape[-1] or int(experts_TK.min()) < 0:
        return unknown
    low = not {logits_TE.dtype, weights_TK.dtype}.isdisjoint((torch.float16, torch.bfloat16))
    x_TE, weights_TK = logits_TE.double(), weights_TK.double()
    tolerance = 0.03 if low else 1e-3
    if not bool(torch.isfinite(x_TE).all()) or float((x_TE.amax(-1) - x_TE.amin(-1)).max()) < 1e-6:
        return unknown
    probabilities = float(x_TE.min()) >= 0 and float((x_TE.sum(-1) - 1).abs().max()) < tolerance
    names = ("probability",) if probabilities else ("softmax", "sigmoid", "sqrtsoftplus")
    usable_TK = weights_TK > 1e-4 * weights_TK.amax()
    if not bool(usable_TK.any()):
        return unknown
    log_scores = {name: LOG_SCORES[name](x_TE) for name in names}
    for factors in ({"": None} | dict(vectors or {})).items():
        fits = [
            fit
            for name, log_TE in log_scores.items()
            if (fit := _fit(name, log_TE, weights_TK, experts_TK, usable_TK, factors, tolerance)) is not None
        ]
        if fits:
            return min(fits, key=lambda fit: fit[0])[1]
    return unknown


def _fit(
    score_func: str,
    log_TE: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    usable_TK: Tensor,
    factors: tuple[str, Tensor | None],
    tolerance: float,
) -> tuple[tuple[int, float], Reading] | None:
    """How well one score explains the weights: (rank, spread) to choose by, and the reading; None if not."""
    name, vector_E = factors
    if vector_E is not None:
        factor_E = vector_E.double().to(weights_TK.device)
        if not bool((factor_E > 0).all()):
            return None
        weights_TK = weights_TK / factor_E[experts_TK]
    ratio_TK = weights_TK.clamp_min(1e-30).log() - log_TE.gather(-1, experts_TK)
    center = ratio_TK[usable_TK].median()
    across = float((ratio_TK[usable_TK] - center).abs().max())
    row_T1 = ratio_TK.masked_fill(~usable_TK, float("nan")).nanmedian(-1, keepdim=True).values
    within = float((ratio_TK - row_T1)[usable_TK].abs().max())
    sum_T = weights_TK.sum(-1)
    total = float(sum_T.median())
    constant = float((sum_T / total - 1).abs().max()) < tolerance if total > 0 else False
    plain = vector_E is None and _largest_chosen(log_TE, experts_TK, tolerance)
    if across < tolerance and vector_E is None:
        return (0, across), Reading(
            score_func, "none", _near_one(float(center.exp()), tolerance), False, plain
        )
    if within < tolerance and constant:
        return (1, within), Reading(
            score_func, "renormalised", _near_one(total, tolerance), False, plain, name
        )
    # One slot is always constant within its token: that explains nothing.
    if within < tolerance and weights_TK.shape[-1] > 1 and vector_E is None:
        return (2, within), Reading(score_func, "none", 1.0, True, False)
    return None


def _near_one(value: float, tolerance: float) -> float:
    return 1.0 if abs(value - 1.0) < tolerance else value


def _largest_chosen(log_TE: Tensor, experts_TK: Tensor, tolerance: float) -> bool:
    """Whether the chosen experts are the K largest scores of every token, ties and rounding aside."""
    chosen_TK = log_TE.gather(-1, experts_TK)
    others_TE = log_TE.scatter(-1, experts_TK, float("-inf"))
    return bool((others_TE.amax(-1) <= chosen_TK.amin(-1) + tolerance).all())
