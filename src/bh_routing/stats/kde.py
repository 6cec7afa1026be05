"""Kernel density estimates on binned counts: kernels, bandwidth rules, and the smoothed counts. Needs the extra ``kde``.

Shape legend: G grid cells.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import CalibrationError, InvalidParameterError, MissingDependencyError
from .histogram import PooledCounts

KERNELS = {"gaussian": "gaussian", "epanechnikov": "epa", "tophat": "box", "triangular": "tri"}


BANDWIDTHS = ("silverman", "isj")


def smoothed_counts(
    pooled: PooledCounts, kernel: str, bandwidth: str | float
) -> tuple[np.ndarray, np.ndarray]:
    """Edges [G + 1] and counts [G] of the kernel density estimate, summing to the number of samples.

    The density is convolved on the binned counts by KDEpy's ``FFTKDE``. The bandwidth is computed here, from the
    counts and the true n, and handed to KDEpy as a number, because its own rules ignore weights or take the number
    of bins for n. Parameters and errors as in `bh_routing.stats.nulls.kde_null`.
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
    # every kernel here ends (or is below 1e-30) within 12 of its std
    pad = 2 + math.ceil(12.0 * size / width)
    num = len(pooled.counts_G)
    grid = pooled.edges_G[0] + (np.arange(-pad, num + pad) + 0.5) * width
    used = pooled.counts_G > 0
    kde = FFTKDE(kernel=KERNELS[kernel], bw=size).fit(grid[pad:-pad][used], weights=pooled.counts_G[used])
    density = np.maximum(kde.evaluate(grid), 0.0)
    edges = pooled.edges_G[0] + np.arange(-pad, num + pad + 1) * width
    return edges, density * (pooled.num / density.sum())


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
