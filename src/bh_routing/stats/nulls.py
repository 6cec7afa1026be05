"""Null distributions of the statistic, estimated from binned counts, and the thresholds they imply.

Shape legend: L routed layers, E experts, B bins, G grid points.

A null is an object with ``p_values(statistic) -> float64``, non-increasing in the statistic. Every estimator
gives one: the empirical tail and the kernel density estimate are piecewise linear on a grid (`GridNull`), the
normal is closed-form (`NormalNull`). `smallest_passing` turns a null and critical values into thresholds that
say exactly what the p-values say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .._words import Estimator, check_word
from ..errors import CalibrationError
from .histogram import PooledCounts
from .kde import smoothed_counts


class Null(Protocol):
    """What every null distribution offers."""

    @property
    def num(self) -> int:
        """How many samples it was estimated from."""

    def p_values(self, statistic: Tensor) -> Tensor:
        """P(null >= statistic), float64, of the statistic's shape; NaN counts as p = 1."""


@dataclass(frozen=True, eq=False)
class GridNull:
    """A null whose p-value is linear between grid points, and constant (or `tail_rate`) beyond them.

    Attributes
    ----------
    grid_G : Tensor
        float64, strictly increasing.
    survival_G : Tensor
        float64, non-increasing, in (0, 1]: the p-value at each grid point.
    num : int
        How many null samples it was estimated from (0: unknown).
    tail_rate : float
        Beyond the last grid point p falls as exp(-rate * distance); 0 keeps it constant.
    """

    grid_G: Tensor
    survival_G: Tensor
    num: int
    tail_rate: float = 0.0

    def p_values(self, statistic: Tensor) -> Tensor:
        """p-values in float64; exactly non-increasing in the statistic."""
        grid_G, survival_G = self.grid_G.to(statistic.device), self.survival_G.to(statistic.device)
        s = statistic.to(torch.float64).clamp(grid_G[0], grid_G[-1]).contiguous()
        cell = (torch.searchsorted(grid_G, s, right=True) - 1).clamp(0, grid_G.numel() - 2)
        left, right = survival_G[cell], survival_G[cell + 1]
        share = (s - grid_G[cell]) / (grid_G[cell + 1] - grid_G[cell])
        # Rounding must not carry the value past either end of the cell, or p would not be monotone.
        p = torch.minimum(left, torch.maximum(right, left + share * (right - left)))
        if self.tail_rate:
            # Distances in steps of 2^-20, far above the rounding of exp, which so cannot make p increase.
            beyond = ((statistic.to(torch.float64) - grid_G[-1]) * 2.0**20).floor().clamp_min(0.0) / 2.0**20
            p = (p * torch.exp(-self.tail_rate * beyond)).clamp_min(torch.finfo(torch.float64).tiny)
        return p.where(~torch.isnan(statistic), 1.0)


@dataclass(frozen=True, eq=False)
class NormalNull:
    """The normal distribution with the null samples' mean and standard deviation.

    Unlike the other estimators it extrapolates: p-values far below 1 / (number of samples) occur.
    """

    mean: float
    std: float
    num: int

    def p_values(self, statistic: Tensor) -> Tensor:
        """P(N(mean, std) >= s) in float64, at least the smallest positive number.

        z is cut to multiples of 2^-20 and p is 1 below z = -6 (1 - p < 1e-9 there), so that the rounding of
        the normal tail can never make p increase.
        """
        z = (statistic.to(torch.float64) - self.mean) / self.std
        z = (z * 2.0**20).floor() / 2.0**20
        p = torch.special.ndtr(-z).clamp_min(torch.finfo(torch.float64).tiny)
        return torch.where((z < -6.0) | torch.isnan(z), 1.0, p)


def _tail(edges: np.ndarray, counts: np.ndarray, num: int) -> GridNull:
    """(1 + #{null >= s}) / (num + 1) with # linear inside each cell, from counts that sum to num."""
    above = np.concatenate((counts[::-1].cumsum()[::-1], [0.0]))
    survival = (1.0 + np.minimum(above, num)) / (num + 1.0)
    return GridNull(torch.from_numpy(edges.copy()), torch.from_numpy(survival), num)


def empirical_null(pooled: PooledCounts) -> GridNull:
    """(1 + #{null >= s}) / (n + 1), # interpolated linearly inside a bin.

    With the +1 the p-value of an exchangeable draw is valid: P(p <= u) <= u (Phipson & Smyth 2010, eq. 2; here
    up to the bin's width).
    """
    return _tail(pooled.edges_G, pooled.counts_G, pooled.num)


def normal_null(pooled: PooledCounts) -> NormalNull:
    """A normal distribution with the samples' mean and standard deviation."""
    mean, std = pooled.moments()
    if not std > 0.0:
        raise CalibrationError("the null samples do not vary, so that no normal distribution fits them.")
    return NormalNull(mean, std, pooled.num)


def kde_null(
    pooled: PooledCounts, *, kernel: str = "gaussian", bandwidth: str | float = "silverman"
) -> GridNull:
    """The tail of a kernel density estimate, p = (1 + n S(s)) / (n + 1) with S its survival function.

    The density is summed from the right; the +1 is the empirical estimator's: beyond the samples a density says
    nothing that n samples could support.

    Parameters
    ----------
    kernel : {"gaussian", "epanechnikov", "tophat", "triangular"}
    bandwidth : "silverman" or float
        The kernel's standard deviation, or the rule for it (`bh_routing.stats.kde`).

    Raises
    ------
    MissingDependencyError
        Without KDEpy (the extra ``kde``).
    """
    return _tail(*smoothed_counts(pooled, kernel, bandwidth), pooled.num)


def with_exponential_tail(null: GridNull, pooled: PooledCounts, share: float = 0.01) -> GridNull:
    """The same null, falling exponentially beyond its last grid point instead of staying at 1 / (n + 1).

    The rate is 1 / the mean excess of the samples over their (1 - share) quantile: the exponential case of the
    generalised Pareto tail that Knijnenburg et al. (2009) fit to a permutation null. Nothing below 1 / (n + 1)
    is supported by samples; it serves to order statistics beyond all of them, where a budget needs that.
    """
    threshold = pooled.quantile(1.0 - share)
    centres = (pooled.edges_G[1:] + pooled.edges_G[:-1]) / 2
    beyond_G = np.where(centres > threshold, pooled.counts_G, 0.0)
    excess = float((beyond_G * (centres - threshold)).sum() / max(beyond_G.sum(), 1e-300))
    return replace(null, tail_rate=1.0 / max(excess, pooled.width))


def fit_null(
    pooled: PooledCounts,
    estimator: str = "empirical",
    *,
    kernel: str = "gaussian",
    bandwidth: str | float = "silverman",
    extended: bool = False,
) -> GridNull | NormalNull:
    """A null of the named estimator; ``extended`` gives it an exponential tail (the normal null has its own).

    Raises `InvalidParameterError` for an unknown one.
    """
    check_word("estimator", estimator, Estimator)
    if pooled.num < 1:
        raise CalibrationError("there are no null samples to estimate a distribution from.")
    if estimator == "normal":
        return normal_null(pooled)
    if estimator == "kde":
        null = kde_null(pooled, kernel=kernel, bandwidth=bandwidth)
    else:
        null = empirical_null(pooled)
    return with_exponential_tail(null, pooled) if extended else null
