"""What a policy may ask for and return, checked where a router is bound and at its first decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..decision.types import RoutingDecision
from ..errors import InvalidInputError, InvalidParameterError, InvalidTypeError

if TYPE_CHECKING:
    from .base import RoutingContext, RoutingPolicy


def check_within(k: float, context: RoutingContext, name: str = "k") -> None:
    """Raise `InvalidParameterError` for more experts than a router selects itself."""
    if k > context.top_k:
        raise InvalidParameterError(
            f"{name}={k:g} is more than the {context.top_k} experts that router {context.path} selects."
        )


def check_decision(
    decision: object,
    policy: RoutingPolicy,
    own_weights_TK: Tensor,
    own_experts_TK: Tensor,
    context: RoutingContext,
) -> None:
    """Check what a policy returned for one router call. It looks at the values, which waits for the device.

    Raises
    ------
    InvalidTypeError, InvalidInputError
        If it is no `RoutingDecision`, or a tensor of it has another dtype or shape than `RoutingDecision` says, an
        index names no expert, or a count is no number of slots.
    """
    where = f"policy {policy.name!r} ({type(policy).__name__}) at router {context.path}"
    if not isinstance(decision, RoutingDecision):
        raise InvalidTypeError(
            f"{where}: decide() must return a RoutingDecision, got {type(decision).__name__}; return self.shrink(...)."
        )
    tokens, top_k = own_experts_TK.shape
    slots = policy.slots(context)
    weights, experts = own_weights_TK.dtype, own_experts_TK.dtype
    expected = {
        "weights_TK": (weights, (tokens, slots)),
        "experts_TK": (experts, (tokens, slots)),
        "counts_T": (torch.int64, (tokens,)),
        "raw_counts_T": (torch.int64, (tokens,)),
        "dropped_TK": (torch.bool, (tokens, top_k)),
        "own_weights_TK": (weights, (tokens, top_k)),
        "own_experts_TK": (experts, (tokens, top_k)),
        "fallback_T": (torch.bool, (tokens,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(decision, name)
        if tensor is None and name == "fallback_T":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InvalidTypeError(f"{where}: {name} must be a tensor of {dtype}, got {got}.")
        if tuple(tensor.shape) != shape:
            raise InvalidInputError(f"{where}: {name} must have shape {shape}, got {tuple(tensor.shape)}.")
    last = max(context.empty, context.num_experts - 1)
    for name, most, what in (
        ("experts_TK", last, f"an expert, or {context.empty} for an empty slot"),
        ("counts_T", slots, "a number of slots"),
    ):
        values = getattr(decision, name)
        if tokens and not bool(((values >= 0) & (values <= most)).all()):
            raise InvalidInputError(
                f"{where}: each of {name} must be {what}, 0 to {most}, got values from {int(values.min())} to "
                f"{int(values.max())}."
            )
