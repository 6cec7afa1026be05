"""What each layer's experts are worth: costs per layer and number of experts, for `bh_routing.evaluation.baselines.allocate`.

Shape legend: L routed layers, K slots of the router's own choice, B sequences, S tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..integration import RoutingIntegration
from ..patching import make_plan
from .baselines import PerLayerPolicy
from .perplexity import window_losses


def loss_costs(model: Any, windows: Sequence[Tensor]) -> list[list[float]]:
    """Mean loss in nats per token with one layer cut to its k best experts, ``[layer][k - 1]``, k = 1..K.

    The sensitivity profile of Alloc-MoE (arXiv:2604.08133), taken as the loss on text: L * (K - 1) + 1 passes.
    """
    tops = [context.top_k for context in make_plan(model).contexts]

    def loss(ks: list[int]) -> float:
        with RoutingIntegration(model, PerLayerPolicy(ks), collect_stats=False):
            return float(torch.cat([window_losses(model, w).double().cpu() for w in windows]).mean())

    full = loss(tops)
    return [
        [loss([*tops[:i], k, *tops[i + 1 :]]) for k in range(1, top)] + [full] for i, top in enumerate(tops)
    ]


@torch.no_grad()
def lexi_costs(model: Any, *, batches: int = 4, tokens: int = 256, seed: int = 0) -> list[list[float]]:
    """Frobenius norm of what a layer's output loses with its k best experts, ``[layer][k - 1]``, on N(0, 1) inputs.

    The data-free profile of LExI (arXiv:2509.02753, algorithm 1): every MoE block by itself, the norm averaged
    over random inputs.

    Raises
    ------
    UnsupportedModelError
        If a block cannot be run by itself on hidden states.
    """
    plan = make_plan(model)
    tops = [context.top_k for context in plan.contexts]
    text_config = model.config.get_text_config() if hasattr(model, "config") else None
    hidden = getattr(text_config, "hidden_size", None)
    if not isinstance(hidden, int) or any(layer.experts_path is None for layer in plan.layers):
        raise UnsupportedModelError(
            "the data-free profile runs every MoE block by itself on hidden states: expected blocks with experts and "
            "a config with hidden_size; give the numbers of experts per layer instead (perlayer:k=...)."
        )
    blocks = []
    for layer in plan.layers:
        assert layer.experts_path is not None
        blocks.append(model.get_submodule(layer.experts_path.rpartition(".")[0]))
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(1, tokens, hidden, generator=generator) for _ in range(batches)]

    def outputs(ks: list[int]) -> list[list[Tensor]]:
        with RoutingIntegration(model, PerLayerPolicy(ks), collect_stats=False):
            return [[_run(block, x) for x in inputs] for block in blocks]

    full = outputs(tops)
    costs: list[list[float]] = [[] for _ in tops]
    for k in range(1, max(tops) + 1):
        cut = outputs([min(k, top) for top in tops])
        for i, top in enumerate(tops):
            if k <= top:
                norms = [float((a - b).float().norm()) for a, b in zip(full[i], cut[i], strict=True)]
                costs[i].append(sum(norms) / len(norms))
    return costs


def _run(block: Any, x_BSH: Tensor) -> Tensor:
    parameter = next(block.parameters())
    out = block(x_BSH.to(parameter.device, parameter.dtype))
    out_BSH: Tensor = out[0] if isinstance(out, tuple) else out
    return out_BSH
