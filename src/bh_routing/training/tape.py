"""What the losses of training see of a forward: every router's call, with its graph.

Shape legend: T tokens, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..decision.select import not_finite
from ..decision.types import RoutingDecision
from ..policies import RoutingContext
from ..telemetry.counters import recomputing


class Seen(NamedTuple):
    """One call of a router; tensors with their graph. ``real_T`` is False for padding and non-finite logits."""

    logits_TE: Tensor
    experts_TK: Tensor
    own_experts_TK: Tensor
    counts_T: Tensor
    real_T: Tensor


class Tape:
    """A watcher that holds the calls of every router since they were last taken: all that have a graph, else the latest.

    A recomputation in the backward pass is not seen.
    """

    def __init__(self) -> None:
        self._with_graph: dict[str, list[Seen]] = {}
        self._latest: dict[str, list[Seen]] = {}
        self.training = False

    def __call__(
        self, router: nn.Module, context: RoutingContext, decision: RoutingDecision, logits_TE: Tensor
    ) -> None:
        if recomputing():
            return
        self.training = router.training
        seen = Seen(
            logits_TE,
            decision.experts_TK,
            decision.own_experts_TK,
            decision.counts_T,
            real_tokens(context, logits_TE),
        )
        if logits_TE.requires_grad:
            self._with_graph.setdefault(context.path, []).append(seen)
        else:
            self._latest[context.path] = [seen]

    @property
    def held(self) -> dict[str, list[Seen]]:
        """The calls by router path."""
        return self._with_graph or self._latest

    def take(self) -> dict[str, list[Seen]]:
        """The same, let go of here."""
        held = self.held
        self._with_graph, self._latest = {}, {}
        return held


def real_tokens(context: RoutingContext, logits_TE: Tensor) -> Tensor:
    """bool [T]: no padding, and finite logits."""
    real_T = ~not_finite(logits_TE.detach()).squeeze(-1)
    return real_T if context.mask_T is None else real_T & context.mask_T
