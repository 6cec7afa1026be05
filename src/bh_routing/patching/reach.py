"""Whether what a router leaves out reaches the experts that would skip it: shown by one call of their block.

The call carries the marks of left-out pairs (`bh_routing.patching.expert_math.left_out`) on indices that exist, and ends where
the experts are reached, before they compute. It is this thread's alone: others go on as if nothing were there.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .contract import _Answered, _random_state_kept
from .expert_math import left_out
from .implementation import PROBE, ImplementationPatch, probing
from .instance import InstancePatch, execution_device, installed
from .plan import LayerPlan


class _Mark(InstancePatch):
    """A router whose last slot is left out for every token."""

    called = False

    def __init__(self, layer: LayerPlan) -> None:
        super().__init__(layer.call.module, layer.call.attribute)
        self.layer, self.thread = layer, threading.get_ident()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.inner(*args, **kwargs)
        if threading.get_ident() != self.thread:
            return outputs
        self.called = True
        _, weights_TK, experts_TK = self.layer.read(outputs, args, kwargs)
        last_K = torch.arange(weights_TK.shape[-1], device=weights_TK.device) == weights_TK.shape[-1] - 1
        return self.layer.replace(outputs, args, kwargs, weights_TK.masked_fill(last_K, -0.0), experts_TK)


class _Arrival(InstancePatch):
    """Experts that only tell whether marks came."""

    marks: bool | None = None

    def __init__(self, layer: LayerPlan) -> None:
        assert layer.experts is not None
        super().__init__(layer.experts)
        self.thread = threading.get_ident()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.inner(*args, **kwargs)
        given = [*args, *kwargs.values()]
        floats = [t for t in given[1:] if isinstance(t, Tensor) and t.is_floating_point()]
        self.marks = any(bool(left_out(t).any()) for t in floats)
        raise _Answered


class _DispatchedArrival(ImplementationPatch):
    """The same for experts that dispatch through transformers' registry: what the dispatch gives to an implementation."""

    def __init__(self, layer: LayerPlan) -> None:
        assert layer.experts is not None
        super().__init__(layer.experts, PROBE)

    def install(self) -> None:
        probing.marks = None
        probing.experts = self.module
        super().install()

    def remove(self) -> None:
        super().remove()
        probing.experts = None

    @property
    def marks(self) -> bool | None:
        """Whether marks came; None if nothing did."""
        return probing.marks


def marks_arrive(layer: LayerPlan, *, dispatched: bool) -> bool | None:
    """Whether marks on a router's weights come to its experts; None where the block cannot be run by itself.

    Parameters
    ----------
    dispatched : bool
        To the implementation that the experts' forward dispatches to; else to that forward.
    """
    block, experts, width = layer.block, layer.experts, layer.width
    if block is None or experts is None or width is None:
        return None
    if any(type(p).__name__ == "DTensor" for p in block.parameters()):
        return None  # a sharded block runs in its model only
    parameters = [
        p for module in (experts, layer.router) for p in module.parameters() if p.is_floating_point()
    ]
    device = execution_device(layer.router)
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        for shape in ((1, 2, width), (2, width)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device, dtype)
            mark = _Mark(layer)
            arrival: Any = _DispatchedArrival(layer) if dispatched else _Arrival(layer)
            ended = False
            try:
                with installed((mark, arrival)), torch.no_grad(), _random_state_kept(device):
                    block.forward(x)
                ended = True
            except Exception:  # it has arrived, or the block needs more than hidden states
                pass
            if arrival.marks is not None:
                return bool(arrival.marks)
            if ended and mark.called:
                return False
    return None
