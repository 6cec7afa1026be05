"""Self-check of the integration on mock objects: needs torch, but no model and no download.

    python test_integration.py

runs seven checks on a mock of OLMoE-1B-7B's routers (16 layers, 64 experts, top-8, random weights) and ends in the
line ``7/7 tests passed``; the exit code is 1 if a check fails. With a real model at hand, in a notebook::

    from test_integration import test_with_real_model
    test_with_real_model(model)
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from olmoe_bh_integration import BHRoutingIntegration, benjamini_hochberg_routing

LAYERS, EXPERTS, TOP_K, HIDDEN = 16, 64, 8, 32
ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)


class OlmoeTopKRouter(nn.Module):
    """A mock: found by its class name, returns (weights, experts, logits) in the original document's order."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.num_experts = TOP_K, EXPERTS
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden_states.reshape(-1, HIDDEN), self.weight)
        weights, experts = torch.softmax(logits, dim=-1).topk(TOP_K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), experts, logits


class MockLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = OlmoeTopKRouter()
        self.expert_outputs = nn.Parameter(torch.randn(EXPERTS + 1, HIDDEN))

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights, experts, _ = self.gate(hidden_states)
        return hidden_states + 0.1 * (weights.unsqueeze(-1) * self.expert_outputs[experts]).sum(-2)


