"""What the records say: a row per policy, differences with their noise, who is on the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .paired import Interval, pareto_front, perplexity_change

# Relative differences of realised experts: up to the first two policies are "at the same number", up to the second
# they are compared where one has both fewer experts and the lower perplexity.
SAME_EXPERTS, NEAR_EXPERTS = 0.025, 0.15


def summarise(records: Sequence[dict[str, Any]], dataset: str) -> list[dict[str, Any]]:
    """One row per policy on a text data set, by number of experts.

    Keys: ``record``; ``experts``, ``perplexity``; ``change``, the `Interval` of the relative change of perplexity
    against the model's own routing; ``against_topk``, the same against plain top-k at the same number of experts
    (None where there is none); ``verdict``, "better", "worse" or "within noise" by that, where the numbers differ
    "better" with fewer experts and "worse" with more, or nothing; ``front``, whether no policy has both fewer
    experts and lower perplexity.
    """
    held = [r for r in records if r["dataset"] == dataset and r["kind"] == "text"]
    full = next((r for r in held if r["policy"] == "full"), None)
    cuts = [r for r in held if _plain_top_k(r)]
    rows: list[dict[str, Any]] = []
    for record in held:
        experts = record["mean_experts_per_token"]
        near = None if record in cuts or record is full else _nearest(cuts, experts)
        against = None if near is None else perplexity_change(record["blocks"], near["blocks"])
        word = "" if near is None or against is None else _verdict_at(record, near, against)
        if not word:
            near = against = None
        rows.append(
            {
                "record": record,
                "experts": experts,
                "perplexity": record["perplexity"],
                "change": None
                if full in (None, record)
                else perplexity_change(record["blocks"], full["blocks"]),
                "against": None if near is None else near["policy"],
                "against_topk": against,
                "verdict": word,
            }
        )
    points = [
        (float("nan") if r["experts"] is None else r["experts"], r["perplexity"] or float("nan"))
        for r in rows
    ]
    front = set(pareto_front(points))
    for i, row in enumerate(rows):
        row["front"] = i in front
    return sorted(rows, key=lambda r: (-(r["experts"] or 0.0), r["perplexity"] or 0.0))


def verdict(difference: Interval) -> str:
    """In a word, by the 95 % interval."""
    if difference.within_noise:
        return "within noise"
    return "better" if difference.value < 0 else "worse"


def _verdict_at(record: dict[str, Any], cut: dict[str, Any], difference: Interval) -> str:
    """The verdict; empty where more experts bought the lower perplexity."""
    word = verdict(difference)
    ours, theirs = record["mean_experts_per_token"], cut["mean_experts_per_token"]
    same = abs(theirs - ours) <= SAME_EXPERTS * ours
    dominates = (word == "better" and ours < theirs) or (word == "worse" and ours > theirs)
    return word if same or dominates else ""


def _plain_top_k(record: dict[str, Any]) -> bool:
    settings = record["settings"]
    return (
        settings.get("policy") == "topk"
        and settings.get("k") is not None
        and settings.get("weights") == "model"
        and not settings.get("compensation")
    )


def _nearest(cuts: Sequence[dict[str, Any]], experts: float | None) -> dict[str, Any] | None:
    if experts is None:
        return None
    near = [c for c in cuts if c["mean_experts_per_token"] is not None]
    best = min(near, key=lambda c: abs(c["mean_experts_per_token"] - experts), default=None)
    if best is None or abs(best["mean_experts_per_token"] - experts) > NEAR_EXPERTS * experts:
        return None
    return best


def text_datasets(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the text data sets, in the order of the records."""
    return list(dict.fromkeys(r["dataset"] for r in records if r["kind"] == "text"))


def other_datasets(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the other data sets, in the order of the records."""
    return list(dict.fromkeys(r["dataset"] for r in records if r["kind"] != "text"))
