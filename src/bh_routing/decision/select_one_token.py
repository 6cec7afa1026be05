"""One token on the host: a twin of `bh_routing.decision.select.decide_by_table` in plain Python.

Shape legend: E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from math import exp, isfinite, log, log1p
from typing import NamedTuple

import torch
from torch import Tensor

from ..stats.statistic import TOKEN_BOUND, base_statistic
from .types import RoutingDecision, TableSettings
from .weights import apply_weight_rule


class HostRow(NamedTuple):
    """One row of a decision table for the host: Python floats, the slopes [D, E] in float64."""

    thresholds: list[float]
    offset: list[float]
    slope_DE: Tensor | None = None
    center: list[float] | None = None

    @classmethod
    def of(
        cls,
        thresholds_E: Tensor,
        offset_E: Tensor,
        slope_DE: Tensor | None = None,
        center_D: Tensor | None = None,
    ) -> HostRow:
        """From the row's tensors."""
        row = cls(thresholds_E.tolist(), offset_E.tolist())
        if slope_DE is None or center_D is None:
            return row
        return row._replace(slope_DE=slope_DE.double(), center=center_D.tolist())


def decide_one_token(
    logits_1E: Tensor,
    own_weights_1K: Tensor,
    own_experts_1K: Tensor,
    row: HostRow,
    how: TableSettings,
) -> RoutingDecision:
    """`decide_by_table` for one token on the host, in plain Python.

    Between products that empty the caches every tensor operation costs 5 to 20 microseconds, whatever it does;
    this takes three of them instead of twenty-five (docs/performance.md). It computes in double precision: counts and sets are those of `decide_by_table`
    wherever a statistic is further than 8 units in the last place of float32 from its threshold, and always on
    logits for which the arithmetic is exact.
    """
    logits, own = logits_1E.tolist()[0], own_experts_1K.tolist()[0]
    num = len(own)
    min_k, max_k, clamp = how.limits
    assert isinstance(min_k, int)
    top = num if max_k is None else min(max_k, num)
    raw, drop = 0, [False] * num
    # The sum first: it is finite nearly always. A logit of -inf is a masked expert.
    lost = not isfinite(sum(logits)) and (any(x != x for x in logits) or not isfinite(max(logits)))
    if lost:
        count = num
    else:
        told = [] if row.slope_DE is None else _token_size(logits, row)
        if how.temperature != 1.0:
            logits = [x / how.temperature for x in logits]
        chosen = [logits[expert] for expert in own]
        if how.statistic != "logit":
            if how.score_func in _HOST_SCORES:
                chosen = _HOST_SCORES[how.score_func](chosen, logits)
            else:
                scores = base_statistic(logits_1E, how.statistic, how.score_func, how.temperature).tolist()[0]
                chosen = [scores[expert] for expert in own]
        offset = row.offset
        found = [x + offset[expert] for x, expert in zip(chosen, own, strict=True)]
        if told:
            found = [x + told[expert] for x, expert in zip(found, own, strict=True)]
        order = sorted(range(num), key=found.__getitem__, reverse=True)  # stable: ties keep their order
        within = 0  # the largest passing rank up to the clamp
        for rank, (slot, threshold) in enumerate(zip(order, row.thresholds, strict=False), 1):
            if found[slot] >= threshold:
                raw = rank
                within = rank if rank <= top else within
            elif how.rule == "step_down":
                break
        count = min(max(within if clamp == "inside" else raw, min_k), top)
        for slot in order[count:]:
            drop[slot] = True
    dropped_1K = _fresh(tuple(drop))
    return RoutingDecision(
        weights_TK=apply_weight_rule(own_weights_1K, dropped_1K, how.weights),
        experts_TK=own_experts_1K.masked_fill(dropped_1K, how.empty),
        counts_T=_fresh(count),
        raw_counts_T=_fresh(raw),
        dropped_TK=dropped_1K,
        own_weights_TK=own_weights_1K,
        own_experts_TK=own_experts_1K,
        empty=how.empty,
        fallback_T=_fresh(lost),
        in_place=True,
        logits_TE=logits_1E,
    )


def _token_size(logits: list[float], row: HostRow) -> list[float]:
    """`bh_routing.stats.statistic.token_size` of one token."""
    assert row.slope_DE is not None
    assert row.center is not None
    z = [x - c if isfinite(x) else 0.0 for x, c in zip(logits, row.center, strict=True)]
    told: list[float] = torch.mv(
        row.slope_DE.t(), torch.tensor(z, dtype=torch.float64, device="cpu")
    ).tolist()
    return [min(max(x, -TOKEN_BOUND), TOKEN_BOUND) for x in told]


def _log_softmax(chosen: list[float], logits: list[float]) -> list[float]:
    top, total = max(logits), 0.0
    for x in logits:  # no list of them: beside cold caches every new object is a miss
        total += exp(x - top)
    rest = top + log(total)
    return [x - rest for x in chosen]


def _log_sigmoid(chosen: list[float], logits: list[float]) -> list[float]:
    return [min(x, 0.0) - log1p(exp(-abs(x))) for x in chosen]


_HOST_SCORES = {"softmax": _log_softmax, "sigmoid": _log_sigmoid}


_POOL, _MOST_POOLS = 64, 512
_pools: dict[tuple[type, int | tuple[bool, ...]], list[Tensor]] = {}


def _fresh(value: int | tuple[bool, ...]) -> Tensor:
    """[1], or [1, K] of a pattern: a tensor that nobody else has. They are made 64 at a time, for the price of one."""
    key = (type(value), value)  # False == 0
    try:
        return _pools[key].pop()
    except (KeyError, IndexError):
        if len(_pools) >= _MOST_POOLS:
            _pools.clear()
        with torch.inference_mode(False):  # an inference tensor could not be saved for a backward pass
            # Unlike views, chunks of this kind count writes each for itself.
            pool = _pools[key] = list(torch.tensor([value] * _POOL, device="cpu").unsafe_chunk(_POOL))
        return pool.pop()
