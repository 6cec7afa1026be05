"""Null distributions of the statistic, estimated from binned counts, and the thresholds they imply.

Shape legend: L routed layers, E experts, B bins, G grid points.

A null is an object with ``p_values(statistic) -> float64``, non-increasing in the statistic. Every estimator
gives one: the empirical tail and the kernel density estimate are piecewise linear on a grid (`GridNull`), the
normal is closed-form (`NormalNull`). `smallest_passing` turns a null and critical values into thresholds that
say exactly what the p-values say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import CalibrationError, InvalidParameterError, MissingDependencyError

Estimator = Literal["empirical", "kde", "normal"]
ESTIMATORS = ("empirical", "kde", "normal")
KERNELS = {"gaussian": "gaussian", "epanechnikov": "epa", "tophat": "box", "triangular": "tri"}
BANDWIDTHS = ("silverman", "isj")

# Bins are [b / 64, (b + 1) / 64) for integers b: fixed edges, so that counts of any two calibrations add up.
# A power of two, so that the values a bfloat16 router can take above 2 lie on edges.
BINS_PER_UNIT = 64
MAX_ABS = 64  # statistics beyond +-64 are counted in the outermost bins
FIRST_BIN, LAST_BIN = -MAX_ABS * BINS_PER_UNIT, MAX_ABS * BINS_PER_UNIT - 1


def bin_index(statistic: Tensor) -> Tensor:
    """The bin each value falls into, int32, clipped to the outermost bins."""
    return (statistic * BINS_PER_UNIT).floor_().clamp_(FIRST_BIN, LAST_BIN).to(torch.int32)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of a base statistic per layer and expert on the fixed bins.

    Attributes
    ----------
    start : int
        Index of the first bin that is stored; bin ``start + b`` covers [(start + b) / 64, (start + b + 1) / 64).
    counts_LEB : Tensor
        int64 [L, E, B].
    """

    start: int
    counts_LEB: Tensor

    @property
    def edges(self) -> np.ndarray:
        """Bin edges, float64 [B + 1]."""
        num = self.counts_LEB.shape[-1]
        return np.arange(self.start, self.start + num + 1, dtype=np.float64) / BINS_PER_UNIT

    def trimmed_to_use(self) -> Histogram:
        """The same counts without the empty bins at either end (one bin stays if all are empty)."""
        used = self.counts_LEB.sum((0, 1)).nonzero().flatten()
        if not len(used):
            return Histogram(self.start, self.counts_LEB[..., :1].clone())
        first, last = int(used[0]), int(used[-1])
        return Histogram(self.start + first, self.counts_LEB[..., first : last + 1].clone())

    def __add__(self, other: Histogram) -> Histogram:
        """Exact sum of the counts, over the union of the two ranges."""
        start = min(self.start, other.start)
        stop = max(h.start + h.counts_LEB.shape[-1] for h in (self, other))
        total = torch.zeros(*self.counts_LEB.shape[:2], stop - start, dtype=torch.int64)
        for h in (self, other):
            first = h.start - start
            total[..., first : first + h.counts_LEB.shape[-1]] += h.counts_LEB
        return Histogram(start, total)


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


# ---------------------------------------------------------------------------------------------------------
# From counts to nulls
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PooledCounts:
    """Null samples of the statistic on one uniform grid.

    Attributes
    ----------
    edges_G : ndarray
        float64 [G + 1], uniform.
    counts_G : ndarray
        float64 [G] (integers where nothing had to be shifted off the bins).
    num : int
        How many samples.
    """

    edges_G: np.ndarray
    counts_G: np.ndarray
    num: int

    @property
    def width(self) -> float:
        """Width of a grid cell."""
        return float(self.edges_G[1] - self.edges_G[0])

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation (ddof = 1), each sample at its bin's centre."""
        centres = (self.edges_G[1:] + self.edges_G[:-1]) / 2
        mean = float((self.counts_G * centres).sum() / self.num)
        variance = float((self.counts_G * (centres - mean) ** 2).sum() / max(1, self.num - 1))
        return mean, math.sqrt(variance)

    def quantile(self, share: float) -> float:
        """The value below which this share of the samples lies, linear inside a bin."""
        below = np.concatenate(([0.0], self.counts_G.cumsum()))
        return float(np.interp(share * below[-1], below, self.edges_G))


