"""False discovery rate and power where the truth is known: independent and equicorrelated statistics.

The tolerance is three standard errors of the simulated mean, as measured from the draws themselves.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from statsmodels.stats.multitest import multipletests

from bh_routing.decision.functional import benjamini_hochberg_routing
from bh_routing.stats.procedures import get_procedure

TOKENS, ALPHA, SHIFT = 2000, 0.1, 2.5


def simulate(experts: int, share: float, correlation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One-sided p-values [T, E] and the truth: z = sqrt(rho) shared + sqrt(1 - rho) own (+ 2.5 for a signal)."""
    rng = np.random.default_rng(seed)
    signal = np.zeros((TOKENS, experts), dtype=bool)
    signal[:, : round(share * experts)] = True
    shared = rng.standard_normal((TOKENS, 1)) * np.sqrt(correlation)
    z = shared + rng.standard_normal((TOKENS, experts)) * np.sqrt(1.0 - correlation) + SHIFT * signal
    return scipy.stats.norm.sf(z), signal


def rejected(p_TE: np.ndarray) -> np.ndarray:
    """What the unclamped BH rejects, bool [T, E]."""
    sorted_p, order = torch.from_numpy(p_TE).sort(dim=-1, stable=True)
    counts_T = get_procedure("bh").rejection_counts(sorted_p, ALPHA)
    first = torch.arange(p_TE.shape[-1]) < counts_T.unsqueeze(-1)
    return torch.zeros_like(first).scatter(-1, order, first).numpy()


def false_share(rejected_TE: np.ndarray, signal_TE: np.ndarray) -> tuple[float, float]:
    """Mean false discovery proportion and its standard error."""
    wrong = (rejected_TE & ~signal_TE).sum(-1) / np.maximum(1, rejected_TE.sum(-1))
    return float(wrong.mean()), float(wrong.std(ddof=1) / np.sqrt(len(wrong)))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25])
@pytest.mark.parametrize("experts", [8, 64, 256])
def test_independent_statistics_meet_the_rate_exactly(experts, share):
    """FDR = alpha pi0 under independence (Benjamini & Yekutieli 2001, theorem 5.1 with continuous statistics)."""
    p_TE, signal_TE = simulate(experts, share, 0.0, seed=1)
    rate, error = false_share(rejected(p_TE), signal_TE)
    null_share = 1.0 - signal_TE[0].mean()
    assert abs(rate - ALPHA * null_share) <= 3 * error


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25])
@pytest.mark.parametrize("experts", [8, 64, 256])
@pytest.mark.parametrize("correlation", [0.3, 0.7])
def test_positive_dependence_keeps_the_rate(experts, share, correlation):
    """Equicorrelated normals with rho >= 0 are PRDS (Benjamini & Yekutieli 2001, case 1): FDR <= alpha pi0."""
    p_TE, signal_TE = simulate(experts, share, correlation, seed=2)
    rate, error = false_share(rejected(p_TE), signal_TE)
    assert rate <= ALPHA * (1.0 - signal_TE[0].mean()) + 3 * error
    assert error > 0


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize(("experts", "share"), [(8, 0.25), (64, 0.05), (64, 0.25)])
def test_power_is_statsmodels(experts, share, correlation):
    p_TE, signal_TE = simulate(experts, share, correlation, seed=3)
    ours = rejected(p_TE[:100])
    theirs = np.stack([multipletests(p, ALPHA, method="fdr_bh")[0] for p in p_TE[:100]])
    np.testing.assert_array_equal(ours, theirs)
    assert (ours & signal_TE[:100]).sum() > 0.1 * signal_TE[:100].sum()


def test_the_routing_function_keeps_the_rate():
    """The public function with given p-values and a clamp that cannot bind below (min_k = 1 may)."""
    p_TE, signal_TE = simulate(64, 0.25, 0.0, seed=4)
    _, experts_TK, counts_T = benjamini_hochberg_routing(
        torch.zeros(p_TE.shape), alpha=ALPHA, max_k=64, pvalues=torch.from_numpy(p_TE)
    )
    chosen_TE = np.zeros_like(signal_TE)
    for token, row in enumerate(experts_TK.numpy()):
        chosen_TE[token, row[row >= 0]] = True
    np.testing.assert_array_equal(chosen_TE.sum(-1), counts_T.numpy())
    free_T = rejected(p_TE).sum(-1) > 0  # where min_k = 1 did not bind
    assert free_T.mean() > 0.99
    rate, error = false_share(chosen_TE[free_T], signal_TE[free_T])
    assert abs(rate - ALPHA * 0.75) <= 3 * error
