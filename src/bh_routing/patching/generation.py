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
        beams = getattr(config, "num_beams", None) or 1
        if beams > 1:  # asked about candidates, which are no rows: see `BeamsPatch`
            return criteria
        kind: Any = type(criteria)
        told = telling(kind)(criteria)
        told.here = self.forwards.here
        return told


class BeamsPatch(InstancePatch):
    """Reads off beam search which sequences of a batch have ended: all their beams run on until the last one has."""

    def __init__(self, module: nn.Module, forwards: Forwards) -> None:
        super().__init__(module, "_check_early_stop_heuristic")
        self.forwards = forwards

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """A static method in transformers."""
        return (self.previous or getattr(type(self.module), self.attribute))(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        open_B1 = self.inner(*args, **kwargs)
        finished_BK = kwargs.get("is_sent_finished")  # K beams of each
        if finished_BK is not None:
            done_B = ~open_B1.flatten()
            if kwargs.get("early_stopping") is True:
                done_B = done_B | finished_BK.all(-1)
            self.forwards.here.ended_B = done_B.repeat_interleave(finished_BK.shape[1])
        return open_B1


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
