"""A model patched from its calibration: the pieces together, against plain loops and the general path."""

from __future__ import annotations

import pytest
import torch

from bh_routing import BHRoutingIntegration, RoutingIntegration
from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.passes import calibrate
from bh_routing.errors import BudgetError, CalibrationMismatchError, InvalidParameterError
from bh_routing.policies import PValuePolicy


@pytest.fixture
def model(tiny_olmoe):
    return tiny_olmoe()


@pytest.fixture
def calibration(model):
    documents = torch.randint(3, 256, (160, 64), generator=torch.Generator().manual_seed(1)).tolist()
    return calibrate(model, None, documents, progress=False)


@pytest.fixture
def ids():
    return torch.randint(3, 256, (4, 64), generator=torch.Generator().manual_seed(2))


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("budget", [2.0, 3.0, 4.5])
def test_a_budget_is_met_on_other_text(model, calibration, ids, budget):
    with BHRoutingIntegration(model, calibration=calibration, experts_per_token=budget) as integrator:
        logits_of(model, ids)
        stats = integrator.get_routing_stats()
    # 512 decisions of a spread of about 1.5: three standard errors are 0.2
    assert stats["mean_experts_per_token"] == pytest.approx(budget, abs=0.2)
    assert stats["experts_per_token"] == budget
    assert 0 < stats["alpha"] < 1


def test_a_budget_per_layer(model, calibration, ids):
    budgets = dict(zip(calibration.paths, (2.0, 4.0), strict=True))
    with BHRoutingIntegration(model, calibration=calibration, experts_per_token=budgets) as integrator:
        logits_of(model, ids)
        layers = integrator.telemetry.to_dict()["layers"]
    assert [layer["mean_experts"] for layer in layers] == pytest.approx([2.0, 4.0], abs=0.3)


