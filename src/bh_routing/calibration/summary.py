"""What a calibration holds, for tables and for people."""

from __future__ import annotations

import math
from typing import Any

import torch

from .._words import aligned
from ..stats.nulls import GridNull
from .data import CalibrationData, GivenNulls


def summary_rows(data: CalibrationData) -> list[dict[str, Any]]:
    """`Calibration.summary`: means of the statistics, experts never selected, median sizes, per layer."""
    if data.given is not None and not data.histograms:
        return _given_rows(data, data.given)
    rows: list[dict[str, Any]] = []
    moments = data.moments
    for i, layer in enumerate(data.layers):
        row: dict[str, Any] = {
            "router": layer.path,
            "experts": data.num_experts,
            "top_k": layer.top_k,
        }
        for kind, sets in data.histograms.items():
            for name in ("unselected", "selected"):
                counts_B = sets[name].counts_LEB[i].sum(0).double()
                centres_B = torch.from_numpy((sets[name].edges[1:] + sets[name].edges[:-1]) / 2)
                total = float(counts_B.sum())
                row[f"{kind} {name}"] = float(counts_B @ centres_B) / total if total else math.nan
            row["unused"] = int((sets["selected"].counts_LEB[i].sum(-1) == 0).sum())
        if moments is not None:
            for kind in ("output", "deviation", "sensitivity"):
                if kind != "sensitivity" or moments.sensitivity_LE is not None:
                    row[kind] = float(moments.size(kind)[i].median())
        if data.linear is not None:
            row["rank"] = int(data.linear.rank_L[i])
            row["explained"] = float(data.linear.r2_L[i])
            row["explained by means"] = float(data.linear.mean_r2_L[i])
            row["cost"] = data.linear.share(i)
        if data.token_sizes is not None:
            row["size explained"] = float(data.token_sizes.r2_L[i])
        rows.append(row)
    return rows


def describe(data: CalibrationData) -> str:
    """What it holds, in one line, and a table of its layers."""
    if data.given is not None and not data.histograms:
        medians = [f"{row['median']:.3g}" for row in summary_rows(data)]
        return (
            f"Calibration by {data.given.source} in {data.model_id}: {data.num_layers} layers x {data.num_experts} "
            f"experts, statistic {data.given.statistic}, null {data.given.null}, medians {', '.join(medians[:8])}"
            f"{', ...' * (len(medians) > 8)}"
        )
    moments, reservoir = data.moments, data.reservoir
    holds = [f"reservoir of {reservoir.num} tokens" if reservoir else "no reservoir"]
    if moments is None:
        holds.append("no expert outputs")
    else:
        holds.append("expert sizes")
        holds += ["mean outputs"] if moments.mean_LEH is not None else []
        holds += ["loss sensitivities"] if moments.sensitivity_LE is not None else []
        if moments.mean_LEH is not None:
            form = "fitted compensation" if moments.cross_LJH is not None else "compensation by the means"
            holds.append(f"{form} at scale {data.compensation_scale:.2f}")
    if data.linear is not None:
        kept = (data.linear.rank_L > 0).sum()
        numbers = int(data.linear.rank_L.sum()) * data.linear.mean_LEH[0].numel()
        holds.append(
            f"linear compensation in {kept} layers at scale {data.linear_scale:.2f} ({2 * numbers / 1e6:.1f} MB in 16 bit)"
        )
    if data.token_sizes is not None and reservoir is not None:
        passed = sum(data.num_experts - layer.top_k for layer in data.layers) * reservoir.num
        holds.append(
            f"sizes from the token (null of {passed:,} samples: p-values from {1 / (passed + 1):.1g})"
        )
    if data.given is not None:
        holds.append(data.given.source)
    rows = summary_rows(data)
    table = aligned([list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)])
    return (
        f"Calibration of {data.model_id}: {data.tokens:,} tokens of {data.documents:,} "
        f"documents, {data.num_layers} layers x {data.num_experts} experts; {', '.join(holds)}\n{table}"
    )


def _given_rows(data: CalibrationData, given: GivenNulls) -> list[dict[str, Any]]:
    """Where there are no counts: each layer's null, and its median."""
    rows: list[dict[str, Any]] = []
    for index, null in enumerate(given.nulls):
        row = {"layer": index, "experts": data.num_experts, "null": given.null, "median": math.nan}
        if isinstance(null, GridNull):
            below = int((null.survival_G <= 0.5).to(torch.int8).argmax())
            row |= {"grid points": null.grid_G.numel(), "median": float(null.grid_G[below])}
        rows.append(row)
    return rows


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