def pool_counts(histogram: Histogram, scale_LE: Tensor, offset_LE: Tensor, layer: int | None) -> PooledCounts:
    """Counts of s = scale * x + offset over the experts of one layer, or of all (``layer=None``).

    Each expert's bins are mapped by its own scale and offset. Where every map is the identity the counts are
    the integers that were collected; else each count is spread evenly over its own bin's image and collected
    on a common grid of the same width.
    """
    rows = slice(None) if layer is None else slice(layer, layer + 1)
    counts_RB = histogram.counts_LEB[rows].flatten(0, 1).numpy()
    scale_R = scale_LE[rows].flatten().double().numpy()
    offset_R = offset_LE[rows].flatten().double().numpy()
    num = int(counts_RB.sum())
    edges = histogram.edges
    if np.all(scale_R == 1.0) and np.all(offset_R == 0.0):
        grid, counts_G = edges, counts_RB.sum(0).astype(np.float64)
    else:
        width = 1.0 / BINS_PER_UNIT
        first = math.floor(float((edges[0] * scale_R + offset_R).min()) / width) - 1
        last = math.ceil(float((edges[-1] * scale_R + offset_R).max()) / width) + 1
        grid = np.arange(first, last + 1, dtype=np.float64) * width
        below = np.zeros_like(grid)
        for counts_B, scale, offset in zip(counts_RB, scale_R, offset_R, strict=True):
            if counts_B.any():
                cumulative = np.concatenate(([0.0], counts_B.cumsum()))
                below += np.interp(grid, edges * scale + offset, cumulative)
        counts_G = np.diff(below)
    # Empty bins at the ends are no part of the null: where its samples end, its tail begins.
    used = counts_G.nonzero()[0]
    if not len(used):
        return PooledCounts(grid, counts_G, num)
    return PooledCounts(grid[used[0] : used[-1] + 2], counts_G[used[0] : used[-1] + 1], num)


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

    The density is convolved on the binned counts (KDEpy's ``FFTKDE``) and summed from the right; the +1 is the
    empirical estimator's: beyond the samples a density says nothing that n samples could support.

    Parameters
    ----------
    kernel : {"gaussian", "epanechnikov", "tophat", "triangular"}
    bandwidth : {"silverman", "isj"} or float
        The kernel's standard deviation; computed from the counts and the true n (`silverman_bandwidth`,
        `isj_bandwidth`) and handed to KDEpy as a number, because its own rules ignore weights or take the
        number of bins for n.

    Raises
    ------
    MissingDependencyError
        Without KDEpy (the extra ``kde``).
    """
    if kernel not in KERNELS:
        raise InvalidParameterError(f"unknown kernel {kernel!r}; expected one of {', '.join(KERNELS)}.")
    try:
        from KDEpy import FFTKDE
    except ImportError:
        raise MissingDependencyError(
            "estimator='kde' needs KDEpy, which is not installed; pip install 'bh-routing[kde]', or use "
            "estimator='empirical'."
        ) from None
    width = pooled.width
    size = resolve_bandwidth(pooled, bandwidth)
    pad = 2 + math.ceil(
        12.0 * size / width
    )  # every kernel here ends (or is below 1e-30) within 12 of its std
    num = len(pooled.counts_G)
    grid = pooled.edges_G[0] + (np.arange(-pad, num + pad) + 0.5) * width
    used = pooled.counts_G > 0
    kde = FFTKDE(kernel=KERNELS[kernel], bw=size).fit(grid[pad:-pad][used], weights=pooled.counts_G[used])
    density = np.maximum(kde.evaluate(grid), 0.0)
    edges = pooled.edges_G[0] + np.arange(-pad, num + pad + 1) * width
    return _tail(edges, density * (pooled.num / density.sum()), pooled.num)


def resolve_bandwidth(pooled: PooledCounts, bandwidth: str | float) -> float:
    """A bandwidth as a number, from a rule's name or a number."""
    if isinstance(bandwidth, (int, float)) and not isinstance(bandwidth, bool):
        if not 0.0 < bandwidth < math.inf:
            raise InvalidParameterError(f"bandwidth must be above 0, got {bandwidth!r}.")
        return float(bandwidth)
    if bandwidth == "silverman":
        return silverman_bandwidth(pooled)
    if bandwidth == "isj":
        return isj_bandwidth(pooled)
    raise InvalidParameterError(
        f"unknown bandwidth {bandwidth!r}; expected one of {', '.join(BANDWIDTHS)}, or a number above 0."
    )


def silverman_bandwidth(pooled: PooledCounts) -> float:
    """min(std, IQR / 1.349) (3n / 4)^(-1/5) from the counts, with n the number of samples.

    Silverman 1986, eq. 3.28 with the robust spread of eq. 3.30. A width of zero (all samples in one bin)
    becomes the width of a bin.
    """
    iqr = (pooled.quantile(0.75) - pooled.quantile(0.25)) / 1.3489795003921634
    spread = min(pooled.moments()[1], iqr)
    return (spread if spread > 0.0 else pooled.width) * (0.75 * pooled.num) ** -0.2


