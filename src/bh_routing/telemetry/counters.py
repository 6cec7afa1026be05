"""The buffers behind `bh_routing.telemetry.figures.Telemetry`: one router's bins, and calls that wait.

Shape legend and layout of the bins: see `bh_routing.telemetry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._threads import Lock
from ..decision.price import Step
from ..decision.select import not_finite
from ..decision.types import RoutingDecision
from ..errors import InvalidInputError
from ..policies import RoutingContext
from ..stats.pvalues import at_least_float32
from .derived import LayerSums
from .steps import StepCounts, Waiting

# Calls wait until they are so many, or hold so many tokens: counting them together costs what counting one does.
CALLS, TOKENS = 64, 512


def recomputing() -> bool:
    """Whether this forward is gradient checkpointing's repetition: within a backward pass autograd has a graph task."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


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
        self.waiting: list[Waiting] = []
        self.expert_bytes = context.expert_bytes
        self.waiting_tokens = 0
        self.lock = Lock()  # threads may share the model
        device = context.device
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.counts = torch.zeros(self.padding + 1, dtype=torch.int64, device=device)
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.sums = torch.zeros(self.padding + 1, dtype=dtype, device=device)
            self.calls = torch.zeros((), dtype=torch.int64, device=device)
            self.steps = StepCounts(self.stride, min(context.num_experts, context.empty), device)
            self.one = torch.ones(1, dtype=torch.int64, device=device)
            self.padding_bin = torch.full((), self.padding, dtype=torch.int64, device=device)
            self.first_bin_N = torch.tensor(
                [0] * slots + [self.stride] * context.top_k + [cells], dtype=torch.int64, device=device
            )

    @property
    def shape(self) -> tuple[str, int, int, int, int]:
        """What two layers must share to be added."""
        return (self.path, self.num_experts, self.empty, self.top_k, self.slots)

    def update(
        self,
        decision: RoutingDecision,
        mask_T: Tensor | None,
        logits_TE: Tensor | None,
        step: Step | None = None,
    ) -> None:
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
        came_now = Waiting(decision, weights_TK, fallback_T, mask_T, step)
        if in_graph(self.counts):
            self.count([came_now])
            return
        with self.lock:
            if tokens >= TOKENS:
                self.count([came_now])
                return
            # A copy: the model may write to the weights it is given.
            self.waiting.append(came_now._replace(weights_TK=weights_TK.clone()))
            self.waiting_tokens += tokens
            if len(self.waiting) >= CALLS or self.waiting_tokens >= TOKENS:
                self.catch_up()

    def catch_up(self) -> None:
        """Count the calls that are waiting."""
        with self.lock:
            if self.waiting:
                waiting = list(self.waiting)
                self._forget_waiting()
                with torch.no_grad():
                    self.count(waiting)

    def _forget_waiting(self) -> None:
        self.waiting.clear()
        self.waiting_tokens = 0

    def count(self, calls: Sequence[Waiting]) -> None:
        """Add some calls to the buffers."""

        def column(name: str) -> Tensor:
            return _joined([getattr(call.decision, name) for call in calls])

        raw_T = column("raw_counts_T").masked_fill(_joined([c.fallback_T for c in calls]), self.width - 1)
        cell_T = torch.add(raw_T, column("counts_T"), alpha=self.width)
        own_TK = torch.add(column("own_experts_TK"), column("dropped_TK"), alpha=self.stride)
        bin_TN = torch.cat((column("experts_TK"), own_TK, cell_T.unsqueeze(-1)), -1) + self.first_bin_N
        if any(call.mask_T is not None for call in calls):
            mask_T = _joined([torch.ones_like(c.fallback_T) if c.mask_T is None else c.mask_T for c in calls])
            bin_TN = torch.where(mask_T.unsqueeze(-1), bin_TN, self.padding_bin)

        weights_TK = at_least_float32(_joined([call.weights_TK for call in calls]))
        share_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        entropy_T1 = torch.special.entr(share_TK).sum(-1, keepdim=True)
        value_TN = torch.cat((weights_TK, column("own_weights_TK"), entropy_T1), -1)
        # A row of zeros has share 0 / 0, a token with NaN logits NaN weights: either would stay in the sums.
        value_TN = value_TN.to(self.sums.dtype).nan_to_num_(0.0, 0.0, 0.0)

        bins = bin_TN.view(-1)
        self.counts.index_add_(0, bins, self.one.expand(bins.shape[0]))
        self.sums.index_add_(0, bins, value_TN.view(-1))
        self.calls.add_(len(calls))
        self.steps.count(calls)

    def reset(self) -> None:
        with self.lock:
            self._forget_waiting()
            for buffer in (self.counts, self.sums, self.calls, self.steps.counts):
                buffer.zero_()

    def add(self, other: LayerCounters) -> None:
        other.catch_up()
        with other.lock:
            held = (other.counts, other.sums, other.calls, other.steps.counts)
            more = [buffer.clone() for buffer in held]
        with self.lock:
            self.catch_up()
            held = (self.counts, self.sums, self.calls, self.steps.counts)
            for mine, theirs in zip(held, more, strict=True):
                mine.add_(theirs.to(mine))

    def read(self) -> LayerSums:
        """Copy the buffers to the host and name their parts."""
        with self.lock:
            self.catch_up()
            counts, sums, calls = self.counts.cpu().clone(), self.sums.cpu().double().clone(), int(self.calls)
            loads, own_loads, shared = self.steps.read()
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
            load_histogram=loads,
            own_load_histogram=own_loads,
            shared_pairs=shared,
            expert_bytes=self.expert_bytes,
        )
