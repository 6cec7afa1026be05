"""Budgets of loads: the price at which a layer reads a mean number of experts in a step, solved on the calibration's tokens.

Shape legend: N tokens of the reservoir, E experts, K slots of the router's own choice, M steps, B tokens of one.

Steps are drawn: B tokens of different documents each (of as many as there are, then again), because tokens of one document
ask for the same experts more often. An expert is loaded where what it is worth to a step reaches the price
(`bh_routing.decision.price`), so that loads fall with the price, and one sort of those worths gives the whole curve.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..decision.price import first_of
from ..decision.select import rank_by_table
from ..decision.table import DecisionTable
from ..decision.types import Limits
from ..errors import InvalidParameterError
from ..policies import FixedPrice, PricePolicy, TablePolicy
from ..stats.statistic import full_statistic
from .data import CalibrationData, Reservoir
from .fit import NullSettings, sized

logger = logging.getLogger(__name__)

DRAWN = 1 << 15  # tokens in the steps that a price is solved on, about
IN_UNITS_OF_THE_LOSS = ("sensitivity", "token")  # sizes in which drop losses of different layers compare


class Documents(Protocol):
    """Tokens, and which document each is from; None: unknown."""

    @property
    def num(self) -> int:
        """How many tokens."""

    @property
    def document_N(self) -> Tensor | None:
        """int64, equal for tokens of one document."""


def draw_steps(reservoir: Documents, tokens: int, steps: int, seed: int = 0) -> Tensor:
    """Steps of tokens of different documents, int64 [M, B]: indices into the reservoir.

    A document is drawn with a probability in proportion to the tokens that it has there, and comes again only when
    all others have come; without documents (files of format 1) tokens are drawn from all.
    """
    generator = torch.Generator().manual_seed(seed)
    if reservoir.document_N is None:
        return torch.randint(reservoir.num, (steps, tokens), generator=generator)
    order_N = reservoir.document_N.argsort(stable=True)
    _, sizes_D = reservoir.document_N[order_N].unique_consecutive(return_counts=True)
    starts_D = sizes_D.cumsum(0) - sizes_D
    rounds = -(-tokens // len(sizes_D))
    parts = []
    for _ in range(rounds):  # the largest of log(size) + Gumbel noise: drawn without putting back
        noise_MD = -torch.rand(steps, len(sizes_D), generator=generator, dtype=torch.float64).log()
        keys_MD = sizes_D.double() / noise_MD.clamp_min(1e-300)
        parts.append(keys_MD.topk(min(tokens, len(sizes_D)), dim=-1).indices)
    document_MB = torch.cat(parts, -1)[:, :tokens]
    place_MB = torch.rand(document_MB.shape, generator=generator, dtype=torch.float64) * sizes_D[document_MB]
    return order_N[starts_D[document_MB] + place_MB.long().clamp(max=sizes_D[document_MB] - 1)]


@dataclass(eq=False)
class LoadBudget:
    """Prices at which layers read ``loads`` experts in a step on average, at any number of sequences.

    Attributes
    ----------
    loads : float
    worth_LNK : Tensor
        float32, h of the reservoir's pairs; 0 of those that the table drops, infinite of those that are loaded first.
    experts_LNK : Tensor
    one_price : bool
        One price for the whole model, whose loads are met as a mean over layers; else one for each layer.
    """

    loads: float
    worth_LNK: list[Tensor]
    experts_LNK: list[Tensor]
    num_experts: int
    reservoir: Reservoir
    one_price: bool
    solved: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def at(self, tokens: int) -> Sequence[float]:
        """The price of each layer where a step has so many tokens. Warns where that many loads cannot be had."""
        if tokens not in self.solved:
            worths = self.worths(tokens)
            groups = [torch.stack(worths)] if self.one_price else worths
            prices, reached = zip(*(solve_price(worth, self.loads) for worth in groups), strict=True)
            if math.inf in prices:
                logger.warning(
                    "distinct_experts=%g is less than the %.3g experts per layer that steps of %d sequences load first, whatever "
                    "they are worth; with a compensation min_k=0 loads nothing first.",
                    self.loads,
                    max(reached),
                    tokens,
                )
            self.solved[tokens] = prices * len(worths) if self.one_price else prices
        return self.solved[tokens]

    def worths(self, tokens: int) -> list[Tensor]:
        """What each expert is worth to each of the steps that are drawn, [M, E] of every layer."""
        steps = max(64, DRAWN // tokens)
        token_MB = draw_steps(self.reservoir, tokens, steps)
        found = []
        for worth_NK, experts_NK in zip(self.worth_LNK, self.experts_LNK, strict=True):
            place_MP = experts_NK[token_MB].reshape(steps, -1)
            worth_ME = torch.zeros(steps, self.num_experts)
            found.append(worth_ME.scatter_add(1, place_MP, worth_NK[token_MB].reshape(steps, -1)))
        return found

    def __repr__(self) -> str:
        return f"LoadBudget({self.loads:g} loads per layer and step)"


def solve_price(worth: Tensor, loads: float) -> tuple[float, float]:
    """The price at which ``loads`` experts are worth it on average, and how many are, from worths [..., E].

    0 where the budget is more than there is to load; infinite where what is loaded whatever it is worth is more.
    """
    rows = worth.numel() // worth.shape[-1]
    least, most = int(worth.isinf().sum()), int((worth > 0).sum())
    wanted = round(loads * rows)
    if wanted >= most:
        return 0.0, most / rows
    if wanted <= least:
        return math.inf, least / rows
    paid = worth[torch.isfinite(worth)]
    price = float(paid.kthvalue(paid.numel() - (wanted - least) + 1).values)
    return price, float((worth >= price).sum()) / rows


def load_budget(
    data: CalibrationData, loads: float, table: DecisionTable, limits: Limits, *, first: int, one_price: bool
) -> LoadBudget:
    """The prices of a budget of loads for a table's policy; ``one_price`` as in `LoadBudget`.

    Raises
    ------
    CalibrationError
        If the calibration holds no tokens to solve it on.
    """
    instead = "give price_load instead, or calibrate again with a reservoir"
    reservoir = data.kept_tokens("distinct_experts is solved on", instead)
    worths, experts = [], []
    for index, layer in enumerate(data.layers):
        logits_NE, own_NK = reservoir.layer(index, layer.top_k)
        _, offset_E, *follows = table.tensors(index)
        statistic_NE = full_statistic(
            logits_NE, offset_E, table.statistic, layer.score_func, table.temperature, *follows
        )
        statistic_NK = statistic_NE.gather(-1, own_NK)
        ranking = rank_by_table(statistic_NK, table.thresholds_LE[index], rule=table.rule, limits=limits)
        worth_NK = (2.0 * statistic_NK).exp()
        if (first_NK := first_of(ranking, first, None)) is not None:
            worth_NK = worth_NK.masked_fill(first_NK, torch.inf)
        worth_NK = worth_NK.masked_fill(~ranking.kept().keep_TK, 0.0)
        worths.append(worth_NK)
        experts.append(own_NK)
    return LoadBudget(
        loads=float(loads),
        worth_LNK=worths,
        experts_LNK=experts,
        num_experts=data.num_experts,
        reservoir=reservoir,
        one_price=one_price,
    )


def whole_table(data: CalibrationData, settings: NullSettings) -> DecisionTable:
    """A table that keeps all of the model's own choice, with the statistic of a calibration."""
    sizes = sized(data, settings)
    return DecisionTable(
        thresholds_LE=torch.full_like(sizes.offset_LE, -math.inf),
        statistic=settings.statistic,
        **sizes._asdict(),
        paths=data.paths,
        temperature=data.temperature,
        label=f"the model's own choice: {settings.describe()}",
    )


