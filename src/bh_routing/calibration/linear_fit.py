"""The linear compensation of one layer, fitted: what a dropped expert would have added, as a function of the router logits.

Shape legend: T tokens, K slots of the router's own choice, E experts, D router logits of a token, J = D + 1 regressors
(1 and the logits), R rank, H hidden size.

A dropped pair of weight w adds w (m_e + A_e z~) in place of w f_e(x), with z~ = W' (z - mu), z the raw router logits.
For every expert, over its dropped pairs only,

    minimise  sum w^2 |f_e(x) - m_e - A_e z~|^2  +  lambda |A_e|^2  +  lambda / 1000 |m_e|^2,

lambda = ridge * (sum of w^2 over all dropped pairs) / E. mu and W come from the covariance of z pooled over all dropped
pairs with weights w^2: W scales its R leading eigenvectors to variance 1. All of it follows from sums over pairs,
S_e += w^2 phi phi' and C_e += w^2 phi f_e' with phi = [1, z], which add up over batches and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import TensorSums

RIDGE = 5e-3
INTERCEPT_SHARE = 1e-3  # of the ridge that falls on the mean
FLOOR = 1e-8  # eigenvalues of the logits' covariance below this share of the largest count as this much


@dataclass(frozen=True, eq=False)
class LinearFit:
    """The map of one layer, float64.

    Attributes
    ----------
    center_D : Tensor
        mu, what is subtracted from the logits; a masked logit (-inf) counts as this much.
    low_D, high_D : Tensor
        The range of each logit on the calibration text; logits are clamped to it.
    whiten_DR : Tensor
        W.
    mean_EH, slope_ERH : Tensor
        m and A.
    """

    center_D: Tensor
    low_D: Tensor
    high_D: Tensor
    whiten_DR: Tensor
    mean_EH: Tensor
    slope_ERH: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.whiten_DR.shape[1]


class LinearSums(TensorSums):
    """Sums over the dropped pairs of one layer, float64, on its device.

    Parameters
    ----------
    num_experts : int
        E.
    origin_D : Tensor
        Logits are counted from here (their means over the calibration text), which keeps the sums well conditioned and
        is what a masked logit (-inf) counts as.
    hidden : int
        H.
    """

    names = ("pairs_E", "gram_EJJ", "cross_EJH", "square", "low_D", "high_D")

    def __init__(self, num_experts: int, origin_D: Tensor, hidden: int) -> None:
        wide = origin_D.numel() + 1
        self.origin_D = origin_D.double()
        zeros = torch.zeros(num_experts, dtype=torch.float64, device=origin_D.device)
        self.pairs_E = zeros.long()
        self.gram_EJJ = zeros.new_zeros(num_experts, wide, wide)
        self.cross_EJH = zeros.new_zeros(num_experts, wide, hidden)
        self.square = zeros.new_zeros(())  # sum of w^2 |f|^2
        self.low_D = zeros.new_full((wide - 1,), torch.inf)
        self.high_D = -self.low_D

    def update(
        self,
        logits_TD: Tensor,
        outputs_TKH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        dropped_TK: Tensor,
    ) -> None:
        """Add some tokens. Padding must have been taken out.

        Parameters
        ----------
        logits_TD : Tensor
            Raw router logits.
        outputs_TKH : Tensor
            f_e(x) of the router's own experts, unweighted.
        experts_TK, weights_TK, dropped_TK : Tensor
            The router's own choice, its weights, and which of its slots were dropped.
        """
        pair_P = dropped_TK.flatten().nonzero().squeeze(-1)
        if not pair_P.numel():
            return
        token_P = pair_P // dropped_TK.shape[-1]
        order_P = experts_TK.flatten()[pair_P].argsort(stable=True)
        pair_P, token_P = pair_P[order_P], token_P[order_P]
        finite_TD = torch.isfinite(logits_TD)
        shifted_TD = torch.where(finite_TD, logits_TD.double() - self.origin_D, 0.0).float()
        seen_PD = shifted_TD[token_P].double()
        self.low_D = torch.minimum(self.low_D, seen_PD.amin(0))
        self.high_D = torch.maximum(self.high_D, seen_PD.amax(0))
        weight_P1 = weights_TK.flatten()[pair_P].float().unsqueeze(-1)
        phi_PJ = torch.cat((weight_P1, weight_P1 * shifted_TD[token_P]), -1)
        out_PH = weight_P1 * outputs_TKH.flatten(0, 1)[pair_P].float()
        self.square += out_PH.double().square().sum()
        counts_E = experts_TK.flatten()[pair_P].bincount(minlength=self.pairs_E.numel())
        self.pairs_E += counts_E
        start = 0
        for expert, count in enumerate(counts_E.tolist()):
            if count:  # one batch in float32, batches in float64
                phi_NJ, out_NH = phi_PJ[start : start + count], out_PH[start : start + count]
                self.gram_EJJ[expert] += phi_NJ.T @ phi_NJ
                self.cross_EJH[expert] += phi_NJ.T @ out_NH
                start += count

    def take(self, pairs: Any) -> None:
        """`update` with what a forward with dropped experts hands over (`bh_routing.calibration.dropping.Pairs`)."""
        self.update(pairs.logits_TD, pairs.outputs_TKH, pairs.experts_TK, pairs.weights_TK, pairs.dropped_TK)

    def added(self, others: Sequence[tuple[Tensor, ...]]) -> LinearSums:
        """These sums and the `parts` of others (with the same origin), on the CPU."""
        total = LinearSums(self.pairs_E.numel(), self.origin_D.cpu(), self.cross_EJH.shape[-1])
        for pairs_E, gram_EJJ, cross_EJH, square, low_D, high_D in (self.parts(), *others):
            total.pairs_E += pairs_E
            total.gram_EJJ += gram_EJJ
            total.cross_EJH += cross_EJH
            total.square += square
            total.low_D, total.high_D = torch.minimum(total.low_D, low_D), torch.maximum(total.high_D, high_D)
        return total


def fit_linear(sums: LinearSums, rank: int, ridge: float = RIDGE) -> LinearFit:
    """Solve for W, m and A at one rank and ridge (the module's docstring has the formulas). Rank 0: means alone.

    An expert of which nothing was dropped gets m = 0 and A = 0; a layer in which nothing was dropped, no coordinates.
    """
    num = sums.pairs_E.numel()
    total_JJ = sums.gram_EJJ.sum(0)
    weight = total_JJ[0, 0]
    rank = min(rank, total_JJ.shape[0] - 1)
    if not weight > 0:
        empty = torch.zeros(num, 0, sums.cross_EJH.shape[-1], dtype=torch.float64)
        zeros_D = torch.zeros_like(sums.origin_D)
        return LinearFit(
            sums.origin_D,
            zeros_D,
            zeros_D,
            zeros_D.new_zeros(zeros_D.numel(), 0),
            sums.cross_EJH[:, 0] * 0.0,
            empty,
        )
    mean_D = total_JJ[0, 1:] / weight
    covariance_DD = total_JJ[1:, 1:] / weight - torch.outer(mean_D, mean_D)
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    values_R, vectors_DR = values_D.flip(0)[:rank], vectors_DD.flip(1)[:, :rank]
    whiten_DR = vectors_DR / values_R.clamp_min(FLOOR * values_D[-1]).clamp_min(1e-30).sqrt()
    # phi~ = [1, W' (z - mu)] as a matrix times phi = [1, z]
    map_QJ = torch.zeros(rank + 1, total_JJ.shape[0], dtype=torch.float64)
    map_QJ[0, 0] = 1.0
    map_QJ[1:, 0], map_QJ[1:, 1:] = -whiten_DR.T @ mean_D, whiten_DR.T
    gram_EQQ = map_QJ @ sums.gram_EJJ @ map_QJ.T
    penalty_Q = torch.full((rank + 1,), float(ridge * weight / num), dtype=torch.float64)
    penalty_Q[0] *= INTERCEPT_SHARE
    solved_EQH = torch.linalg.solve(gram_EQQ + penalty_Q.diag(), map_QJ @ sums.cross_EJH)
    return LinearFit(
        center_D=sums.origin_D + mean_D,
        low_D=sums.origin_D + sums.low_D,
        high_D=sums.origin_D + sums.high_D,
        whiten_DR=whiten_DR,
        mean_EH=solved_EQH[:, 0],
        slope_ERH=solved_EQH[:, 1:],
    )


def explained(fit: LinearFit, sums: LinearSums) -> float:
    """The share of the dropped outputs' squares that a fit explains (R2 about 0), on sums that it was not made of.

    1 - sum w^2 |f - m - A z~|^2 / sum w^2 |f|^2; NaN where nothing was dropped. The clamp of the logits is not in it.
    """
    if not sums.square > 0:
        return float("nan")
    slope_EJH = torch.cat(
        (fit.mean_EH.unsqueeze(1), torch.einsum("dr,erh->edh", fit.whiten_DR, fit.slope_ERH)), 1
    )
    slope_EJH[:, 0] -= torch.einsum("d,edh->eh", fit.center_D - sums.origin_D, slope_EJH[:, 1:])
    linear = (slope_EJH * sums.cross_EJH).sum()
    quadratic = torch.einsum("ejh,ejk,ekh->", slope_EJH, sums.gram_EJJ, slope_EJH)
    return float((2.0 * linear - quadratic) / sums.square)
