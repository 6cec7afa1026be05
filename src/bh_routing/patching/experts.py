"""Experts that skip empty slots: a (token, expert) pair that was dropped costs nothing.

Shape legend: T tokens, E experts, K slots per token, P kept (token, slot) pairs, H hidden size.

`skip_experts_forward` is an experts implementation for transformers' registry (`IMPLEMENTATION`); it serves
every experts class of that registry, on CPU by a loop over the experts that have tokens, elsewhere by
``grouped_mm`` with static shapes and no host synchronisation. `compacted` does the same for any other experts
module, in front of its own forward. An empty slot carries ``num_experts`` (or more) and weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import ExpertIds, flat_experts

IMPLEMENTATION = "bh_routing"

ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]


def register() -> None:
    """Add the implementation to transformers' registry (again and again is fine)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, skip_experts_forward)


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


def skip_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts forward in the form of transformers' registry; ``self`` is the experts module."""
    if hidden_states.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool((top_k_index >= self.num_experts).any()):
            return _stock_forward(self, hidden_states, top_k_index, top_k_weights)
        return _loop_forward(self, hidden_states, top_k_index, top_k_weights)
    return _grouped_forward(self, hidden_states, top_k_index, top_k_weights)


def _stock_forward(self: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What the unpatched model would run: nothing is empty, and the result is the model's own, bit for bit."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = getattr(self, STOCK, None)
    own = type(self).forward.__wrapped__
    function = ALL_EXPERTS_FUNCTIONS.get_interface(name, own) if name else own
    return function(self, hidden_TH, experts_TK, weights_TK)


STOCK = "_bh_routing_stock_implementation"  # instance attribute while patched: the model's own implementation


def _loop_forward(self: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """One pair of matrix products per expert that has tokens; the sum over experts in float32."""
    slots = experts_TK.shape[-1]
    flat_P = experts_TK.reshape(-1)
    order_P = flat_P.argsort(stable=True)
    counts = torch.bincount(flat_P, minlength=self.num_experts)[: self.num_experts].tolist()
    token_P = order_P // slots
    weight_P1 = weights_TK.reshape(-1)[order_P].unsqueeze(-1)
    out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(start, start + count)
        start += count
        y_PH = expert_output(self, expert, hidden_TH[token_P[rows]])
        out_TH = out_TH.index_add(0, token_P[rows], (y_PH * weight_P1[rows]).float())
    return out_TH.to(hidden_TH.dtype)


def expert_output(self: Any, expert: int, x_PH: Tensor) -> Tensor:
    """Output of one expert of a registry module, before the routing weight, [P, H]."""

    def project(x: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        x = x.to(weight.dtype)
        if self.is_transposed:
            y = x @ weight
            return y if bias is None else y + bias
        return torch.nn.functional.linear(x, weight, bias)

    if self.has_gate:
        hidden = self._apply_gate(project(x_PH, "gate_up_proj"))
    else:
        hidden = self.act_fn(project(x_PH, "up_proj"))
    y_PH = project(hidden, "down_proj")
    return self.post_expert_norm(y_PH) if self.has_post_expert_norm else y_PH


def _grouped_forward(self: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Sort, offsets, ``grouped_mm``: static shapes, no host synchronisation.

    Empty pairs sort behind the last offset, where no product touches them; their rows, which the products
    leave unwritten, are removed by ``where``, never by a multiplication with 0 (0 * NaN is NaN).
    """
    from transformers.integrations.moe import _grouped_linear

    slots, num_experts = experts_TK.shape[-1], self.num_experts
    flat_P = experts_TK.reshape(-1)
    sorted_P, order_P = torch.sort(flat_P, stable=True)
    kept_P1 = (sorted_P < num_experts).unsqueeze(-1)
    offsets_E = torch.searchsorted(
        sorted_P, torch.arange(num_experts, device=flat_P.device), right=True, out_int32=True
    )
    index_P = sorted_P.clamp(max=num_experts - 1)

    def zero_empty(y: Tensor) -> Tensor:
        return torch.where(kept_P1, y, torch.zeros((), dtype=y.dtype, device=y.device))

    def project(x: Tensor, name: str) -> Tensor:
        bias = getattr(self, f"{name}_bias")[index_P] if self.has_bias else None
        y = zero_empty(
            _grouped_linear(x, getattr(self, name), offsets_E, bias=None, is_transposed=self.is_transposed)
        )
        return y if bias is None else y + bias

    x_PH = zero_empty(hidden_TH[order_P // slots])
    if self.has_gate:
        hidden = self._apply_gate(project(x_PH, "gate_up_proj"))
    else:
        hidden = self.act_fn(project(x_PH, "up_proj"))
    y_PH = project(hidden, "down_proj")
    if self.has_post_expert_norm:
        y_PH = self.post_expert_norm(y_PH)
    weighted_PH = zero_empty(y_PH * weights_TK.reshape(-1)[order_P].unsqueeze(-1))
    back_P = torch.empty_like(order_P).scatter_(
        0, order_P, torch.arange(order_P.numel(), device=flat_P.device)
    )
    out_TH = weighted_PH[back_P].view(hidden_TH.shape[0], slots, -1).sum(dim=1)
    return out_TH.to(hidden_TH.dtype)
