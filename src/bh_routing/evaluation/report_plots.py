"""The plots of the report page, as SVG text.

Shape legend: L routed layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .paired import Interval
from .summary import summarise, text_datasets
from .svg import Series, heat, plot

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration

MOST = 8  # policies in a plot of layers: more cannot be told apart


def plots(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The plots by name, as SVG text: ``pareto-DATASET``, ``layers-DATASET``, ``counts-DATASET``."""
    found = {}
    for i, dataset in enumerate(text_datasets(records)):
        rows = summarise(records, dataset)
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in dataset) or str(i)
        found[f"pareto-{name}"] = pareto_plot(rows, dataset)
        if shown := adaptive_rows(rows):
            found[f"layers-{name}"] = layers_plot(shown)
            found[f"counts-{name}"] = counts_plot(shown)
    return found


# ------------------------------------------------------------------------------------------------- plots


def pareto_plot(rows: Sequence[dict[str, Any]], dataset: str) -> str:
    """Change of perplexity against experts per token, with intervals; the policies of one name are one series."""
    families: dict[str, list[dict[str, Any]]] = {}
    usual = [r for r in rows if r["experts"] is not None and r["change"] is not None]
    # What ruins the model would squeeze everything else into one line: it is named instead of drawn.
    cuts = [r["change"].value for r in usual if family(r["record"]) == "topk"]
    typical = sorted(r["change"].value for r in usual)
    limit = max(0.1, 2 * max(cuts) if cuts else 6 * typical[len(typical) // 2] if typical else 1.0)
    beyond = [r for r in usual if r["change"].value > limit]
    for row in usual:
        if row not in beyond:
            families.setdefault(family(row["record"]), []).append(row)
    series = [
        Series(
            name=name,
            x=[r["experts"] for r in held],
            y=[100 * r["change"].value for r in held],
            low=[100 * r["change"].low for r in held],
            high=[100 * r["change"].high for r in held],
            labels=[
                f"{r['record']['policy']}: {r['experts']:.2f} experts, {percent(r['change'])}" for r in held
            ],
            line=len(held) > 1,
        )
        for name, held in families.items()
    ]
    note = ""
    if beyond:
        names = dict.fromkeys(family(r["record"]) for r in sorted(beyond, key=lambda r: -r["change"].value))
        note = f" (beyond {limit:.0%}: {', '.join(names)})"
    front = [(r["experts"], 100 * r["change"].value) for r in usual if r["front"] and r not in beyond]
    return plot(
        series,
        title=f"Rise of perplexity against experts per token, {dataset}{note}",
        x_label="experts per token (realised, mean over tokens and layers)",
        y_label="perplexity against the full model",
        width=900,
        height=440,
        percent=True,
        front=front,
    )


def layers_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Experts per token by layer."""
    depth = max(len(r["record"]["layers"]) for r in rows)
    return plot(
        [
            Series(
                name=r["record"]["policy"],
                x=list(range(len(r["record"]["layers"]))),
                y=[layer["mean_experts"] for layer in r["record"]["layers"]],
                line=True,
            )
            for r in rows
        ],
        title="Experts per token by layer",
        x_label="layer",
        y_label="experts per token",
        y_from_zero=True,
        x_names=[str(i) for i in range(depth)] if depth <= 32 else (),
    )


def counts_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Distribution of the number of experts over tokens and layers."""
    series = []
    for row in rows:
        histogram = row["record"]["count_histogram"]
        total = sum(histogram) or 1
        series.append(
            Series(
                name=row["record"]["policy"],
                x=list(range(len(histogram))),
                y=[100 * n / total for n in histogram],
                line=True,
            )
        )
    return plot(
        series,
        title="How many experts tokens get (all layers)",
        x_label="experts",
        y_label="tokens",
        percent=True,
        y_from_zero=True,
    )


def load_plot(row: dict[str, Any]) -> str:
    """Load of every expert by layer, sorted: the policy's row under the model's own."""
    rows: list[list[float]] = []
    names: list[str] = []
    labels: list[list[str]] = []
    for i, layer in enumerate(row["record"]["layers"]):
        order = sorted(range(len(layer["own_expert_load"])), key=lambda e: -layer["own_expert_load"][e])
        for title, key in ((f"layer {i}, own", "own_expert_load"), ("policy", "expert_load")):
            load, tokens = layer[key], layer["tokens"] or 1
            rows.append([load[e] / tokens for e in order])
            names.append(title)
            labels.append([f"expert {e}: {load[e] / tokens:.1%} of tokens" for e in order])
    return heat(
        rows,
        title=f"Expert load, {row['record']['policy']} against the model's own",
        names=names,
        labels=labels,
    )


# ---------------------------------------------------------------------------------------------- sections


def p_value_plot(calibration: Calibration) -> str:
    """Shares of p-values below p on kept tokens, per layer: on the diagonal they are uniform."""
    import torch

    reservoir = calibration.reservoir
    assert reservoir is not None
    grid = [i / 40 for i in range(41)]
    series = []
    layers = range(calibration.num_layers)
    if calibration.num_layers > MOST:
        layers = [round(i * (calibration.num_layers - 1) / (MOST - 1)) for i in range(MOST)]  # type: ignore[assignment]
    for i in layers:
        top = calibration.layers[i].top_k
        logits_NE = reservoir.logits_NLE[:2048, i].float()
        own_NK = reservoir.experts_NLK[:2048, i, :top].long()
        passed_NE = torch.ones_like(logits_NE, dtype=torch.bool).scatter(-1, own_NK, False)
        p = calibration.p_values(logits_NE, i)[passed_NE]
        series.append(
            Series(
                name=f"layer {i}",
                x=grid,
                y=[float((p <= x).double().mean()) for x in grid],
                line=True,
                points=False,
            )
        )
    series.append(Series(name="uniform", x=[0.0, 1.0], y=[0.0, 1.0], line=True, points=False))
    return plot(
        series,
        title="p-values of passed-over experts on kept calibration tokens",
        x_label="p",
        y_label="share of p-values at most p",
        width=720,
        height=440,
    )


# ----------------------------------------------------------------------------------------------- helpers


def adaptive_rows(rows: Sequence[dict[str, Any]], most: int = MOST) -> list[dict[str, Any]]:
    """Rows with counted experts whose numbers vary, those nearest to half of the full model's first; a few."""
    full = max((r["experts"] or 0.0 for r in rows), default=0.0)
    varying = [r for r in rows if r["record"]["layers"] and (r["record"]["std_experts_per_token"] or 0.0) > 0]
    return sorted(varying, key=lambda r: abs(r["experts"] - full / 2))[:most]


def family(record: dict[str, Any]) -> str:
    """Policies that differ in nothing but their budget or parameter."""
    name, _, body = record["policy"].partition(":")
    numbers = ("experts=", "k=", "p=", "t=", "q=", "alpha=", "scale=")
    rest = [part for part in body.split(",") if part and not part.startswith(numbers)]
    return ", ".join([name, *rest])


def percent(value: Interval | None) -> str:
    if value is None:
        return ""
    return f"{value.value:+.1%} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
