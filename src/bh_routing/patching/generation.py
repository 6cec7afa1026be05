"""Around a model's ``generate``: which sequences of a batch have ended."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from .calls import Forwards
from .instance import InstancePatch


class GeneratePatch(InstancePatch):
    """Around ``generate``: what was ended in one is forgotten at its end."""

    def __init__(self, module: nn.Module, forwards: Forwards) -> None:
        super().__init__(module, "generate")
        self.forwards = forwards

    def run(self, *args: Any, **kwargs: Any) -> Any:
        here = self.forwards.here
        here.ended_B = None
        try:
            return self.inner(*args, **kwargs)
        finally:
            here.ended_B = None


class CriteriaPatch(InstancePatch):
    """Reads off ``generate``'s stopping criteria which sequences of a batch have ended: their rows run on as padding."""

    def __init__(self, module: nn.Module, forwards: Forwards) -> None:
        super().__init__(module, "_get_stopping_criteria")
        self.forwards = forwards

    def run(self, *args: Any, **kwargs: Any) -> Any:
        criteria = self.inner(*args, **kwargs)
        config = kwargs.get("generation_config", args[0] if args else None)
        if (getattr(config, "num_beams", None) or 1) > 1:  # rows change places
            return criteria
        kind: Any = type(criteria)
        told = telling(kind)(criteria)
        told.here = self.forwards.here
        return told


@cache
def telling(kind: type) -> Any:
    """A list of stopping criteria that also writes down what it answers."""

    class Telling(kind):
        here: Any = None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            done_B = super().__call__(*args, **kwargs)
            ended_B = self.here.ended_B
            self.here.ended_B = done_B if ended_B is None else ended_B | done_B
            return done_B

    return Telling
