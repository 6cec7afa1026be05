"""How large a mean loss may be, from a sample of it: p-values and upper confidence bounds that hold for every sample size.

Losses are independent draws from one distribution on [0, 1]; nothing else is assumed of it. (A loss that was clipped at c
is divided by c.) What is tested is H: "the mean is above the level", or at it; a small p-value says that it is not.

Shape legend: N losses of a sample, in the order in which they were drawn; ... any number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .._words import Bound, check_word
from ..errors import InvalidInputError, InvalidParameterError

Array = np.ndarray[Any, np.dtype[np.float64]]


def binomial_cdf(most: int, trials: int, share: float) -> float:
    """P(Bin(trials, share) <= most), 0 < share < 1.

    Examples
    --------
    >>> round(binomial_cdf(1, 3, 0.5), 9)
    0.5
    """
    if most >= trials:
        return 1.0
    if most < 0:
        return 0.0
    k = np.arange(most + 1)
    log_factorial = np.concatenate(([0.0], np.log(np.arange(1.0, trials + 1.0)).cumsum()))
    ways = log_factorial[trials] - log_factorial[k] - log_factorial[trials - k]
    logs = ways + k * math.log(share) + (trials - k) * math.log1p(-share)
    top = logs.max()
    return min(1.0, float(math.exp(top) * np.exp(logs - top).sum()))


def hoeffding_bentkus(losses_N: Array, level: float, delta: float = 0.05) -> float:
    """The p-value of Hoeffding and Bentkus: of the mean alone, whatever the losses' spread.

    With r the sample's mean and a the level: min(exp(-N h(min(r, a), a)), e P(Bin(N, a) <= ceil(N r))), where
    h(x, y) = x log(x / y) + (1 - x) log((1 - x) / (1 - y)). Bates, Angelopoulos, Lei, Malik and Jordan 2021, "Distribution-
    free, risk-controlling prediction sets", section 3.1.2; Angelopoulos et al. 2021, "Learn then test", proposition 4.

    Parameters
    ----------
    losses_N : ndarray
        Float64 in [0, 1].
    level : float
        Above 0 and below 1.
    delta : float
        Not used: this p-value is the same at every confidence.

    Examples
    --------
    >>> round(hoeffding_bentkus(np.zeros(30), 0.1), 4)  # 0.9 ** 30
    0.0424
    """
    num, mean = len(losses_N), float(losses_N.mean())
    low = min(mean, level)
    hoeffding = math.exp(-num * (_xlog(low, level) + _xlog(1.0 - low, 1.0 - level)))
    # A mean of k / N that is a rounding above it must not count as k + 1.
    bentkus = math.e * binomial_cdf(math.ceil(num * mean - 1e-9), num, level)
    return min(1.0, hoeffding, bentkus)


def _xlog(x: float, y: float) -> float:
    return x * math.log(x / y) if x > 0.0 else 0.0


def log_capital(losses: Array, level: Any, delta: float) -> Array:
    """The log of what a gambler has after each loss [..., N], who starts with 1 and bets that the mean is below the level.

    Before the i-th loss he stakes b_i of it, after what he saw before: b_i = min(1, sqrt(2 log(1 / delta) / (N v_{i-1}))), with
    v_i = (1/4 + sum_{j<=i} (x_j - m_j)^2) / (i + 1) and m_i = (1/2 + sum_{j<=i} x_j) / (i + 1); then his capital is
    multiplied by 1 - b_i (x_i - level), which is never negative. Waudby-Smith and Ramdas 2024, "Estimating means of bounded
    random variables by betting", equation (15), as Bates et al. 2021, proposition 5, use it on one side.

    Parameters
    ----------
    losses : ndarray
        Float64 in [0, 1], [..., N].
    level : float or ndarray
        [...], above 0.
    delta : float
        The confidence is 1 - delta; the stakes are made for it, the bound holds for any.
    """
    num = losses.shape[-1]
    seen_N = np.arange(2.0, num + 2.0)
    means = (0.5 + losses.cumsum(-1)) / seen_N
    spreads = (0.25 + np.square(losses - means).cumsum(-1)) / seen_N
    before = np.concatenate((np.full((*losses.shape[:-1], 1), 0.25), spreads[..., :-1]), axis=-1)
    stakes = np.minimum(1.0, np.sqrt(2.0 * math.log(1.0 / delta) / (num * before)))
    logs: Array = np.log1p(-stakes * (losses - np.asarray(level)[..., None])).cumsum(-1)
    return logs


def betting(losses_N: Array, level: float, delta: float = 0.05) -> float:
    """The p-value of betting, 1 over the largest capital that was ever reached (`log_capital`): it follows the spread.

    Under H the capital is a non-negative supermartingale from 1, which ever reaches 1 / p with probability at most p
    (Ville's inequality). Losses that differ little from one another, as those of documents do, make it far smaller than
    `hoeffding_bentkus` is.

    Examples
    --------
    >>> round(betting(np.zeros(30), 0.1), 4)
    0.0579
    """
    return min(1.0, math.exp(-max(0.0, float(log_capital(losses_N, level, delta).max()))))


P_VALUES: dict[Bound, Callable[[Array, float, float], float]] = {
    "betting": betting,
    "hoeffding-bentkus": hoeffding_bentkus,
}


def p_value(losses_N: Any, level: float, *, delta: float = 0.05, bound: Bound = "betting") -> float:
    """How surprising these losses would be if their mean were above the level.

    Parameters
    ----------
    losses_N : array of float
        In [0, 1], at least one.
    level : float
        At 1 and above it the hypothesis cannot hold: 0. At 0 and below it, it must: 1.
    delta : float
        Above 0, below 1: the confidence is 1 - delta.
    bound : {"betting", "hoeffding-bentkus"}

    Raises
    ------
    InvalidInputError, InvalidParameterError
        For losses or a delta out of range.
    """
    losses = _checked(losses_N, delta, bound)
    if not 0.0 < level < 1.0:
        return 1.0 if level <= 0.0 else 0.0
    return P_VALUES[bound](losses, level, delta)


def upper_bound(losses_N: Any, *, delta: float = 0.05, bound: Bound = "betting") -> float:
    """The smallest level that is rejected at delta: the mean is at most this, with probability 1 - delta over the sample.

    Parameters are those of `p_value`, which falls with the level; found by halving, to 1e-9, from above.

    Examples
    --------
    >>> round(upper_bound([0.01, 0.02, 0.015] * 40), 4)
    0.0407
    """
    losses = _checked(losses_N, delta, bound)
    low, high = float(losses.mean()), 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if P_VALUES[bound](losses, middle, delta) <= delta else (middle, high)
    return high


def _checked(losses_N: Any, delta: float, bound: Bound) -> Array:
    check_word("bound", bound, Bound)
    losses = np.asarray(losses_N, dtype=np.float64)
    if losses.ndim != 1 or not len(losses) or not ((losses >= 0.0) & (losses <= 1.0)).all():
        raise InvalidInputError(
            f"expected losses from 0 to 1, at least one, got an array of shape {losses.shape}"
            + (f" with values from {losses.min():g} to {losses.max():g}." if losses.size else ".")
        )
    if not 0.0 < delta < 1.0:
        raise InvalidParameterError(f"delta must be above 0 and below 1, got {delta!r}.")
    return losses


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact p-value, two-sided, that two answerers of the same questions are equally often right (McNemar 1947).

    Parameters
    ----------
    only_first, only_second : int
        Questions that only one of them got right. Under H each of these is a toss of a coin; the others say nothing.

    Examples
    --------
    >>> round(mcnemar(2, 8), 9)
    0.109375
    """
    fewer, all_of_them = min(only_first, only_second), only_first + only_second
    return min(1.0, 2.0 * binomial_cdf(fewer, all_of_them, 0.5))
