"""An experts module of transformers' registry that runs an implementation of ours."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .._threads import PerThread
from . import experts as skip_aware
from .contract import _Answered
from .expert_math import left_out


class ImplementationPatch:
    """Gives one experts module a config of its own that names the skip-aware implementation.

    ``set_experts_implementation`` would write the shared config object, and a second model that uses it
    would notice.
    """

    def __init__(self, experts: nn.Module, implementation: str = skip_aware.IMPLEMENTATION) -> None:
        self.module: Any = experts
        self.implementation = implementation
        self.config: Any = None

    def install(self) -> None:
        """Put it in place."""
        skip_aware.register()
        skip_aware._registry().register(PROBE, _tell)
        self.config = self.module.config
        own = copy.copy(self.config)
        own._experts_implementation_internal = self.implementation
        setattr(self.module, skip_aware.STOCK, self.config._experts_implementation)
        self.module.config = own

    def remove(self) -> None:
        """Undo it; safe to call twice."""
        if self.config is not None:
            self.module.config = self.config
            delattr(self.module, skip_aware.STOCK)
            self.config = None


PROBE = "bh_routing_probe"


class _Probing(PerThread):
    """What this thread probes, and what it found."""

    def __init__(self) -> None:
        self.experts: Any = None
        self.marks: bool | None = None


probing = _Probing()


def _tell(self: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """An implementation that only tells whether left-out pairs came with their marks; the model's own in other threads."""
    if probing.experts is not self:
        return skip_aware._stock_forward(self, hidden_TH, experts_TK, weights_TK)
    probing.marks = bool(left_out(weights_TK).any())
    raise _Answered
