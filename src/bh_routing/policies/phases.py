"""A policy for reading a prompt, and one for writing the answer.

Shape legend: T tokens, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .._words import Phase
from ..decision.types import RoutingDecision
from ..errors import InvalidParameterError
from .base import RoutingContext, RoutingPolicy


class PhasePolicy(RoutingPolicy):
    """Decides by one policy while a prompt is read and by another while the answer is written.

    ``context.phase`` says which it is; where tokens of both are in one call, ``context.decode_T`` says which decode. A
    call that tells neither (a block by itself) is one of prefill.

    Parameters
    ----------
    by_phase : mapping of "prefill" and "decode" to RoutingPolicy
        With the same weight rule, and the same number of slots.
    """

    name = "phases"

    def __init__(self, by_phase: Mapping[Phase, RoutingPolicy]) -> None:
        prefill, decode = by_phase["prefill"], by_phase["decode"]
        if prefill.weights != decode.weights:
            raise InvalidParameterError(
                f"both phases need the same rule of weights, got {prefill.weights!r} and {decode.weights!r}."
            )
        super().__init__(weights=prefill.weights)
        self.by_phase: dict[Phase, RoutingPolicy] = {"prefill": prefill, "decode": decode}
        self.causal = prefill.causal and decode.causal  # type: ignore[misc]

    @property
    def min_k(self) -> int:
        """The smaller one."""
        return min(getattr(policy, "min_k", 1) for policy in self.by_phase.values())

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        for policy in self.by_phase.values():
            policy.bind(contexts)
        for context in contexts:
            if len({policy.slots(context) for policy in self.by_phase.values()}) > 1:
                raise InvalidParameterError(
                    "both phases need the same max_k, or none above the model's own top-k."
                )

    def reset(self) -> None:
        for policy in self.by_phase.values():
            policy.reset()

    def slots(self, context: RoutingContext) -> int:
        return self.by_phase["prefill"].slots(context)

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        own = (logits_TE, own_weights_TK, own_experts_TK)
        if context.decode_T is None:
            return self.by_phase[context.phase or "prefill"].decide(*own, context)
        prefill, decode = (policy.decide(*own, context) for policy in self.by_phase.values())
        return mixed(prefill, decode, context.decode_T)

    def describe(self) -> dict[str, Any]:
        told: dict[str, Any] = {phase: policy.describe() for phase, policy in self.by_phase.items()}
        return super().describe() | {"min_k": self.min_k} | told


def mixed(prefill: RoutingDecision, decode: RoutingDecision, decode_T: Tensor) -> RoutingDecision:
    """Token by token one of two decisions for the same call: the second where ``decode_T``."""
    chosen: dict[str, Any] = {}
    for item in fields(RoutingDecision):
        first, second = getattr(prefill, item.name), getattr(decode, item.name)
        if isinstance(first, Tensor) and isinstance(second, Tensor) and item.name != "logits_TE":
            where = decode_T if first.dim() == 1 else decode_T.unsqueeze(-1)
            chosen[item.name] = torch.where(where, second, first)
    return replace(prefill, in_place=prefill.in_place and decode.in_place, **chosen)
