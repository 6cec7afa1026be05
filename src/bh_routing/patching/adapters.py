"""Adapters: where one kind of contract keeps what the common one returns from its router.

Shape legend: T tokens, E experts, K slots per token.

There is one adapter per kind of contract, found by structure, never by a family's name. What differs is where
the routing can be read and replaced (`RouterCall`), and which index the experts leave out (`ExpertIds`).
Score function, normalisation and scaling need no adapter: they are read off the numbers (`bh_routing.patching.contract`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ROUTING_METHOD = "route_tokens_to_experts"
LOGITS = "router_logits"

# (hidden states [T, H], expert indices [T, K], weights [T, K]) -> [T, H]
ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterCall:
    """The call that routes: a router's forward, or a method of its block that is given the logits.

    Attributes
    ----------
    module, attribute : nn.Module, str
        What is called.
    logits_argument : int or None
        Position of the logits among the call's arguments, where they are not among its results (DBRX).
    matrix : str
        Name of the module's matrix [E, H] that the logits are computed from again, where the call neither takes
        nor returns them (LongCat in older transformers).
    """

    module: nn.Module
    attribute: str = "forward"
    logits_argument: int | None = None
    matrix: str = ""

    def canonical(self, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> Any:
        """The call's outputs with the logits in front, where they are not among them."""
        if not isinstance(outputs, (tuple, list)):
            return outputs
        if self.matrix:
            hidden = args[0] if args else next(iter(kwargs.values()))
            weight_EH = self.module.get_parameter(self.matrix)
            logits_TE = linear(hidden.reshape(-1, hidden.shape[-1]).float(), weight_EH.float())
            return (logits_TE, *outputs)
        if self.logits_argument is None:
            return outputs
        if LOGITS in kwargs:
            return (kwargs[LOGITS], *outputs)
        return (args[self.logits_argument], *outputs)

    def original(self, outputs: Any) -> Any:
        """The reverse: what the caller expects to get."""
        return outputs if self.logits_argument is None and not self.matrix else tuple(outputs[1:])


def router_call(router: nn.Module, parent: nn.Module | None) -> RouterCall:
    """What routes at this site: the block's own routing method where it has one, else the router's forward."""
    method = getattr(type(parent), ROUTING_METHOD, None)
    if parent is not None and callable(method):
        names = list(inspect.signature(method).parameters)[1:]
        if LOGITS in names:
            return RouterCall(module=parent, attribute=ROUTING_METHOD, logits_argument=names.index(LOGITS))
    return RouterCall(module=router)


def with_logits_again(call: RouterCall) -> RouterCall | None:
    """The call with its logits computed anew from the router's one matrix; None if it has not exactly one."""
    matrices = [name for name, p in call.module.named_parameters() if p.dim() == 2]
    if call.attribute != "forward" or len(matrices) != 1:
        return None
    return RouterCall(module=call.module, matrix=matrices[0])


@dataclass(frozen=True, kw_only=True)
class ExpertIds:
    """Which indices an experts module knows.

    Attributes
    ----------
    empty : int
        Index of an empty slot: the first that names no expert.
    single_slot_fails : bool
        The module does not accept one slot per token: it gets a second one, of weight 0.
    filler : int or None
        An expert that computes nothing (identity), for that second slot.
    """

    empty: int
    single_slot_fails: bool = False
    filler: int | None = None

    @property
    def can_compact(self) -> bool:
        """Whether dropped pairs can be taken out in front of the module at a gain."""
        return not self.single_slot_fails or self.filler is not None


def expert_ids(experts: nn.Module | None, num_logits: int) -> ExpertIds:
    """Read the indices off an experts module; ``num_logits`` where it does not tell.

    The logits may be wider than the experts: ZAYA's last class skips the layer (its router maps it to expert 0
    with weight 0), LongCat's last ones are identity experts, which do add their weight times the input and are
    therefore experts like any other here, at no cost.
    """
    routed, total = (getattr(experts, name, None) for name in ("num_routed_experts", "total_experts"))
    if isinstance(routed, int) and isinstance(total, int):
        return ExpertIds(empty=total, single_slot_fails=True, filler=routed if total > routed else None)
    stated = getattr(experts, "num_experts", None)
    return ExpertIds(empty=stated if isinstance(stated, int) else num_logits)


def flat_experts(inner: ExpertsForward, ids: ExpertIds) -> ExpertsForward:
    """An experts forward that takes [T, H] with any number of slots and returns [T, H], whatever the module's.

    DBRX's experts return [T, 1, H]; LongCat's do not accept a single slot.
    """

    def forward(hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if ids.single_slot_fails and experts_TK.shape[-1] == 1:
            second_T1 = experts_TK if ids.filler is None else torch.full_like(experts_TK, ids.filler)
            experts_TK = torch.cat([experts_TK, second_T1], -1)
            weights_TK = torch.cat([weights_TK, torch.zeros_like(weights_TK)], -1)
        return inner(hidden_TH, experts_TK, weights_TK).reshape(hidden_TH.shape[0], -1)

    return forward


__all__ = [
    "ExpertIds",
    "ExpertsForward",
    "RouterCall",
    "expert_ids",
    "flat_experts",
    "router_call",
    "with_logits_again",
]
