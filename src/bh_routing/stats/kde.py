"""Kernel density estimates on binned counts: kernels, bandwidth rules, and the smoothed counts. Needs the extra ``kde``.

Shape legend: G grid cells.
"""

from __future__ import annotations

import math

import numpy as np

from .._lazy import needed
from .._words import check_word
from ..errors import InvalidParameterError
from .histogram import PooledCounts

KERNELS = {"gaussian": "gaussian", "epanechnikov": "epa", "tophat": "box", "triangular": "tri"}


BANDWIDTHS = ("silverman",)


def smoothed_counts(
    pooled: PooledCounts, kernel: str, bandwidth: str | float
) -> tuple[np.ndarray, np.ndarray]:
    """Edges [G + 1] and counts [G] of the kernel density estimate, summing to the number of samples.

    The density is convolved on the binned counts by KDEpy's ``FFTKDE``. The bandwidth is computed here, from the
    counts and the true n, and handed to KDEpy as a number, because its own rules ignore weights or take the number
    of bins for n. Parameters and errors as in `bh_routing.stats.nulls.kde_null`.
    """
    check_word("kernel", kernel, KERNELS)
    kdepy = needed("KDEpy", "estimator='kde'", "kde", ", or use estimator='empirical'")
    width = pooled.width
    size = resolve_bandwidth(pooled, bandwidth)
    # every kernel here ends (or is below 1e-30) within 12 of its std
    pad = 2 + math.ceil(12.0 * size / width)
    num = len(pooled.counts_G)
    grid = pooled.edges_G[0] + (np.arange(-pad, num + pad) + 0.5) * width
    used = pooled.counts_G > 0
    kde = kdepy.FFTKDE(kernel=KERNELS[kernel], bw=size).fit(
        grid[pad:-pad][used], weights=pooled.counts_G[used]
    )
    density = np.maximum(kde.evaluate(grid), 0.0)
    edges = pooled.edges_G[0] + np.arange(-pad, num + pad + 1) * width
    return edges, density * (pooled.num / density.sum())


def resolve_bandwidth(pooled: PooledCounts, bandwidth: str | float) -> float:
    """A bandwidth as a number, from a rule's name or a number."""
    if isinstance(bandwidth, (int, float)) and not isinstance(bandwidth, bool):
        if not 0.0 < bandwidth < math.inf:
            raise InvalidParameterError(f"bandwidth must be above 0, got {bandwidth!r}.")
        return float(bandwidth)
    check_word("bandwidth", bandwidth, BANDWIDTHS)
    return silverman_bandwidth(pooled)


def silverman_bandwidth(pooled: PooledCounts) -> float:
    """min(std, IQR / 1.349) (3n / 4)^(-1/5) from the counts, with n the number of samples.

    Silverman 1986, eq. 3.28 with the robust spread of eq. 3.30. A width of zero (all samples in one bin)
    becomes the width of a bin.
    """
    iqr = (pooled.quantile(0.75) - pooled.quantile(0.25)) / 1.3489795003921634
    spread = min(pooled.moments()[1], iqr)
    return float((spread if spread > 0.0 else pooled.width) * (0.75 * pooled.num) ** -0.2)