def isj_bandwidth(pooled: PooledCounts) -> float:
    """Improved Sheather-Jones from the counts, with n the number of samples.

    Botev, Grotowski & Kroese 2010, algorithm 1: the root of t = xi gamma^[5](t) in terms of the cosine
    transform of the counts; the bandwidth is sqrt(t) times the length of the (padded) grid.

    Raises
    ------
    CalibrationError
        If the fixed point has no root (too few or degenerate samples).
    """
    from scipy.fft import dct
    from scipy.optimize import brentq

    num_bins = len(pooled.counts_G)
    pad = num_bins // 2 + 1
    share = np.pad(pooled.counts_G / pooled.counts_G.sum(), pad)
    a2 = dct(share, type=2)[1:] ** 2
    k2 = np.arange(1, len(share), dtype=np.float64) ** 2
    length = len(share) * pooled.width

    def norm_of_derivative(order: int, t: float) -> float:
        with np.errstate(under="ignore"):
            return 0.5 * math.pi ** (2 * order) * float((k2**order * a2 * np.exp(-k2 * math.pi**2 * t)).sum())

    def excess(t: float) -> float:
        f = norm_of_derivative(7, t)
        for s in range(6, 1, -1):
            odd = math.prod(range(1, 2 * s, 2)) / math.sqrt(2 * math.pi)
            time = (2 * (1 + 0.5 ** (s + 0.5)) / 3 * odd / (pooled.num * f)) ** (2 / (3 + 2 * s))
            f = norm_of_derivative(s, time)
        return t - (2 * pooled.num * math.sqrt(math.pi) * f) ** (-2 / 5)

    upper = 1e-6
    while upper < 1.0:
        try:
            root = brentq(excess, 0.0, upper, xtol=1e-16)
        except (ValueError, ZeroDivisionError, OverflowError):
            upper *= 2.0
            continue
        if root > 0.0:
            return math.sqrt(root) * length
        upper *= 2.0
    raise CalibrationError(
        "the Improved Sheather-Jones rule found no bandwidth for these samples; use bandwidth='silverman' "
        "or a number."
    )


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

    Raises `InvalidParameterError` for an unknown estimator.
    """
    if pooled.num < 1:
        raise CalibrationError("there are no null samples to estimate a distribution from.")
    if estimator == "normal":
        return normal_null(pooled)
    if estimator in ("empirical", "kde"):
        null = (
            empirical_null(pooled)
            if estimator == "empirical"
            else kde_null(pooled, kernel=kernel, bandwidth=bandwidth)
        )
        return with_exponential_tail(null, pooled) if extended else null
    raise InvalidParameterError(f"unknown estimator {estimator!r}; expected one of {', '.join(ESTIMATORS)}.")


# ---------------------------------------------------------------------------------------------------------
# From nulls to thresholds
# ---------------------------------------------------------------------------------------------------------

_SIGN = 0x7FFFFFFF


def _from_order(order: Tensor) -> Tensor:
    """float32 from its rank among all float32: the integers in [-2^31, 2^31) in the numbers' own order."""
    bits = torch.where(order >= 0, order, (-order - 1) ^ ~_SIGN)
    return bits.to(torch.int32).view(torch.float32)


def smallest_passing(null: Null, critical_E: Tensor) -> Tensor:
    """For each critical value c the smallest float32 s with p(s) <= c, float32 [E]; +inf if there is none.

    p is evaluated by the null itself, in float64, so that ``s >= t`` says what ``p(s) <= c`` says, for every
    finite float32 s: a bisection over the float32 numbers in their order, not an inversion of p.
    """
    critical_E = critical_E.to(torch.float64)
    largest = torch.finfo(torch.float32).max
    top = int(torch.tensor(largest).view(torch.int32))
    low_E = torch.full(critical_E.shape, -top - 2, dtype=torch.int64)  # one below the smallest finite number
    high_E = torch.full_like(low_E, top)
    none_E = null.p_values(torch.full(critical_E.shape, largest)) > critical_E
    while bool((high_E - low_E > 1).any()):
        middle_E = torch.maximum((low_E + high_E).div(2, rounding_mode="floor"), low_E + 1)
        passes_E = null.p_values(_from_order(middle_E)) <= critical_E
        high_E = torch.where(passes_E, middle_E, high_E)
        low_E = torch.where(passes_E, low_E, middle_E)
    # Zero has two representations; -0.0 >= 0.0 holds, so either stands for both.
    return torch.where(none_E, torch.inf, _from_order(high_E))
