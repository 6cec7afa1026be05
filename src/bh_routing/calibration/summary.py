"""What a calibration holds, for tables and for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .data import SIZES

if TYPE_CHECKING:
    from .calibration import Calibration


def summary_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """`Calibration.summary`: means of the statistics, experts never selected, median sizes, per layer."""
    rows: list[dict[str, Any]] = []
    moments = calibration.moments
    for i, layer in enumerate(calibration.layers):
        row: dict[str, Any] = {
            "router": layer.path,
            "experts": calibration.num_experts,
            "top_k": layer.top_k,
        }
        for kind, sets in calibration.histograms.items():
            for name in ("unselected", "selected"):
                counts_B = sets[name].counts_LEB[i].sum(0).double()
                centres_B = torch.from_numpy((sets[name].edges[1:] + sets[name].edges[:-1]) / 2)
                total = float(counts_B.sum())
                row[f"{kind} {name}"] = float(counts_B @ centres_B) / total if total else math.nan
            row["unused"] = int((sets["selected"].counts_LEB[i].sum(-1) == 0).sum())
        if moments is not None:
            for kind in SIZES:
                if kind != "sensitivity" or moments.sensitivity_LE is not None:
                    row[kind] = float(moments.size(kind)[i].median())
        rows.append(row)
    return rows


def describe(calibration: Calibration) -> str:
    """What it holds, in one line, and a table of its layers."""
    moments, reservoir = calibration.moments, calibration.reservoir
    holds = [f"reservoir of {reservoir.num} tokens" if reservoir else "no reservoir"]
    if moments is None:
        holds.append("no expert outputs")
    else:
        holds.append("expert sizes")
        holds += ["mean outputs"] if moments.mean_LEH is not None else []
        holds += ["loss sensitivities"] if moments.sensitivity_LE is not None else []
        if moments.mean_LEH is not None:
            form = "fitted compensation" if moments.cross_LJH is not None else "compensation by the means"
            holds.append(f"{form} at strength {calibration.compensation_strength:.2f}")
    lines = [
        f"Calibration of {calibration.model_id}: {calibration.tokens:,} tokens of {calibration.documents:,} "
        f"documents, {calibration.num_layers} layers x {calibration.num_experts} experts; {', '.join(holds)}"
    ]
    rows = calibration.summary()
    names = list(rows[0])
    cells = [names] + [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        lines.append("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
