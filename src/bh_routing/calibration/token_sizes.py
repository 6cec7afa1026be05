"""Sizes that follow the token: what an expert's absence changes beyond its compensation, predicted from the router logits.

Shape legend: L routed layers, N tokens, K slots of the router's own choice, D router logits of a token, E experts,
P pairs of one expert.

    log size_te = a_e + clamp((z_t - c) . v_e, -2, 2),

z the raw router logits, c their means. Over the pairs of the router's own choice, v_e is the ridge regression of
half the log of |r|^2 on the whitened z, r = f_e(x) - m_e - A_e z~ what the compensation leaves over: ridge 2e-2 N K / E
about a slope that the layer's experts share (itself with ridge 1e-2 N, each expert with an intercept of its own).
a_e makes the sizes right on average: sum (g . r)^2 = sum exp(2 log size) over the expert's pairs, g the gradient of the
loss with respect to the layer's output. (Measured: what the choice of an expert costs varies by token more than by expert.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from .._files.tensors import COUNTS, FLOAT32, SHARES
from ..stats.statistic import token_size
from .moments import ENOUGH

OWN_RIDGE, SHARED_RIDGE = 2e-2, 1e-2
FEWEST = 20  # pairs of an expert below which it has the shared slope
FLOOR = 1e-8  # eigenvalues of the logits' covariance below this share of the largest count as this much
HELD_OUT = 4  # every fourth window judges the slopes


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSizes:
    """The prediction of every layer.

    Attributes
    ----------
    offset_LE : Tensor
        float32: a.
    slope_LDE : Tensor
        float32: v; 0 in a layer where it predicted nothing.
    center_LD : Tensor
        float32: c, which masked logits count as.
    r2_L : Tensor
        float64: the share of the variance of log |r| within an expert that the slopes explain on windows they were not
        fitted to; 0 where there were too few.
    tokens_LE : Tensor
        int64: pairs of each expert that it was fitted to.
    """

    offset_LE: Annotated[Tensor, FLOAT32]
    slope_LDE: Annotated[Tensor, FLOAT32]
    center_LD: Annotated[Tensor, FLOAT32]
    r2_L: Annotated[Tensor, SHARES]
    tokens_LE: Annotated[Tensor, COUNTS]


@dataclass(frozen=True, kw_only=True, eq=False)
class Residuals:
    """Pairs of one layer's own choice.

    Attributes
    ----------
    logits_ND : Tensor
        float32, raw.
    experts_NK : Tensor
        int64.
    size_NK : Tensor
        float32: |r|^2.
    effect_NK : Tensor
        float32: (g . r)^2.
    window_N : Tensor
        int64, a number for each window.
    """

    logits_ND: Tensor
    experts_NK: Tensor
    size_NK: Tensor
    effect_NK: Tensor
    window_N: Tensor

    @staticmethod
    def joined(parts: Sequence[Residuals]) -> Residuals:
        """All of them, in the order of their windows (and of their tokens within)."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])}
        order_N = joined["window_N"].argsort(stable=True)
        return Residuals(**{name: x[order_N] for name, x in joined.items()})

    def where(self, keep_N: Tensor) -> Residuals:
        """Some of the tokens."""
        return Residuals(**{name: x[keep_N] for name, x in vars(self).items()})


def fit_token_sizes(layers: Sequence[Residuals], centers: Sequence[Tensor], num_experts: int) -> TokenSizes:
    """From the residuals of every layer, and the means of its logits [D]."""
    found = [
        _layer(residuals, center_D.float(), num_experts)
        for residuals, center_D in zip(layers, centers, strict=True)
    ]
    offsets, slopes, r2, tokens = zip(*found, strict=True)
    return TokenSizes(
        offset_LE=torch.stack(offsets).float(),
        slope_LDE=torch.stack(slopes).float(),
        center_LD=torch.stack([center_D.float() for center_D in centers]),
        r2_L=torch.tensor(r2, dtype=torch.float64).nan_to_num(0.0).clamp_max(1.0),
        tokens_LE=torch.stack(tokens),
    )


def _layer(residuals: Residuals, center_D: Tensor, num_experts: int) -> tuple[Tensor, Tensor, float, Tensor]:
    """a_E, v_DE, R2, pairs_E."""
    numbers, window_N = residuals.window_N.unique(return_inverse=True)
    judged_N = window_N % HELD_OUT == HELD_OUT - 1
    r2 = float("nan")
    slope_DE = torch.zeros(center_D.numel(), num_experts)
    if len(numbers) >= HELD_OUT:
        r2 = _explained(
            residuals.where(judged_N), center_D, fit_slopes(residuals.where(~judged_N), center_D, num_experts)
        )
    if r2 > 0.0:
        slope_DE = fit_slopes(residuals, center_D, num_experts)
    experts_P = residuals.experts_NK.flatten()
    size_NE = token_size(residuals.logits_ND, slope_DE, center_D)
    square_P = (2.0 * size_NE.gather(1, residuals.experts_NK)).exp().flatten()
    zeros_E = torch.zeros(num_experts, dtype=torch.float64)
    effect_E = zeros_E.index_add(0, experts_P, residuals.effect_NK.flatten().double())
    square_E = zeros_E.index_add(0, experts_P, square_P)
    pairs_E = experts_P.bincount(minlength=num_experts)
    return 0.5 * _matched(effect_E, square_E, pairs_E).log(), slope_DE, r2, pairs_E


