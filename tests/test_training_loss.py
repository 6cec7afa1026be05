"""`bh_routing.training`: the losses against their definitions, and what they do to a model."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from bh_routing import BHRoutingIntegration, RoutingIntegration, TopKPolicy
from bh_routing.calibration.passes import calibrate
from bh_routing.decision.select import rank_by_table
from bh_routing.decision.types import Limits
from bh_routing.errors import InvalidInputError, InvalidParameterError, InvalidTypeError, PatchError
from bh_routing.training import AdaptiveRoutingLoss, expected_experts, load_balancing_loss, router_z_loss

DOCUMENTS = torch.randint(3, 256, (120, 64), generator=torch.Generator().manual_seed(1)).tolist()
INF = float("inf")


@pytest.fixture
def model(tiny_olmoe):
    return tiny_olmoe().train()


@pytest.fixture
def calibration(model):
    return calibrate(model, None, DOCUMENTS, progress=False)


@pytest.fixture
def ids():
    return torch.randint(3, 256, (6, 40), generator=torch.Generator().manual_seed(2))


def adaptive(model, calibration, experts=3.0, **options):
    return BHRoutingIntegration(model, calibration=calibration, experts_per_token=experts, **options)


def run(model, ids):
    return model(input_ids=ids, use_cache=False)


def test_the_losses_load_no_trainer():
    code = (
        "import sys, bh_routing.training; assert 'torch' not in sys.modules; "
        "from bh_routing.training import AdaptiveRoutingLoss, finetune; "
        "assert not {'transformers.trainer', 'accelerate', 'peft'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


# -------------------------------------------------------------------------------------------- load balancing


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("layers", "experts", "k"), [(1, 8, 2), (3, 16, 4), (4, 64, 8), (2, 5, 5)])
def test_with_k_experts_for_every_token_it_is_the_loss_of_transformers(layers, experts, k, masked):
    logits = tuple(2 * torch.randn(60, experts, requires_grad=True) for _ in range(layers))
    mask = (torch.rand(4, 15) < 0.7).long() if masked else None
    chosen = [x.topk(k, -1).indices for x in logits]
    ours = load_balancing_loss(logits, chosen, top_k=k, mask_T=mask)
    theirs = load_balancing_loss_func(logits, experts, k, mask)
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)  # at most an ulp: another order of two sums
    one, other = (torch.autograd.grad(x, logits) for x in (ours, theirs))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_it_is_the_definition_for_a_variable_number():
    logits_TE = torch.randn(7, 4)
    experts_TK = torch.tensor([[0, 1, 2], [0, 4, 4], [3, 4, 4], [0, 1, 4], [0, -1, -1], [2, 3, 4], [1, 0, 3]])
    load = [sum(int(e == i) for row in experts_TK.tolist() for e in row) for i in range(4)]
    probability = logits_TE.softmax(-1).mean(0)
    expected = 4 * sum(3 * n / sum(load) * float(p) for n, p in zip(load, probability, strict=True))
    assert float(load_balancing_loss([logits_TE], [experts_TK], top_k=3)) == pytest.approx(expected, rel=1e-6)


def test_uniform_is_k_whatever_runs():
    flat = torch.zeros(8, 8)
    one = torch.arange(8).unsqueeze(1)
    assert float(load_balancing_loss([flat], [one], top_k=4)) == 4.0
    assert float(load_balancing_loss([flat], [torch.cat((one, 8 + one), 1)], top_k=4)) == 4.0


def test_scope_layer_does_not_let_layers_make_up_for_each_other():
    logits = [torch.tensor([[4.0, 0.0]]).repeat(6, 1), torch.tensor([[0.0, 4.0]]).repeat(6, 1)]
    experts = [torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1, dtype=torch.int64)]
    assert float(load_balancing_loss(logits, experts, top_k=1)) == pytest.approx(1.0)
    assert float(load_balancing_loss(logits, experts, top_k=1, scope="layer")) > 1.9
    with pytest.raises(InvalidParameterError, match="scope must be 'model' or 'layer', got 'both'"):
        load_balancing_loss(logits, experts, top_k=1, scope="both")
    with pytest.raises(InvalidInputError, match="of the same layers, at least one, got 2 and 1"):
        load_balancing_loss(logits, experts[:1], top_k=1)


def test_z_loss_is_its_definition():
    logits = [torch.randn(5, 6), torch.randn(5, 6)]
    mask = torch.tensor([1, 1, 0, 1, 0])
    expected = torch.stack([x[mask.bool()].logsumexp(-1).square().mean() for x in logits]).mean()
    torch.testing.assert_close(router_z_loss(logits, mask_T=mask), expected)


def test_what_does_not_count_may_be_nan():
    logits_TE = torch.randn(4, 6, requires_grad=True)
    broken_TE = torch.where(torch.tensor([[0], [1], [0], [0]]).bool(), float("nan"), logits_TE)
    experts = logits_TE.topk(2, -1).indices
    mask = torch.tensor([1, 0, 1, 1])
    for x in (logits_TE, broken_TE):
        total = load_balancing_loss([x], [experts], top_k=2, mask_T=mask) + router_z_loss([x], mask_T=mask)
        (gradient,) = torch.autograd.grad(total, logits_TE)
        assert torch.isfinite(gradient).all()
        assert (gradient[1] == 0).all()


# ------------------------------------------------------------------------------------------ the relaxation


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(["step_up", "step_down"]),
    clamp=st.sampled_from(["after", "inside"]),
    min_k=st.integers(1, 3),
    max_k=st.sampled_from([None, 3, 4]),
    holes=st.booleans(),
)
def test_towards_temperature_0_it_is_the_count_of_the_decision(seed, rule, clamp, min_k, max_k, holes):
    generator = torch.Generator().manual_seed(seed)
    statistic_TK = torch.randn(20, 6, generator=generator)
    thresholds_E = torch.randn(9, generator=generator).sort().values
    if holes:
        thresholds_E[:2], thresholds_E[5:] = -INF, INF
    options = {"rule": rule, "clamp": clamp, "min_k": min_k, "max_k": max_k}
    limits = Limits(min_k, max_k, clamp)
    exact = rank_by_table(statistic_TK, thresholds_E, rule=rule, limits=limits).counts_T.float()
    relaxed = expected_experts(statistic_TK, thresholds_E, temperature=1e-6, **options)
    near = (statistic_TK.unsqueeze(-1) - thresholds_E).abs().min() < 1e-4  # sigmoid(100) is 1 in float32
    if not near:
        torch.testing.assert_close(relaxed, exact, rtol=0, atol=1e-5)
    assert (relaxed <= (max_k or 6) + 1e-5).all()
    assert (relaxed >= min_k - 1e-5).all()


@pytest.mark.parametrize("rule", ["step_up", "step_down"])
def test_gradcheck_of_the_relaxation(rule):
    statistic_TK = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    thresholds_E = torch.randn(6, dtype=torch.float64).sort().values
    thresholds_E[-1] = INF
    assert torch.autograd.gradcheck(
        lambda s: expected_experts(s, thresholds_E, temperature=0.7, rule=rule), statistic_TK
    )


def test_the_relaxation_grows_with_the_statistic():
    statistic_TK = torch.randn(30, 6, requires_grad=True)
    expected = expected_experts(statistic_TK, torch.linspace(-1, 1, 6), temperature=0.3)
    (gradient,) = torch.autograd.grad(expected.sum(), statistic_TK)
    assert (gradient >= 0).all()
    assert gradient.sum() > 1


# ------------------------------------------------------------------------------------- the loss of a model


def test_parts_are_what_the_routers_did(model, calibration, ids):
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    seen = []
    with adaptive(model, calibration) as integrator:
        loss = AdaptiveRoutingLoss(integrator)
        integrator.watchers.append(lambda router, context, decision, logits: seen.append((logits, decision)))
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        total = loss.auxiliary()
        mean = integrator.telemetry.mean_experts_per_token
    logits, decisions = zip(*seen, strict=True)
    experts = [d.experts_TK for d in decisions]
    torch.testing.assert_close(
        loss.parts["balance"], load_balancing_loss(logits, experts, top_k=6, mask_T=mask), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(loss.parts["z"], router_z_loss(logits, mask_T=mask), rtol=1e-5, atol=0)
    assert float(loss.parts["experts_per_token"]) == pytest.approx(mean, rel=1e-6)
    assert float(loss.parts["budget"]) == pytest.approx((mean / 3 - 1) ** 2, rel=1e-4)
    parts = {name: float(value) for name, value in loss.parts.items()}
    expected = 0.01 * parts["balance"] + 0.001 * parts["z"] + 0.1 * parts["budget"]
    assert total.item() == pytest.approx(expected, rel=1e-6)


def test_of_the_unpatched_choice_it_is_the_auxiliary_loss_of_olmoe(model, ids):
    expected = model(input_ids=ids, output_router_logits=True).aux_loss
    with RoutingIntegration(model, TopKPolicy()) as integrator:
        loss = AdaptiveRoutingLoss(integrator, balance=1.0, z=0.0, budget=0.0)
        run(model, ids)
        torch.testing.assert_close(loss.auxiliary(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("target", "sign"), [(2.0, -1), (5.0, 1)])
@pytest.mark.parametrize("per_layer", [False, True])
def test_the_budget_term_moves_the_mean_count_towards_its_target(
    model, calibration, ids, target, sign, per_layer
):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate.weight" in name)
    wanted = dict.fromkeys(calibration.paths, target) if per_layer else target
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    means = []
    with adaptive(model, calibration, experts=3.5) as integrator:
        loss = AdaptiveRoutingLoss(integrator, balance=0.0, z=0.0, budget=1.0, experts_per_token=wanted)
        for _ in range(12):
            run(model, ids)
            loss.auxiliary().backward()
            means.append(float(loss.parts["experts_per_token"]))
            optimiser.step()
            optimiser.zero_grad()
    assert sign * (means[-1] - means[0]) > 0.3, means
    assert abs(means[-1] - target) < abs(means[0] - target)


def test_at_its_target_the_budget_term_has_no_gradient(model, calibration, ids):
    with adaptive(model, calibration) as integrator:
        run(model, ids)
        mean = integrator.telemetry.mean_experts_per_token
        loss = AdaptiveRoutingLoss(integrator, balance=0.0, z=0.0, budget=1.0, experts_per_token=mean)
        run(model, ids)
        loss.auxiliary().backward()
    assert float(loss.parts["budget"]) < 1e-12
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() < 1e-6


def test_with_labels_it_is_the_loss_of_the_trainer(model, calibration, ids):
    labels = ids.clone()
    labels[:, :7] = -100
    items = int((labels[:, 1:] != -100).sum())
    with adaptive(model, calibration) as integrator:
        loss = AdaptiveRoutingLoss(integrator)
        whole = loss(model(input_ids=ids, labels=labels, use_cache=False))
        auxiliary = whole.item() - float(loss.parts["task"])
        given = loss(run(model, ids), labels)
        assert given.item() == pytest.approx(whole.item(), rel=1e-6)
        half = loss(run(model, ids), labels, num_items_in_batch=2 * items)
    assert half.item() == pytest.approx(whole.item() / 2, rel=1e-5)
    assert auxiliary > 0.05
    with pytest.raises(InvalidParameterError, match="expected outputs with a loss, or outputs with logits"):
        loss({"hidden": ids})


# --------------------------------------------------------------------------------------------- bad input


def test_nothing_was_routed(model, calibration, ids):
    integrator = adaptive(model, calibration)
    loss = AdaptiveRoutingLoss(integrator)
    with pytest.raises(
        PatchError,
        match="expected a forward of the patched model since the last loss, but the model is not patched",
    ):
        loss.auxiliary()
    with integrator:
        with pytest.raises(PatchError, match="but the model was not called; patch it, run it on a batch"):
            loss.auxiliary()
        run(model, ids)
        loss.auxiliary()
        with pytest.raises(PatchError, match="was not called"):
            loss.auxiliary()
        loss.close()
        run(model, ids)
        with pytest.raises(PatchError, match="was not called"):
            loss.auxiliary()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_has_a_value(model, calibration, ids, context):
    with adaptive(model, calibration) as integrator:
        loss = AdaptiveRoutingLoss(integrator)
        run(model, ids)
        expected = loss.auxiliary()
        with context():
            run(model, ids)
            value = loss.auxiliary()
    assert not value.requires_grad
    assert value.item() == expected.item()


def test_a_frozen_router_is_no_error(model, calibration, ids, caplog):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    with caplog.at_level(logging.WARNING, "bh_routing"), adaptive(model, calibration) as integrator:
        loss = AdaptiveRoutingLoss(integrator)
        total = loss(model(input_ids=ids, labels=ids, use_cache=False))
    total.backward()
    assert model.lm_head.weight.grad.abs().max() > 0
    assert model.model.layers[0].mlp.gate.weight.grad is None
    assert not caplog.records


def test_logits_without_their_graph_are_told_once(model, calibration, ids, caplog):
    with caplog.at_level(logging.WARNING, "bh_routing"), adaptive(model, calibration) as integrator:
        loss = AdaptiveRoutingLoss(integrator)
        for _ in range(2):
            with torch.no_grad():
                run(model, ids)
            loss.auxiliary()
    (record,) = caplog.records
    assert "use use_reentrant=False" in record.getMessage()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"experts_per_token": 0.5},
            InvalidParameterError,
            "must lie between min_k=1 and max_k=6 in router model.layers.0",
        ),
        (
            {"experts_per_token": 7},
            InvalidParameterError,
            "must lie between min_k=1 and max_k=6 .* got 7; change the target",
        ),
        (
            {"experts_per_token": {"a": 3}},
            InvalidParameterError,
            "must name every router, got none for model.layers.0",
        ),
        ({"experts_per_token": "3"}, InvalidTypeError, "must be a number of experts, got '3'"),
        (
            {"experts_per_token": 3, "budget": 0},
            InvalidParameterError,
            "is the target of the budget term, got budget=0",
        ),
        ({"balance": -1}, InvalidParameterError, "balance must be a finite number of at least 0, got -1"),
        ({"z": INF}, InvalidParameterError, "z must be a finite number of at least 0, got inf"),
        ({"budget": "much"}, InvalidTypeError, "budget must be a number, got 'much'"),
        ({"temperature": 0}, InvalidParameterError, "temperature must be a finite number above 0, got 0"),
        ({"scope": "batch"}, InvalidParameterError, "scope must be 'model' or 'layer', got 'batch'"),
    ],
)
def test_settings_out_of_range(model, calibration, options, error, sentence):
    integrator = adaptive(model, calibration)
    with pytest.raises(error, match=sentence):
        AdaptiveRoutingLoss(integrator, **options)
    assert not integrator.watchers


def test_a_budget_needs_a_table_and_a_target(model, calibration):
    with pytest.raises(
        InvalidParameterError, match="the budget term needs a decision table, got a policy without one"
    ):
        AdaptiveRoutingLoss(BHRoutingIntegration(model, alpha=0.3))
    AdaptiveRoutingLoss(BHRoutingIntegration(model, alpha=0.3), budget=0)
    with pytest.raises(InvalidParameterError, match="the budget term needs a target"):
        AdaptiveRoutingLoss(BHRoutingIntegration(model, calibration=calibration, alpha=0.3))
    with pytest.raises(
        InvalidTypeError, match="integrator must be a RoutingIntegration, got OlmoeForCausalLM"
    ):
        AdaptiveRoutingLoss(model)


def test_a_copy_of_the_model_is_not_watched(model, calibration, ids):
    with adaptive(model, calibration) as integrator:
        loss = AdaptiveRoutingLoss(integrator)
        run(model, ids)
        assert loss._tape.held
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            loss._tape.held.clear()
            run(other, ids)
            assert not loss._tape.held
        run(model, ids)
        assert loss._tape.held
