"""The linear compensation of all layers, as a calibration holds it: chosen, shrunk, stacked.

Shape legend: L routed layers, E experts, D router logits of a token, R the largest rank of a layer, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from .._files.tensors import COUNTS, FLOAT32, SHARES, Expected
from ..decision.compensation import Compensation
from .linear_fit import LinearFit, LinearSums, explained, fit_linear
from .moments import ENOUGH

MEMORY_SHARE = 0.03  # of the experts' weights that A may be as large as, in the same dtype; by default no more than that,
SMALLEST_MOST = (
    16  # but a rank of 16 is tried in any model: where experts are tiny it was best at equal arithmetic
)
RIDGES = (1e-3, 5e-3, 2.5e-2)
PAYS = 0.01  # a layer keeps the mean unless the held-out share explained rises by this much over the means'
NEAR = 0.002  # of two ranks so near in that share the smaller is taken


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearMaps:
    """One `LinearFit` per layer, padded with zeros to one rank.

    Attributes
    ----------
    center_LD, low_LD, high_LD, whiten_LDR : Tensor
        float32: mu, the range of the logits, and W.
    mean_LEH : Tensor
        float32: m.
    slope_LERH : Tensor
        bfloat16: A.
    rank_L : Tensor
        int64; 0 where a layer keeps the compensation by fixed vectors.
    r2_L, mean_r2_L : Tensor
        float64: the share of the dropped outputs' squares that this map, and one mean per expert, explain on windows that
        they were not fitted to; 0 where nothing was dropped.
    pairs_LE : Tensor
        int64: the dropped pairs that each expert's map was fitted to.
    expert_numbers_L : Tensor
        int64: how many numbers one expert's weights are. A dropped pair takes R H multiplications in place of so many, and
        A is the same share of the experts' weights.
    """

    center_LD: Annotated[Tensor, FLOAT32]
    low_LD: Annotated[Tensor, FLOAT32]
    high_LD: Annotated[Tensor, FLOAT32]
    whiten_LDR: Annotated[Tensor, FLOAT32]
    mean_LEH: Annotated[Tensor, FLOAT32]
    slope_LERH: Annotated[Tensor, Expected((torch.bfloat16,))]
    rank_L: Annotated[Tensor, COUNTS]
    r2_L: Annotated[Tensor, SHARES]
    mean_r2_L: Annotated[Tensor, SHARES]
    pairs_LE: Annotated[Tensor, COUNTS]
    expert_numbers_L: Annotated[Tensor, COUNTS]

    @classmethod
    def stack(cls, layers: Sequence[ChosenFit], expert_numbers: Sequence[int]) -> LinearMaps:
        """From one choice per layer."""
        rank = max(1, *(one.fit.rank for one in layers))

        def wide(x: Tensor, dim: int) -> Tensor:
            shape = list(x.shape)
            shape[dim] = rank - shape[dim]
            return torch.cat((x, x.new_zeros(shape)), dim)

        fits = [one.fit for one in layers]
        return cls(
            center_LD=torch.stack([fit.center_D for fit in fits]).float(),
            low_LD=torch.stack([fit.low_D for fit in fits]).float(),
            high_LD=torch.stack([fit.high_D for fit in fits]).float(),
            whiten_LDR=torch.stack([wide(fit.whiten_DR, 1) for fit in fits]).float(),
            mean_LEH=torch.stack([fit.mean_EH for fit in fits]).float(),
            slope_LERH=torch.stack([wide(fit.slope_ERH, 1) for fit in fits]).to(torch.bfloat16),
            rank_L=torch.tensor([fit.rank for fit in fits]),
            r2_L=torch.tensor([one.r2 for one in layers], dtype=torch.float64).nan_to_num(0.0).clamp_max(1.0),
            mean_r2_L=torch.tensor([one.mean_r2 for one in layers], dtype=torch.float64)
            .nan_to_num(0.0)
            .clamp_max(1.0),
            pairs_LE=torch.stack([one.pairs_E for one in layers]),
            expert_numbers_L=torch.tensor(list(expert_numbers)),
        )

    def layer(self, index: int) -> LinearFit:
        """The map of one layer at its own rank, as it is stored."""
        rank = int(self.rank_L[index])
        return LinearFit(
            center_D=self.center_LD[index],
            low_D=self.low_LD[index],
            high_D=self.high_LD[index],
            whiten_DR=self.whiten_LDR[index, :, :rank],
            mean_EH=self.mean_LEH[index],
            slope_ERH=self.slope_LERH[index, :, :rank],
        )

    def share(self, index: int) -> float:
        """What a dropped pair costs of an expert, and A takes of the experts' weights in the same dtype; r / (3 I) for an
        expert of three matrices I x H. Infinite where the experts' weights were not to be seen."""
        numbers = int(self.rank_L[index]) * self.mean_LEH.shape[-1]
        return numbers / max(int(self.expert_numbers_L[index]), 1e-300)

    def compensation(self, index: int, scale: float) -> Compensation:
        """What runs in one layer."""
        return Compensation.linear(**vars(self.layer(index)), scale=scale)


