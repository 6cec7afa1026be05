"""Which differences are real: paired bootstrap over blocks of tokens, and the Pareto front.

Shape legend: J blocks, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import InvalidInputError

BLOCK = 512  # tokens


FEWEST = 10  # blocks: of fewer, draws with replacement are too few different ones for an interval


class Interval(NamedTuple):
    """An estimate and its 95 % interval; NaN at both ends where there were too few blocks for one."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    def to_dict(self) -> dict[str, float | None]:
        """Its three numbers by name, None for an end that is not known."""
        return {name: None if math.isnan(value) else value for name, value in self._asdict().items()}

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0.0 <= self.high


def block_sums(values: Any, size: int = BLOCK) -> list[list[float]]:
    """Sum and number of the values of each run of ``size`` tokens, in order."""
    array = np.asarray(values, dtype=np.float64)
    return [
        [float(array[i : i + size].sum()), int(array[i : i + size].size)] for i in range(0, array.size, size)
    ]


def perplexity_change(
    blocks: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Relative change of perplexity against another routing on the same blocks, exp(mean loss difference) - 1.

    Blocks are drawn with replacement, the same for both (paired); the interval is of percentiles. It says how much
    the figure depends on which text was read, and nothing about other models or seeds.
    """
    ours, theirs = _arrays(blocks), _arrays(base)
    _check_paired(ours, theirs)
    sums_J, counts_J = ours[:, 0] - theirs[:, 0], ours[:, 1]
    return _interval(sums_J, counts_J, resamples, seed, lambda x: np.expm1(x))


def mean_change(
    blocks: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean per token, or its difference from another routing's on the same blocks (paired), with a bootstrap interval.

    Examples
    --------
    >>> mean_change([(3.0, 2), (5.0, 2)], [(1.0, 2), (1.0, 2)]).value
    1.5
    """
    ours = _arrays(blocks)
    theirs = ours * (0.0, 1.0) if base is None else _arrays(base)
    _check_paired(ours, theirs)
    return _interval(ours[:, 0] - theirs[:, 0], ours[:, 1], resamples, seed, lambda x: x)


def perplexity_interval(
    blocks: Sequence[Sequence[float]], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Perplexity with a bootstrap interval over blocks."""
    ours = _arrays(blocks)
    return _interval(ours[:, 0], ours[:, 1], resamples, seed, lambda x: np.exp(np.minimum(x, 700.0)))


def _check_paired(ours: np.ndarray, theirs: np.ndarray) -> None:
    if ours.shape != theirs.shape or not np.array_equal(ours[:, 1], theirs[:, 1]):
        raise InvalidInputError(
            f"only routings of the same tokens can be compared, got {len(ours)} and {len(theirs)} blocks."
        )


def _arrays(blocks: Sequence[Sequence[float]]) -> np.ndarray:
    array = np.asarray(blocks, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 2 or not len(array):
        raise InvalidInputError("blocks must be pairs of a sum and a number of tokens, at least one.")
    return array


def _interval(sums_J: Any, counts_J: Any, resamples: int, seed: int, to_scale: Any) -> Interval:
    num = len(sums_J)
    if num < FEWEST:
        return Interval(float(to_scale(sums_J.sum() / counts_J.sum())), math.nan, math.nan)
    draws_RJ = np.random.default_rng(seed).multinomial(num, np.full(num, 1.0 / num), size=resamples)
    means_R = (draws_RJ @ sums_J) / (draws_RJ @ counts_J)
    low, high = np.percentile(to_scale(means_R), [2.5, 97.5])
    return Interval(float(to_scale(sums_J.sum() / counts_J.sum())), float(low), float(high))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: both coordinates at most as large, and one smaller.

    Examples
    --------
    >>> pareto_front([(8.0, 10.0), (4.0, 11.0), (4.0, 12.0), (6.0, 11.5)])
    [0, 1]
    """
    return [
        i
        for i, (x, y) in enumerate(points)
        if math.isfinite(x)
        and math.isfinite(y)
        and not any(u <= x and v <= y and (u < x or v < y) for j, (u, v) in enumerate(points) if j != i)
    ]
