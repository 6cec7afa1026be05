"""What the patched routers did: exact counts per token and layer, gathered on the device, read on demand.

Shape legend: T tokens, E experts (width of the logits), K slots of the router's own choice, S slots of the
decision (S > K only when widening), N = S + K + 1 columns.

Every router call adds a table of N columns per token to two flat buffers, one of integers and one of floats,
both laid out in the same bins::

    column                         bin                                   integer   float
    decided slot (S columns)       the expert                            1         its decided weight
    own slot (K columns)           the expert, in the half for kept      1         its own weight
                                   or in the half for dropped slots
    the token (1 column)           cell (count, raw count)               1         entropy of its weights
    any column of padding          the last bin

so that one index and two scatters give everything; all figures are derived when somebody reads them. Small calls
(decoding) are kept until there are enough of them, or until somebody reads, and then counted together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InvalidInputError, MissingDependencyError
from .policies import RoutingContext
from .pvalues import at_least_float32
from .routing import RoutingDecision, not_finite

# Calls wait until they are so many, or hold so many tokens: counting them together costs what counting one does.
CALLS, TOKENS = 64, 512


class Telemetry:
    """Counts what the routers of one model did, exact per token, without synchronising with a GPU.

    Parameters
    ----------
    contexts : sequence of RoutingContext
        One per router; the buffers are allocated on each ``context.device``.
    slots : sequence of int
        Slots per token in the decision of each router (``policy.slots(context)``).

    Notes
    -----
    Tokens whose mask is False are counted as padding and nowhere else. A forward that gradient checkpointing
    repeats within the backward pass is not counted again (it is where checkpointing is wrapped around a module
    compiled by itself, whose graph cannot know; compile around the checkpointing instead). Integers are exact;
    float sums are float64 (float32 on MPS, which has no float64); a weight that is not finite counts as 0.

    `to_dict` returns ``{"layers": [...], "total": {...}}`` of plain Python values; what is not defined (a mean
    over no tokens) is None. Keys of a layer and, unless marked *, of the total, over all tokens of all layers:

    ======================== =====================================================================
    path*, index*            the router's module path and position
    num_experts*, top_k*     E and K
    slots*                   S, slots per token in the decision
    router_calls             calls of the router
    tokens                   tokens seen without padding (total: of the layer that saw most)
    padding_tokens           tokens that the mask left out (total: of the layer that left out most)
    decisions                tokens, added over layers: what every mean of the total is over
    fallback_tokens          tokens with non-finite logits, which kept the router's own choice
    mean_experts             experts per token
    std_experts              its standard deviation over tokens (population)
    min_experts, max_experts smallest and largest count seen
    share_at_min             share of tokens with the smallest count seen
    share_at_max             share of tokens with the largest count seen
    mean_raw_count           what the procedure rejected, before the clamp (without fallback tokens)
    floor_tokens             tokens where min_k bound: count above the raw count (without fallback tokens)
    ceiling_tokens           tokens where max_k bound: count below the raw count (without fallback tokens)
    share_floor              floor_tokens as a share of the tokens
    share_ceiling            ceiling_tokens as a share of the tokens
    share_saved              1 - experts run / experts of the router's own choice; negative when widening
    mean_selected_weight     sum of a token's weights as decided
    mean_own_weight          sum of the weights of the router's own choice
    mean_lost_weight         sum of the router's own weights of what was dropped
    lost_weight_share        mean_lost_weight / mean_own_weight
    mean_entropy             entropy of the decided weights as a distribution, nats (without fallback tokens)
    own_kept_share           share of the router's own choice that was kept
    decided_own_share        share of the decided experts that are the router's own choice (1 unless widening)
    jaccard                  kept / union of the router's own choice and the decision, pooled over tokens
    load_imbalance*          largest expert load over the mean load; 1 is perfectly even
    load_cv*                 standard deviation over mean of the expert load
    unused_experts           experts that no token reached (total: summed over layers)
    own_load_imbalance*      the same three figures for the router's own choice
    own_load_cv*
    own_unused_experts
    count_histogram          tokens by number of experts, [S + 1]
    raw_count_histogram*     tokens by raw count, [E + 1] (without fallback tokens)
    expert_load*             tokens by expert, [E]; empty slots are not counted
    own_expert_load*         the same for the router's own choice
    dropped_load*            tokens of which the expert was dropped, [E]
    expert_weight*           sum of decided weights by expert, [E]
    layers, silent_layers    total only: number of routers; paths of those that saw no call
    ======================== =====================================================================

    Where the logits are wider than the experts module (identity experts), [E] is the number of real experts.
    """

    def __init__(self, contexts: Sequence[RoutingContext], slots: Sequence[int]) -> None:
        if len(contexts) != len(slots):
            raise InvalidInputError(
                f"telemetry needs one number of slots per router, got {len(slots)} for {len(contexts)} routers."
            )
        self._layers = {c.path: _Layer(c, s) for c, s in zip(contexts, slots, strict=True)}
        if len(self._layers) != len(contexts):
            raise InvalidInputError(
                f"router paths must differ, got {len(contexts)} routers with {len(self._layers)} paths."
            )

    def update(
        self, context: RoutingContext, decision: RoutingDecision, logits_TE: Tensor | None = None
    ) -> None:
        """Count one router call.

        Parameters
        ----------
        context : RoutingContext
            Of the router; its ``mask_T`` may be None (every token counts) or bool [T].
        decision : RoutingDecision
        logits_TE : Tensor, optional
            Only used to find tokens with non-finite logits where the decision does not tell them.
        """
        # Within the backward pass autograd has a graph task: this forward is a recomputation, counted before.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        layer = self._layers.get(context.path)
        if layer is None:
            raise InvalidInputError(
                f"router {context.path} is none of the {len(self._layers)} that this telemetry was made for."
            )
        layer.update(decision, context.mask_T, logits_TE)

    def reset(self) -> None:
        """Set every counter to zero, in the same buffers."""
        for layer in self._layers.values():
            layer.reset()

    def merge(self, other: Telemetry) -> Telemetry:
        """Add the counters of another telemetry of the same routers; returns self.

        Raises
        ------
        InvalidInputError
            If the other has other routers, or the same with another number of experts or slots.
        """
        mine, theirs = ([x.shape for x in t._layers.values()] for t in (self, other))
        if mine != theirs:
            different = next((pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]), None)
            detail = f"{different[0]} and {different[1]}" if different else f"{len(mine)} and {len(theirs)}"
            raise InvalidInputError(
                "only telemetry of the same routers can be merged (path, experts, empty index, top_k, slots); "
                f"got {detail}."
            )
        for layer, more in zip(self._layers.values(), other._layers.values(), strict=True):
            layer.add(more)
        return self

    def silent_layers(self) -> list[str]:
        """Paths of the routers that saw no call."""
        return [path for path, layer in self._layers.items() if not layer.waiting and not int(layer.calls)]

    @property
    def mean_experts_per_token(self) -> float:
        """Experts per token, over all tokens of all layers; NaN before the first."""
        return self._total()["mean_experts"]

    @property
    def std_experts_per_token(self) -> float:
        """Population standard deviation of the same; NaN before the first."""
        return self._total()["std_experts"]

    @property
    def total_forward_passes(self) -> int:
        """Router calls, added over layers."""
        return self._total()["router_calls"]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding that went through the layer that saw most."""
        return self._total()["tokens"]

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values; the keys are in the class docstring."""
        sums = self._read()
        return _defined({"layers": [_layer_figures(s) for s in sums], "total": _total_figures(sums)})

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row per layer: the figures of `to_dict` that are single values.

        Raises
        ------
        MissingDependencyError
            Without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError(
                "to_frame needs pandas, which is not installed; pip install 'bh-routing[frame]', or use to_dict."
            ) from error
        rows = [_layer_figures(s) for s in self._read()]
        return pandas.DataFrame(
            [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]
        )

    def __repr__(self) -> str:
        sums = self._read()
        total = _total_figures(sums)
        rows = [(s.path, _figures([s])) for s in sums] + [("all", total)]
        width = max(len(name) for name, _ in rows)
        lines = [
            f"Telemetry: {total['layers']} routers, {total['router_calls']} calls, {total['tokens']} tokens",
            f"{'layer':<{width}} {'tokens':>9} {'mean':>6} {'std':>6} {'saved':>7}",
        ]
        lines += [
            f"{name:<{width}} {f['tokens']:>9} {f['mean_experts']:>6.2f} {f['std_experts']:>6.2f} "
            f"{f['share_saved']:>7.1%}"
            for name, f in rows
        ]
        return "\n".join(lines)

    def _read(self) -> list[_Sums]:
        return [layer.read() for layer in self._layers.values()]

    def _total(self) -> dict[str, Any]:
        return _total_figures(self._read())


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


def _in_graph(buffer: Tensor) -> bool:
    """Whether this call is being compiled or captured, so that it must write to the buffers itself."""
    return torch.compiler.is_compiling() or (buffer.is_cuda and torch.cuda.is_current_stream_capturing())


class _Layer:
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
        if tokens >= TOKENS or _in_graph(self.counts):
            self.count(_call(decision, weights_TK, fallback_T, mask_T), 1)
            return
        # A copy: the model may write to the weights it is given.
        self.waiting.append((decision, weights_TK.clone(), fallback_T, mask_T))
        self.waiting_tokens += tokens
        if len(self.waiting) >= CALLS or self.waiting_tokens >= TOKENS:
            self.catch_up()

    def catch_up(self) -> None:
        """Count the calls that are waiting."""
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
        self._forget_waiting()
        for buffer in (self.counts, self.sums, self.calls):
            buffer.zero_()

    def add(self, other: _Layer) -> None:
        self.catch_up()
        other.catch_up()
        self.counts.add_(other.counts.to(self.counts.device))
        self.sums.add_(other.sums.to(self.sums))
        self.calls.add_(other.calls.to(self.calls.device))

    def read(self) -> _Sums:
        """Copy the buffers to the host and name their parts."""
        self.catch_up()
        counts, sums = self.counts.cpu(), self.sums.cpu().double()
        load, kept, dropped = counts[: 3 * self.stride].view(3, self.stride).unbind()
        weight, kept_weight, dropped_weight = sums[: 3 * self.stride].view(3, self.stride).unbind()
        cells = counts[3 * self.stride : self.padding].view(self.slots + 1, self.width)
        judged, fallback = cells[:, :-1], cells[:, -1]  # [S + 1, E + 1]: count, raw count
        entropy = sums[3 * self.stride : self.padding].view(self.slots + 1, self.width)[:, :-1]
        own = slice(self.num_experts)  # an empty slot of the router's own is no choice
        real = slice(min(self.num_experts, self.empty))
        return _Sums(
            path=self.path,
            index=self.index,
            num_experts=self.num_experts,
            top_k=self.top_k,
            slots=self.slots,
            router_calls=int(self.calls),
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
class _Sums:
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


def _figures(parts: Sequence[_Sums]) -> dict[str, Any]:
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


def _layer_figures(sums: _Sums) -> dict[str, Any]:
    names = ("path", "index", "num_experts", "top_k", "slots")
    lists = ("raw_count_histogram", "expert_load", "own_expert_load", "dropped_load", "expert_weight")
    return (
        {name: getattr(sums, name) for name in names}
        | _figures([sums])
        | _balance("", sums.expert_load)
        | _balance("own_", sums.own_expert_load)
        | {name: getattr(sums, name) for name in lists}
    )


def _total_figures(sums: Sequence[_Sums]) -> dict[str, Any]:
    silent = [s.path for s in sums if not s.router_calls]
    return _figures(sums) | {"layers": len(sums), "silent_layers": silent}


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


def _defined(value: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


__all__ = ["Telemetry"]
