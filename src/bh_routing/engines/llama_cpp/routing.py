"""The routing of one `Llama`: settings and calibration in, tables for the callback out; what it counted, and its level.

Shape legend: E experts, H hidden size, K slots of the router's own choice.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import support
from ...calibration.calibration import Calibration
from ...calibration.fingerprint import (
    by_weights,
    check_complete,
    check_layer,
    logits_differ,
    project_weights,
    projections_differ,
)
from ...calibration.responses import inputs
from ...decision.compensation import compensated_norm
from ...errors import CalibrationMismatchError, CalibrationWarning, InvalidParameterError
from ...policies import RoutingContext, TablePolicy
from ...settings import RoutingSettings, counted, level_of
from ...stats.procedures import get_procedure
from ...telemetry.figures import Telemetry
from .callback import PythonRouter
from .hook import Hook
from .shim import CRouter, LayerTables
from .structure import Structure

logger = logging.getLogger("bh_routing")


class LlamaRouting:
    """What `bh_routing.engines.llama_cpp.route` puts on a `Llama`, as ``llm.routing``.

    Parameters
    ----------
    settings : RoutingSettings
    calibration : Calibration
    structure : Structure
    routers : mapping of block number to list of Tensor
        The routers' weights, to compare with the calibration's.

    Raises
    ------
    CalibrationError, BudgetError, InvalidParameterError
        If the settings cannot be served, or the calibration is of another model.
    """

    def __init__(
        self,
        settings: RoutingSettings,
        calibration: Calibration,
        structure: Structure,
        routers: Mapping[int, list[Tensor]],
    ) -> None:
        self.settings, self.calibration, self.structure = settings, calibration, structure
        self.lock = threading.RLock()  # of a decode; counters and tables are read or written between two
        self.compensations = settings.compensations(calibration)
        policy = settings.policy(calibration)
        assert isinstance(policy, TablePolicy)
        self.policy = policy
        self.contexts = self._contexts(routers)
        if settings.max_k is not None and settings.max_k > structure.slots:
            raise InvalidParameterError(
                f"max_k must be at most {structure.slots}, what this model selects itself: llama.cpp's graph has room for "
                f"no more; got {settings.max_k}."
            )
        policy.bind(self.contexts.values())
        if sentence := settings.elsewhere(calibration, "GGUF", "llama.cpp"):
            logger.warning("%s", sentence)
        self.telemetry: Telemetry | None = None
        if settings.collect_stats:
            contexts = list(self.contexts.values())
            self.telemetry = Telemetry(contexts, [structure.slots] * len(contexts))
        self.router: CRouter | PythonRouter | None = None

    # -- what fits what ----------------------------------------------------------------------------------

    def _contexts(self, routers: Mapping[int, list[Tensor]]) -> dict[int, RoutingContext]:
        """By block number, those that the calibration left out apart."""
        made: dict[int, RoutingContext] = {}
        norm = self.structure.route_norm
        if self.compensations:
            norm = compensated_norm(norm, self.settings.weights)
        left_out = {_number(path) for path in self.calibration.left_out}
        for block in self.structure.blocks:
            if block in left_out:
                continue
            row = self._row(block)
            record = self.calibration.layers[row]
            self._check(block, row, routers[block])
            made[block] = RoutingContext(
                path=record.path,
                index=row,
                num_experts=self.structure.experts,
                empty=self.structure.experts,
                top_k=self.structure.slots,
                route_norm=norm,
                score_func=record.score_func,
            )
        check_complete(self.calibration, (context.path for context in made.values()))
        return made

    def _row(self, block: int) -> int:
        rows = [i for i, record in enumerate(self.calibration.layers) if _number(record.path) == block]
        if len(rows) != 1:
            known = ", ".join(self.calibration.paths[:2])
            raise CalibrationMismatchError(
                f"the calibration has {len(rows)} layers for block {block}, expected one: it has {known}, ...; calibrate "
                "this model."
            )
        return rows[0]

    def _check(self, block: int, row: int, router: list[Tensor]) -> None:
        found = {
            "num_experts": self.structure.experts,
            "top_k": self.structure.slots,
            "score_func": self.structure.score_func,
            "route_norm": self.structure.route_norm,
        }
        check_layer(self.calibration, row, f"blk.{block}", found)
        wrong = router_differs(self.calibration, row, router, f"blk.{block}")
        if wrong is not None and self.settings.strict:
            raise CalibrationMismatchError(wrong)
        if wrong is not None:
            warnings.warn(wrong, CalibrationWarning, stacklevel=6)

    # -- in charge ---------------------------------------------------------------------------------------

    def tables(self) -> dict[int, LayerTables]:
        """What decides in each block."""
        counters = {} if self.telemetry is None else self.telemetry.layers
        changes = self.settings.mode == "patch"
        return {
            block: LayerTables(
                row=self.policy.row_of(context),
                how=self.policy.settings_of(context),
                compensation=self.compensations.get(context.path) if changes else None,
                counters=counters.get(context.path),
            )
            for block, context in self.contexts.items()
        }

    def take_charge(self, hook: Hook) -> None:
        """Decide from the next decode on: in C where there is a compiler, else in Python."""
        changes = self.settings.mode == "patch"
        s = self.structure
        if hook.lib is None:
            self.router = PythonRouter(self, changes)
            hook.to_python(self.router)
            return
        self.router = CRouter(
            hook.lib,
            self.tables(),
            experts=s.experts,
            slots=s.slots,
            hidden=s.hidden,
            logits=s.logits,
            weights=s.weights,
            skip=self.settings.skip != "zero",
            change=changes,
        )
        hook.to_c(self.router.function, self.router.user)

    def guard(self, decode: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
        """A context's decode that raises what went wrong in it, and leaves the graph as it was in every case."""

        def guarded(batch: Any) -> Any:
            with self.lock:
                try:
                    return decode(batch)
                finally:
                    if isinstance(self.router, CRouter):
                        self.router.end()
                    hook.raise_error()

        return guarded

    # -- for people --------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """ "patch" or "analyze"."""
        return self.settings.mode

    @property
    def alpha(self) -> float | None:
        """The level in use; with a budget the solved one."""
        return level_of(self.policy)

    @property
    def budget(self) -> float | Mapping[str, float] | None:
        """The budget in use, experts per token; None where a level was given."""
        return self.settings.experts_per_token

    def set_level(
        self,
        *,
        alpha: float | None = None,
        experts_per_token: float | Mapping[str, float] | None = None,
        max_kl: float | None = None,
        agreement: float | None = None,
    ) -> None:
        """Another level, budget or certified loss from the next decode on; the context stays.

        Raises
        ------
        InvalidParameterError, BudgetError
            Unless exactly one of them is given and can be served; nothing has changed then.
        """
        settings = self.settings.with_level(
            alpha=alpha, experts_per_token=experts_per_token, max_kl=max_kl, agreement=agreement
        )
        with self.lock:
            settings.rewrite(self.policy, self.calibration)
            self.settings = settings
            if isinstance(self.router, CRouter):
                self.router.load(self.tables())

    def reset_stats(self) -> None:
        """Set all statistics to zero."""
        with self.lock:
            if self.telemetry is not None:
                self.telemetry.reset()
            if self.router is not None:
                self.router.pairs(reset=True)

    def get_routing_stats(self) -> dict[str, Any]:
        """The statistics as a plain dictionary, under the names of `bh_routing.BHRoutingIntegration`."""
        with self.lock:
            total: dict[str, Any] = {
                "mean_experts": None,
                "std_experts": None,
                "router_calls": 0,
                "tokens": 0,
            }
            if self.telemetry is not None:
                total = self.telemetry.to_dict()["total"]
        counts = counted(self.settings.mode, total)
        counts = {name: math.nan if value is None else value for name, value in counts.items()}
        told = self.settings.describe(self.policy, calibrated=True, top_k=self.structure.slots)
        return {"mode": self.mode} | told | counts

    def stats(self) -> dict[str, Any]:
        """All that is counted, as values that JSON knows: ``stats``, ``telemetry``, ``layers``, ``pairs_computed``."""
        stats = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in self.get_routing_stats().items()
        }
        with self.lock:
            return {
                "stats": stats | {"compensation": bool(self.compensations) and self.mode == "patch"},
                "telemetry": None if self.telemetry is None else self.telemetry.to_dict(),
                "layers": [
                    {"layer": f"blk.{block}", "path": context.path}
                    for block, context in self.contexts.items()
                ],
                "pairs_computed": 0 if self.router is None else self.router.pairs(),
            }

    def __repr__(self) -> str:
        name = get_procedure(self.settings.procedure).name
        level = "" if self.alpha is None else f" at alpha {self.alpha:.4g}"
        budget = "" if self.budget is None else f", budget {self.budget}"
        return (
            f"LlamaRouting({self.structure.architecture}, {len(self.contexts)} routers of {self.structure.slots} of "
            f"{self.structure.experts}, {name}{level}{budget}, mode {self.mode})"
        )


