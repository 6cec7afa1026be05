"""How strongly the compensation is applied: where the routed model predicts most like the model itself.

The fit of the compensation makes the squared error of each layer's output least. What the model then predicts is
another matter: on olmoe-nano three quarters of it are best, on the text it was fitted to and on others (docs/calibration.md).
So a calibration measures it: the Kullback-Leibler divergence of the routed model's predictions from the model's own,
at scale 0, 1/2 and 1, and the vertex of the parabola through the three.

Shape legend: B windows of a batch, S tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..patching import PatchPlan, RoutingPatch
from ..stats.divergence import kl_of_logits
from ..text import Batch
from .calibration import Calibration
from .dropping import dropping_policy
from .forwards import forward, gather

SCALES = (0.0, 0.5, 1.0)
TOKENS = 8192  # how many are measured on, about, and at most
SHARE = 8  # and at most one in so many of the text's


class SpreadWindows:
    """Some windows of a text that is read once, evenly over it: the first of every n-th batch, n a power of two.

    Memory stays that of twice as many ``tokens``, and all processes together keep what a single one would.
    """

    def __init__(self, window: int, tokens: int | None = None) -> None:
        self.window, self.limit = window, max(1, (TOKENS if tokens is None else tokens) // window)
        self.every, self.batches = 1, 0
        self.held: list[Batch] = []

    def add(self, batch: Batch) -> None:
        """Keep the batch's first window, if it is one of every n-th."""
        self.batches = batch.index + 1
        if self.batches > 2 * self.limit * self.every:
            self.every *= 2
            self.held = [held for held in self.held if held.index % self.every == 0]
        if batch.index % self.every == 0:
            self.held.append(batch.windows([0]))

    def state(self) -> dict[str, Any]:
        """What is kept, as tensors and numbers."""
        held = [
            {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in vars(batch).items()}
            for batch in self.held
        ]
        return {"every": self.every, "batches": self.batches, "held": held}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.every, self.batches = state["every"], state["batches"]
        self.held = [
            Batch(**one | {name: one[name].numpy() for name in ("hashes", "documents")})
            for one in state["held"]
        ]

    def result(self, tokens: int, most: int | None = None) -> list[Batch]:
        """This process's share, given how many tokens the whole text had; of all shares at most so many tokens."""
        batches = max(gather(self.batches))
        limit = min(self.limit, max(1, tokens // SHARE // self.window))
        limit = limit if most is None else min(limit, max(1, most // self.window))
        every = max(gather(self.every))
        while math.ceil(batches / every) > limit:
            every *= 2
        return [held for held in self.held if held.index % every == 0]


def measure_scale(
    model: nn.Module,
    plan: PatchPlan,
    calibration: Calibration,
    batches: Sequence[Batch],
    advance: Callable[[int], None],
    routed: Callable[[Batch], Iterator[Tensor]] | None = None,
) -> float:
    """The scale from 0 to 1, a multiple of 0.01, with the least divergence; 1 for a model without logits.

    Parameters
    ----------
    model : nn.Module
        Unpatched, in evaluation mode; it is unpatched again afterwards, also after an exception.
    calibration : Calibration
        With mean outputs. Experts are dropped as in the second pass, at a third of the router's own number.
    batches : sequence of Batch
        This process's share of the text; the divergences of all processes are added up.
    advance : callable
        Called with the number of tokens after each batch.
    routed : callable, optional
        The routed model's logits of a batch at each of `SCALES`. Default: with the compensation by fixed vectors.
    """
    routed = _by_fixed_vectors(model, plan, calibration) if routed is None else routed
    sums = [0.0] * len(SCALES)
    for batch in batches:
        with torch.no_grad():
            own_BSV = forward(model, plan, batch, head=True)
            if own_BSV is None:
                sums = [math.nan] * len(SCALES)  # no early return: every process must reach the sum
                break
            for i, routed_BSV in enumerate(routed(batch)):
                sums[i] += divergence(own_BSV, routed_BSV, batch.mask)
        advance(batch.num_tokens)
    totals = [math.fsum(column) for column in zip(*gather(sums), strict=True)]
    return vertex(*totals)


def _by_fixed_vectors(
    model: nn.Module, plan: PatchPlan, calibration: Calibration
) -> Callable[[Batch], Iterator[Tensor]]:
    policy = dropping_policy(calibration, size=None)
    policy.bind(plan.contexts)
    full = calibration.compensation("mean", 1.0)
    patch = RoutingPatch(plan.compensated("model"), policy, compensations=full)

    def routed(batch: Batch) -> Iterator[Tensor]:
        try:
            patch.apply()
            for scale in SCALES:
                patch.set_compensations({path: one.scaled(scale) for path, one in full.items()})
                routed_BSV = forward(model, plan, batch, head=True)
                assert routed_BSV is not None
                yield routed_BSV
        finally:
            patch.remove()

    return routed


def divergence(own_BSV: Tensor, routed_BSV: Tensor, mask_BS: Tensor) -> float:
    """Sum over real tokens of KL(own || routed), nats; one window at a time, so that memory stays small."""
    total = 0.0
    for own_SV, routed_SV, mask_S in zip(own_BSV, routed_BSV, mask_BS.to(own_BSV.device), strict=True):
        each_S = kl_of_logits(own_SV, routed_SV)
        total += float(each_S[mask_S].double().sum())
    return total


def vertex(at_0: float, at_half: float, at_1: float) -> float:
    """Where the parabola through three divergences is least on [0, 1], to two decimals.

    >>> vertex(1.0, 0.2, 0.4)
    0.65
    >>> vertex(3.0, 2.0, 1.0)
    1.0
    """
    curvature = 2.0 * (at_0 - 2.0 * at_half + at_1)
    slope = -3.0 * at_0 + 4.0 * at_half - at_1
    if not math.isfinite(curvature + slope):
        return 1.0
    if curvature <= 0.0:
        return 1.0 if at_1 <= at_0 else 0.0
    return round(min(1.0, max(0.0, -slope / (2.0 * curvature))), 2)
