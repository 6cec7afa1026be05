"""Null distributions against raw samples, scipy and KDEpy; thresholds against p-values, exactly."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bh_routing._words import Estimator
from bh_routing.decision.table import smallest_passing
from bh_routing.errors import CalibrationError, InvalidParameterError
from bh_routing.stats.histogram import BINS_PER_UNIT, Histogram, PooledCounts, bin_index, pool_counts
from bh_routing.stats.kde import KERNELS, silverman_bandwidth
from bh_routing.stats.nulls import GridNull, empirical_null, fit_null, kde_null

N = 20_000


def histogram_of(samples_LEN: np.ndarray) -> Histogram:
    """Counts of raw samples [L, E, N] on the fixed bins."""
    bins = bin_index(torch.from_numpy(samples_LEN.astype(np.float32))).numpy()
    start, num = int(bins.min()), int(bins.max() - bins.min()) + 1
    counts = np.stack([[np.bincount(row - start, minlength=num) for row in layer] for layer in bins])
    return Histogram(start, torch.from_numpy(counts))


def pooled(samples: np.ndarray) -> PooledCounts:
    histogram = histogram_of(samples[None, None])
    return pool_counts(histogram, torch.zeros(1, 1), None)


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    rng = np.random.default_rng(5)
    mixed = np.where(rng.random(N) < 0.3, rng.normal(-1.0, 0.3, N), rng.normal(-3.5, 0.8, N))
    return mixed.astype(np.float32).astype(np.float64)


def test_counts_of_different_ranges_add_up():
    a = Histogram(-3, torch.tensor([[[1, 2, 3]]]))
    b = Histogram(1, torch.tensor([[[5, 7]]]))
    total = a + b
    assert total.start == -3
    assert total.counts_LEB.tolist() == [[[1, 2, 3, 0, 5, 7]]]
    assert (total.trimmed_to_use().start, total.trimmed_to_use().counts_LEB.tolist()) == (
        -3,
        [[[1, 2, 3, 0, 5, 7]]],
    )


def test_unused_bins_are_cut_off():
    used = Histogram(-3, torch.tensor([[[0, 0, 3, 0]], [[0, 1, 0, 0]]])).trimmed_to_use()
    assert used.start == -2
    assert used.counts_LEB.tolist() == [[[0, 3]], [[1, 0]]]
    assert Histogram(4, torch.zeros(1, 1, 9, dtype=torch.int64)).trimmed_to_use().counts_LEB.numel() == 1


def test_bins_are_closed_on_the_left_and_clipped():
    values = torch.tensor([0.0, 1 / 64, -1e-6, 63.999, 1e9, -1e9, -64.0])
    assert bin_index(values).tolist() == [0, 1, -1, 4095, 4095, -4096, -4096]


def test_empirical_tail_by_hand():
    null = empirical_null(PooledCounts(np.array([0.0, 1.0, 2.0]), np.array([3.0, 1.0]), 4))
    points = torch.tensor([-5.0, 0.0, 0.5, 1.0, 2.0, 9.0])
    # (1 + number at or above) / 5, the number linear inside a bin: 4, 4, 2.5, 1, 0, 0
    assert null.p_values(points).tolist() == pytest.approx([1.0, 1.0, 0.7, 0.4, 0.2, 0.2], abs=1e-15)


def test_empirical_tail_equals_raw_samples(samples):
    null = empirical_null(pooled(samples))
    points = np.arange(-6 * 64, 64) / 64  # on the edges the count is exact
    raw = (1 + (samples[None] >= points[:, None]).sum(1)) / (N + 1)
    np.testing.assert_allclose(null.p_values(torch.from_numpy(points)).numpy(), raw, rtol=0, atol=1e-15)


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_held_out_p_values_are_uniform(estimator):
    rng = np.random.default_rng(11)
    null = fit_null(pooled(rng.normal(-2.0, 0.7, 200_000)), estimator)
    p = null.p_values(torch.from_numpy(rng.normal(-2.0, 0.7, N).astype(np.float32))).numpy()
    # the 1 % point of the one-sample statistic is 1.63 / sqrt(n) = 0.0115; the null's own sampling adds a third
    assert scipy.stats.kstest(p, "uniform").statistic < 0.014


def test_empty_bins_at_the_ends_are_no_part_of_the_null():
    counts = torch.zeros(1, 1, 300, dtype=torch.int64)
    counts[..., 100:103] = torch.tensor([5, 0, 7])
    wide, narrow = Histogram(-200, counts), Histogram(-200, counts).trimmed_to_use()
    for offset in (0.0, 0.3):
        a, b = (pool_counts(h, torch.full((1, 1), offset), None) for h in (wide, narrow))
        np.testing.assert_allclose(a.edges_G, b.edges_G)
        np.testing.assert_allclose(a.counts_G, b.counts_G, atol=1e-12)
        assert (len(a.counts_G), a.num) == (3 if offset == 0.0 else 4, 12)
        assert fit_null(a, extended=True).tail_rate == pytest.approx(fit_null(b, extended=True).tail_rate)


def test_shifted_experts_pool_like_raw_samples():
    rng = np.random.default_rng(3)
    raw = rng.normal(-2.0, 0.6, (2, 3, 4000)).astype(np.float32)
    offset = torch.tensor([[0.1, -0.73, 0.4], [1.3, 0.0, -0.2]])
    shifted = raw + offset.numpy()[..., None]
    for layer, of in ((None, shifted.ravel()), (1, shifted[1].ravel())):
        null = empirical_null(pool_counts(histogram_of(raw), offset, layer))
        points = np.linspace(-5, 1, 50)
        exact = (1 + (of[None] >= points[:, None]).sum(1)) / (len(of) + 1)
        # a count moves at most within its bin: density 0.7 x 1/64
        np.testing.assert_allclose(null.p_values(torch.from_numpy(points)).numpy(), exact, atol=0.01)
        assert null.num == len(of)


def test_silverman_is_that_of_the_raw_samples(samples):
    from KDEpy.bw_selection import silvermans_rule

    # samples sit at bin centres: the spread differs by at most 1/64 / sqrt(12) of 0.8
    assert silverman_bandwidth(pooled(samples)) == pytest.approx(silvermans_rule(samples[:, None]), rel=1e-3)


def test_silverman_uses_the_number_of_samples_not_of_bins(samples):
    few = pooled(samples)
    many = PooledCounts(few.edges_G, few.counts_G * 100, few.num * 100)
    assert silverman_bandwidth(many) == pytest.approx(silverman_bandwidth(few) * 100**-0.2, rel=1e-4)


def test_kde_tail_is_scipys(samples):
    size = 0.15
    null = kde_null(pooled(samples), bandwidth=size)
    exact = scipy.stats.gaussian_kde(samples, bw_method=size / samples.std(ddof=1))
    for point in (-5.0, -3.5, -2.0, -1.0, -0.3):
        tail = (1 + N * exact.integrate_box_1d(point, np.inf)) / (N + 1)
        # binning moves samples by up to 1/128, of which the convolution averages out all but the second order
        assert float(null.p_values(torch.tensor([point]))) == pytest.approx(tail, abs=2e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_have_the_bandwidth_as_standard_deviation(kernel):
    """One sample: the density is the kernel itself."""
    single = PooledCounts(np.array([0.0, 1 / BINS_PER_UNIT]), np.array([1.0e6]), 10**6)
    null = kde_null(single, kernel=kernel, bandwidth=0.5)
    density, x = -np.diff(null.survival_G.numpy()), null.grid_G.numpy()
    centres = (x[1:] + x[:-1]) / 2
    mean = (density * centres).sum() / density.sum()
    assert mean == pytest.approx(1 / 128, abs=1e-6)
    # tophat and triangular end between two grid points: 1/64 of the bandwidth
    spread = np.sqrt((density * (centres - mean) ** 2).sum() / density.sum())
    assert spread == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_far_tails(estimator, samples):
    null = fit_null(pooled(samples), estimator)
    p = null.p_values(torch.tensor([-200.0, 200.0, float("inf"), float("-inf"), float("nan")]))
    assert p[0] == p[3] == p[4] == 1.0
    assert 0.0 < p[1] == p[2] <= 1 / (N + 1) + 1e-15


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_p_values_never_increase(estimator, samples):
    null = fit_null(pooled(samples), estimator)
    edges = np.arange(-7 * 64, 2 * 64) / 64
    near = np.nextafter(edges.astype(np.float32), np.float32(np.inf))
    below = np.nextafter(edges.astype(np.float32), np.float32(-np.inf))
    points = np.sort(np.concatenate((edges.astype(np.float32), near, below, samples.astype(np.float32))))
    p = null.p_values(torch.from_numpy(points))
    assert bool((p[1:] <= p[:-1]).all())
    assert len(p.unique()) > 100


NULLS = {
    e: fit_null(pooled(np.random.default_rng(2).normal(-2.5, 0.8, 3000)), e) for e in get_args(Estimator)
}


@pytest.mark.parametrize("estimator", get_args(Estimator))
@given(
    values=st.lists(st.floats(-8.0, 3.0, width=32), min_size=1, max_size=30),
    critical=st.lists(st.floats(1e-9, 0.999), min_size=1, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_thresholds_say_what_p_values_say(estimator, values, critical):
    null = NULLS[estimator]
    critical_E = torch.tensor(critical, dtype=torch.float64)
    thresholds_E = smallest_passing(null, critical_E)
    finite = thresholds_E[torch.isfinite(thresholds_E)]
    nearby = [t for edge in finite for t in (edge, edge.nextafter(finite.new_tensor(-torch.inf)))]
    s_T1 = torch.stack([torch.tensor(v) for v in values] + nearby).float().unsqueeze(1)
    assert torch.equal(s_T1 >= thresholds_E, null.p_values(s_T1) <= critical_E)


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_critical_values_that_are_attained_exactly(estimator):
    """Ties at the boundary: critical values that are p-values themselves."""
    rng = np.random.default_rng(4)
    null = fit_null(pooled(rng.normal(0.0, 1.0, 500)), estimator)
    s_T = torch.from_numpy(rng.normal(0.5, 1.0, 200).astype(np.float32))
    critical_T = null.p_values(s_T)
    thresholds_T = smallest_passing(null, critical_T)
    assert bool((s_T >= thresholds_T).all())
    assert torch.equal(null.p_values(thresholds_T) <= critical_T, torch.ones(200, dtype=torch.bool))


def test_threshold_is_infinite_where_nothing_passes(samples):
    null = empirical_null(pooled(samples))
    thresholds = smallest_passing(null, torch.tensor([0.5 / N, 1.0 / (N + 1), 1.0], dtype=torch.float64))
    assert thresholds[0] == float("inf")
    assert thresholds[1] == pytest.approx(samples.max(), abs=1 / 64)
    assert thresholds[2] == torch.finfo(torch.float32).min  # p = 1 passes everywhere


def test_grid_null_on_uneven_points():
    null = GridNull(
        torch.tensor([0.0, 1.0, 5.0]).double(), torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64), 0
    )
    assert null.p_values(torch.tensor([0.5, 3.0, 5.0])).tolist() == pytest.approx([0.75, 0.3, 0.1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "spline"}, "estimator must be 'empirical', 'kde' or 'normal', got 'spline'."),
        (
            {"estimator": "kde", "kernel": "cosine"},
            "kernel must be 'gaussian', .* or 'triangular', got 'cosine'.",
        ),
        (
            {"estimator": "kde", "bandwidth": "scott"},
            "bandwidth must be 'silverman', got 'scott'.",
        ),
        ({"estimator": "kde", "bandwidth": 0.0}, "bandwidth must be above 0, got 0.0."),
    ],
)
def test_unknown_names(arguments, message, samples):
    with pytest.raises(InvalidParameterError, match=message):
        fit_null(pooled(samples), **arguments)


def test_nothing_to_estimate_from():
    empty = PooledCounts(np.array([0.0, 1.0]), np.array([0.0]), 0)
    with pytest.raises(
        CalibrationError, match=r"^there are no null samples to estimate a distribution from\.$"
    ):
        fit_null(empty)
    constant = PooledCounts(np.array([0.0, 1.0]), np.array([9.0]), 9)
    with pytest.raises(CalibrationError, match="do not vary, so that no normal distribution fits them"):
        fit_null(constant, "normal")


@pytest.mark.parametrize("estimator", ["empirical", "kde"])
def test_an_exponential_tail_changes_nothing_among_the_samples(samples, estimator):
    counts = pooled(samples)
    plain, extended = fit_null(counts, estimator), fit_null(counts, estimator, extended=True)
    inside = torch.linspace(-8.0, float(plain.grid_G[-1]), 5000, dtype=torch.float64).float()
    inside = inside[inside.double() <= plain.grid_G[-1]]
    assert torch.equal(plain.p_values(inside), extended.p_values(inside))


def test_the_exponential_tail_has_the_rate_of_the_largest_samples():
    rate = 3.0
    values = np.random.default_rng(2).exponential(1.0 / rate, 200_000) - 5.0
    counts = pooled(values)
    null = fit_null(counts, extended=True)
    # 2000 samples beyond the quantile: the mean excess has a standard error of 2.2 %; three of them
    assert null.tail_rate == pytest.approx(rate, rel=0.07)
    last = float(null.grid_G[-1])
    far = torch.tensor([last + 1.0, last + 2.0])
    p = null.p_values(far)
    assert float(p[1] / p[0]) == pytest.approx(np.exp(-null.tail_rate), rel=1e-5)
    assert float(p[0]) < 1.0 / (counts.num + 1)
    critical = torch.tensor([1e-12, 1e-9, 1e-6, 1e-3], dtype=torch.float64)
    thresholds = smallest_passing(null, critical)
    assert torch.isfinite(thresholds).all()
    below = torch.nextafter(thresholds, torch.tensor(-np.inf))
    assert bool((null.p_values(thresholds) <= critical).all())
    assert bool((null.p_values(below) > critical).all())


def test_the_exponential_tail_never_increases(samples):
    null = fit_null(pooled(samples), extended=True)
    steps = torch.arange(200_000, dtype=torch.float64) * 2.0**-18
    s = (float(null.grid_G[-1]) + steps).float()
    assert bool((null.p_values(s).diff() <= 0).all())
    assert float(null.p_values(torch.tensor([1e30]))) > 0.0
