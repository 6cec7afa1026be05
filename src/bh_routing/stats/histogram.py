"""Integer counts of the statistic on fixed bins, and their pool over experts and layers.

Shape legend: L routed layers, E experts, B bins, G grid cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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


def pool_counts(histogram: Histogram, offset_LE: Tensor, layer: int | None) -> PooledCounts:
    """Counts of s = x + offset over the experts of one layer, or of all (``layer=None``).

    Each expert's bins are shifted by its own offset. Where every offset is 0 the counts are the integers that
    were collected; else each count is spread evenly over its own shifted bin and collected on a common grid of
    the same width.
    """
    rows = slice(None) if layer is None else slice(layer, layer + 1)
    counts_RB = histogram.counts_LEB[rows].flatten(0, 1).numpy()
    offset_R = offset_LE[rows].flatten().double().numpy()
    num = int(counts_RB.sum())
    edges = histogram.edges
    if np.all(offset_R == 0.0):
        grid, counts_G = edges, counts_RB.sum(0).astype(np.float64)
    else:
        width = 1.0 / BINS_PER_UNIT
        first = math.floor(float(edges[0] + offset_R.min()) / width) - 1
        last = math.ceil(float(edges[-1] + offset_R.max()) / width) + 1
        grid = np.arange(first, last + 1, dtype=np.float64) * width
        below = np.zeros_like(grid)
        for counts_B, offset in zip(counts_RB, offset_R, strict=True):
            if counts_B.any():
                cumulative = np.concatenate(([0.0], counts_B.cumsum()))
                below += np.interp(grid, edges + offset, cumulative)
        counts_G = np.diff(below)
    # Empty bins at the ends are no part of the null: where its samples end, its tail begins.
    used = counts_G.nonzero()[0]
    if not len(used):
        return PooledCounts(grid, counts_G, num)
    return PooledCounts(grid[used[0] : used[-1] + 2], counts_G[used[0] : used[-1] + 1], num)