def _matched(effect_E: Tensor, square_E: Tensor, pairs_E: Tensor) -> Tensor:
    """exp(2 a): the ratio of two sums over an expert's pairs; with few pairs the layer's median stands in for the others."""
    known_E = (pairs_E >= ENOUGH) & (effect_E > 0)
    every = float(effect_E.sum() / square_E.sum().clamp_min(1e-300))
    usual = float((effect_E[known_E] / square_E[known_E]).median()) if bool(known_E.any()) else every or 1.0
    prior_E = (ENOUGH - pairs_E).clamp_min(0).double()
    ratio_E = (effect_E + prior_E * usual) / (square_E + prior_E).clamp_min(1e-300)
    return torch.where(ratio_E > 0, ratio_E, usual)


def fit_slopes(residuals: Residuals, center_D: Tensor, num_experts: int) -> Tensor:
    """v of one layer, float32 [D, E]."""
    shifted_ND, experts_NK, target_NK = _regression(residuals, center_D)
    num, slots = experts_NK.shape
    values_D, vectors_DD = torch.linalg.eigh(shifted_ND.T @ shifted_ND / num - _outer(shifted_ND.mean(0)))
    whiten_DD = vectors_DD / values_D.clamp_min(FLOOR * values_D[-1]).clamp_min(1e-30).sqrt()
    white_ND, wide = shifted_ND @ whiten_DD, center_D.numel()
    gram_EDD = torch.zeros(num_experts, wide, wide, dtype=torch.float64)
    cross_ED = torch.zeros(num_experts, wide, dtype=torch.float64)
    pairs_E = experts_NK.flatten().bincount(minlength=num_experts)
    order_P = experts_NK.flatten().argsort(stable=True)
    for expert, pairs_P in enumerate(order_P.split(pairs_E.tolist())):
        if len(pairs_P):
            z_PD, y_P = white_ND[pairs_P // slots], target_NK.flatten()[pairs_P]
            z_PD = z_PD - z_PD.mean(0)
            gram_EDD[expert], cross_ED[expert] = z_PD.T @ z_PD, z_PD.T @ (y_P - y_P.mean())
    eye_DD = torch.eye(wide, dtype=torch.float64)
    shared_D = torch.linalg.solve(gram_EDD.sum(0) + SHARED_RIDGE * num * eye_DD, cross_ED.sum(0))
    ridge = OWN_RIDGE * num * slots / num_experts
    own_ED = torch.linalg.solve(gram_EDD + ridge * eye_DD, cross_ED - gram_EDD @ shared_D)
    slope_ED = shared_D + own_ED * (pairs_E >= FEWEST).unsqueeze(1)
    slope_DE: Tensor = whiten_DD @ slope_ED.T
    return slope_DE.float()


def _regression(residuals: Residuals, center_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z - c float64 [N, D], experts, and half the log of |r|^2 float64 [N, K]."""
    logits_ND = residuals.logits_ND
    shifted_ND = torch.where(torch.isfinite(logits_ND), logits_ND - center_D, 0.0).double()
    tiny = torch.finfo(torch.float32).tiny
    return shifted_ND, residuals.experts_NK, 0.5 * residuals.size_NK.double().clamp_min(tiny).log()


def _outer(x_D: Tensor) -> Tensor:
    return torch.outer(x_D, x_D)


def _explained(residuals: Residuals, center_D: Tensor, slope_DE: Tensor) -> float:
    """Share of the variance of log |r| within experts that slopes explain, each expert with a mean of its own."""
    _, experts_NK, target_NK = _regression(residuals, center_D)
    size_NK = token_size(residuals.logits_ND, slope_DE, center_D).gather(1, experts_NK)
    experts_P, num_experts = experts_NK.flatten(), slope_DE.shape[1]

    def within(values_P: Tensor) -> float:
        zeros_E = torch.zeros(num_experts, dtype=torch.float64)
        pairs_E = experts_P.bincount(minlength=num_experts).clamp_min(1)
        mean_E = zeros_E.index_add(0, experts_P, values_P) / pairs_E
        return float((values_P - mean_E[experts_P]).square().sum())

    total = within(target_NK.flatten())
    return 1.0 - within((target_NK - size_NK).flatten()) / total if total > 0 else float("nan")
