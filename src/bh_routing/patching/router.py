"""The patch of a router: its choice goes through a policy.

Shape legend: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._threads import PerThread
from ..decision.types import RoutingDecision
from ..errors import PatchError
from ..policies import RoutingContext, RoutingPolicy, check_decision
from ..telemetry.counters import in_graph, recomputing
from ..telemetry.figures import Telemetry
from . import experts as skip_aware
from .calls import Forwards
from .instance import InstancePatch
from .plan import LayerPlan


class Watchers(list[Callable[..., None]]):
    """Functions ``f(router, context, decision, logits_TE)`` that see every decision of a patched model, with its graph.

    A copy or a pickle of the model is not watched: watchers belong to whoever added them.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Watchers:
        return Watchers()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watchers, ()


class Link(PerThread):
    """What a router's patch hands to the patch of the experts beside it, within one forward of one thread."""

    def __init__(self) -> None:
        self.decision: RoutingDecision | None = None


class RouterPatch(InstancePatch):
    """Runs the router, lets the policy decide, counts, and returns the router's value with that decision.

    What leaves it is always an index of an expert that exists. A dropped slot keeps its index and gets weight -0.0:
    weight 0 to everybody, and to experts that skip the sign to leave the pair out (`bh_routing.patching.experts`).
    """

    def __init__(
        self,
        layer: LayerPlan,
        policy: RoutingPolicy,
        *,
        forwards: Forwards,
        telemetry: Telemetry | None,
        link: Link | None,
        change: bool,
        watchers: Watchers,
    ) -> None:
        super().__init__(layer.call.module, layer.call.attribute)
        # PEFT copies a router by itself: that must not take its model along.
        self.layer = replace(layer, owner=None, block=None, experts=None)
        self.has_owner = layer.owner is not None
        self.context, self.policy, self.forwards = layer.context, policy, forwards
        self.telemetry, self.link = telemetry, link
        self.change, self.watchers = change, watchers
        self.checked = False  # the first decision is looked at, later ones are trusted

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "transformers" in sys.modules:  # a fresh process does not know the experts' implementation yet
            skip_aware.register()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        forwards = self.forwards
        call = forwards.here.call
        if not (forwards.is_open and not forwards.began_before if call is None else call.routed):
            return self.inner(*args, **kwargs)
        if call is None and self.has_owner and self.change and not self.policy.causal and recomputing():
            raise PatchError(
                f"{self.layer.path}: the routing policy looks at a whole batch, and a forward that is repeated in the "
                "backward pass (gradient checkpointing) does not tell which: expected the model's own "
                "gradient_checkpointing_enable(), or a causal policy."
            )
        outputs = self.inner(*args, **kwargs)
        logits_TE, weights_TK, experts_TK = self.layer.read(outputs, args, kwargs)
        if logits_TE.device != self.context.device:
            raise PatchError(
                f"{self.layer.path}: expected router logits on {self.context.device}, where it was patched, got "
                f"{logits_TE.device}; unpatch the model before moving it, and patch it anew."
            )
        context = forwards.complete(self.context, logits_TE)
        factors_E = self.layer.expert_factors_E
        if factors_E is None:
            decision = self.policy.decide(logits_TE, weights_TK, experts_TK, context)
        else:
            decision = decide_with_factors(self.policy, logits_TE, weights_TK, experts_TK, context, factors_E)
        if not in_graph(logits_TE) and not self.checked:
            check_decision(decision, self.policy, weights_TK, experts_TK, context)
            self.checked = True
        if self.telemetry is not None:
            self.telemetry.update(context, decision, logits_TE)
        for watcher in self.watchers:
            watcher(self.layer.router, context, decision, logits_TE)
        if not self.change:
            return outputs
        if self.link is not None:
            if decision.logits_TE is not logits_TE:
                decision = replace(decision, logits_TE=logits_TE)  # which a compensation may follow
            self.link.decision = decision
        return self.layer.replace(outputs, args, kwargs, *visible(decision, experts_TK, context.empty))


def visible(decision: RoutingDecision, own_experts_TK: Tensor, empty: int) -> tuple[Tensor, Tensor]:
    """Weights and indices as the model gets them: every index names an expert, and an empty slot has weight -0.0."""
    if decision.in_place:  # marked already, and every kept slot is where the router had it
        return decision.weights_TK, own_experts_TK
    chosen_TK = decision.experts_TK
    empty_TK = chosen_TK == empty
    spare_TK = own_experts_TK if chosen_TK.shape == own_experts_TK.shape else own_experts_TK[:, :1]
    return decision.weights_TK.masked_fill(empty_TK, -0.0), torch.where(empty_TK, spare_TK, chosen_TK)


def decide_with_factors(
    policy: RoutingPolicy,
    logits_TE: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    context: RoutingContext,
    factors_E: Tensor,
) -> RoutingDecision:
    """Decide on weights before a router's factors per expert, and put the factors back.

    Such a router renormalises first and multiplies afterwards: the rule that renormalises over the kept experts
    must see the weights in between. Rows of which nothing was dropped stay the router's own, bit for bit.
    """
    factors_TK = factors_E.to(weights_TK.dtype)[experts_TK]
    decision = policy.decide(logits_TE, weights_TK / factors_TK, experts_TK, context)
    whole_T1 = ~decision.dropped_TK.any(-1, keepdim=True)
    return replace(
        decision,
        weights_TK=torch.where(whole_T1, weights_TK, decision.weights_TK * factors_TK),
        own_weights_TK=weights_TK,
    )
