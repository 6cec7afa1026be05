"""What decoding steps read: how many experts are loaded, beside how many the router's own choice would have loaded.

Shape legend: T tokens, S steps, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..decision.price import Step
from ..decision.types import RoutingDecision


class Waiting(NamedTuple):
    """A call that is to be counted: its decision, a copy of the decided weights, and what its context says."""

    decision: RoutingDecision
    weights_TK: Tensor
    fallback_T: Tensor
    mask_T: Tensor | None
    step: Step | None


class StepCounts:
    """Counts of one layer's steps in one buffer: steps by loads, [E + 1], by own loads, [E + 1], and shared pairs.

    A step all of whose tokens are padding counts nowhere; resident experts are no loads.

    Parameters
    ----------
    stride, real : int
        Indices that a slot may carry, and how many of them name an expert.
    """

    def __init__(self, stride: int, real: int, device: torch.device) -> None:
        self.stride, self.real = stride, real
        self.counts = torch.zeros(2 * real + 3, dtype=torch.int64, device=device)

    def count(self, calls: Sequence[Waiting]) -> None:
        """Add the steps of some calls."""
        calls = [call for call in calls if call.step is not None]
        if not calls:
            return
        device, steps = self.counts.device, 0
        of_T, free = [], []
        for decision, _, fallback_T, mask_T, step in calls:
            assert step is not None
            batch, more = step.shape
            step_T = torch.arange(steps, steps + more, device=device).repeat(batch)
            steps += more
            of_T.append((step_T, *(mask for mask in (mask_T, step.priced_T) if mask is not None)))
            free_E = decision.resident_E
            if free_E is None:
                free_E = fallback_T.new_zeros(self.real)
            free.append(free_E[: self.real].expand(more, -1))
        nowhere = steps  # where padding goes
        step_T = torch.cat([_masked(step_T, masks, nowhere) for step_T, *masks in of_T])
        free_SE = torch.cat(free)
        any_S = step_T.new_zeros(steps + 1, dtype=torch.bool).index_fill(0, step_T, True)[:-1]

        def distinct(experts: list[Tensor]) -> Tensor:
            loaded = any_S.new_zeros((steps + 1) * self.stride)
            place_TK = step_T.unsqueeze(-1) * self.stride + torch.cat(experts)
            loaded_SE = loaded.index_fill(0, place_TK.flatten(), True).view(-1, self.stride)
            return (loaded_SE[:-1, : self.real] & ~free_SE).sum(-1)

        loads_S = distinct([call.decision.experts_TK for call in calls])
        own_S = distinct([call.decision.own_experts_TK for call in calls])
        bins = torch.cat((loads_S, own_S + self.real + 1))
        self.counts.index_add_(0, bins, any_S.repeat(2).long())
        for call in calls:
            if call.decision.shared_TK is not None:
                self.counts[-1] += call.decision.shared_TK.sum()

    def read(self) -> tuple[list[int], list[int], int]:
        """Steps by loads, by own loads; pairs served by loads that others paid for."""
        counts = self.counts.tolist()
        return counts[: self.real + 1], counts[self.real + 1 : -1], counts[-1]


def _masked(step_T: Tensor, masks: list[Tensor], nowhere: int) -> Tensor:
    for mask_T in masks:
        step_T = step_T.masked_fill(~mask_T, nowhere)
    return step_T
