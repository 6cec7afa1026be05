"""Deciding, compensating and the ragged experts as operations that torch.compile does not look into. Needs vLLM.

On CPU vLLM traces through the router. Behind an operation no threshold becomes part of a compiled graph, so that
`bh_routing_set` works in a compiled engine, and counting is done by plain Python. A layer is found by its name in the
forward context, as vLLM's own operations find theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from vllm._custom_ops import cpu_fused_moe
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from .ragged import kept_only
from .routing import ATTRIBUTE, LayerRouting

library = Library("bh_routing", "FRAGMENT")


def layer_of(name: Any) -> tuple[LayerRouting, bool]:
    """The layer of that name, and whether this forward is a real one (not a warm-up)."""
    context = get_forward_context()
    layer = getattr(context.no_compile_layers[_resolve_layer_name(name)], ATTRIBUTE)
    # Warm-up has no attention to compute. What a CUDA graph records, it counts when it is played.
    real = context.attn_metadata is not None
    if not real and torch.cuda.is_available():
        real = torch.cuda.is_current_stream_capturing()
    return layer, real


def _route(
    router_logits: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: LayerNameType
) -> tuple[Tensor, Tensor]:
    layer, real = layer_of(layer_name)
    return layer.route(router_logits, topk_weights, topk_ids, count=real)


def _route_fake(
    router_logits: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: LayerNameType
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(topk_weights), torch.empty_like(topk_ids)


def _compensate(output: Tensor, layer_name: LayerNameType) -> Tensor:
    return layer_of(layer_name)[0].compensate(output)


def _compensate_fake(output: Tensor, layer_name: LayerNameType) -> Tensor:
    return torch.empty_like(output)


def _cpu_experts(
    output: Tensor,
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    isa: str,
    layer_name: LayerNameType,
) -> None:
    def kernel(out_TH: Tensor, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> None:
        cpu_fused_moe(
            out_TH, x_TH, w13, w2, w13_bias, w2_bias, weights_TK, experts_TK, activation, isa, False
        )

    layer, real = layer_of(layer_name)
    pairs = kept_only(kernel, output, hidden_states, topk_weights, topk_ids)
    if real:
        layer.pairs += pairs


def _cpu_experts_fake(*arguments: Any) -> None:
    """It writes to its first argument."""


direct_register_custom_op("vllm_route", _route, fake_impl=_route_fake, target_lib=library)
direct_register_custom_op("vllm_compensate", _compensate, fake_impl=_compensate_fake, target_lib=library)
direct_register_custom_op(
    "vllm_cpu_experts", _cpu_experts, mutates_args=["output"], fake_impl=_cpu_experts_fake, target_lib=library
)


class RouteCall:
    """In place of a router's ``_compute_routing``: its own result, then the decision."""

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.name = inner, name

    def __call__(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        weights_TK, experts_TK = self.inner(hidden_states, router_logits, indices_type, **kwargs)
        decided: tuple[Tensor, Tensor] = torch.ops.bh_routing.vllm_route(
            router_logits, weights_TK, experts_TK, _encode_layer_name(self.name)
        )
        return decided


class CompensatedForward:
    """In place of a runner's ``forward``: its own result, then what stands in for the dropped experts."""

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.name = inner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output_TH: Tensor = torch.ops.bh_routing.vllm_compensate(
            self.inner(*args, **kwargs), _encode_layer_name(self.name)
        )
        return output_TH


class RaggedApply:
    """In place of ``CPUUnquantizedExperts.apply``: the same kernel with the kept pairs only."""

    def __init__(self, experts: Any, name: str) -> None:
        self.experts, self.name = experts, name
        self.inner = experts.apply

    def __call__(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        *,
        apply_router_weight_on_input: bool,
        **kwargs: Any,
    ) -> None:
        if apply_router_weight_on_input:  # one slot per token: nothing can be dropped
            self.inner(
                output,
                hidden_states,
                w1,
                w2,
                topk_weights,
                topk_ids,
                activation,
                apply_router_weight_on_input=True,
                **kwargs,
            )
            return
        torch.ops.bh_routing.vllm_cpu_experts(
            output,
            hidden_states,
            w1,
            w2,
            self.experts.w1_bias,
            self.experts.w2_bias,
            topk_weights,
            topk_ids,
            activation.value,
            self.experts.isa,
            _encode_layer_name(self.name),
        )
