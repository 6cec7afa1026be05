"""What policies are built from: a model, its calibration, text to solve budgets and profile layers on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from ..calibration.calibration import Calibration
from ..errors import InvalidParameterError
from ..patching import PatchPlan, make_plan
from .routing_log import RoutingLog, log_routing


class Workbench:
    """What policies are built from: a model, its calibration, text to solve and profile on.

    Parameters
    ----------
    model : nn.Module
    calibration : Calibration, optional
        Its kept tokens are what budgets are solved on.
    windows : sequence of Tensor
        Token windows of calibration text, for the layer profiles, and for budgets without a calibration.
    collect_stats : bool
        Whether the integrations that are made count.
    streams : int
        Sequences that are decoded together, for budgets of loads.
    """

    def __init__(
        self,
        model: Any,
        calibration: Calibration | None = None,
        windows: Sequence[Tensor] = (),
        *,
        collect_stats: bool = True,
        streams: int = 1,
    ) -> None:
        self.streams = streams
        self.model, self.calibration, self.windows = model, calibration, list(windows)
        self.collect_stats = collect_stats

    @cached_property
    def plan(self) -> PatchPlan:
        """The routers of the model."""
        return make_plan(self.model)

    @cached_property
    def log(self) -> RoutingLog:
        """Recorded routing that budgets are solved on."""
        if self.calibration is not None and self.calibration.reservoir is not None:
            return RoutingLog.from_calibration(self.calibration)
        if not self.windows:
            raise InvalidParameterError(
                "a budget is solved on calibration text: give a calibration, or text to solve it on."
            )
        return log_routing(self.model, self.windows)

    @cached_property
    def loss_costs(self) -> list[list[float]]:
        """`bh_routing.evaluation.profile.loss_costs` on the calibration text."""
        from .profile import loss_costs

        if not self.windows:
            raise InvalidParameterError(
                "allocmoe profiles the layers on calibration text: give the text to solve it on."
            )
        return loss_costs(self.model, self.windows)

    @cached_property
    def lexi_costs(self) -> list[list[float]]:
        """`bh_routing.evaluation.profile.lexi_costs`."""
        from .profile import lexi_costs

        return lexi_costs(self.model)

    @property
    def top_k(self) -> int:
        """The smallest number of experts that a router selects."""
        return min(context.top_k for context in self.plan.contexts)
