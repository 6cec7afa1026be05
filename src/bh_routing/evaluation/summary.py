"""What the results say: a row per policy, differences with their noise, who is on the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .paired import Interval, pareto_front, perplexity_change

# Relative differences of realised experts: up to the first two policies are "at the same number", up to the second
# they are compared where one has both fewer experts and the lower perplexity.
SAME_EXPERTS, NEAR_EXPERTS = 0.025, 0.15


def summarise(results: Sequence[dict[str, Any]], dataset: str) -> list[dict[str, Any]]:
    """One row per policy on a text, by number of experts.

    Keys: ``result``; ``experts``, ``perplexity``; ``change``, the `Interval` of the relative change of perplexity
    against the model's own routing; ``against_topk``, the same against plain top-k at the same number of experts
    (None where there is none), and ``against``, which that was; ``verdict``, "better", "worse" or "within noise" by
    that, where the numbers differ "better" with fewer experts and "worse" with more, or nothing; ``front``, whether
    no policy has both fewer experts and lower perplexity.
    """
    held = [r for r in results if r["dataset"] == dataset]
    full = next((r for r in held if r["policy"] == "full"), None)
    cuts = [r for r in held if _plain_top_k(r)]
    front = pareto_front([(r["mean_experts_per_token"], r["perplexity"] or math.nan) for r in held])
    rows = []
    for i, result in enumerate(held):
        near = None if result in cuts or result is full else _nearest(cuts, result["mean_experts_per_token"])
        against = None if near is None else perplexity_change(result["blocks"], near["blocks"])
        word = "" if near is None or against is None else _verdict(result, near, against)
        rows.append(
            {
                "result": result,
                "experts": result["mean_experts_per_token"],
                "perplexity": result["perplexity"],
                "change": None
                if full is None or result is full
                else perplexity_change(result["blocks"], full["blocks"]),
                "against": near["policy"] if near is not None and word else None,
                "against_topk": against if word else None,
                "verdict": word,
                "front": i in front,
            }
        )
    return sorted(rows, key=lambda r: (-r["experts"], r["perplexity"] or 0.0))


def _verdict(result: dict[str, Any], cut: dict[str, Any], difference: Interval) -> str:
    """In a word, by the 95 % interval; empty where more experts bought the lower perplexity."""
    if difference.within_noise:
        word = "within noise"
    else:
        word = "better" if difference.value < 0 else "worse"
    ours, theirs = result["mean_experts_per_token"], cut["mean_experts_per_token"]
    same = abs(theirs - ours) <= SAME_EXPERTS * ours
    dominates = (word == "better" and ours < theirs) or (word == "worse" and ours > theirs)
    return word if same or dominates else ""


def _plain_top_k(result: dict[str, Any]) -> bool:
    settings = result["settings"]
    return (
        settings.get("policy") == "topk"
        and settings.get("k") is not None
        and settings.get("weights") == "model"
        and not settings.get("compensation")
    )


def _nearest(cuts: Sequence[dict[str, Any]], experts: float) -> dict[str, Any] | None:
    """The top-k whose number of experts is nearest, if it is near at all."""

    def distance(cut: dict[str, Any]) -> float:
        return abs(float(cut["mean_experts_per_token"]) - experts)

    best = min(cuts, key=distance, default=None)
    return None if best is None or distance(best) > NEAR_EXPERTS * experts else best


def datasets_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the texts, in the order of the results."""
    return list(dict.fromkeys(r["dataset"] for r in results))