def test_a_file_is_the_same_as_the_object(model, calibration, ids, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    with BHRoutingIntegration(model, calibration=calibration, experts_per_token=3.0):
        expected = logits_of(model, ids)
    with BHRoutingIntegration(model, calibration=path, experts_per_token=3.0):
        assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("statistic", ["logit", "logprob", "contribution"])
@pytest.mark.parametrize("procedure", ["bh", "by", "holm"])
def test_the_table_routes_exactly_as_p_values_do(model, calibration, ids, statistic, procedure):
    def p_values(logits_TE, context):
        return calibration.p_values(logits_TE, context.path, statistic=statistic)

    table = calibration.policy(alpha=0.2, procedure=procedure, statistic=statistic)
    general = PValuePolicy(p_values, alpha=0.2, procedure=procedure)
    results = []
    for policy in (table, general):
        with RoutingIntegration(model, policy) as integrator:
            results.append((logits_of(model, ids), integrator.telemetry.to_dict()["layers"]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    histogram = results[0][1][0]["count_histogram"]
    assert sum(1 for n in histogram if n) > 2


def test_compensation_adds_the_mean_outputs_of_what_was_dropped(model, calibration, ids):
    compensations = calibration.compensations()
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 32, 32)
    weights, experts = block.gate(hidden.view(-1, 32))[1:]
    with BHRoutingIntegration(model, calibration=calibration, alpha=0.05) as integrator, torch.no_grad():
        compensated = block(hidden)
        left = block.gate(hidden.view(-1, 32))[1]
    assert integrator.plan.layers[0].path == calibration.paths[0]
    with (
        BHRoutingIntegration(
            model, calibration=calibration, alpha=0.05, compensation=False, size="deviation"
        ) as plain,
        torch.no_grad(),
    ):
        without = block(hidden)
        assert torch.equal(block.gate(hidden.view(-1, 32))[1], left)
    assert plain.compensations == {}
    expected = without.clone()
    for token in range(32):
        for slot in range(6):
            if left[token, slot] == 0:
                mean = compensations[calibration.paths[0]].dropped_EH[experts[token, slot]]
                expected[0, token] += weights[token, slot] * mean
    assert int((left == 0).sum()) > 32
    torch.testing.assert_close(compensated, expected, rtol=1e-5, atol=1e-6)


def test_compensation_of_a_renormalising_model_keeps_the_own_weights(tiny_olmoe, ids):
    model = tiny_olmoe(norm_topk_prob=True)
    documents = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(1)).tolist()
    calibration = calibrate(model, None, documents, progress=False)
    own = model.model.layers[0].mlp.gate(torch.ones(1, 32))[1]
    for compensation, total in ((True, None), (False, 1.0)):
        with BHRoutingIntegration(
            model, calibration=calibration, experts_per_token=3.0, compensation=compensation
        ):
            weights = model.model.layers[0].mlp.gate(torch.ones(1, 32))[1]
            dropped = weights == 0
        assert bool(dropped.any())
        if total is None:
            assert torch.equal(weights, own.masked_fill(dropped, 0.0))
        else:
            torch.testing.assert_close(weights.sum(), torch.tensor(total), rtol=1e-6, atol=0)


def test_set_level_on_a_compiled_model(model, calibration, ids):
    torch._dynamo.reset()
    results = {}
    for budget in (4.0, 2.0):
        with BHRoutingIntegration(model, calibration=calibration, experts_per_token=budget):
            results[budget] = logits_of(model, ids)
    with BHRoutingIntegration(model, calibration=calibration, experts_per_token=4.0) as integrator:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits_of(compiled, ids), results[4.0], rtol=1e-4, atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            integrator.set_level(experts_per_token=2.0)
            torch.testing.assert_close(logits_of(compiled, ids), results[2.0], rtol=1e-4, atol=1e-5)
            integrator.set_level(alpha=0.3)
            assert integrator.alpha == 0.3
            logits_of(compiled, ids)
    assert (results[4.0] - results[2.0]).abs().max() > 1e-2
    torch._dynamo.reset()


def test_keeping_everything_with_compensation_is_bit_identical(model, calibration, ids):
    before = logits_of(model, ids)
    with BHRoutingIntegration(model, calibration=calibration, alpha=0.05, min_k=6) as integrator:
        assert integrator.compensations
        assert torch.equal(logits_of(model, ids), before)
    assert torch.equal(logits_of(model, ids), before)


def test_gradients_flow_through_compensation(model, calibration, ids):
    model.train()
    with BHRoutingIntegration(model, calibration=calibration, experts_per_token=2.0):
        model(input_ids=ids).logits.square().mean().backward()
    gate = model.model.layers[1].mlp.gate.weight.grad
    assert torch.isfinite(gate).all()
    assert float(gate.abs().max()) > 0


def test_the_calibration_of_another_model_is_refused(tiny_olmoe, calibration):
    other = tiny_olmoe(seed=5)
    with pytest.raises(CalibrationMismatchError, match=r"model\.layers\.0\.mlp\.gate"):
        BHRoutingIntegration(other, calibration=calibration)
    with pytest.warns(UserWarning, match="differ from those that were calibrated") as told:
        BHRoutingIntegration(other, calibration=calibration, strict=False)
    assert [path in str(w.message) for path, w in zip(calibration.paths, told, strict=True)] == [True, True]
    with pytest.raises(CalibrationMismatchError):
        BHRoutingIntegration(tiny_olmoe(num_hidden_layers=1), calibration=calibration)


def test_a_half_precision_copy_of_the_model_is_accepted(tiny_olmoe, calibration, ids):
    model = tiny_olmoe(dtype=torch.bfloat16)
    with BHRoutingIntegration(model, calibration=calibration, experts_per_token=3.0) as integrator:
        logits_of(model, ids)
        assert integrator.get_routing_stats()["mean_experts_per_token"] == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"experts_per_token": 7.0}, BudgetError, "7"),
        ({"experts_per_token": 0.5}, BudgetError, "0.5"),
        ({"experts_per_token": 3.0, "min_k": 4}, BudgetError, "min_k=4"),
        ({"temperature": 2.0}, CalibrationMismatchError, "made at temperature 1, got temperature=2"),
        (
            {"statistic": "odds"},
            InvalidParameterError,
            "statistic must be 'contribution', 'logprob' or 'logit', got 'odds'.",
        ),
        ({"null": "some"}, InvalidParameterError, "some"),
    ],
)
def test_what_cannot_be_met_is_refused(model, calibration, ids, settings, error, message):
    before = logits_of(model, ids)
    with pytest.raises(error) as caught:
        BHRoutingIntegration(model, calibration=calibration, **settings)
    assert message in str(caught.value)
    assert torch.equal(logits_of(model, ids), before)


def test_no_means_no_compensation(model, calibration):
    with pytest.raises(InvalidParameterError, match="compensation=True needs the experts' mean outputs"):
        BHRoutingIntegration(model, calibration=calibration.without_means(), compensation=True)
    assert isinstance(calibration, Calibration)
