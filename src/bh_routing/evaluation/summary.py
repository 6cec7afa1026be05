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
    """One row per policy on a text (of `datasets_of`), by number of experts.

    Keys: ``result``; ``experts``, ``perplexity``; ``change``, the `Interval` of the relative change of perplexity
    against the model's own routing; ``against_topk``, the same against plain top-k at the same number of experts
    (None where there is none), and ``against``, which that was; ``verdict``, "better", "worse" or "within noise" by
    that, where the numbers differ "better" with fewer experts and "worse" with more, or nothing; ``front``, whether
    no policy has both fewer experts and lower perplexity.
    """
    held = groups_of(results)[dataset]
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


def by_arithmetic(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `summarise` that say their arithmetic, the most first, each with ``arithmetic`` and ``arithmetic_front``.

    A compensation multiplies too: at the same number of experts it is more arithmetic. ``arithmetic_front``: no policy has
    both less of it and a lower perplexity.
    """
    known = [row for row in rows if row["result"].get("arithmetic_per_token") is not None]
    points = [(row["result"]["arithmetic_per_token"], row["perplexity"] or math.nan) for row in known]
    front = pareto_front(points)
    added = [
        row | {"arithmetic": arithmetic, "arithmetic_front": i in front}
        for i, (row, (arithmetic, _)) in enumerate(zip(known, points, strict=True))
    ]
    return sorted(added, key=lambda row: (-row["arithmetic"], row["perplexity"] or 0.0))


# Columns of a table of policies: the figure of a result, its format and its unit.
COLUMNS: dict[str, tuple[str, str, float]] = {
    "loads": ("mean_loads", ".1f", 1),
    "experts": ("mean_experts_per_token", ".2f", 1),
    "±": ("std_experts_per_token", ".2f", 1),
    "arithmetic": ("arithmetic_per_token", ".2f", 1),
    "MB": ("bytes_per_token", ".3g", 1e6),
    "perplexity": ("perplexity", ".3f", 1),
    "per word": ("word_perplexity", ".4g", 1),
    "accuracy": ("token_accuracy", ".2%", 1),
    "KL": ("kl", ".4f", 1),
    "M parameters": ("active_parameters", ".2f", 1e6),
    "MFLOPs": ("flops_per_token", ".2f", 1e6),
    "tokens/s": ("tokens_per_second", ",.0f", 1),
    "s": ("seconds", ".1f", 1),
}


def cells(row: dict[str, Any], *columns: str) -> list[str]:
    """Figures of a row as text, by their titles in `COLUMNS`; empty where it has none."""
    found = []
    for title in columns:
        name, form, unit = COLUMNS[title]
        missing = "inf" if title == "perplexity" else ""  # JSON knows no infinity
        value = row["result"].get(name)
        found.append(missing if value is None else format(value / unit, form))
    return found


def measured_kl(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The title of the divergence's column, where it was measured."""
    return ["KL"] if any(row["result"].get("kl") is not None for row in rows) else []


def _verdict(result: dict[str, Any], cut: dict[str, Any], difference: Interval) -> str:
    """In a word, by the 95 % interval; empty where more experts bought the lower perplexity."""
    if not difference.known:
        return ""
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


# What a result was measured with beside its policy: results that differ in it are kept apart.
MEASURED = ("window", "stride", "streams", "tokens", "text", "calibration", "dtype", "seed")


def datasets_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the texts, in the order of the results; with the settings that differ where one was measured several ways."""
    return list(groups_of(results))


def groups_of(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The results by text, and by what they were measured with: only those of one group can be compared.

    >>> rows = [{"dataset": "a", "window": 64}, {"dataset": "a", "window": 32}, {"dataset": "b", "window": 64}]
    >>> list(groups_of(rows))
    ['a (window 64)', 'a (window 32)', 'b']
    """
    by_text: dict[str, dict[tuple[Any, ...], list[dict[str, Any]]]] = {}
    for result in results:
        settings = tuple(result.get(name) for name in MEASURED)
        by_text.setdefault(result["dataset"], {}).setdefault(settings, []).append(result)
    found = {}
    for name, groups in by_text.items():
        differ = [i for i, values in enumerate(zip(*groups, strict=True)) if len(set(values)) > 1]
        for settings, held in groups.items():
            said = ", ".join(
                f"{MEASURED[i]} {'none' if settings[i] is None else settings[i]}" for i in differ
            )
            found[f"{name} ({said})" if said else name] = held
    return found
