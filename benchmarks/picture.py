"""Draw docs/overview.png: where the experts of olmoe-nano go, and what dropping the others costs.

    python benchmarks/picture.py [--text FILE] [-o docs/overview.png]

Above: a passage of the bundled text, each token on a ground as dark as the experts it gets (mean over layers) at a
budget of 4. Below: perplexity on the second half of FILE (default: the bundled text) against experts per token.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import matplotlib
import torch
from pages import WINDOW, text_name, text_windows
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bh_routing import BHRoutingIntegration, Calibration, RoutingIntegration, TopKPolicy
from bh_routing.data import sample_sections
from bh_routing.evaluation import compare
from bh_routing.models.loading import default_calibration, load_model

BUDGET = 4.0
BUDGETS = (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5)
ALPHAS = (0.8, 0.6, 0.4, 0.2, 0.05)
CUTS = (7, 6, 5, 4, 3, 2)
COLOURS = {"BH, calibrated": "#1b6ca8", "top-k": "#b5651d", "BH, uncalibrated": "#8a8a8a"}


def counts_per_token(model: Any, integrator: RoutingIntegration, ids_1S: Tensor) -> Tensor:
    """Experts per token, mean over layers, float [S]."""
    counted: list[Tensor] = []
    integrator.watchers.append(lambda router, context, decision, logits_TE: counted.append(decision.counts_T))
    with integrator, torch.no_grad():
        model(input_ids=ids_1S)
    return torch.stack(counted).float().mean(0)


def draw_text(axes: Any, tokens: list[str], counts_S: Tensor, columns: int, rows: int) -> None:
    """Tokens in a fixed-width font, wrapped, each on a ground as dark as its count."""
    shade = plt.get_cmap("Blues")
    low, high = float(counts_S.quantile(0.02)), float(counts_S.quantile(0.98))
    x, y = 0, 0
    for token, count in zip(tokens, counts_S.tolist(), strict=True):
        if x and x + len(token) > columns:
            x, y = 0, y + 1
            token = token.lstrip(" ")
        if y >= rows:
            break
        strength = min(max((count - low) / (high - low), 0.0), 1.0)
        axes.add_patch(plt.Rectangle((x, y), len(token), 0.92, color=shade(0.05 + 0.75 * strength), lw=0))
        for i, letter in enumerate(token):
            axes.text(
                x + i + 0.5,
                y + 0.48,
                letter,
                family="DejaVu Sans Mono",
                fontsize=8.5,
                ha="center",
                va="center",
                color="white" if strength > 0.7 else "#202020",
            )
        x += len(token)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    bar = axes.figure.colorbar(
        plt.cm.ScalarMappable(
            plt.Normalize(low, high),
            plt.matplotlib.colors.ListedColormap(shade(torch.linspace(0.05, 0.8, 64).numpy())),
        ),
        ax=axes,
        orientation="vertical",
        pad=0.01,
        fraction=0.02,
    )
    bar.set_label("experts per token", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", help="default: the one that comes with olmoe-nano")
    parser.add_argument("--text", type=Path, help="measure on its second half (default: the bundled text)")
    parser.add_argument("--limit", type=int, default=200, help="measure on so many windows (default 200)")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/overview.png"))
    args = parser.parse_args()
    logging.getLogger("bh_routing").setLevel(logging.ERROR)
    path = args.calibration or default_calibration("olmoe-nano")
    if path is None:
        raise SystemExit("expected a calibration of olmoe-nano, got none; give --calibration FILE.")
    calibration = Calibration.load(path)
    model, tokenizer = load_model("olmoe-nano", device="cpu")

    def bh(**settings: Any) -> BHRoutingIntegration:
        return BHRoutingIntegration(model, **settings)

    routings: dict[str, RoutingIntegration | None] = {"own": None}
    routings |= {f"BH, calibrated {b}": bh(experts_per_token=b, calibration=calibration) for b in BUDGETS}
    routings |= {f"top-k {k}": RoutingIntegration(model, TopKPolicy(k)) for k in CUTS}
    routings |= {f"BH, uncalibrated {a}": bh(alpha=a) for a in ALPHAS}
    measured = {m.label: m for m in compare(model, text_windows(tokenizer, args.text, args.limit), routings)}
    own = measured.pop("own")

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8.6, 6.2), layout="constrained", height_ratios=(1.0, 1.5), dpi=150
    )
    ids_1S = tokenizer(sample_sections()["fiction"], return_tensors="pt", verbose=False).input_ids[:, :WINDOW]
    counts_S = counts_per_token(model, bh(experts_per_token=BUDGET, calibration=calibration), ids_1S)
    tokens = [tokenizer.decode([i]).replace("\n", " ") for i in ids_1S[0].tolist()]
    draw_text(above, tokens, counts_S, columns=96, rows=8)
    above.set_title(
        f"olmoe-nano, budget of {BUDGET:g} experts per token: who gets them", fontsize=10, loc="left"
    )

    for name, colour in COLOURS.items():
        rows = sorted(
            (m.mean_experts, 100 * (m.perplexity / own.perplexity - 1))
            for k, m in measured.items()
            if k.startswith(name)
        )
        below.plot(*zip(*rows, strict=True), marker="o", ms=4, color=colour, label=name)
    below.axhline(0, color="#202020", lw=0.8)
    below.annotate(
        f"own top-8 (perplexity {own.perplexity:.1f})",
        (8, 0),
        (0, 4),
        textcoords="offset points",
        fontsize=8,
        ha="right",
        va="bottom",
    )
    below.set(xlabel="experts per token (mean over layers)", ylabel="perplexity, change in %", xlim=(1, 8.1))
    below.set_title(f"what it costs, on {text_name(args.text).strip('`')}", fontsize=10, loc="left")
    below.spines[["top", "right"]].set_visible(False)
    below.legend(frameon=False, fontsize=9)
    figure.savefig(args.output)
    print(f"drawn to {args.output}")


if __name__ == "__main__":
    main()
