"""Telemetry of a routing whose level depends on the phase: each phase by itself, and both together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor

from .._words import Phase
from ..decision.types import RoutingDecision
from ..policies import RoutingContext
from .counters import LayerSums
from .figures import Telemetry


class PhaseTelemetry(Telemetry):
    """`Telemetry` with ``phases``: one of the same kind for ``"prefill"`` and one for ``"decode"``.

    `to_dict` has their totals under ``"phases"`` beside everything of both together. A call with tokens of both phases
    (vLLM) is counted in each, the other phase's tokens as padding.
    """

    def __init__(self, contexts: Sequence[RoutingContext], slots: Sequence[int]) -> None:
        super().__init__(contexts, slots)
        self._made = (list(contexts), list(slots))
        self.phases: dict[Phase, Telemetry] = {phase: Telemetry(contexts, slots) for phase in get_args(Phase)}

    def update(
        self, context: RoutingContext, decision: RoutingDecision, logits_TE: Tensor | None = None
    ) -> None:
        decode_T = context.decode_T
        if decode_T is None:
            self.phases[context.phase or "prefill"].update(context, decision, logits_TE)
            return
        for phase, part in self.phases.items():
            own_T = decode_T if phase == "decode" else ~decode_T
            mask_T = own_T if context.mask_T is None else own_T & context.mask_T
            part.update(replace(context, mask_T=mask_T), decision, logits_TE)

    def reset(self) -> None:
        super().reset()
        for part in self.phases.values():
            part.reset()

    def merge(self, other: Telemetry) -> Telemetry:
        if isinstance(other, PhaseTelemetry):
            for phase, part in self.phases.items():
                part.merge(other.phases[phase])
            return self
        return super().merge(other)

    def silent_layers(self) -> list[str]:
        silent = [part.silent_layers() for part in self.phases.values()]
        return [path for path in silent[0] if all(path in one for one in silent)]

    def to_dict(self) -> dict[str, Any]:
        """As in `Telemetry`, and the total of each phase under ``"phases"``."""
        parts = {phase: part.to_dict()["total"] for phase, part in self.phases.items()}
        return super().to_dict() | {"phases": parts}

    def _read(self) -> list[LayerSums]:
        both = Telemetry(*self._made)
        for part in self.phases.values():
            both.merge(part)
        return both._read()
