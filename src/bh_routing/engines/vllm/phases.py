"""What is counted by phase: experts, loads, floor and ceiling, of tokens of prompts and of generated ones. No vLLM in here.

Shape legend: T tokens, P the two phases, S indices that a slot may carry, K slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...decision.types import RoutingDecision
from ...telemetry.counters import CALLS, TOKENS, in_graph
from .step import DECODE, PADDING

PHASES = ("prefill", "decode")
FIGURES = ("decisions", "experts", "floor", "ceiling", "steps", "loads")


class PhaseCounts:
    """One layer's sums by phase.

    ======================== =====================================================================
    decisions                tokens that the layer decided for
    experts                  experts that they ran, added over them
    floor, ceiling           of them: min_k kept more than was called for; max_k kept less
    steps                    forwards with tokens of that phase
    loads                    distinct experts that those tokens of a forward run, added over forwards
    ======================== =====================================================================

    Parameters
    ----------
    num_experts, empty : int
        E, and the index of an empty slot.
    """

    def __init__(self, num_experts: int, empty: int, device: torch.device) -> None:
        self.num_experts, self.stride = num_experts, max(num_experts, empty + 1)
        self.sums = torch.zeros(len(PHASES), len(FIGURES), dtype=torch.int64, device=device)
        self.waiting: list[tuple[RoutingDecision, Tensor]] = []
        self.tokens = 0

    def update(self, decision: RoutingDecision, phase_T: Tensor) -> None:
        """Count one call; ``phase_T``: `step.Step.phase_T` of its tokens, which may change afterwards."""
        if in_graph(self.sums):
            self._count([(decision, phase_T)])
            return
        self.waiting.append((decision, phase_T.clone()))
        self.tokens += len(phase_T)
        if len(self.waiting) >= CALLS or self.tokens >= TOKENS:
            self.catch_up()

    def catch_up(self) -> None:
        """Count the calls that are waiting."""
        if self.waiting:
            waiting, self.waiting, self.tokens = self.waiting, [], 0
            self._count(waiting)

    def _count(self, calls: list[tuple[RoutingDecision, Tensor]]) -> None:
        phase_T = torch.cat([phase_T for _, phase_T in calls])
        counts_T = torch.cat([decision.counts_T for decision, _ in calls])
        raw_T = torch.cat(
            [
                d.raw_counts_T if d.fallback_T is None else d.raw_counts_T.where(~d.fallback_T, d.counts_T)
                for d, _ in calls
            ]
        )
        real_T = phase_T != PADDING
        place_T = (phase_T >= DECODE).long()
        floor_T, ceiling_T = counts_T > raw_T, counts_T < raw_T
        rows_TF = torch.stack(
            (torch.ones_like(counts_T), counts_T, floor_T, ceiling_T), -1
        ) * real_T.unsqueeze(-1)
        self.sums[:, :4].index_add_(0, place_T, rows_TF)
        # Which experts each call's tokens of a phase run: one flag for each (call, phase, index).
        steps = len(calls)
        sizes = torch.tensor([len(phase_T) for _, phase_T in calls])
        call_T = torch.repeat_interleave(sizes).to(phase_T.device) if steps > 1 else torch.zeros_like(place_T)
        group_T = torch.where(real_T, call_T * 2 + place_T, 2 * steps)
        experts_TK = torch.cat([decision.experts_TK for decision, _ in calls])
        seen = torch.zeros((2 * steps + 1) * self.stride, dtype=torch.bool, device=phase_T.device)
        seen.index_fill_(0, (group_T.unsqueeze(-1) * self.stride + experts_TK).flatten(), True)
        seen_CPS = seen[: 2 * steps * self.stride].view(steps, 2, self.stride)
        any_CP = torch.zeros(2 * steps + 1, dtype=torch.bool, device=phase_T.device).index_fill_(
            0, group_T, True
        )
        self.sums[:, 4].add_(any_CP[: 2 * steps].view(steps, 2).sum(0))
        self.sums[:, 5].add_(seen_CPS[..., : self.num_experts].sum((0, 2)))

    def reset(self) -> None:
        """Set everything to zero."""
        self.waiting, self.tokens = [], 0
        self.sums.zero_()


def by_phase(layers: Iterable[PhaseCounts]) -> dict[str, dict[str, Any]]:
    """The sums over layers, by phase and by the names of `PhaseCounts`, and what follows from them.

    ``mean_experts`` (per token and layer), ``mean_loads`` (per layer and forward), ``share_floor``, ``share_ceiling``: None
    where there was no token.
    """
    total = torch.zeros(len(PHASES), len(FIGURES), dtype=torch.int64)
    for layer in layers:
        layer.catch_up()
        total += layer.sums.cpu()
    told: dict[str, dict[str, Any]] = {}
    for phase, values in zip(PHASES, total.tolist(), strict=True):
        sums: dict[str, Any] = dict(zip(FIGURES, values, strict=True))
        ratios = {
            "mean_experts": ("experts", "decisions"),
            "mean_loads": ("loads", "steps"),
            "share_floor": ("floor", "decisions"),
            "share_ceiling": ("ceiling", "decisions"),
        }
        told[phase] = sums | {name: sums[a] / sums[b] if sums[b] else None for name, (a, b) in ratios.items()}
    return told
