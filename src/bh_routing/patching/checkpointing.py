"""Gradient checkpointing: the repetition of a forward in the backward pass knows the call that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import PatchError
from .calls import Call, Forwards


class Carried:
    """A layer's checkpointing function that takes the call along, so that the repetition in the backward pass knows it.

    The repetition runs when the forward is over, on GPUs in a thread of autograd's.
    """

    def __init__(self, inner: Callable[..., Any], forwards: Forwards) -> None:
        self.inner, self.forwards = inner, forwards

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.forwards.here.call
        if call is not None and call.routed and not torch.compiler.is_compiling():
            function = _Again(function, self.forwards, call)
        return self.inner(function, *args, **kwargs)


class _Again:
    """What is checkpointed, within the call that it belongs to."""

    def __init__(self, function: Callable[..., Any], forwards: Forwards, call: Call) -> None:
        self.function, self.forwards, self.call = function, forwards, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = self.forwards.here
        before = here.call
        if before is self.call:
            return self.function(*args, **kwargs)
        if not self.forwards.in_place:
            raise PatchError(
                "the model was unpatched between a forward and its backward pass, and gradient checkpointing would "
                "repeat the forward without the routing: run the backward pass before unpatching."
            )
        here.call = replace(self.call, counted=False, outer=None)
        try:
            return self.function(*args, **kwargs)
        finally:
            here.call = before


CHECKPOINTING = "_gradient_checkpointing_func"


def carry(module: nn.Module, forwards: Forwards) -> None:
    """Have a layer's checkpointing, where it has one, take calls along."""
    inner = module.__dict__.get(CHECKPOINTING)
    if inner is not None and not isinstance(inner, Carried):
        setattr(module, CHECKPOINTING, Carried(inner, forwards))


def forget_carried(module: nn.Module) -> None:
    """Undo `carry`."""
    found = module.__dict__.get(CHECKPOINTING)
    if isinstance(found, Carried):
        setattr(module, CHECKPOINTING, found.inner)
