"""What stands in for dropped experts: the regressors, the fit, and that it vanishes where nothing is dropped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bh_routing import RoutingIntegration, TopKPolicy
from bh_routing.calibration.moments import Moments
from bh_routing.calibration.passes import calibrate
from bh_routing.decision.compensation import Compensation, lost_and_kept
from bh_routing.decision.types import RoutingDecision

E, K, H = 6, 3, 5


def decision(weights_TK, experts_TK, dropped_TK) -> RoutingDecision:
    return RoutingDecision(
        weights_TK=weights_TK.masked_fill(dropped_TK, 0.0),
        experts_TK=experts_TK.masked_fill(dropped_TK, E),
        counts_T=(~dropped_TK).sum(-1),
        raw_counts_T=(~dropped_TK).sum(-1),
        dropped_TK=dropped_TK,
        own_weights_TK=weights_TK,
        own_experts_TK=experts_TK,
        empty=E,
    )


@pytest.fixture
def routed():
    weights_TK = torch.rand(40, K) + 0.1
    experts_TK = torch.rand(40, E).topk(K, -1).indices
    dropped_TK = torch.rand(40, K) < 0.5
    return weights_TK, experts_TK, dropped_TK


@pytest.mark.parametrize("form", ["mean", "fitted"])
def test_by_a_loop(routed, form):
    weights_TK, experts_TK, dropped_TK = routed
    M, N = torch.randn(2, E, H)
    compensation = Compensation.mean(M, N if form == "fitted" else None)
    expected_TH = torch.zeros(40, H)
    for t in range(40):
        lost = sum(float(weights_TK[t, k]) for k in range(K) if dropped_TK[t, k])
        for k in range(K):
            expert, weight = int(experts_TK[t, k]), weights_TK[t, k]
            if dropped_TK[t, k]:
                expected_TH[t] += weight * M[expert]
            elif form == "fitted":
                expected_TH[t] += weight * lost * N[expert]
    torch.testing.assert_close(compensation.addition(decision(*routed)), expected_TH, rtol=1e-5, atol=1e-5)


def test_nothing_dropped_adds_exactly_nothing(routed):
    weights_TK, experts_TK, dropped_TK = routed
    kept = decision(weights_TK, experts_TK, torch.zeros_like(dropped_TK))
    assert torch.equal(Compensation.mean(*torch.randn(2, E, H)).addition(kept), torch.zeros(40, H))


def test_empty_slots_carry_nothing():
    weights_TK = torch.tensor([[0.5, 0.0]])
    experts_TK = torch.tensor([[2, E]])
    features = lost_and_kept(weights_TK, torch.tensor([[True, True]]), experts_TK, E)
    assert features.tolist() == [[0.0, 0.0, 0.5, 0.0, 0.0, 0.0] + [0.0] * E]


def test_the_fit_finds_what_generated_the_data(routed):
    generator = torch.Generator().manual_seed(3)
    weights_TK = torch.rand(4000, K, generator=generator) + 0.1
    experts_TK = torch.rand(4000, E, generator=generator).topk(K, -1).indices
    dropped_TK = torch.rand(4000, K, generator=generator) < 0.5
    truth = torch.randn(2, E, H, dtype=torch.float64, generator=generator)
    z_TJ = lost_and_kept(weights_TK, dropped_TK, experts_TK, E).double()
    lost_TH = z_TJ @ truth.flatten(0, 1)
    ones = torch.ones(1, E)
    moments = Moments(
        tokens_LE=ones.long(),
        square_LE=ones.double(),
        mean_square_LE=ones.double(),
        mean_LEH=torch.zeros(1, E, H, dtype=torch.float64),
        gram_LJJ=(z_TJ.T @ z_TJ).unsqueeze(0),
        cross_LJH=(z_TJ.T @ lost_TH).unsqueeze(0),
    )
    # the ridge of 2 % draws the coefficients towards the prior (0 here) by about as much
    torch.testing.assert_close(moments.compensation()[0].vectors_JH, truth.flatten(0, 1), rtol=0.1, atol=0.1)
    untouched = replace(moments, gram_LJJ=torch.zeros(1, 2 * E, 2 * E), cross_LJH=torch.zeros(1, 2 * E, H))
    assert torch.allclose(
        untouched.compensation()[0].dropped_EH, moments.mean_LEH[0]
    )  # nothing seen: the prior


def test_sums_add_up(routed):
    weights_TK, experts_TK, dropped_TK = routed
    z_TJ = lost_and_kept(weights_TK, dropped_TK, experts_TK, E).double()
    ones = torch.ones(1, E)
    part = Moments(
        tokens_LE=ones.long(),
        square_LE=ones.double(),
        mean_square_LE=ones.double(),
        mean_LEH=torch.ones(1, E, H, dtype=torch.float64),
        sensitivity_tokens_LE=ones.long(),
        sensitivity_LE=ones.double(),
        gram_LJJ=(z_TJ.T @ z_TJ).unsqueeze(0),
        cross_LJH=(z_TJ.T @ torch.ones(40, H).double()).unsqueeze(0),
    )
    both = part + part
    assert torch.equal(both.gram_LJJ, 2 * part.gram_LJJ)
    torch.testing.assert_close(
        both.compensation()[0].vectors_JH, part.compensation()[0].vectors_JH, rtol=1e-9, atol=1e-9
    )


def test_it_brings_the_layers_output_nearer(tiny_olmoe, token_ids):
    """On the text it was fitted to: no compensation > mean outputs > fit, in squared error of the last hidden state."""
    model = tiny_olmoe()
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(3, 250, (128,), generator=generator).tolist() for _ in range(40)]
    calibration = calibrate(model, None, documents, sensitivity=True, window=128)
    plain = replace(calibration, moments=replace(calibration.moments, gram_LJJ=None, cross_LJH=None))
    ids = torch.tensor(documents[:8])
    with torch.no_grad():
        full = model.model(ids).last_hidden_state
    errors = []
    for held in ({}, plain.compensations(), calibration.compensations()):
        with torch.no_grad(), RoutingIntegration(model, TopKPolicy(2), compensations=held):
            errors.append(float((model.model(ids).last_hidden_state - full).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    with torch.no_grad(), RoutingIntegration(model, TopKPolicy(6), compensations=calibration.compensations()):
        torch.testing.assert_close(model.model(ids).last_hidden_state, full, rtol=1e-5, atol=1e-5)
