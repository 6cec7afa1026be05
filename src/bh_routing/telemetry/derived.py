"""The figures of `bh_routing.telemetry.figures.Telemetry`, derived from what a layer's buffers hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSums:
    """What one layer counted, on the host; names as in `Telemetry` where they are the same thing."""

    path: str
    index: int
    num_experts: int
    top_k: int
    slots: int
    router_calls: int
    padding_tokens: int
    fallback_tokens: int
    floor_tokens: int
    ceiling_tokens: int
    count_histogram: list[int]
    raw_count_histogram: list[int]
    expert_load: list[int]
    own_expert_load: list[int]
    dropped_load: list[int]
    expert_weight: list[float]
    kept: int  # slots of the router's own choice
    dropped: int
    selected_weight: float  # summed over tokens, as are the next three
    own_weight: float
    lost_weight: float
    entropy: float
    load_histogram: list[int]
    own_load_histogram: list[int]
    shared_pairs: int
    expert_bytes: int

    @property
    def loads(self) -> int:
        return _weighted(self.load_histogram)

    @property
    def own_loads(self) -> int:
        return _weighted(self.own_load_histogram)

    @property
    def tokens(self) -> int:
        return sum(self.count_histogram)


def _weighted(histogram: Sequence[int]) -> int:
    return sum(value * times for value, times in enumerate(histogram))


def figures(parts: Sequence[LayerSums]) -> dict[str, Any]:
    """The figures that a layer and the total share; NaN where one is not defined."""
    histogram = [0] * max((len(p.count_histogram) for p in parts), default=0)
    raw_total = 0
    for part in parts:
        raw_total += sum(raw * tokens for raw, tokens in enumerate(part.raw_count_histogram))
        for count, tokens in enumerate(part.count_histogram):
            histogram[count] += tokens
    decisions = sum(histogram)
    run = sum(count * tokens for count, tokens in enumerate(histogram))
    squares = sum(count**2 * tokens for count, tokens in enumerate(histogram))
    seen = [count for count, tokens in enumerate(histogram) if tokens] or [0]

    def total(name: str) -> Any:
        return sum(getattr(p, name) for p in parts)

    fallback, kept = total("fallback_tokens"), total("kept")
    own = kept + total("dropped")
    steps = sum(sum(p.load_histogram) for p in parts)
    return {
        "router_calls": total("router_calls"),
        "tokens": max((p.tokens for p in parts), default=0),
        "padding_tokens": max((p.padding_tokens for p in parts), default=0),
        "decisions": decisions,
        "fallback_tokens": fallback,
        "mean_experts": _ratio(run, decisions),
        # in integers until the last step: no cancellation
        "std_experts": math.sqrt(_ratio(decisions * squares - run**2, decisions**2)),
        "min_experts": seen[0],
        "max_experts": seen[-1],
        "share_at_min": _ratio(histogram[seen[0]] if histogram else 0, decisions),
        "share_at_max": _ratio(histogram[seen[-1]] if histogram else 0, decisions),
        "share_without_expert": _ratio(histogram[0] if histogram else 0, decisions),
        "mean_raw_count": _ratio(raw_total, decisions - fallback),
        "floor_tokens": total("floor_tokens"),
        "ceiling_tokens": total("ceiling_tokens"),
        "share_floor": _ratio(total("floor_tokens"), decisions),
        "share_ceiling": _ratio(total("ceiling_tokens"), decisions),
        "share_saved": 1.0 - _ratio(run, own),
        "mean_selected_weight": _ratio(total("selected_weight"), decisions),
        "mean_own_weight": _ratio(total("own_weight"), decisions),
        "mean_lost_weight": _ratio(total("lost_weight"), decisions),
        "lost_weight_share": _ratio(total("lost_weight"), total("own_weight")),
        "mean_entropy": _ratio(total("entropy"), decisions - fallback),
        "own_kept_share": _ratio(kept, own),
        "decided_own_share": _ratio(kept, run),
        "jaccard": _ratio(kept, own + run - kept),
        "unused_experts": sum(p.expert_load.count(0) for p in parts),
        "own_unused_experts": sum(p.own_expert_load.count(0) for p in parts),
        "count_histogram": histogram,
        "steps": steps,
        "mean_loads": _ratio(total("loads"), steps),
        "own_mean_loads": _ratio(total("own_loads"), steps),
        "loads_saved": total("own_loads") - total("loads"),
        "bytes_saved": sum((p.own_loads - p.loads) * p.expert_bytes for p in parts),
        "shared_pairs": total("shared_pairs"),
    }


def layer_figures(sums: LayerSums) -> dict[str, Any]:
    names = ("path", "index", "num_experts", "top_k", "slots")
    lists = (
        "raw_count_histogram",
        "expert_load",
        "own_expert_load",
        "dropped_load",
        "expert_weight",
        "load_histogram",
        "own_load_histogram",
    )
    return (
        {name: getattr(sums, name) for name in names}
        | figures([sums])
        | _balance("", sums.expert_load)
        | _balance("own_", sums.own_expert_load)
        | {name: getattr(sums, name) for name in lists}
    )


def total_figures(sums: Sequence[LayerSums]) -> dict[str, Any]:
    silent = [s.path for s in sums if not s.router_calls]
    return figures(sums) | {"layers": len(sums), "silent_layers": silent}


def _balance(prefix: str, load_E: Sequence[int]) -> dict[str, float]:
    """How evenly the experts are used: largest over mean, standard deviation over mean."""
    num, total = len(load_E), sum(load_E)
    spread = num * sum(load**2 for load in load_E) - total**2
    return {
        f"{prefix}load_imbalance": _ratio(max(load_E) * num, total),
        f"{prefix}load_cv": math.sqrt(_ratio(spread, total**2)),
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
