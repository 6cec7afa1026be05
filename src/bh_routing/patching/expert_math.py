"""The arithmetic of skip-aware experts: a loop over experts for CPUs, grouped products for everything else.

Shape legend: T tokens, E experts, K slots per token, P kept (token, slot) pairs, H hidden size,
N rows and I columns of a weight.

Both serve every experts class of transformers' registry: biased, transposed, interleaved, ungated, with a gate
of its own, with a norm behind each expert. An empty slot carries ``num_experts`` or more; its weight counts as 0.
"""

from __future__ import annotations

from math import copysign
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import embedding_bag, linear

from ..stats.pvalues import at_least_float32

# What torch.compile's CPU code calls for a linear layer. A call costs 15 microseconds more than `linear`, which weights of
# this many elements make up for with any number of rows, smaller ones with an eightfold number of multiplications.
LARGE = 2**18
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_MINUS_ZERO = {2: (torch.int16, -(2**15)), 4: (torch.int32, -(2**31)), 8: (torch.int64, -(2**63))}


def left_out(weights_TK: Tensor) -> Tensor:
    """bool [T, K], True where a pair was left out: its weight is -0.0, which no router gives, and 0 to everybody else."""
    integer, minus_zero = _MINUS_ZERO[weights_TK.element_size()]
    return weights_TK.detach().view(integer) == minus_zero


def loop_forward(experts: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor | None:
    """One pair of products per expert that has tokens, on the host; the sum over experts in float32.

    Returns None, before any work, where no slot is empty: the caller then runs the stock implementation.
    """
    num_experts, slots = experts.num_experts, experts_TK.shape[-1]
    if experts_TK.shape[0] == 1:
        chosen, weights = experts_TK.tolist()[0], weights_TK.tolist()[0]
        for slot, weight in enumerate(weights):
            if weight == 0.0 and copysign(1.0, weight) < 0.0:
                chosen[slot] = num_experts
        return _one_token(experts, hidden_TH, chosen, weights_TK)
    experts_TK = experts_TK.masked_fill(left_out(weights_TK), num_experts)
    sorted_P, order_P = experts_TK.flatten().sort(stable=True)
    edges = torch.searchsorted(
        sorted_P, torch.arange(num_experts, device=sorted_P.device), right=True
    ).tolist()
    kept = edges[-1]
    if kept == len(order_P):
        return None
    if not kept:
        return torch.zeros_like(hidden_TH)
    order_P = order_P[:kept]
    x_PH = hidden_TH.index_select(0, order_P.div(slots, rounding_mode="floor"))
    groups = [(e, a, b) for e, (a, b) in enumerate(zip([0, *edges], edges, strict=False)) if a < b]
    y_PH = _outputs(experts, x_PH, groups)
    # The pairs in their tokens' order: a ragged weighted sum, which accumulates in float32 whatever the dtype.
    row_P = order_P.argsort()
    weight_P = weights_TK.flatten()[order_P[row_P]]
    dtype = torch.promote_types(y_PH.dtype, weight_P.dtype)
    kept_T = (experts_TK < num_experts).sum(-1)
    out_TH = embedding_bag(
        row_P, y_PH.to(dtype), kept_T.cumsum(0) - kept_T, per_sample_weights=weight_P.to(dtype), mode="sum"
    )
    return out_TH.to(hidden_TH.dtype)


def _one_token(experts: Any, hidden_1H: Tensor, chosen: list[int], weights_1K: Tensor) -> Tensor | None:
    """The same for one token: nothing to sort, nothing to gather."""
    slots = [slot for slot, expert in enumerate(chosen) if expert < experts.num_experts]
    if len(slots) == len(chosen):
        return None
    if not slots:
        return torch.zeros_like(hidden_1H)
    groups = [(chosen[slot], i, i + 1) for i, slot in enumerate(slots)]
    y_PH = at_least_float32(_outputs(experts, hidden_1H.expand(len(slots), -1), groups))
    weights = weights_1K.unbind(1)
    weight_1P = torch.cat([weights[slot] for slot in slots]).unsqueeze(0)
    return torch.mm(weight_1P.to(y_PH.dtype), y_PH).to(hidden_1H.dtype)


def _outputs(experts: Any, x_PH: Tensor, groups: list[tuple[int, int, int]]) -> Tensor:
    """Outputs before the routing weights, [P, H], of pairs sorted by expert; groups of (expert, start, end).

    Two sweeps over the experts with the gate in between: beside products that clear the caches every other
    operation is expensive, and this way there are few (docs/performance.md).
    """
    hidden = _products(experts, "gate_up_proj" if experts.has_gate else "up_proj", x_PH, groups)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    y_PH = _products(experts, "down_proj", hidden, groups)
    return experts.post_expert_norm(y_PH) if getattr(experts, "has_post_expert_norm", False) else y_PH


def _products(experts: Any, name: str, x_PI: Tensor, groups: list[tuple[int, int, int]]) -> Tensor:
    """x W^T + b with each group's own expert, [P, N]. The weights are fetched once: they may be computed (LoRA)."""
    weight_ENI: Tensor = getattr(experts, name)
    if experts.is_transposed:
        weight_ENI = weight_ENI.transpose(-2, -1)
    bias_EN: Tensor | None = getattr(experts, f"{name}_bias") if experts.has_bias else None
    x_PI = x_PI.to(weight_ENI.dtype)
    onednn = _onednn_is_better(experts, x_PI, weight_ENI, bias_EN)
    weights: Any = weight_ENI
    if weight_ENI.requires_grad and torch.is_grad_enabled():
        # Backward stacks what each expert got; indexing would add up as many tensors of all experts' size.
        weights = weight_ENI.unbind(0)
    parts = []
    for expert, start, end in groups:
        bias_N = None if bias_EN is None else bias_EN[expert]
        parts.append(_product(x_PI[start:end], weights[expert], bias_N, onednn=onednn))
    return torch.cat(parts)


def _product(x_PI: Tensor, weight_NI: Tensor, bias_N: Tensor | None, *, onednn: bool) -> Tensor:
    size = weight_NI.numel()
    large = size >= LARGE or size * x_PI.shape[0] >= 8 * LARGE
    if onednn and large and weight_NI.is_contiguous():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_PI, weight_NI, bias_N, "none", [], "")
        return product
    return linear(x_PI, weight_NI, bias_N)