class MockOlmoe(nn.Module):
    """16 mock layers; an expert is a constant vector, which is enough to see which one ran."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(MockLayer() for _ in range(LAYERS))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states

    def routers(self) -> list[OlmoeTopKRouter]:
        return [layer.gate for layer in self.layers]


def _model_and_input() -> tuple[MockOlmoe, Tensor]:
    model = MockOlmoe()
    # Hidden states with some large entries, so that some tokens call for few experts and some for many.
    return model, torch.randn(40, HIDDEN) * torch.linspace(0.2, 3.0, HIDDEN)


@torch.no_grad()
def test_router_discovery() -> None:
    """Finds all 16 routers."""
    model, _ = _model_and_input()
    integrator = BHRoutingIntegration(model, alpha=0.05, max_k=TOP_K)
    assert [row["router"] for row in integrator.plan.rows()] == [f"layers.{i}.gate" for i in range(LAYERS)]
    assert not integrator.is_patched


@torch.no_grad()
def test_patching() -> None:
    """Patching changes the routing, unpatching restores it bit for bit."""
    model, x = _model_and_input()
    before = model(x)
    forwards = [router.forward for router in model.routers()]
    integrator = BHRoutingIntegration(model, alpha=0.05, max_k=TOP_K, mode="patch")
    integrator.patch_model()
    assert integrator.is_patched
    assert not torch.equal(model(x), before)
    integrator.unpatch_model()
    assert not integrator.is_patched
    assert [router.forward for router in model.routers()] == forwards
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_weight_normalization() -> None:
    """Weights are non-negative and sum to 1; what was not selected has weight 0."""
    model, x = _model_and_input()
    with BHRoutingIntegration(model, alpha=0.2, max_k=TOP_K):
        for router in model.routers():
            weights, experts, logits = router(x)
            assert weights.shape == experts.shape == (len(x), TOP_K)
            assert logits.shape == (len(x), EXPERTS)
            assert bool((weights >= 0).all())
            torch.testing.assert_close(weights.sum(-1), torch.ones(len(x)), rtol=0, atol=1e-5)
            assert int(experts.max()) < EXPERTS  # what was not selected keeps its index
    sparse, _, _ = benjamini_hochberg_routing(logits, alpha=0.2, max_k=TOP_K)
    assert bool((sparse >= 0).all())
    torch.testing.assert_close(sparse.sum(-1), torch.ones(len(x)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_expert_selection() -> None:
    """A larger alpha never selects fewer experts, and keeps those that a smaller one selected."""
    model, x = _model_and_input()
    router = model.routers()[0]
    integrator = BHRoutingIntegration(model, alpha=ALPHAS[0], max_k=TOP_K)
    means, last = [], torch.zeros(len(x), EXPERTS, dtype=torch.bool)
    with integrator:
        for alpha in ALPHAS:
            integrator.set_level(alpha=alpha)
            weights, experts, _ = router(x)
            selected = torch.zeros_like(last).scatter(-1, experts, weights > 0)
            assert bool((selected | ~last).all()), (
                f"alpha={alpha} dropped an expert that a smaller one selected"
            )
            means.append(float(selected.sum(-1).float().mean()))
            last = selected
    assert means == sorted(means)
    assert 1.0 <= means[0] < means[-1] <= TOP_K


@torch.no_grad()
def test_analyze_mode() -> None:
    """Mode analyze counts what BH would select and does not change the output."""
    model, x = _model_and_input()
    before = model(x)
    with BHRoutingIntegration(model, alpha=0.05, max_k=TOP_K, mode="analyze") as integrator:
        assert torch.equal(model(x), before)
        stats = integrator.get_routing_stats()
    assert stats["mode"] == "analyze"
    assert 1.0 <= stats["bh_would_select_mean"] < TOP_K
    assert stats["total_forward_passes"] == LAYERS


@torch.no_grad()
def test_statistics() -> None:
    """The statistics have the documented keys, count every router call, and start anew after reset_stats."""
    model, x = _model_and_input()
    with BHRoutingIntegration(model, alpha=0.05, temperature=1.0, min_k=1, max_k=TOP_K) as integrator:
        model(x)
        model(x)
        stats = integrator.get_routing_stats()
        settings = {"mode": "patch", "alpha": 0.05, "temperature": 1.0, "min_k": 1, "max_k": TOP_K}
        assert settings.items() <= stats.items()
        assert 1.0 <= stats["mean_experts_per_token"] <= TOP_K
        assert stats["std_experts_per_token"] > 0.0
        assert stats["total_forward_passes"] == 2 * LAYERS
        assert stats["total_tokens"] == 2 * len(x)
        integrator.reset_stats()
        assert integrator.get_routing_stats()["total_forward_passes"] == 0


@torch.no_grad()
def test_context_manager() -> None:
    """The context manager patches and restores, also after an exception."""
    model, x = _model_and_input()
    before = model(x)
    with BHRoutingIntegration(model, alpha=0.05, max_k=TOP_K) as integrator:
        assert integrator.is_patched
        assert not torch.equal(model(x), before)
    assert not integrator.is_patched
    assert torch.equal(model(x), before)
    try:
        with integrator:
            raise KeyError("from inside")
    except KeyError:
        pass
    assert not integrator.is_patched
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_with_real_model(model: Any) -> dict[str, Any]:
    """Check a real model that is loaded already: discovery, patch, analyze, statistics, restoration.

    Prints the plan and the statistics, leaves the model as it was, and returns the statistics of mode patch.
    Raises AssertionError if a check fails.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 32), generator=generator).to(model.device)
    before = model(input_ids=ids).logits

    integrator = BHRoutingIntegration(model, alpha=0.05, mode="patch")
    print(integrator.plan)
    with integrator:
        patched = model(input_ids=ids).logits
        stats = integrator.get_routing_stats()
    assert not torch.equal(patched, before), "patching did not change the output"
    assert bool(torch.isfinite(patched).all()), "the patched output is not finite"
    assert stats["total_forward_passes"] == len(integrator.plan.layers), "a router was not called"
    assert stats["total_tokens"] == ids.numel()
    assert torch.equal(model(input_ids=ids).logits, before), "unpatching did not restore the output"

    with BHRoutingIntegration(model, alpha=0.05, mode="analyze") as analyzer:
        assert torch.equal(model(input_ids=ids).logits, before), "mode analyze changed the output"
        would = analyzer.get_routing_stats()["bh_would_select_mean"]
    print(
        f"alpha 0.05: {stats['mean_experts_per_token']:.2f} experts per token in mode patch, "
        f"{would:.2f} in mode analyze; {stats['total_forward_passes']} router calls."
    )
    print("real model: all checks passed")
    return stats


test_with_real_model.__test__ = False  # type: ignore[attr-defined]  # takes a model: not for pytest to collect

CHECKS: tuple[Callable[[], None], ...] = (
    test_router_discovery,
    test_patching,
    test_weight_normalization,
    test_expert_selection,
    test_analyze_mode,
    test_statistics,
    test_context_manager,
)


def main() -> int:
    """Run the seven checks; 0 if all pass, else 1."""
    logger = logging.getLogger("bh_routing")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the hint that mocks are not calibrated
    passed = 0
    try:
        for number, check in enumerate(CHECKS, 1):
            try:
                check()
            except Exception:
                traceback.print_exc()
                print(f"[{number}/{len(CHECKS)}] FAILED  {check.__doc__}")
            else:
                passed += 1
                print(f"[{number}/{len(CHECKS)}] passed  {check.__doc__}")
    finally:
        logger.setLevel(level)
    print(f"{passed}/{len(CHECKS)} tests passed")
    return 0 if passed == len(CHECKS) else 1


if __name__ == "__main__":
    sys.exit(main())
