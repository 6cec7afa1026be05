"""The linear compensation's fit: against the definition solved pair by pair, and against a truth that is linear."""

from __future__ import annotations

import pytest
import torch

from bh_routing.calibration.linear_fit import LinearSums, explained, fit_linear

T, E, K, H = 3000, 8, 4, 5


def tokens(seed: int, tokens: int = T, slope: float = 1.0):
    """Logits, the experts' outputs (linear in the logits, and noise), the router's choice and what was dropped."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.Generator().manual_seed(99)
    mean_EH = torch.randn(E, H, generator=truth)
    slope_EDH = slope * torch.randn(E, E, H, generator=truth) / 3
    logits_TD = torch.randn(tokens, E, generator=g) * torch.linspace(0.5, 3.0, E) + 2.0
    weights_TK, experts_TK = logits_TD.softmax(-1).topk(K, -1)
    outputs_TEH = mean_EH + torch.einsum("td,edh->teh", logits_TD, slope_EDH)
    outputs_TEH = outputs_TEH + 0.1 * torch.randn(tokens, E, H, generator=g)
    outputs_TKH = outputs_TEH.gather(1, experts_TK.unsqueeze(-1).expand(-1, -1, H))
    dropped_TK = torch.rand(tokens, K, generator=g) < 0.6
    return logits_TD, outputs_TKH, experts_TK, weights_TK, dropped_TK


def sums_of(*batches) -> LinearSums:
    sums = LinearSums(E, torch.full((E,), 2.0), H)
    for batch in batches:
        sums.update(*batch)
    return sums


def test_fit_is_the_penalised_least_squares_of_the_definition():
    batch = tokens(0)
    logits_TD, outputs_TKH, experts_TK, weights_TK, dropped_TK = batch
    rank = 5
    fit = fit_linear(sums_of(batch), rank)

    token_P, slot_P = dropped_TK.nonzero().unbind(1)
    z_PD, w_P = logits_TD[token_P].double(), weights_TK[token_P, slot_P].double()
    e_P, f_PH = experts_TK[token_P, slot_P], outputs_TKH[token_P, slot_P].double()
    total = w_P.square().sum()
    mu_D = (w_P.square().unsqueeze(1) * z_PD).sum(0) / total
    covariance = ((z_PD - mu_D) * w_P.square().unsqueeze(1)).T @ (z_PD - mu_D) / total
    values, vectors = torch.linalg.eigh(covariance)
    whiten_DR = vectors[:, -rank:].flip(1) / values[-rank:].flip(0).sqrt()
    torch.testing.assert_close(fit.center_D, mu_D, atol=1e-6, rtol=1e-6)  # a batch is summed in float32
    torch.testing.assert_close(fit.whiten_DR.abs(), whiten_DR.abs(), atol=1e-4, rtol=1e-4)  # the sign is free
    lam = 5e-3 * total / E
    for expert in range(E):
        mine_P = e_P == expert
        phi = torch.cat((torch.ones(int(mine_P.sum()), 1), (z_PD[mine_P] - mu_D) @ fit.whiten_DR), 1)
        rows = torch.cat(
            (w_P[mine_P].unsqueeze(1) * phi, torch.diag(torch.tensor([lam / 1000] + [lam] * rank).sqrt()))
        )
        target = torch.cat((w_P[mine_P].unsqueeze(1) * f_PH[mine_P], torch.zeros(rank + 1, H)))
        solved = torch.linalg.lstsq(rows, target).solution
        torch.testing.assert_close(fit.mean_EH[expert], solved[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(fit.slope_ERH[expert], solved[1:], atol=1e-3, rtol=1e-3)


def test_a_linear_truth_is_found_and_held_out_r2_says_so():
    fitted, held = sums_of(tokens(0, 20_000)), sums_of(tokens(1))
    shares = [explained(fit_linear(fitted, rank), held) for rank in (0, 2, 4, 8)]
    assert shares == sorted(shares)
    assert shares[-1] > 0.99  # the noise is 0.1 of outputs that are several in size
    assert shares[0] < 0.9


def test_explained_is_what_the_residuals_say():
    fit, batch = fit_linear(sums_of(tokens(0)), 3), tokens(1)
    logits_TD, outputs_TKH, experts_TK, weights_TK, dropped_TK = batch
    z_TR = (logits_TD.double() - fit.center_D) @ fit.whiten_DR
    guess_TKH = fit.mean_EH[experts_TK] + torch.einsum("tr,tkrh->tkh", z_TR, fit.slope_ERH[experts_TK])
    w_TK1 = weights_TK.masked_fill(~dropped_TK, 0.0).double().unsqueeze(-1)
    left = (w_TK1 * (outputs_TKH - guess_TKH)).square().sum()
    expected = 1 - left / (w_TK1 * outputs_TKH).square().sum()
    assert explained(fit, sums_of(batch)) == pytest.approx(float(expected), abs=1e-5)


def test_sums_add_up_over_batches_and_processes():
    first, second = tokens(0, 700), tokens(1, 500)
    both = sums_of(first, second)
    added = sums_of(first).added([sums_of(second).parts()])
    for a, b in zip(both.parts(), added.parts(), strict=True):
        torch.testing.assert_close(a, b)


def test_masked_logits_count_as_the_mean_and_nothing_is_read_of_what_was_kept():
    batch = list(tokens(0, 400))
    batch[1] = batch[1].masked_fill(~batch[4].unsqueeze(-1), torch.nan)  # outputs of kept pairs
    batch[0] = batch[0].clone()
    batch[0][:, 0] = -torch.inf
    fit = fit_linear(sums_of(tuple(batch)), E)
    assert all(bool(torch.isfinite(x).all()) for x in (fit.mean_EH, fit.slope_ERH, fit.whiten_DR, fit.low_D))
    assert fit.center_D[0] == 2.0


def test_nothing_dropped():
    batch = list(tokens(0, 50))
    batch[4] = torch.zeros_like(batch[4])
    fit = fit_linear(sums_of(tuple(batch)), E)
    assert fit.rank == 0
    assert not fit.mean_EH.any()
