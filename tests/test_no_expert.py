"""Tokens that run without any expert: ``min_k=0``, with a compensation for what is dropped.

Shape legend: T tokens, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bh_routing import BHRoutingIntegration, DecisionTable, RoutingIntegration, TablePolicy
from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.passes import calibrate
from bh_routing.decision.compensation import Compensation
from bh_routing.decision.select import decide_by_table
from bh_routing.decision.types import Limits, TableSettings
from bh_routing.engines.vllm.ragged import kept_only
from bh_routing.engines.vllm.routing import filled
from bh_routing.errors import InvalidParameterError
from bh_routing.settings import RoutingSettings

EXPERTS, TOP_K, HIDDEN = 16, 6, 32  # of the tiny model


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN, so that whatever reads it shows."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture
def model(tiny_olmoe):
    return tiny_olmoe()


def policy(level: float, min_k: int = 0) -> TablePolicy:
    full = torch.full((2, EXPERTS), level)
    return TablePolicy(DecisionTable(thresholds_LE=full, offset_LE=torch.zeros_like(full)), min_k=min_k)


def compensations(model, form: str = "linear") -> dict[str, Compensation]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return 0.1 * torch.randn(*shape, generator=generator)

    def make() -> Compensation:
        if form == "mean":
            return Compensation.mean(normal(EXPERTS, HIDDEN), normal(EXPERTS, HIDDEN))
        return Compensation.linear(
            center_D=normal(EXPERTS),
            low_D=torch.full((EXPERTS,), -3.0),
            high_D=torch.full((EXPERTS,), 3.0),
            whiten_DR=normal(EXPERTS, 4),
            mean_EH=normal(EXPERTS, HIDDEN),
            slope_ERH=normal(EXPERTS, 4, HIDDEN),
        )

    return {f"model.layers.{i}.mlp.gate": make() for i in range(2)}


def level_for(model, ids, share: float) -> float:
    """The log score that the best expert of this share of the tokens of layer 0 does not reach."""
    seen = []
    with torch.no_grad(), RoutingIntegration(model, policy(-torch.inf, 1)) as integrator:
        integrator.watchers.append(lambda router, context, decision, logits: seen.append(logits))
        model(input_ids=ids)
    return float(torch.log_softmax(seen[0].float(), -1).amax(-1).quantile(share))


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("form", ["mean", "linear"])
@pytest.mark.parametrize("skip", ["auto", "compact", "zero"])
@pytest.mark.parametrize("length", [1, 40])
def test_the_layer_gives_the_compensation_alone(model, skip, form, length):
    """Against a loop over the model's own experts, each called for one pair."""
    ids = torch.arange(3, 43).unsqueeze(0)
    level = level_for(model, ids, 0.6)
    found = compensations(model, form)
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, length, HIDDEN)
    seen = []
    with torch.no_grad():
        with RoutingIntegration(model, policy(level), skip=skip, compensations=found) as integrator:
            integrator.watchers.append(lambda router, context, made, logits: seen.append((made, logits)))
            out = block(hidden)[0]
        (made, logits) = seen[0]
        added = found["model.layers.0.mlp.gate"].addition(replace(made, logits_TE=logits))
        expected = torch.zeros(length, HIDDEN) + added
        for t in range(length):
            for k in range(TOP_K):
                if not made.dropped_TK[t, k]:
                    pair = (hidden[0, t : t + 1], made.own_experts_TK[t : t + 1, k : k + 1])
                    expected[t] += block.experts(*pair, made.own_weights_TK[t : t + 1, k : k + 1])[0]
    if length > 1:
        assert 0.2 < float((made.counts_T == 0).float().mean()) < 0.9
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("dirty_memory")
def test_a_whole_model_without_any_expert(model, token_ids):
    """Forward, generation, gradients; the statistics say the share of tokens without an expert per layer."""
    found = compensations(model)
    with RoutingIntegration(model, policy(torch.inf), compensations=found) as integrator:
        with torch.no_grad():
            logits = model(input_ids=token_ids).logits
        told = integrator.telemetry.to_dict()
        assert [layer["share_without_expert"] for layer in told["layers"]] == [1.0, 1.0]
        assert told["total"]["share_without_expert"] == 1.0
        assert told["total"]["mean_experts"] == told["total"]["min_experts"] == 0
        assert bool(logits.isfinite().all())
        written = model.generate(input_ids=token_ids[:, :5], max_new_tokens=4, do_sample=False)
        assert written.shape[1] == 9
        model.train()
        model(input_ids=token_ids, labels=token_ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    routers = [layer.mlp.gate.weight.grad for layer in model.model.layers]
    assert all(float(g.abs().sum()) > 0 for g in routers)  # through weights and logits of the compensation
    assert all(layer.mlp.experts.down_proj.grad is None for layer in model.model.layers)


def test_some_tokens_without_an_expert_are_counted(model, token_ids):
    level = level_for(model, token_ids, 0.5)
    with (
        torch.no_grad(),
        RoutingIntegration(model, policy(level), compensations=compensations(model)) as integrator,
    ):
        model(input_ids=token_ids)
    first = integrator.telemetry.to_dict()["layers"][0]
    assert first["share_without_expert"] == pytest.approx(first["count_histogram"][0] / token_ids.numel())
    assert 0.3 < first["share_without_expert"] < 0.7


def test_without_a_compensation_it_is_refused(model):
    with pytest.raises(
        InvalidParameterError, match=r"^min_k=0 lets a token run without any expert, which needs"
    ):
        RoutingIntegration(model, policy(0.0))
    with pytest.raises(
        InvalidParameterError, match=r"^min_k must be at least 1, got 0; every token needs an expert"
    ):
        BHRoutingIntegration(model, min_k=0)


@pytest.fixture
def calibration(tiny_olmoe) -> Calibration:
    generator = torch.Generator().manual_seed(7)
    documents = [torch.randint(3, 250, (64,), generator=generator).tolist() for _ in range(24)]
    return calibrate(tiny_olmoe(), None, documents, sensitivity=True, window=64, progress=False)


def test_what_none_means(calibration):
    """0 where a linear compensation meets a budget of at most a quarter of the own 6; 1 everywhere else."""
    assert calibration.forms == ("none", "mean", "linear")
    path_a, path_b = calibration.paths
    for given, expected in (
        ({"experts_per_token": 1.5}, 0),
        ({"experts_per_token": 1.6}, 1),
        ({"experts_per_token": {path_a: 1.0, path_b: 2.0}}, 0),
        ({"alpha": 0.01}, 1),
        ({"experts_per_token": 1.5, "compensation": "mean"}, 1),
        ({"experts_per_token": 1.5, "compensation": "none"}, 1),
        ({"experts_per_token": 1.5, "compensation": ("linear", 0.5)}, 0),
        ({"experts_per_token": 1.5, "min_k": 1}, 1),
        ({"experts_per_token": 3.0, "min_k": 0, "compensation": "mean"}, 0),
    ):
        settings = RoutingSettings(**given)
        assert settings.least_kept(calibration) == expected
        if not isinstance(given.get("experts_per_token"), dict):
            assert settings.policy(calibration).min_k == expected
    bare = calibration.without_means()
    assert bare.forms == ("none",)
    with pytest.raises(InvalidParameterError, match="unless a compensation stands in for what is dropped"):
        RoutingSettings(experts_per_token=1.5, min_k=0).policy(bare)


def test_a_small_budget_is_met_with_tokens_that_have_none(calibration, tiny_olmoe):
    """And a change of the level changes what None means, in the policy that is in use."""
    model = tiny_olmoe()
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 250, (24, 64), generator=generator)
    with (
        torch.no_grad(),
        BHRoutingIntegration(model, calibration=calibration, experts_per_token=0.8) as integrator,
    ):
        assert integrator.get_routing_stats()["min_k"] == 0
        assert {one.form for one in integrator.compensations.values()} <= {"linear", "mean"}
        model(input_ids=ids)
        told = integrator.telemetry.to_dict()["total"]
        assert told["mean_experts"] == pytest.approx(0.8, rel=0.1)
        assert told["share_without_expert"] > 0.2
        integrator.reset_stats()
        integrator.set_level(experts_per_token=3.0)
        assert integrator.get_routing_stats()["min_k"] == 1
        model(input_ids=ids[:, :1])
        model(input_ids=ids)
        assert integrator.telemetry.to_dict()["total"]["share_without_expert"] == 0.0


def decided(tokens: int):
    logits_TE = torch.randn(tokens, EXPERTS)
    own_weights_TK, own_TK = torch.softmax(logits_TE, -1).topk(TOP_K, -1)
    how = TableSettings(empty=EXPERTS, limits=Limits(min_k=0))
    none_E = torch.full((EXPERTS,), torch.inf)
    return decide_by_table(logits_TE, own_weights_TK, own_TK, none_E, torch.zeros(EXPERTS), how)


@pytest.mark.parametrize("tokens", [1, 3])
def test_vllm_s_slots_without_an_expert(tokens):
    """Every slot names an expert that exists and has weight 0; the ragged kernel is not called."""
    made = decided(tokens)
    assert made.counts_T.tolist() == [0] * tokens
    chosen_TK = filled(made)
    assert torch.equal(chosen_TK, made.own_experts_TK[:, :1].expand(-1, TOP_K))
    out_TH = torch.full((tokens, 4), torch.nan)

    def kernel(*arguments):
        raise AssertionError("nothing is there to compute")

    assert kept_only(kernel, out_TH, torch.randn(tokens, 4), made.weights_TK, chosen_TK) == 0
    assert torch.equal(out_TH, torch.zeros(tokens, 4))
