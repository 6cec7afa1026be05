"""The buffers behind `bh_routing.telemetry.figures.Telemetry`: one router's bins, calls that wait, figures derived from sums.

Shape legend and layout of the bins: see `bh_routing.telemetry`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._threads import Lock
from ..decision.select import not_finite
from ..decision.types import RoutingDecision
from ..errors import InvalidInputError
from ..policies import RoutingContext
from ..stats.pvalues import at_least_float32

# Calls wait until they are so many, or hold so many tokens: counting them together costs what counting one does.
CALLS, TOKENS = 64, 512


def recomputing() -> bool:
    """Whether this forward is gradient checkpointing's repetition: within a backward pass autograd has a graph task."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Call(NamedTuple):
    """What is counted of one call; fields as in `RoutingDecision`."""

    experts_TK: Tensor
    weights_TK: Tensor
    own_experts_TK: Tensor
    own_weights_TK: Tensor
    dropped_TK: Tensor
    counts_T: Tensor
    raw_counts_T: Tensor
    fallback_T: Tensor
    mask_T: Tensor | None


def _call(decision: RoutingDecision, weights_TK: Tensor, fallback_T: Tensor, mask_T: Tensor | None) -> _Call:
    return _Call(
        experts_TK=decision.experts_TK,
        weights_TK=weights_TK,
        own_experts_TK=decision.own_experts_TK,
        own_weights_TK=decision.own_weights_TK,
        dropped_TK=decision.dropped_TK,
        counts_T=decision.counts_T,
        raw_counts_T=decision.raw_counts_T,
        fallback_T=fallback_T,
        mask_T=mask_T,
    )


def _together(calls: Sequence[_Call]) -> _Call:
    """Several calls as one."""
    columns = dict(zip(_Call._fields, zip(*calls, strict=True), strict=True))
    masks = columns.pop("mask_T")
    if any(mask is not None for mask in masks):
        whole = [torch.ones_like(c.fallback_T) if c.mask_T is None else c.mask_T for c in calls]
    else:
        whole = []
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    return _Call(**joined, mask_T=torch.cat(whole) if whole else None)


def in_graph(buffer: Tensor) -> bool:
    """Whether this call is being compiled or captured, so that it must write to the buffers itself."""
    return torch.compiler.is_compiling() or (buffer.is_cuda and torch.cuda.is_current_stream_capturing())