@dataclass(frozen=True, eq=False)
class ChosenFit:
    """The map of one layer, and what it and the means alone explain of held-out outputs; pairs it was fitted to."""

    fit: LinearFit
    r2: float
    mean_r2: float
    pairs_E: Tensor


def choose_fit(sums: LinearSums, held_out: LinearSums, rank: int | None, most: int) -> ChosenFit:
    """The ridge and the rank that explain most of what was dropped from other windows.

    Parameters
    ----------
    sums, held_out : LinearSums
        On the CPU; of the windows that it is fitted to, and of others. Where nothing was dropped in the latter, the
        former serve for both.
    rank : int, optional
        Take this rank. Default: the best of 4, 8, 16, ... up to ``most``.
    most : int
        The largest rank that is tried.
    """
    means = fit_linear(sums, 0)
    judge = held_out if held_out.square > 0 else sums
    mean_r2 = explained(means, judge)
    width = sums.origin_D.numel()
    largest = min(width, most if rank is None else rank)
    by_ridge = {ridge: fit_linear(sums, largest, ridge) for ridge in RIDGES}
    scores = {ridge: explained(fit, judge) for ridge, fit in by_ridge.items()}
    ridge = max(RIDGES, key=lambda r: scores[r] if math.isfinite(scores[r]) else -math.inf)
    fit, r2 = by_ridge[ridge], scores[ridge]
    if rank is None:
        for smaller in (2**i for i in range(2, 30) if 2**i < largest):
            candidate = fit_linear(sums, smaller, ridge)
            found = explained(candidate, judge)
            if found >= r2 - NEAR:
                fit, r2 = candidate, found
                break
    if not r2 > mean_r2 + PAYS:
        fit, r2 = means, mean_r2
    return ChosenFit(fit, r2, mean_r2, sums.pairs_E)


def shrunk(chosen: ChosenFit, mean_EH: Tensor) -> ChosenFit:
    """Towards an expert's mean output where it was dropped fewer than `ENOUGH` times, in proportion."""
    share_E = (chosen.pairs_E.double() / ENOUGH).clamp(max=1.0)
    fit, share_E1 = chosen.fit, share_E.unsqueeze(1)
    return replace(
        chosen,
        fit=replace(
            fit,
            mean_EH=torch.where(
                share_E1 < 1.0, share_E1 * fit.mean_EH + (1.0 - share_E1) * mean_EH, fit.mean_EH
            ),
            slope_ERH=share_E.view(-1, 1, 1) * fit.slope_ERH,
        ),
    )


def expert_numbers(experts: nn.Module | None, num_experts: int) -> int:
    """How many numbers one expert's weights are."""
    return 0 if experts is None else sum(p.numel() for p in experts.parameters()) // num_experts


def largest_rank(numbers: int, hidden: int) -> int:
    """The rank up to which A, R x H numbers an expert, is at most 3 % of the expert's own; 16 at least (docs/results.md)."""
    return max(SMALLEST_MOST, int(MEMORY_SHARE * numbers / hidden))
