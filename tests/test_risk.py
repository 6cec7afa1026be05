"""p-values and bounds of a mean loss: values computed in another way, and how often the bounds fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from bh_routing.errors import InvalidInputError, InvalidParameterError
from bh_routing.stats.risk import (
    binomial_cdf,
    hoeffding_bentkus,
    log_capital,
    mcnemar,
    p_value,
    upper_bound,
)

BOUNDS = ("betting", "hoeffding-bentkus")


def draws(kind: str, runs: int, num: int, seed: int = 0) -> tuple[np.ndarray, float]:
    """[runs, num] losses in [0, 1], and their known mean."""
    rng = np.random.default_rng(seed)
    if kind == "beta":  # mean 0.1, a spread like that of documents
        return rng.beta(4.0, 36.0, (runs, num)), 0.1
    if kind == "coin":
        return (rng.random((runs, num)) < 0.06).astype(float), 0.06
    if kind == "rare":  # nearly always small, now and then clipped
        return np.where(rng.random((runs, num)) < 0.02, 1.0, 0.05), 0.02 + 0.98 * 0.05
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("most", "trials", "share"),
    [(0, 5, 0.3), (3, 10, 0.1), (40, 500, 0.07), (-1, 4, 0.5), (4, 4, 0.5), (900, 5000, 0.2)],
)
def test_binomial_tail(most, trials, share):
    assert binomial_cdf(most, trials, share) == pytest.approx(binom.cdf(most, trials, share), rel=1e-9)


@pytest.mark.parametrize("level", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("kind", ["beta", "coin", "rare"])
def test_hoeffding_bentkus_is_the_formula(kind, level):
    losses = draws(kind, 1, 120)[0][0]
    mean = losses.mean()
    low = min(mean, level)
    plain = low * math.log(low / level) + (1 - low) * math.log((1 - low) / (1 - level))
    expected = min(1, math.exp(-120 * plain), math.e * binom.cdf(math.ceil(120 * mean), 120, level))
    assert p_value(losses, level, bound="hoeffding-bentkus") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["beta", "coin", "rare"])
def test_betting_is_a_gambler_in_a_loop(kind):
    losses = draws(kind, 1, 60)[0][0]
    level, delta = 0.17, 0.02
    capital, best, total, squares, variance = 1.0, 1.0, 0.5, 0.25, 0.25
    for i, loss in enumerate(losses, start=1):
        capital *= 1 - min(1.0, math.sqrt(2 * math.log(1 / delta) / (60 * variance))) * (loss - level)
        best = max(best, capital)
        total += loss
        squares += (loss - total / (i + 1)) ** 2
        variance = squares / (i + 1)
    assert p_value(losses, level, delta=delta) == pytest.approx(1 / best, rel=1e-9)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("kind", ["beta", "coin", "rare"])
@pytest.mark.parametrize("num", [30, 200])
def test_a_bound_fails_at_most_as_often_as_it_says(kind, num, bound):
    """10,000 runs. The bound is below the mean exactly where the mean's own p-value is at most delta."""
    runs, delta = 10_000, 0.05
    losses, mean = draws(kind, runs, num, seed=num)
    if bound == "betting":
        fails = log_capital(losses, mean, delta).max(-1) >= math.log(1 / delta)
    else:
        means = np.floor(losses.mean(-1) * 1e4) / 1e4  # downwards: a few more failures, never fewer
        known = {m: hoeffding_bentkus(np.full(num, m), mean) for m in set(means)}
        fails = np.array([known[m] for m in means]) <= delta
    assert fails.mean() <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    for sample, failed in zip(losses[:20], fails[:20], strict=True):
        if bound == "betting":  # the other's means were rounded
            assert (upper_bound(sample, delta=delta, bound=bound) < mean) == failed


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_bound_is_where_the_p_value_meets_delta(bound):
    losses = draws("beta", 1, 100)[0][0]
    found = upper_bound(losses, delta=0.05, bound=bound)
    assert losses.mean() < found < 0.3
    assert p_value(losses, found, bound=bound) <= 0.05 < p_value(losses, found - 1e-6, bound=bound)
    assert upper_bound(losses, delta=0.005, bound=bound) > found


def test_losses_of_little_spread_are_where_betting_is_sharper():
    losses = draws("beta", 1, 100)[0][0]
    loose, sharp = (upper_bound(losses, bound=bound) - losses.mean() for bound in BOUNDS[::-1])
    assert sharp < 0.6 * loose


def test_levels_at_the_ends():
    assert p_value([0.2], 0.0) == 1.0
    assert p_value([0.2], 1.0) == 0.0
    assert upper_bound([1.0, 1.0]) == pytest.approx(1.0)


def test_what_is_no_loss_is_refused():
    with pytest.raises(InvalidInputError, match=r"losses from 0 to 1.*values from -0\.1 to 0\.5"):
        p_value([-0.1, 0.5], 0.3)
    with pytest.raises(InvalidInputError, match=r"at least one"):
        upper_bound([])
    with pytest.raises(InvalidParameterError, match=r"delta must be above 0 and below 1, got 1\.0"):
        upper_bound([0.1], delta=1.0)
    with pytest.raises(InvalidParameterError, match=r"bound must be 'betting' or 'hoeffding-bentkus'"):
        upper_bound([0.1], bound="wsr")


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (2, 9), (40, 22), (0, 6)])
def test_mcnemar(first, second):
    expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
