"""Experts that skip empty slots: a (token, expert) pair that was dropped costs nothing.

Shape legend: T tokens, K slots per token, P kept (token, slot) pairs, H hidden size.

`skip_experts_forward` is an experts implementation for transformers' registry (`IMPLEMENTATION`); it serves
every experts class of that registry, on CPU by a loop over the experts that have tokens, elsewhere by
``grouped_mm`` with static shapes and no host synchronisation (`bh_routing.patching.expert_math`). `compacted`
does the same for any other experts module, in front of its own forward. An empty slot carries ``num_experts``
(or more) and weight 0.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .adapters import ExpertIds, ExpertsForward, flat_experts
from .expert_math import grouped_forward, left_out, loop_forward

IMPLEMENTATION = "bh_routing"
STOCK = "_bh_routing_stock_implementation"  # instance attribute while patched: the model's own implementation

# What the skip-aware implementation may stand in for: the same arithmetic in plain PyTorch.
PLAIN_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


def register() -> None:
    """Add the implementation to transformers' registry (again and again is fine)."""
    _registry().register(IMPLEMENTATION, skip_experts_forward)


@cache
def _registry() -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


def uses_registry(experts: nn.Module) -> bool:
    """Whether this experts module dispatches through transformers' registry."""
    return hasattr(experts, "_apply_gate") and hasattr(
        getattr(experts, "config", None), "_experts_implementation"
    )


def compacted(
    inner: ExpertsForward, ids: ExpertIds, hidden_states: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Run only the kept pairs through any experts forward, as top-1 with its weight; sum in float32.

    One ``nonzero``: on a GPU it synchronises, and its shape depends on the data. Where nothing is empty, the
    experts run as they are, and the result is their own, bit for bit.
    """
    slots = experts_TK.shape[-1]
    experts_TK = experts_TK.masked_fill(left_out(weights_TK), ids.empty)
    pair_P = (experts_TK.reshape(-1) < ids.empty).nonzero().squeeze(-1)
    if pair_P.numel() == experts_TK.numel():
        return inner(hidden_states, experts_TK, weights_TK)
    hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    token_P = pair_P // slots
    out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    if pair_P.numel():
        out_PH = flat_experts(inner, ids)(
            hidden_TH[token_P],
            experts_TK.reshape(-1)[pair_P].unsqueeze(-1),
            weights_TK.reshape(-1)[pair_P].unsqueeze(-1),
        )
        out_TH = out_TH.index_add(0, token_P, out_PH.float())
    return out_TH.to(hidden_states.dtype).reshape(hidden_states.shape)


def why_not_compact(experts: nn.Module, ids: ExpertIds, path: str) -> str | None:
    """Why dropped pairs cannot be taken out of this experts module, as a sentence without its full stop."""
    kind = f"{path} ({type(experts).__name__})"
    if getattr(experts, "_is_expert_parallel", False):
        return f"{kind} is expert-parallel, where dropped pairs cannot be taken out"
    if not ids.can_compact:
        return f"{kind} needs several slots per token and has no expert that costs nothing"
    if not uses_registry(experts):
        if any(_is_quantised(weight) for weight in experts.parameters()):
            return f"{kind} has quantised weights, whose kernels were not seen to run single pairs"
        if _takes_three(experts):
            return None
        return f"{kind} is not called with hidden states, indices and weights"
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    if any(_is_quantised(getattr(experts, name)) for name in names):
        return f"{kind} has quantised weights, which only its own implementation can multiply with"
    return None


def knows_implementation(experts: nn.Module) -> bool:
    """Whether a registry module runs one of the plain implementations, which the skip-aware one replaces."""
    config: Any = experts.config
    return config._experts_implementation in PLAIN_IMPLEMENTATIONS


def _is_quantised(weight: Tensor) -> bool:
    if not weight.is_floating_point() or weight.element_size() < 2:
        return True
    return is_traceable_wrapper_subclass(weight) and "DTensor" not in type(weight).__name__


def _takes_three(experts: nn.Module) -> bool:
    try:
        inspect.signature(experts.forward).bind(None, None, None)
    except (TypeError, ValueError):
        return False
    return True


def skip_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts forward in the form of transformers' registry; ``self`` is the experts module.

    On CPU the loop, and the model's own implementation, bit for bit, where nothing is empty. Elsewhere, where
    looking would synchronise, and while compiling always the grouped products.
    """
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        return grouped_forward(self, hidden_states, top_k_index, top_k_weights)
    out_TH = loop_forward(self, hidden_states, top_k_index, top_k_weights)
    return _stock_forward(self, hidden_states, top_k_index, top_k_weights) if out_TH is None else out_TH


def _stock_forward(self: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What the unpatched model would run."""
    name = getattr(self, STOCK, None)
    own = type(self).forward.__wrapped__
    function = _registry().get_interface(name, own) if name else own
    out_TH: Tensor = function(self, hidden_TH, experts_TK, weights_TK)
    return out_TH
