"""A level for each token: the rows of one table per layer, and which row a token has.

Shape legend: T tokens, E experts, K slots of the router's own choice, V rows, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..decision.types import RoutingDecision
from ..errors import InvalidInputError, InvalidParameterError
from .base import RoutingContext, RoutingPolicy
from .phases import mixed
from .table import TablePolicy


class LevelsPolicy(RoutingPolicy):
    """Decides tokens that have a level of their own by that, all others by another policy.

    ``context.level_T`` says which row a token has: a request's in an engine. Row 0 is the other policy. With ``per_row``
    token t of the batch's row b has row b + 1, and there is no other.

    Parameters
    ----------
    default : RoutingPolicy
        What decides where there is no own level.
    like : TablePolicy
        Statistic, sizes, rule and weights of the own levels; may be ``default`` itself.
    rows : int
        V - 1, how many own levels there are at one time. Their buffers are allocated by `bind` and rewritten in place.
    per_row : bool
        Levels follow the rows of the batch.

    Notes
    -----
    A token's decision depends on its own logits and its own row alone: it is the one of a `TablePolicy` at that level.
    """

    name = "levels"

    def __init__(
        self, default: RoutingPolicy, like: TablePolicy, rows: int, *, per_row: bool = False
    ) -> None:
        if default.weights != like.weights:
            raise InvalidParameterError(
                f"levels need the default's rule of weights, {default.weights!r}, got {like.weights!r}."
            )
        super().__init__(weights=default.weights)
        self.default, self.like, self.rows, self.per_row = default, like, rows, per_row
        self.causal = default.causal  # type: ignore[misc]
        self._contexts: list[RoutingContext] = []
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}  # thresholds [V, E], min_k [V]
        self._host: dict[str, list[Callable[..., RoutingDecision] | None]] = {}
        self._least = [1] * (rows + 1)

    @property
    def min_k(self) -> int:
        """The smallest of all levels, the default's too."""
        return min(getattr(self.default, "min_k", 1), *self._least)

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        self._contexts = list(contexts)
        self.default.bind(self._contexts)
        if self.like is not self.default:
            self.like.bind(self._contexts)
        self.bind_rows(self._contexts)

    def bind_rows(self, contexts: Iterable[RoutingContext]) -> None:
        """`bind` where both policies are bound already."""
        self._contexts = list(contexts)
        for c in self._contexts:
            shape = (self.rows + 1, c.num_experts)
            infinite = torch.full(shape, torch.inf, dtype=torch.float32, device=c.device)
            least = torch.ones(self.rows + 1, dtype=torch.int64, device=c.device)
            self._buffers[c.path] = infinite, least
            self._host[c.path] = [None] * (self.rows + 1)

    def reset(self) -> None:
        self.default.reset()

    def slots(self, context: RoutingContext) -> int:
        return self.default.slots(context)

    def set_row(self, row: int, thresholds_LE: Tensor, min_k: int) -> None:
        """Write a level into a row, from 1 on, of every layer's buffers, in place and without waiting for a device.

        Parameters
        ----------
        thresholds_LE : Tensor
            float32, of a table with the layers of ``like.table``; fewer columns: the others are +inf.
        """
        self._least[row] = min_k
        columns = thresholds_LE.shape[1]
        for c in self._contexts:
            values_E = thresholds_LE[self.like.table.row(c.path, c.index)]
            buffer_VE, least_V = self._buffers[c.path]
            if buffer_VE.is_cuda:
                values_E = values_E.pin_memory()
            buffer_VE[row].fill_(torch.inf)
            buffer_VE[row, :columns].copy_(values_E, non_blocking=True)
            least_V[row].fill_(min_k)
            self._host[c.path][row] = self.like.host_row(c.path, values_E.tolist(), min_k)

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        own = (logits_TE, own_weights_TK, own_experts_TK)
        level_T = self._row_of(context, logits_TE) if self.per_row else context.level_T
        if level_T is None:
            return self.default.decide(*own, context)
        if logits_TE.shape[0] == 1 and not torch.compiler.is_compiling() and level_T.device.type == "cpu":
            row = int(level_T)
            if row == 0:
                return self.default.decide(*own, context)
            if (decide := self._host[context.path][row]) is not None:
                return decide(*own)
        thresholds_VE, least_V = self._buffers[context.path]
        chosen = self.like.decide_at(*own, context, thresholds_VE[level_T], least_V[level_T])
        return chosen if self.per_row else mixed(self.default.decide(*own, context), chosen, level_T > 0)

    def _row_of(self, context: RoutingContext, logits_TE: Tensor) -> Tensor:
        shape, tokens = context.shape, logits_TE.shape[0]
        if shape is None or shape[0] != self.rows or shape[0] * shape[1] != tokens:
            came = "is not told" if shape is None else f"has {shape[0]}"
            raise InvalidInputError(
                f"set_level(per_row=...) gave {self.rows} levels, one for each row of the batch, but this forward's batch "
                f"{came} (a beam or a returned sequence is a row); give one for each."
            )
        return torch.arange(1, self.rows + 1, device=logits_TE.device).unsqueeze(1).expand(shape).reshape(-1)

    def describe(self) -> dict[str, Any]:
        return self.default.describe() | {"policy": self.name, "levels": self.rows}