def _onednn_is_better(experts: Any, x_PI: Tensor, weight_ENI: Tensor, bias_EN: Tensor | None) -> bool:
    """Whether float32 products go to oneDNN: on CPU, in evaluation, where nothing asks for a gradient.

    ``linear`` sends float32 to the BLAS library. Where that is MKL and the processor not Intel's, it takes twice as
    long as oneDNN for the 2 to 64 rows that one expert gets (docs/performance.md). Both accumulate in float32; bfloat16
    goes to oneDNN anyway. In training mode the same products are taken with and without gradients, so that
    gradient checkpointing recomputes what it saw.
    """
    return (
        _ONEDNN
        and x_PI.device.type == "cpu"
        and x_PI.dtype == weight_ENI.dtype == torch.float32
        and not experts.training
        and type(weight_ENI) in (Tensor, Parameter)  # no quantised or distributed kind
        and not (
            torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in (x_PI, weight_ENI, bias_EN))
        )
        and not torch.is_autocast_enabled("cpu")
    )


def grouped_forward(experts: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Sort, offsets, ``grouped_mm``: static shapes, no host synchronisation.

    Empty pairs sort behind the last offset, where no product touches them; their rows, which the products
    leave unwritten, are removed by ``where``, never by a multiplication with 0 (0 * NaN is NaN). Where nothing
    is empty, every value is the one that transformers' ``grouped_mm`` implementation computes.
    """
    from transformers.integrations.moe import _grouped_linear

    slots, num_experts = experts_TK.shape[-1], experts.num_experts
    flat_P = experts_TK.masked_fill(left_out(weights_TK), num_experts).reshape(-1)
    # Sorted as transformers sorts (not stably): in some BLAS a row of a product depends on its place.
    sorted_P, order_P = torch.sort(flat_P)
    kept_P1 = (sorted_P < num_experts).unsqueeze(-1)
    offsets_E = torch.searchsorted(
        sorted_P, torch.arange(num_experts, device=flat_P.device), right=True, out_int32=True
    )
    index_P = sorted_P.clamp(max=num_experts - 1)

    def zero_empty(y: Tensor) -> Tensor:
        return torch.where(kept_P1, y, torch.zeros((), dtype=y.dtype, device=y.device))

    def project(x: Tensor, name: str) -> Tensor:
        y = _grouped_linear(x, getattr(experts, name), offsets_E, is_transposed=experts.is_transposed)
        return zero_empty(y + getattr(experts, f"{name}_bias")[index_P] if experts.has_bias else y)

    x_PH = zero_empty(hidden_TH[order_P // slots])
    if experts.has_gate:
        hidden = experts._apply_gate(project(x_PH, "gate_up_proj"))
    else:
        hidden = experts.act_fn(project(x_PH, "up_proj"))
    y_PH = project(hidden, "down_proj")
    # Older transformers (5.16) state no such attribute.
    if getattr(experts, "has_post_expert_norm", False):
        y_PH = experts.post_expert_norm(y_PH)
    weighted_PH = zero_empty(y_PH * weights_TK.reshape(-1)[order_P].unsqueeze(-1))
    back_P = torch.empty_like(order_P).scatter_(
        0, order_P, torch.arange(order_P.numel(), device=flat_P.device)
    )
    out_TH = weighted_PH[back_P].view(hidden_TH.shape[0], slots, -1).sum(dim=1)
    return out_TH.to(hidden_TH.dtype)
