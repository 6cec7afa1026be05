"""Gradients under adaptive routing: those of top-k with the same selection, for every way the experts are run.

Shape legend: T tokens, E experts, K slots of the router's own choice, H hidden size, I width of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from bh_routing import DecisionTable, RoutingIntegration, TablePolicy
from bh_routing.patching import experts as skip_aware

T, E, K, H, I = 9, 6, 4, 8, 8
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
TABLE = DecisionTable(
    thresholds_LE=torch.linspace(-2.2, -1.6, E).expand(1, E).clone(),
    statistic="logprob",
    offset_LE=torch.zeros(1, E),
)


class Router(nn.Module):
    """OLMoE's router without its float32 softmax, which no numerical derivative can look through."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm_topk_prob, self.weight = norm, nn.Parameter(torch.zeros(E, H))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = hidden_states.reshape(-1, H) @ self.weight.T
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(K, -1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, experts_TK


class Model(nn.Module):
    """One OLMoE block, whose router and experts are found as in a model."""

    def __init__(self, implementation: str, dtype: torch.dtype, norm: bool = False) -> None:
        super().__init__()
        config = OlmoeConfig(
            hidden_size=H, intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm
        )
        config._experts_implementation = implementation
        self.mlp = OlmoeSparseMoeBlock(config)
        if dtype == torch.float64:
            self.mlp.gate = Router(norm)
        self.mlp.to(dtype)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        out = self.mlp(hidden_BSH)
        return out[0] if isinstance(out, tuple) else out


def inputs(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, T, H, generator=generator, dtype=torch.float64).to(dtype)


def by_a_plain_loop(model: Model, hidden_BSH: Tensor, keep_TK: Tensor, norm: bool = False) -> Tensor:
    """Top-k with a given selection: token by token, slot by slot."""
    gate, experts = model.mlp.gate, model.mlp.experts
    out = []
    for t, x_H in enumerate(hidden_BSH[0]):
        scores_E = torch.softmax(gate.weight @ x_H, -1)
        weights_K, chosen_K = scores_E.topk(K)
        if norm:
            weights_K = weights_K / weights_K.sum()
            weights_K = weights_K * (weights_K.sum() / weights_K[keep_TK[t]].sum())
        total_H = torch.zeros_like(x_H)
        for k in range(K):
            if keep_TK[t, k]:
                e = int(chosen_K[k])
                first, second = (experts.gate_up_proj[e] @ x_H).chunk(2)
                total_H = total_H + weights_K[k] * (experts.down_proj[e] @ (silu(first) * second))
        out.append(total_H)
    return torch.stack(out).unsqueeze(0)


def patched(model: Model, **options: Any) -> tuple[RoutingIntegration, list[Any]]:
    integrator = RoutingIntegration(model, TablePolicy(TABLE), collect_stats=True, **options)
    seen: list[Any] = []
    integrator.watchers.append(lambda router, context, decision, logits: seen.append((decision, logits)))
    return integrator, seen


def gradients(model: Model, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    hidden = inputs(dtype).requires_grad_()
    pull = torch.randn(1, T, H, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    out = function(hidden)
    return [out.detach(), *torch.autograd.grad((out * pull).sum(), [hidden, *model.parameters()])]


def margin(seen: list[Any]) -> float:
    """How far the nearest statistic is from a threshold, or another from its neighbour in the order."""
    decision, logits_TE = seen[-1]
    statistic_TK = (
        logits_TE.log_softmax(-1).gather(-1, decision.own_experts_TK).sort(-1, descending=True).values
    )
    to_threshold = (statistic_TK - TABLE.thresholds_LE[0, :K]).abs().min()
    return float(torch.minimum(to_threshold, logits_TE.sort(-1).values.diff(dim=-1).abs().min()).detach())


def grouped_on_cpu(monkeypatch) -> None:
    """What runs on a GPU and while compiling."""
    monkeypatch.setattr(skip_aware, "loop_forward", skip_aware.grouped_forward)


PATHS = {
    "skip-aware loop": {"skip": "auto"},
    "skip-aware grouped": {"skip": "auto"},
    "compacted": {"skip": "compact"},
    "weight zero": {"skip": "zero"},
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_a_plain_loop(path, implementation, norm, monkeypatch):
    dtype = torch.float32  # grouped products know no float64
    model = Model(implementation, dtype, norm)
    if path == "skip-aware grouped":
        grouped_on_cpu(monkeypatch)
    if path == "compacted":
        monkeypatch.setattr(skip_aware, "uses_registry", lambda experts: False)
    integrator, seen = patched(model, **PATHS[path])
    with integrator:
        got = gradients(model, model, dtype)
    decision, _ = seen[-1]
    assert margin(seen) > 1e-4  # the selection is the same in any arithmetic
    counts = decision.counts_T
    assert len(counts.unique()) > 2
    expected = gradients(model, lambda x: by_a_plain_loop(model, x, ~decision.dropped_TK, norm), dtype)
    for one, other in zip(got, expected, strict=True):
        # sums of at most T * K terms in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))
    assert expected[2].abs().max() > 1e-2  # the router's


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("skip", ["auto", "zero"])
def test_gradcheck_in_float64(skip, norm):
    model = Model("eager", torch.float64, norm)
    integrator, seen = patched(model, skip=skip)
    hidden = inputs(torch.float64).requires_grad_()
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    with integrator:
        function(hidden, *values)
        assert margin(seen) > 1e-3  # gradcheck steps by 1e-6
        assert seen[-1][0].dropped_TK.any()
        # in full once, along random directions for the others: the same graph but for the weights' rule
        assert torch.autograd.gradcheck(function, (hidden, *values), fast_mode=norm or skip == "zero")


def test_the_loop_in_float64_is_the_plain_loop():
    model = Model("eager", torch.float64)
    integrator, seen = patched(model)
    with integrator:
        got = gradients(model, model, torch.float64)
    keep_TK = ~seen[-1][0].dropped_TK
    for one, other in zip(
        got, gradients(model, lambda x: by_a_plain_loop(model, x, keep_TK), torch.float64), strict=True
    ):
        # the sum over experts is in the dtype of the outputs, float64
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_through_the_fused_kernel_are_the_references(norm, monkeypatch):
    fused = pytest.importorskip("bh_routing.decision.select_triton", exc_type=ImportError)
    if not fused.runs_on(torch.device("cpu")):
        monkeypatch.setattr(fused, "runs_on", lambda device: True)
    found = []
    for backend in ("torch", "triton"):
        model = Model("eager", torch.float32, norm)
        policy = TablePolicy(TABLE, backend=backend)
        with RoutingIntegration(model, policy, collect_stats=False) as integrator:
            function = policy._functions[integrator.plan.contexts[0].path]
            assert function.__module__.endswith("select_triton" if backend == "triton" else "decision.select")
            found.append(gradients(model, model, torch.float32))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_dropped_experts_get_no_gradient():
    model = Model("eager", torch.float32)
    integrator, seen = patched(model)
    with integrator:
        _, _, _, gate_up, down = gradients(model, model, torch.float32)
    used = set(seen[-1][0].experts_TK.flatten().tolist()) - {E}
    for e in range(E):
        assert bool(gate_up[e].abs().sum() > 0) == bool(down[e].abs().sum() > 0) == (e in used)
    assert math.isfinite(float(gate_up.abs().sum()))