class LayerCounters:
    """The buffers of one router; the layout of the bins is in the module docstring."""

    def __init__(self, context: RoutingContext, slots: int) -> None:
        self.path, self.index, self.top_k, self.slots = context.path, context.index, context.top_k, slots
        self.num_experts, self.empty = context.num_experts, context.empty
        self.stride = max(context.num_experts, context.empty + 1)  # bins of one set of experts
        self.columns = slots + context.top_k + 1
        self.width = context.num_experts + 2  # raw counts 0..E, then fallback
        cells = 3 * self.stride
        self.padding = cells + (slots + 1) * self.width
        self.waiting: list[tuple[RoutingDecision, Tensor, Tensor, Tensor | None]] = []
        self.waiting_tokens = 0
        self.lock = Lock()  # threads may share the model
        device = context.device
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.counts = torch.zeros(self.padding + 1, dtype=torch.int64, device=device)
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.sums = torch.zeros(self.padding + 1, dtype=dtype, device=device)
            self.calls = torch.zeros((), dtype=torch.int64, device=device)
            self.one = torch.ones(1, dtype=torch.int64, device=device)
            self.padding_bin = torch.full((), self.padding, dtype=torch.int64, device=device)
            self.first_bin_N = torch.tensor(
                [0] * slots + [self.stride] * context.top_k + [cells], dtype=torch.int64, device=device
            )

    @property
    def shape(self) -> tuple[str, int, int, int, int]:
        """What two layers must share to be added."""
        return (self.path, self.num_experts, self.empty, self.top_k, self.slots)

    def update(self, decision: RoutingDecision, mask_T: Tensor | None, logits_TE: Tensor | None) -> None:
        came = (decision.experts_TK.shape[-1], decision.own_experts_TK.shape[-1])
        if came != (self.slots, self.top_k):
            raise InvalidInputError(
                f"router {self.path}: telemetry was made for {self.slots} slots in the decision and "
                f"{self.top_k} of the router's own, got {came[0]} and {came[1]}."
            )
        fallback_T = decision.fallback_T
        if fallback_T is None:
            if logits_TE is None:
                fallback_T = torch.zeros_like(decision.counts_T, dtype=torch.bool)
            else:
                fallback_T = not_finite(logits_TE).squeeze(-1)
        weights_TK, own_weights_TK = decision.weights_TK, decision.own_weights_TK
        if weights_TK.requires_grad or own_weights_TK.requires_grad:  # neither keep nor compute a graph
            weights_TK, own_weights_TK = weights_TK.detach(), own_weights_TK.detach()
            decision = replace(decision, weights_TK=weights_TK, own_weights_TK=own_weights_TK)
        tokens = len(fallback_T)
        if in_graph(self.counts):
            self.count(_call(decision, weights_TK, fallback_T, mask_T), 1)
            return
        with self.lock:
            if tokens >= TOKENS:
                self.count(_call(decision, weights_TK, fallback_T, mask_T), 1)
                return
            # A copy: the model may write to the weights it is given.
            self.waiting.append((decision, weights_TK.clone(), fallback_T, mask_T))
            self.waiting_tokens += tokens
            if len(self.waiting) >= CALLS or self.waiting_tokens >= TOKENS:
                self.catch_up()

    def catch_up(self) -> None:
        """Count the calls that are waiting."""
        with self.lock:
            if self.waiting:
                calls = [_call(*waiting) for waiting in self.waiting]
                self._forget_waiting()
                with torch.no_grad():
                    self.count(_together(calls), len(calls))

    def _forget_waiting(self) -> None:
        self.waiting.clear()
        self.waiting_tokens = 0

    def count(self, call: _Call, calls: int) -> None:
        """Add some tokens to the buffers."""
        raw_T = call.raw_counts_T.masked_fill(call.fallback_T, self.width - 1)
        cell_T = torch.add(raw_T, call.counts_T, alpha=self.width)
        own_TK = torch.add(call.own_experts_TK, call.dropped_TK, alpha=self.stride)
        bin_TN = torch.cat((call.experts_TK, own_TK, cell_T.unsqueeze(-1)), -1) + self.first_bin_N
        if call.mask_T is not None:
            bin_TN = torch.where(call.mask_T.unsqueeze(-1), bin_TN, self.padding_bin)

        weights_TK = at_least_float32(call.weights_TK)
        share_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        entropy_T1 = torch.special.entr(share_TK).sum(-1, keepdim=True)
        value_TN = torch.cat((weights_TK, call.own_weights_TK, entropy_T1), -1)
        # A row of zeros has share 0 / 0, a token with NaN logits NaN weights: either would stay in the sums.
        value_TN = value_TN.to(self.sums.dtype).nan_to_num_(0.0, 0.0, 0.0)

        bins = bin_TN.view(-1)
        self.counts.index_add_(0, bins, self.one.expand(bins.shape[0]))
        self.sums.index_add_(0, bins, value_TN.view(-1))
        self.calls.add_(calls)

    def reset(self) -> None:
        with self.lock:
            self._forget_waiting()
            for buffer in (self.counts, self.sums, self.calls):
                buffer.zero_()

    def add(self, other: LayerCounters) -> None:
        other.catch_up()
        with other.lock:
            more = [buffer.clone() for buffer in (other.counts, other.sums, other.calls)]
        with self.lock:
            self.catch_up()
            for mine, theirs in zip((self.counts, self.sums, self.calls), more, strict=True):
                mine.add_(theirs.to(mine))

    def read(self) -> LayerSums:
        """Copy the buffers to the host and name their parts."""
        with self.lock:
            self.catch_up()
            counts, sums, calls = self.counts.cpu().clone(), self.sums.cpu().double().clone(), int(self.calls)
        load, kept, dropped = counts[: 3 * self.stride].view(3, self.stride).unbind()
        weight, kept_weight, dropped_weight = sums[: 3 * self.stride].view(3, self.stride).unbind()
        cells = counts[3 * self.stride : self.padding].view(self.slots + 1, self.width)
        judged, fallback = cells[:, :-1], cells[:, -1]  # [S + 1, E + 1]: count, raw count
        entropy = sums[3 * self.stride : self.padding].view(self.slots + 1, self.width)[:, :-1]
        own = slice(self.num_experts)  # an empty slot of the router's own is no choice
        real = slice(min(self.num_experts, self.empty))
        return LayerSums(
            path=self.path,
            index=self.index,
            num_experts=self.num_experts,
            top_k=self.top_k,
            slots=self.slots,
            router_calls=calls,
            padding_tokens=int(counts[self.padding]) // self.columns,
            fallback_tokens=int(fallback.sum()),
            floor_tokens=int(judged.tril(-1).sum()),
            ceiling_tokens=int(judged.triu(1).sum()),
            count_histogram=cells.sum(1).tolist(),
            raw_count_histogram=judged.sum(0).tolist(),
            expert_load=load[real].tolist(),
            own_expert_load=(kept + dropped)[real].tolist(),
            dropped_load=dropped[real].tolist(),
            expert_weight=weight[real].tolist(),
            kept=int(kept[own].sum()),
            dropped=int(dropped[own].sum()),
            selected_weight=float(weight.sum()),
            own_weight=float(kept_weight.sum() + dropped_weight.sum()),
            lost_weight=float(dropped_weight.sum()),
            entropy=float(entropy.sum()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSums:
    """What one layer counted, on the host; names as in `Telemetry` where they are the same thing."""

    path: str
    index: int
    num_experts: int
    top_k: int
    slots: int
    router_calls: int
    padding_tokens: int
    fallback_tokens: int
    floor_tokens: int
    ceiling_tokens: int
    count_histogram: list[int]
    raw_count_histogram: list[int]
    expert_load: list[int]
    own_expert_load: list[int]
    dropped_load: list[int]
    expert_weight: list[float]
    kept: int  # slots of the router's own choice
    dropped: int
    selected_weight: float  # summed over tokens, as are the next three
    own_weight: float
    lost_weight: float
    entropy: float

    @property
    def tokens(self) -> int:
        return sum(self.count_histogram)


def figures(parts: Sequence[LayerSums]) -> dict[str, Any]:
    """The figures that a layer and the total share; NaN where one is not defined."""
    histogram = [0] * max((len(p.count_histogram) for p in parts), default=0)
    raw_total = 0
    for part in parts:
        raw_total += sum(raw * tokens for raw, tokens in enumerate(part.raw_count_histogram))
        for count, tokens in enumerate(part.count_histogram):
            histogram[count] += tokens
    decisions = sum(histogram)
    run = sum(count * tokens for count, tokens in enumerate(histogram))
    squares = sum(count**2 * tokens for count, tokens in enumerate(histogram))
    seen = [count for count, tokens in enumerate(histogram) if tokens] or [0]

    def total(name: str) -> Any:
        return sum(getattr(p, name) for p in parts)

    fallback, kept = total("fallback_tokens"), total("kept")
    own = kept + total("dropped")
    return {
        "router_calls": total("router_calls"),
        "tokens": max((p.tokens for p in parts), default=0),
        "padding_tokens": max((p.padding_tokens for p in parts), default=0),
        "decisions": decisions,
        "fallback_tokens": fallback,
        "mean_experts": _ratio(run, decisions),
        # in integers until the last step: no cancellation
        "std_experts": math.sqrt(_ratio(decisions * squares - run**2, decisions**2)),
        "min_experts": seen[0],
        "max_experts": seen[-1],
        "share_at_min": _ratio(histogram[seen[0]] if histogram else 0, decisions),
        "share_at_max": _ratio(histogram[seen[-1]] if histogram else 0, decisions),
        "share_without_expert": _ratio(histogram[0] if histogram else 0, decisions),
        "mean_raw_count": _ratio(raw_total, decisions - fallback),
        "floor_tokens": total("floor_tokens"),
        "ceiling_tokens": total("ceiling_tokens"),
        "share_floor": _ratio(total("floor_tokens"), decisions),
        "share_ceiling": _ratio(total("ceiling_tokens"), decisions),
        "share_saved": 1.0 - _ratio(run, own),
        "mean_selected_weight": _ratio(total("selected_weight"), decisions),
        "mean_own_weight": _ratio(total("own_weight"), decisions),
        "mean_lost_weight": _ratio(total("lost_weight"), decisions),
        "lost_weight_share": _ratio(total("lost_weight"), total("own_weight")),
        "mean_entropy": _ratio(total("entropy"), decisions - fallback),
        "own_kept_share": _ratio(kept, own),
        "decided_own_share": _ratio(kept, run),
        "jaccard": _ratio(kept, own + run - kept),
        "unused_experts": sum(p.expert_load.count(0) for p in parts),
        "own_unused_experts": sum(p.own_expert_load.count(0) for p in parts),
        "count_histogram": histogram,
    }


def layer_figures(sums: LayerSums) -> dict[str, Any]:
    names = ("path", "index", "num_experts", "top_k", "slots")
    lists = ("raw_count_histogram", "expert_load", "own_expert_load", "dropped_load", "expert_weight")
    return (
        {name: getattr(sums, name) for name in names}
        | figures([sums])
        | _balance("", sums.expert_load)
        | _balance("own_", sums.own_expert_load)
        | {name: getattr(sums, name) for name in lists}
    )


def total_figures(sums: Sequence[LayerSums]) -> dict[str, Any]:
    silent = [s.path for s in sums if not s.router_calls]
    return figures(sums) | {"layers": len(sums), "silent_layers": silent}


def _balance(prefix: str, load_E: Sequence[int]) -> dict[str, float]:
    """How evenly the experts are used: largest over mean, standard deviation over mean."""
    num, total = len(load_E), sum(load_E)
    spread = num * sum(load**2 for load in load_E) - total**2
    return {
        f"{prefix}load_imbalance": _ratio(max(load_E) * num, total),
        f"{prefix}load_cv": math.sqrt(_ratio(spread, total**2)),
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def defined(value: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: defined(item) for key, item in value.items()}
    if isinstance(value, list):
        return [defined(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
