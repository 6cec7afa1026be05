"""Any procedure with fixed critical values, from its decision table.

Shape legend: T tokens, E experts, K slots of the router's own choice, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._words import Backend, Clamp, WeightRule, check_word
from ..decision.backend import decision_function
from ..decision.select import decide_by_table, rank_by_table
from ..decision.select_one_token import HostRow, decide_one_token
from ..decision.table import DecisionTable
from ..decision.types import Limits, RoutingDecision, TableSettings
from ..decision.weights import plain_rule
from ..errors import InvalidParameterError
from ..stats.statistic import full_statistic
from .base import CountPolicy, RoutingContext


class TablePolicy(CountPolicy):
    """Any procedure with fixed critical values, from its decision table: order, compare, count.

    Parameters
    ----------
    table : DecisionTable
    min_k, max_k, clamp, weights
        As in `bh_routing.BHRoutingIntegration`.
    backend : "auto", "torch" or "triton"
        What computes the decision (`bh_routing.decision.backend.decision_function`). A widened choice (max_k above the
        router's own number of slots) is always computed in PyTorch.
    """

    name = "table"

    def __init__(
        self,
        table: DecisionTable,
        *,
        min_k: int = 1,
        max_k: int | None = None,
        clamp: Clamp = "after",
        weights: WeightRule = "model",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(min_k=min_k, max_k=max_k, clamp=clamp, weights=weights)
        check_word("backend", backend, Backend)
        self.table = table
        self.backend = backend
        self._rows: dict[str, tuple[Tensor, ...]] = {}  # thresholds, offsets (slopes, center)
        self._functions: dict[str, Callable[..., RoutingDecision]] = {}
        self._settings: dict[str, TableSettings] = {}
        self._host: dict[str, Callable[..., RoutingDecision]] = {}

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        super().bind(contexts)
        functions = {
            c.path: decision_function(
                self.backend,
                c.device,
                num_experts=c.num_experts,
                statistic=self.table.statistic,
                score_func=c.score_func,
            )
            for c in contexts
        }
        self._rows = {c.path: self._row(self.table, c) for c in contexts}
        self._functions = functions
        self._settings = {c.path: self._settings_for(c) for c in contexts}
        self._read_rows()

    def _settings_for(self, context: RoutingContext) -> TableSettings:
        return TableSettings(
            empty=context.empty,
            statistic=self.table.statistic,
            score_func=context.score_func,
            temperature=self.table.temperature,
            rule=self.table.rule,
            limits=self.limits,
            weights=plain_rule(self.weights, context.route_norm),
        )

    def _read_rows(self) -> None:
        """What decides a single token on the host, where rows and router live there: all but the token bound."""
        self._host = {
            path: partial(decide_one_token, row=HostRow.of(*row), how=self._settings[path])
            for path, row in self._rows.items()
            if self._functions[path] is decide_by_table and row[0].device.type == "cpu"
        }

    def _row(self, table: DecisionTable, context: RoutingContext) -> tuple[Tensor, ...]:
        row = table.row(context.path, context.index)
        if table.num_experts != context.num_experts:
            raise InvalidParameterError(
                f"the table has {table.num_experts} experts, router {context.path} has {context.num_experts}; "
                "calibrate this model itself."
            )
        thresholds_E, offset_E, *follows = (t.clone().to(context.device) for t in table.tensors(row))
        if context.device.type == "cpu":  # computed in float64: not converted again for every decision
            follows = [tensor.double() for tensor in follows]
        return (thresholds_E, offset_E, *follows)

    def row_of(self, context: RoutingContext) -> tuple[Tensor, ...]:
        """A router's thresholds and offsets (slopes and center): the buffers in use."""
        return self._rows[context.path]

    def settings_of(self, context: RoutingContext) -> TableSettings:
        """All else that its decisions depend on."""
        return self._settings[context.path]

    def thresholds_of(self, context: RoutingContext) -> Tensor:
        """A router's thresholds by rank, float32 [E]: the buffer in use, on its device."""
        return self._rows[context.path][0]

    def statistic(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        """What is compared with the thresholds, [T, E], float32 at least; differentiable."""
        table, (_, offset_E, *follows) = self.table, self._rows[context.path]
        return full_statistic(
            logits_TE, offset_E, table.statistic, context.score_func, table.temperature, *follows
        )

    def set_table(self, table: DecisionTable) -> None:
        """Write another table's thresholds into the same buffers: no re-patching, no recompiling.

        Raises
        ------
        InvalidParameterError
            If the new table has another rule, statistic, temperature or shape: that needs a new policy.
        """
        for name in (
            "rule",
            "statistic",
            "follows_token",
            "temperature",
            "num_layers",
            "num_experts",
            "paths",
        ):
            old, new = getattr(self.table, name), getattr(table, name)
            if old != new:
                raise InvalidParameterError(
                    f"the new table has {name}={new!r}, the one in use {old!r}; unpatch and patch anew for that."
                )
        for index, (path, buffers) in enumerate(self._rows.items()):
            for buffer, new in zip(buffers, table.tensors(table.row(path, index)), strict=True):
                buffer.copy_(new)
        self.table = table
        self._settings = {path: replace(how, limits=self.limits) for path, how in self._settings.items()}
        self._read_rows()

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        path = context.path
        if self._widens(context):
            return self._decide_widened(
                logits_TE, own_weights_TK, own_experts_TK, context, self.thresholds_of(context), self.limits
            )
        if logits_TE.shape[0] == 1 and path in self._host and not torch.compiler.is_compiling():
            return self._host[path](logits_TE, own_weights_TK, own_experts_TK)
        thresholds_E, offset_E, *follows = self._rows[path]
        return self._functions[path](
            logits_TE, own_weights_TK, own_experts_TK, thresholds_E, offset_E, self._settings[path], *follows
        )

    def decide_at(
        self,
        logits_TE: Tensor,
        own_weights_TK: Tensor,
        own_experts_TK: Tensor,
        context: RoutingContext,
        thresholds_TE: Tensor,
        min_k_T: Tensor,
    ) -> RoutingDecision:
        """The same with thresholds, float32 [T, E], and a ``min_k``, int64 [T], of each token's own; in PyTorch."""
        limits = self.limits._replace(min_k=min_k_T)
        if self._widens(context):
            return self._decide_widened(
                logits_TE, own_weights_TK, own_experts_TK, context, thresholds_TE, limits
            )
        how = replace(self._settings[context.path], limits=limits)
        _, offset_E, *follows = self._rows[context.path]
        return decide_by_table(
            logits_TE, own_weights_TK, own_experts_TK, thresholds_TE, offset_E, how, *follows
        )

    def host_row(
        self, path: str, thresholds: list[float], min_k: int
    ) -> Callable[..., RoutingDecision] | None:
        """What decides a single token of a router on the host at other thresholds; None where none does."""
        found = self._host.get(path)
        if not isinstance(found, partial):
            return None
        row, how = found.keywords["row"], found.keywords["how"]
        limits = self.limits._replace(min_k=min_k)
        return partial(
            decide_one_token, row=row._replace(thresholds=thresholds), how=replace(how, limits=limits)
        )

    def _decide_widened(
        self,
        logits_TE: Tensor,
        own_weights_TK: Tensor,
        own_experts_TK: Tensor,
        context: RoutingContext,
        thresholds: Tensor,
        limits: Limits,
    ) -> RoutingDecision:
        ranking = rank_by_table(
            self.statistic(logits_TE, context), thresholds, rule=self.table.rule, limits=limits
        )
        return self._widened(ranking, logits_TE, own_weights_TK, own_experts_TK, context)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"table": repr(self.table), "alpha": self.table.alpha}
