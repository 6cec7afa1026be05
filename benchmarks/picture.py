"""Draw docs/overview.png: who gets the experts, what fewer of them cost, and the time of a real-sized layer.

    python benchmarks/picture.py --data DIR [-o docs/overview.png]

Left: the bundled text, each token on a ground as dark as the experts it gets (mean over layers) at half of the model's
own number. Right: the divergence KL(the model itself || this) on equal parts of DIR's mixed test files for BH and every rule
that it is compared with, against experts per token and against arithmetic, in which compensation counts; layer profiles of
the other rules are made on the calibration files. Below: one token through a layer of OLMoE-1B-7B's shape. What was
measured is kept in build/picture.json; --redraw draws that again.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from pages import WINDOW, arguments, mixed_text, spread_windows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bh_routing import Calibration
from bh_routing.cli.demo_parts import cut_pieces, strips_of
from bh_routing.cli.strip import broken
from bh_routing.data import sample_documents
from bh_routing.evaluation import Workbench, compare, cut_windows, make_routing, parse_policy
from bh_routing.evaluation.layer_speed import experts_that_fit, make_layer, measure_layer
from bh_routing.models import bundled_calibration
from bh_routing.models.loading import load_model

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the model's own number of experts
RULES = {  # policy as text without its budget: name, colour, strong
    "bh": ("BH", "#1b6ca8", True),
    "bh:compensation=mean": ("BH, mean", "#6fa8d6", True),
    "topk": ("top-k", "#c2571a", True),
    "allocmoe": ("Alloc-MoE", "#5b8c5a", True),
    "seqtopk": ("other rules", "#a9a9a9", False),
    **dict.fromkeys(("threshold", "lexi", "minp", "topp", "naee", "entropy"), ("", "#a9a9a9", False)),
}
COLUMNS, LINES = 37, 3
MEASURED = Path("build/picture.json")
INK, FAINT = "#202020", "#6a6a6a"


# ------------------------------------------------------------------------------------------------------ measuring


def measure(args: argparse.Namespace) -> dict[str, Any]:
    calibration = Calibration.load(bundled_calibration())
    model, tokenizer = load_model("olmoe-nano", device="cpu")
    solve = mixed_text(args.data, "calibration", 120_000)
    bench = Workbench(model, calibration, cut_windows(tokenizer, solve, WINDOW, 16))
    budgets = [share * bench.top_k for share in SHARES]
    routings: dict[str, Any] = {"own": None}
    for rule in RULES:
        for budget in budgets:
            spec = f"{rule}{',' if ':' in rule else ':'}experts={budget:g}"
            routings[spec] = make_routing(parse_policy(spec), bench)
    windows = spread_windows(tokenizer, args.data, "mixed-test", args.tokens)
    points: dict[str, list[dict[str, float | None]]] = {rule: [] for rule in RULES}
    for row in compare(model, windows, routings)[1:]:
        rule = row.label.rpartition("experts=")[0].rstrip(":,")
        points[rule].append(row.to_dict() | {"kl": row.kl().value})
    half = make_routing(parse_policy(f"bh:experts={bench.top_k / 2:g}"), bench)
    pieces = cut_pieces(tokenizer, sample_documents(), False)
    strips = [asdict(strip) for strip in strips_of(model, tokenizer, half, pieces)]
    layer = make_layer(experts_that_fit())
    timed = [row.to_dict() for row in measure_layer(layer, seconds=args.seconds)]
    return {"top_k": bench.top_k, "points": points, "strips": strips, "layer": timed}


# -------------------------------------------------------------------------------------------------------- drawing


def draw_text(axes: Any, strips: list[dict[str, Any]], top_k: int) -> None:
    """Six passages in a fixed-width font, each token on a ground as dark as its experts."""
    shade = plt.get_cmap("Blues")
    y = 0.0
    for strip in strips:
        mean = sum(strip["experts"]) / len(strip["experts"])
        axes.text(0, y + 0.6, f"{strip['domain']}, {mean:.1f}", fontsize=7.2, color=FAINT, va="center")
        y += 1.1
        for line in broken(strip["tokens"], strip["experts"], COLUMNS)[:LINES]:
            x = 0
            for token, experts in line:
                strength = min(experts / top_k, 1.0)
                ground = shade(0.03 + 0.85 * strength)
                axes.add_patch(plt.Rectangle((x, y), len(token), 0.94, color=ground, lw=0))
                for i, letter in enumerate(token):
                    axes.text(
                        x + i + 0.5,
                        y + 0.5,
                        letter,
                        family="DejaVu Sans Mono",
                        fontsize=7.2,
                        ha="center",
                        va="center",
                        color="white" if strength > 0.6 else INK,
                    )
                x += len(token)
            y += 1.0
        y += 0.25
    axes.set(xlim=(0, COLUMNS), ylim=(y, 0))
    axes.axis("off")
    axes.set_title(
        f"who gets {top_k / 2:g} of {top_k} experts: darker is more", fontsize=8, loc="left", color=INK
    )


def draw_losses(axes: Any, points: dict[str, Any], key: str, label: str, top_k: int) -> None:
    """KL of every rule against experts, or against arithmetic."""
    for rule, (name, colour, strong) in sorted(RULES.items(), key=lambda item: item[1][2]):
        rows = sorted((p[key], 1e3 * p["kl"]) for p in points[rule])
        style = {"lw": 1.8, "marker": "o", "ms": 3.5} if strong else {"lw": 0.8, "alpha": 0.8}
        axes.plot(*zip(*rows, strict=True), color=colour, label=name or None, **style)
    axes.set_yscale("log")
    axes.set(xlabel=label, xlim=(top_k * 0.2, top_k * 0.9))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, colors=INK)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.label.set_size(7.5)
    axes.grid(axis="y", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)


def draw_layer(axes: Any, timed: list[dict[str, Any]]) -> None:
    """A bar for each number of experts."""
    for place, row in enumerate(timed):
        colour = "#b9b9b9" if place == 0 else "#1b6ca8"
        axes.barh(place, row["ratio"], color=colour, height=0.66)
        said = "its time" if place == 0 else f"{row['ratio']:.2f} of it"
        axes.text(row["ratio"] + 0.01, place, said, fontsize=7.5, va="center", color=INK)
    names = [row["label"].replace("mean", "a mean of") for row in timed]
    axes.set_yticks(range(len(timed)), names, fontsize=7.5, color=INK)
    axes.set(xlim=(0, 1.25), ylim=(len(timed) - 0.5, -0.5))
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(
        "one token through an MoE layer of OLMoE-1B-7B's size, bfloat16 on CPU",
        fontsize=8,
        loc="left",
        color=INK,
    )


def draw(found: dict[str, Any], output: Path) -> None:
    figure = plt.figure(figsize=(7.2, 6.0), dpi=200, layout="constrained", facecolor="white")
    above, below = figure.subfigures(2, 1, height_ratios=(4.6, 1.0))
    text, left, right = above.subplots(1, 3, width_ratios=(1.55, 1.0, 1.0))
    right.sharey(left)
    draw_text(text, found["strips"], found["top_k"])
    draw_losses(left, found["points"], "mean_experts", "experts per token", found["top_k"])
    draw_losses(right, found["points"], "arithmetic_per_token", "arithmetic, in experts", found["top_k"])
    right.tick_params(labelleft=False)
    left.set_title(
        "distance from the full model\non held-out text: KL, millinats", fontsize=8, loc="left", color=INK
    )
    left.legend(frameon=False, fontsize=6.8, loc="lower left", handlelength=1.2, borderaxespad=0.1)
    draw_layer(below.subplots(), found["layer"])
    figure.savefig(output)


def main() -> None:
    parser = arguments(__doc__, threads=False, write=False, data=True)
    parser.add_argument("--tokens", type=int, default=20_480, help="to measure on (default 20,480)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the layer (default 20)")
    parser.add_argument("--redraw", action="store_true", help=f"draw what {MEASURED} holds")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/overview.png"))
    args = parser.parse_args()
    logging.getLogger("bh_routing").setLevel(logging.ERROR)
    if not args.redraw:
        MEASURED.parent.mkdir(exist_ok=True)
        MEASURED.write_text(json.dumps(measure(args)))
    found = json.loads(MEASURED.read_text())
    draw(found, args.output)
    print(f"drawn to {args.output}")


if __name__ == "__main__":
    main()
