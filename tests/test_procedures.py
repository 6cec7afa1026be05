"""Procedures against statsmodels, scipy, published numbers and their own definitions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import fdrcorrection_twostage, multipletests

from bh_routing.errors import InvalidParameterError
from bh_routing.stats.procedures import PROCEDURES, get_procedure

STATSMODELS = {
    "bh": "fdr_bh",
    "by": "fdr_by",
    "bonferroni": "bonferroni",
    "holm": "holm",
    "hochberg": "simes-hochberg",
}
# Benjamini & Hochberg 1995, section 3.2: the fifteen p-values of Neuhaus et al. 1992, in order.
NEUHAUS = [
    0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
    0.7590, 1.0,
]  # fmt: skip


def counts(p_TE, alpha, procedure) -> list[int]:
    sorted_TE = torch.as_tensor(np.asarray(p_TE, dtype=np.float64)).sort(-1).values
    return get_procedure(procedure).rejection_counts(sorted_TE, alpha).tolist()


def draws(seed: int, tokens: int, experts: int) -> np.ndarray:
    """p-values with signals, ties and exact zeros and ones."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(size=(tokens, experts))
    p = np.where(rng.random(p.shape) < 0.3, p**8, p)
    p = np.where(rng.random(p.shape) < 0.2, np.round(p, 2), p)
    return p


@pytest.mark.parametrize(
    ("procedure", "expected"),
    [("bh", 4), ("bonferroni", 3), ("holm", 3), ("hochberg", 3), ("by", 3)],
)
def test_published_example(procedure, expected):
    """BH rejects four at 0.05, Bonferroni three (Benjamini & Hochberg 1995, p. 296)."""
    assert counts([NEUHAUS], 0.05, procedure) == [expected]


@pytest.mark.parametrize("experts", [1, 2, 8, 64])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2, 0.8])
@pytest.mark.parametrize("procedure", STATSMODELS)
def test_equal_to_statsmodels(procedure, alpha, experts):
    p_TE = draws(1, 3 if procedure == "holm" else 40, experts)  # statsmodels' Holm takes 0.2 s a call
    expected = [int(multipletests(p, alpha, method=STATSMODELS[procedure])[0].sum()) for p in p_TE]
    # statsmodels compares Bonferroni and Holm on p * E and rounds differently at exact boundaries; no draw is on one
    assert counts(p_TE, alpha, procedure) == expected
    if experts > 1 and procedure != "holm":
        assert max(expected) > 0


@pytest.mark.parametrize("method", ["bh", "by"])
def test_equal_to_scipy_within_rounding(method):
    p_TE = draws(2, 300, 64)
    adjusted_TE = scipy.stats.false_discovery_control(p_TE, axis=-1, method=method)
    for alpha in (0.03, 0.3):
        for count, adjusted_E in zip(counts(p_TE, alpha, method), adjusted_TE, strict=True):
            assert (adjusted_E <= alpha - 1e-12).sum() <= count <= (adjusted_E <= alpha + 1e-12).sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("procedure", "method"),
    [("bh", "fdr_bh"), ("by", "fdr_by"), ("hochberg", "simes-hochberg"), ("bonferroni", "bonferroni")],
)
def test_a_hundred_thousand_rows(procedure, method):
    """Against statsmodels row by row, and scipy where it has the procedure."""
    p_TE = draws(3, 100_000, 32)
    found = counts(p_TE, 0.1, procedure)
    assert found == [int(multipletests(p_E, 0.1, method=method)[0].sum()) for p_E in p_TE]
    if procedure in ("bh", "by"):
        adjusted_TE = scipy.stats.false_discovery_control(p_TE, axis=-1, method=procedure)
        assert bool(((adjusted_TE <= 0.1 - 1e-12).sum(-1) <= found).all())
        assert bool((found <= (adjusted_TE <= 0.1 + 1e-12).sum(-1)).all())


def by_definition(procedure: str, sorted_TE: np.ndarray, alpha: float) -> np.ndarray:
    """Numbers of rejections in plain numpy, [T]: Holm's first p above alpha / (E - k + 1); Storey's BH at alpha / pi0;
    all p-values up to the one of the highest score (Donoho and Jin)."""
    num, rank_E = sorted_TE.shape[1], np.arange(1, sorted_TE.shape[1] + 1)
    if procedure == "holm":
        return np.cumprod(sorted_TE <= alpha / (num - rank_E + 1), axis=-1).sum(-1)
    if procedure == "higher_criticism":
        spread_TE = np.sqrt(np.maximum(sorted_TE * (1 - sorted_TE), np.finfo(float).tiny))
        score_TE = np.sqrt(num) * (rank_E / num - sorted_TE) / spread_TE
        score_TE[(rank_E > max(1.0, alpha * num)) | (sorted_TE < 1 / num)] = 0.0
        best_T1 = np.take_along_axis(sorted_TE, score_TE.argmax(-1)[:, None], -1)
        found_T1 = (score_TE > 0).any(-1, keepdims=True)
        return np.where(found_T1, sorted_TE <= best_T1, sorted_TE < 1 / num).sum(-1)
    pi0_T1 = ((sorted_TE > 0.5).sum(-1, keepdims=True) + 1) / (0.5 * num)
    passing_TE = (sorted_TE <= alpha / pi0_T1 * rank_E / num) & (sorted_TE <= 0.5)
    return np.where(passing_TE, rank_E, 0).max(-1)


