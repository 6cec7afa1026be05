"""A decision table with a price on loads: what a step of different sequences reads, it reads for all of them.

Shape legend: T tokens, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..decision.price import first_of, price_loads
from ..decision.select import Kept, keep_own, not_finite, rank_by_table, seen_finite
from ..decision.table import DecisionTable
from ..decision.types import RoutingDecision
from ..errors import InvalidInputError, InvalidParameterError
from .base import RoutingContext
from .table import TablePolicy

Resident = Mapping[str, Tensor] | Callable[[str], Tensor]


class Prices(Protocol):
    """What a load costs, by the number of sequences in a step."""

    def at(self, tokens: int) -> Sequence[float]:
        """The price of each layer, in order, where a step has so many tokens."""


@dataclass(frozen=True)
class FixedPrice:
    """One price, whatever the batch."""

    price: float
    layers: int

    def at(self, tokens: int) -> Sequence[float]:
        """The price of each layer."""
        return [self.price] * self.layers


class PricePolicy(TablePolicy):
    """A decision table, of whose pairs a decoding step runs those that its loads pay for (`bh_routing.decision.price`).

    It acts where the call is a decoding step (``context.step``); elsewhere it decides as the table does.

    Parameters
    ----------
    table, min_k, weights, ...
        As in `TablePolicy`; no widening.
    prices : Prices
        What a load costs.
    first : int, optional
        How many of a token's experts are loaded whatever they are worth, its best ones. Default: min_k. 0, where a
        compensation stands in, lifts the floor under the loads of large steps.
    resident : mapping of router path to bool [E], or callable of the path that gives one, optional
        Experts whose loads are free. A callable is asked at every step.
    """

    name = "price"
    batch_invariant = False

    def __init__(
        self,
        table: DecisionTable,
        *,
        prices: Prices,
        first: int | None = None,
        resident: Resident | None = None,
        **limits: Any,
    ) -> None:
        super().__init__(table, **limits)
        self.prices, self.resident = prices, resident
        self.first = self.min_k if first is None else first
        self._price: dict[int, dict[str, Tensor]] = {}  # by tokens of a step, then by path
        self._priced_contexts: list[RoutingContext] = []

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        super().bind(contexts)
        for context in contexts:
            if self._widens(context):
                raise InvalidParameterError(
                    f"a price on loads decides within the model's own choice, of {context.top_k} experts in router "
                    f"{context.path}, got max_k={self.max_k}; leave max_k out."
                )
            if isinstance(self.resident, Mapping) and context.path in self.resident:
                self._check_resident(self.resident[context.path], context)
        self._priced_contexts, self._price = contexts, {}
        self._look_at_table()

    def set_table(self, table: DecisionTable) -> None:
        super().set_table(table)
        self._look_at_table()

    def _look_at_table(self) -> None:
        """Of which routers the table keeps all of the model's own choice: nothing is ranked there."""
        self._whole = {
            context.path: bool((self.thresholds_of(context)[: context.top_k] == -torch.inf).all())
            and self.limits.top(context.top_k) == context.top_k
            for context in self._priced_contexts
        }

    def set_prices(self, prices: Prices) -> None:
        """Other prices, in the same buffers."""
        for tokens, buffers in self._price.items():
            for buffer, price in zip(buffers.values(), prices.at(tokens), strict=True):
                buffer.fill_(price)
        self.prices = prices

    def price_of(self, context: RoutingContext, tokens: int) -> Tensor:
        """A router's price of a load where a step has so many tokens: float32 [], the buffer in use."""
        return self._buffer(context.path, int(tokens))

    def _buffer(self, path: str, tokens: int) -> Tensor:
        """Compiled, the buffer itself is the constant: `set_prices` writes to it."""
        held = self._price.get(tokens)
        if held is None:
            with torch.inference_mode(False), torch.no_grad():
                held = self._price[tokens] = {
                    context.path: torch.tensor(price, dtype=torch.float32, device=context.device)
                    for context, price in zip(self._priced_contexts, self.prices.at(tokens), strict=True)
                }
        buffer: Tensor = held[path]
        return buffer

    # What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo.
    _buffer._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def resident_of(self, context: RoutingContext) -> Tensor | None:
        """Experts of this router whose loads are free, bool [E] on its device.

        Raises
        ------
        InvalidInputError
            If the callable gives something else.
        """
        if self.resident is None and context.empty >= context.num_experts:
            return None
        found = self.resident.get(context.path) if isinstance(self.resident, Mapping) else None
        if callable(self.resident):
            found = self.resident(context.path)
            self._check_resident(found, context)
        if context.empty < context.num_experts:  # identity experts have no weights
            free_E = torch.arange(context.num_experts, device=context.device) >= context.empty
            return free_E if found is None else free_E | found.to(context.device)
        return None if found is None else found.to(context.device)

    def _check_resident(self, mask: Any, context: RoutingContext) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (context.num_experts,):
            came = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise InvalidInputError(
                f"resident must give a bool mask of shape ({context.num_experts},) for router {context.path}, got {came}."
            )

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        step = context.step
        if step is None:
            return super().decide(logits_TE, own_weights_TK, own_experts_TK, context)
        how, votes_T, resident_E = self._settings[context.path], context.mask_T, self.resident_of(context)
        price = self.price_of(context, step.tokens)
        own_TK = self.statistic(logits_TE, context).gather(-1, own_experts_TK)
        lost_T1 = None if seen_finite(logits_TE) else not_finite(logits_TE)
        keep_TK, first_TK, raw_T = None, lost_T1, None
        if self.first or not self._whole[context.path]:
            ranking = rank_by_table(own_TK, self.thresholds_of(context), rule=how.rule, limits=how.limits)
            raw_T, first_TK = ranking.raw_counts_T, first_of(ranking, self.first, lost_T1)
            keep_TK = ranking.kept().keep_TK
            keep_TK = keep_TK if lost_T1 is None else keep_TK | lost_T1
        priced = price_loads(
            keep_TK,
            first_TK,
            (2.0 * own_TK).exp(),
            own_experts_TK,
            shape=step.shape,
            num_experts=context.num_experts,
            price_load=price,
            priced_T=step.priced_T,
            votes_T=votes_T,
            resident_E=resident_E,
        )
        if votes_T is not None and lost_T1 is not None:
            # A padded token's own choice is not loaded for its sake.
            lost_T1 = lost_T1 & (votes_T if step.priced_T is None else votes_T | ~step.priced_T).unsqueeze(-1)
        counts_T = priced.keep_TK.sum(-1)
        if raw_T is None:
            raw_T = torch.full_like(counts_T, own_experts_TK.shape[-1])
        return keep_own(
            Kept(priced.keep_TK, counts_T, raw_T),
            lost_T1,
            own_weights_TK,
            own_experts_TK,
            weights=how.weights,
            empty=how.empty,
            shared_TK=priced.shared_TK,
            resident_E=resident_E,
        )

    def describe(self) -> dict[str, Any]:
        told = {"prices": repr(self.prices), "first": self.first, "resident": self.resident is not None}
        return super().describe() | told