def check_settings(settings: RoutingSettings, calibration: Calibration | None) -> None:
    """Refuse what llama.cpp cannot do, by `bh_routing.support`."""
    support.check("llama.cpp", settings.features(calibration))
    if settings.skip == "compact":
        raise InvalidParameterError(
            "skip='compact' has no meaning in llama.cpp, which computes what is kept only; leave it out, or skip='zero' to compute "
            "dropped experts with weight 0."
        )


def router_logits(router: list[Tensor]) -> Tensor:
    """What a router, its weights [E, H] and its bias [E] where it has one, answers to the fingerprint's inputs, [R, E]."""
    weight_EH, *bias = router
    logits_RE = inputs(weight_EH.shape[1]) @ weight_EH.T
    return logits_RE + bias[0] if bias else logits_RE


def router_differs(calibration: Calibration, row: int, router: list[Tensor], layer: str) -> str | None:
    """What is wrong with a router's weights, in one sentence; None if nothing is."""
    if by_weights(calibration):
        weights_N = torch.cat(
            [one.flatten() for one in reversed(router)]
        )  # in the order of their names: bias, weight
        return projections_differ(calibration, row, project_weights(weights_N), layer, "pass strict=False")
    return logits_differ(calibration, row, router_logits(router), layer, "pass strict=False")


def _number(path: str) -> int | None:
    """The block's number in a module path."""
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


def without_counting(tables: dict[int, LayerTables]) -> dict[int, LayerTables]:
    """The same, counted nowhere and compensated by nothing."""
    return {block: replace(one, counters=None, compensation=None) for block, one in tables.items()}
