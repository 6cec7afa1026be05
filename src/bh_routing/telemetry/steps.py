"""What decoding steps read: how many experts are loaded, beside how many the router's own choice would have loaded.

Shape legend: T tokens, S steps, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
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
        counted = [(call, call.step) for call in calls if call.step is not None]
        if not counted:
            return
        calls = [call for call, _ in counted]
        device, steps, places = self.counts.device, 0, []
        for (batch, more), group in groupby(step.shape for _, step in counted):  # nearly always one
            num = len(list(group)) * more
            step_CBS = torch.arange(steps, steps + num, device=device).view(-1, 1, more)
            places.append(step_CBS.expand(-1, batch, -1).flatten())
            steps += num
        step_T = torch.cat(places)
        for masks in ([call.mask_T for call in calls], [step.priced_T for _, step in counted]):
            if any(mask is not None for mask in masks):  # padding goes behind the last step
                mask_T = torch.cat(_filled(masks, [torch.ones_like(call.fallback_T) for call in calls]))
                step_T = step_T.masked_fill(~mask_T, steps)
        resident = [call.decision.resident_E for call in calls]
        free_SE = None
        if any(mask_E is not None for mask_E in resident):
            none_E = torch.zeros(self.real, dtype=torch.bool, device=device)
            free = zip(_filled(resident, [none_E] * len(calls)), counted, strict=True)
            free_SE = torch.cat([mask_E[: self.real].expand(step.shape[1], -1) for mask_E, (_, step) in free])
        any_S = step_T.new_zeros(steps + 1, dtype=torch.bool).index_fill(0, step_T, True)[:-1]

        def distinct(experts: list[Tensor]) -> Tensor:
            loaded = any_S.new_zeros((steps + 1) * self.stride)
            place_TK = step_T.unsqueeze(-1) * self.stride + torch.cat(experts)
            loaded_SE = loaded.index_fill(0, place_TK.flatten(), True).view(-1, self.stride)
            loaded_SE = loaded_SE[:-1, : self.real]
            return (loaded_SE if free_SE is None else loaded_SE & ~free_SE).sum(-1)

        loads_S = distinct([call.decision.experts_TK for call in calls])
        own_S = distinct([call.decision.own_experts_TK for call in calls])
        bins = torch.cat((loads_S, own_S + self.real + 1))
        self.counts.index_add_(0, bins, any_S.repeat(2).long())
        shared = [call.decision.shared_TK for call in calls if call.decision.shared_TK is not None]
        if shared:
            self.counts[-1] += torch.cat(shared).sum()

    def read(self) -> tuple[list[int], list[int], int]:
        """Steps by loads, by own loads; pairs served by loads that others paid for."""
        counts = self.counts.tolist()
        return counts[: self.real + 1], counts[self.real + 1 : -1], counts[-1]


def _filled(masks: Sequence[Tensor | None], otherwise: Sequence[Tensor]) -> list[Tensor]:
    return [other if mask is None else mask for mask, other in zip(masks, otherwise, strict=True)]
