"""What the experts' outputs are like: sums that add up, and the sizes and the compensation that follow from them.

Shape legend: L routed layers, E experts, H hidden size, J = 2E regressors of the compensation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .._files.tensors import COUNTS, FLOAT32, SIZES
from ..decision.compensation import Compensation
from ..errors import CalibrationError

ENOUGH = 32  # tokens of an expert below which its layer's median counts as the missing ones
RIDGE = 0.02  # of the compensation's fit, relative to the mean square of a dropped weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """What the experts' outputs are like, over the tokens routed to each of them; annotated with what a file may hold.

    Attributes
    ----------
    tokens_LE : Tensor
        int64, how many tokens.
    square_LE : Tensor
        float64, mean of |f(x)|^2.
    mean_square_LE : Tensor
        float64, |mean of f(x)|^2.
    mean_LEH : Tensor or None
        float64 in memory, float32 in the file: mean of f(x), for the compensation.
    sensitivity_tokens_LE, sensitivity_LE : Tensor or None
        int64 and float64: mean of (g . (f(x) - mean))^2, g the gradient of the summed next-token loss with
        respect to the layer's output, and over how many tokens.
    gram_LJJ, cross_LJH : Tensor or None
        For the compensation, of the second pass: sums of z z' and z d' over tokens, with z the 2E regressors
        of `bh_routing.decision.compensation.lost_and_kept` and d what the dropped experts would have added. float64 in
        memory, float32 in the file.
    """

    tokens_LE: Annotated[Tensor, COUNTS]
    square_LE: Annotated[Tensor, SIZES]
    mean_square_LE: Annotated[Tensor, SIZES]
    mean_LEH: Annotated[Tensor | None, FLOAT32]
    sensitivity_tokens_LE: Annotated[Tensor | None, COUNTS] = None
    sensitivity_LE: Annotated[Tensor | None, SIZES] = None
    gram_LJJ: Annotated[Tensor | None, FLOAT32] = None
    cross_LJH: Annotated[Tensor | None, FLOAT32] = None

    def size(self, kind: str) -> Tensor:
        """Typical size c_e per expert, float64 [L, E].

        ``output``: RMS of f(x). ``deviation``: RMS of f(x) - mean. ``sensitivity``: RMS of
        g . (f(x) - mean).

        An expert that fewer than `ENOUGH` tokens were routed to is shrunk towards its layer's median: so many squared
        deviations as are missing count as the median's square. (The deviation of n outputs from their own mean has
        n - 1 degrees of freedom: one output alone says nothing.) With none it is the median. An expert whose outputs
        are all 0 gets it too.
        """
        if kind == "sensitivity":
            assert self.sensitivity_LE is not None
            assert self.sensitivity_tokens_LE is not None
            square_LE, tokens_LE = self.sensitivity_LE, self.sensitivity_tokens_LE
        else:
            square_LE, tokens_LE = self.square_LE, self.tokens_LE
            if kind == "deviation":
                square_LE = (square_LE - self.mean_square_LE).clamp_min(0.0)
        own = 0 if kind == "output" else 1  # degrees of freedom that the mean takes
        known_LE = (tokens_LE > own) & (square_LE > 0)
        size_LE = square_LE.sqrt()
        for size_E, square_E, tokens_E, known_E in zip(size_LE, square_LE, tokens_LE, known_LE, strict=True):
            enough_E = known_E & (tokens_E >= ENOUGH)
            if bool(enough_E.any()):
                usual = float(size_E[enough_E].median())
            elif bool(known_E.any()):  # no expert is known well: all of them together
                pairs_E = tokens_E[known_E]
                usual = float((square_E[known_E] * pairs_E).sum() / (pairs_E - own).sum()) ** 0.5
            else:
                usual = 1.0
            few_E = (tokens_E < ENOUGH) & (tokens_E > 0)
            missing_E = ENOUGH - own - (tokens_E - own).clamp_min(0)
            mixed_E = (square_E * tokens_E + usual**2 * missing_E) / (ENOUGH - own)
            size_E[few_E] = mixed_E[few_E].sqrt()
            size_E[(square_E == 0) | (tokens_E == 0)] = usual
        return size_LE

    def shrunk_means(self) -> Tensor:
        """Mean outputs, float64 [L, E, H]; with fewer tokens than `ENOUGH` shrunk towards the layer's mean, in proportion."""
        assert self.mean_LEH is not None
        tokens_LE1 = self.tokens_LE.unsqueeze(-1).double()
        layer_L1H = (self.mean_LEH * tokens_LE1).sum(1, keepdim=True) / tokens_LE1.sum(
            1, keepdim=True
        ).clamp_min(1.0)
        share_LE1 = (tokens_LE1 / ENOUGH).clamp(max=1.0)
        return torch.where(
            share_LE1 < 1.0, share_LE1 * self.mean_LEH + (1.0 - share_LE1) * layer_L1H, self.mean_LEH
        )

    def compensation(self) -> list[Compensation] | None:
        """What stands in for dropped experts, per layer, float64; None without means.

        The mean output of each expert; after a second pass the least-squares fit of what was dropped:
        argmin sum |d - B'z|^2 + sum_j rho_j |B_j - P_j|^2, with the mean outputs (and 0 for the kept experts) as P,
        and rho_j a small share of the mean square of such regressors.
        """
        if self.mean_LEH is None:
            return None
        if self.gram_LJJ is None or self.cross_LJH is None:
            return [Compensation.mean(mean_EH) for mean_EH in self.shrunk_means()]
        fitted: list[Compensation] = []
        for mean_EH, gram_JJ, cross_JH in zip(
            self.shrunk_means(), self.gram_LJJ, self.cross_LJH, strict=True
        ):
            num = mean_EH.shape[0]
            prior_JH = torch.cat((mean_EH, torch.zeros_like(mean_EH)))
            halves = gram_JJ.diagonal().double().view(2, num).mean(1)
            rho_J = RIDGE * halves.clamp_min(1e-30).repeat_interleave(num)
            solved_JH = torch.linalg.solve(
                gram_JJ.double() + rho_J.diag(), cross_JH.double() + rho_J.unsqueeze(1) * prior_JH
            )
            fitted.append(Compensation.mean(solved_JH[:num], solved_JH[num:]))
        return fitted

    def __add__(self, other: Moments) -> Moments:
        if (self.mean_LEH is None) != (other.mean_LEH is None) or (self.sensitivity_LE is None) != (
            other.sensitivity_LE is None
        ):
            raise CalibrationError(
                "only calibrations that hold the same parts can be merged: expected mean outputs and "
                "sensitivities in both or in neither."
            )
        if self.mean_LEH is None:
            raise CalibrationError(
                "calibrations whose mean outputs were dropped cannot be merged, because the deviation from "
                "the common mean is unknown; merge first, then drop the means."
            )
        tokens_LE = self.tokens_LE + other.tokens_LE
        assert other.mean_LEH is not None
        mean_LEH = _weighted(self.mean_LEH, other.mean_LEH, self.tokens_LE, other.tokens_LE)
        more: dict[str, Any] = {}
        if self.sensitivity_LE is not None:
            assert self.sensitivity_tokens_LE is not None
            assert other.sensitivity_LE is not None
            assert other.sensitivity_tokens_LE is not None
            ours_LE, theirs_LE = self.sensitivity_tokens_LE, other.sensitivity_tokens_LE
            more = {
                "sensitivity_tokens_LE": ours_LE + theirs_LE,
                "sensitivity_LE": _weighted(self.sensitivity_LE, other.sensitivity_LE, ours_LE, theirs_LE),
            }
            if self.gram_LJJ is not None and other.gram_LJJ is not None:
                assert self.cross_LJH is not None
                assert other.cross_LJH is not None
                more["gram_LJJ"] = self.gram_LJJ + other.gram_LJJ
                more["cross_LJH"] = self.cross_LJH + other.cross_LJH
        return Moments(
            tokens_LE=tokens_LE,
            square_LE=_weighted(self.square_LE, other.square_LE, self.tokens_LE, other.tokens_LE),
            mean_square_LE=mean_LEH.square().sum(-1),
            mean_LEH=mean_LEH,
            **more,
        )


def _weighted(a: Tensor, b: Tensor, tokens_a_LE: Tensor, tokens_b_LE: Tensor) -> Tensor:
    """Mean of two means by their numbers of tokens; 0 where there are none."""
    share = tokens_b_LE.double() / (tokens_a_LE + tokens_b_LE).clamp_min(1)
    share = share.reshape(share.shape + (1,) * (a.dim() - share.dim()))
    return a + share * (b - a)