def price_policy(
    data: CalibrationData,
    table: DecisionTable | None,
    settings: NullSettings,
    *,
    distinct_experts: float | None,
    price_load: float | None,
    first: int,
    resident: Any = None,
    **limits: Any,
) -> PricePolicy:
    """The policy of a price, or of a budget of loads.

    Parameters
    ----------
    table : DecisionTable or None
        Whose pairs are priced; None: the model's own choice.
    settings : NullSettings
        Of the statistic.
    distinct_experts, price_load : float
        One of the two.
    first : int
        As in `PricePolicy`.

    Raises
    ------
    InvalidParameterError
        For a price where drop losses of different layers are not in one unit.
    CalibrationError
        If a budget is asked for and the calibration holds no tokens to solve it on.
    """
    table = whole_table(data, settings) if table is None else table
    comparable = settings.size in IN_UNITS_OF_THE_LOSS
    if price_load is None:
        assert distinct_experts is not None
        policy = TablePolicy(table, **limits)
        prices: Any = load_budget(
            data, distinct_experts, table, policy.limits, first=first, one_price=comparable
        )
    elif price_load and not comparable:
        raise InvalidParameterError(
            f"price_load={price_load:g} is one price for the whole model, which needs sizes in the units of the loss "
            f"(size='sensitivity' or 'token'), got {settings.describe()}; give distinct_experts, which is solved for each layer, "
            "or calibrate with --sensitivity."
        )
    else:
        prices = FixedPrice(price_load, data.num_layers)
    return PricePolicy(table, prices=prices, first=first, resident=resident, **limits)