@pytest.mark.slow
@pytest.mark.parametrize("procedure", ["holm", "storey", "higher_criticism"])
def test_a_hundred_thousand_rows_by_definition(procedure):
    """Of those that no library computes for many rows: Holm also as statsmodels does it, which takes 0.2 s a row."""
    p_TE = draws(3, 100_000, 32)
    found = np.array(counts(p_TE, 0.1, procedure))
    assert np.array_equal(found, by_definition(procedure, np.sort(p_TE, axis=-1), 0.1))
    assert len(set(found)) > 3
    if procedure == "holm":
        rows = [int(np.flatnonzero(found == n)[0]) for n in sorted(set(found))[:20]]
        assert [int(multipletests(p_TE[i], 0.1, method="holm")[0].sum()) for i in rows] == list(found[rows])


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_storey_by_its_definition(alpha):
    """BH at alpha / pi0, pi0 = (#{p > 1/2} + 1) / (E / 2), rejecting nothing above 1/2."""
    p_TE = draws(3, 200, 32)
    expected = []
    for p in p_TE:
        pi0 = ((p > 0.5).sum() + 1) / (0.5 * p.size)
        passing = np.flatnonzero((np.sort(p) <= alpha / pi0 * np.arange(1, 33) / 32) & (np.sort(p) <= 0.5))
        expected.append(int(passing[-1]) + 1 if len(passing) else 0)
    assert counts(p_TE, alpha, "storey") == expected
    assert len(set(expected)) > 5


def test_storey_agrees_with_another_adaptive_procedure_on_average():
    """The two-stage procedure of Benjamini, Krieger & Yekutieli estimates the same share of nulls."""
    p_TE = draws(4, 60, 64)
    theirs = [int(fdrcorrection_twostage(p, 0.1)[0].sum()) for p in p_TE]
    assert np.mean(counts(p_TE, 0.1, "storey")) == pytest.approx(np.mean(theirs), rel=0.15)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_higher_criticism_by_a_loop(alpha):
    p_TE = draws(5, 200, 32)
    expected = []
    for p in np.sort(p_TE, axis=-1):
        best, score = None, 0.0
        for i, value in enumerate(p, start=1):
            if i <= max(1.0, alpha * 32) and value >= 1 / 32:
                spread = np.sqrt(max(value * (1 - value), np.finfo(float).tiny))
                this = np.sqrt(32) * (i / 32 - value) / spread
                if this > score:
                    best, score = value, this
        expected.append(int((p <= best).sum()) if best is not None else int((p < 1 / 32).sum()))
    assert counts(p_TE, alpha, "higher_criticism") == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("procedure", ["bh", "by", "bonferroni", "holm", "hochberg", "storey"])
@given(
    p=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20),
    levels=st.tuples(st.floats(0.001, 0.999), st.floats(0.001, 0.999)),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_monotone_and_equivariant(procedure, p, levels, seed):
    low, high = sorted(levels)
    assert counts([p], low, procedure) <= counts([p], high, procedure)
    smaller = [value / 2 for value in p]
    assert counts([p], low, procedure) <= counts([smaller], low, procedure)
    shuffled = np.random.default_rng(seed).permutation(p)
    assert counts([p], low, procedure) == counts([shuffled], low, procedure)


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.4])
def test_procedures_are_ordered_by_strictness(alpha):
    p_TE = draws(6, 300, 64)
    held = {name: np.array(counts(p_TE, alpha, name)) for name in STATSMODELS}
    assert (held["bonferroni"] <= held["holm"]).all()
    assert (held["holm"] <= held["hochberg"]).all()
    assert (held["hochberg"] <= held["bh"]).all()
    assert (held["by"] <= held["bh"]).all()
    assert (held["holm"] < held["bh"]).any()


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_extremes(procedure):
    assert counts([[1.0] * 16], 0.1, procedure) == [0]
    assert counts([[0.0] * 16], 0.1, procedure) == [16]
    assert counts(np.zeros((0, 16)), 0.1, procedure) == []


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_every_procedure_states_its_guarantee_and_source(procedure):
    entry = PROCEDURES[procedure]
    assert entry.name == procedure
    assert len(entry.guarantee) > 20
    assert any(character.isdigit() for character in entry.source)


def test_exact_boundaries_are_rejected():
    """p_(i) = alpha i / E as float64 computes it."""
    alpha, experts = 0.05, 10
    boundary = (torch.arange(1, experts + 1, dtype=torch.float64) * alpha / experts).tolist()
    assert counts([boundary], alpha, "bh") == [experts]
    above = [np.nextafter(value, 1.0) for value in boundary]
    assert counts([above], alpha, "bh") == [0]


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan"), True, "0.05"])
def test_levels_out_of_range(alpha):
    with pytest.raises(InvalidParameterError, match="alpha must be a number strictly between 0 and 1, got"):
        counts([[0.5]], alpha, "bh")


def test_unknown_procedure():
    with pytest.raises(
        InvalidParameterError, match="unknown procedure 'simes'; expected one of bh, by, bonferroni"
    ):
        get_procedure("simes")
