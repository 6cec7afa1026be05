"""What alpha, min_k, max_k and temperature do, measured on a model: the figures of docs/parameters.md.

    python benchmarks/parameters.py [MODEL] [--calibration FILE] [--text FILE] [--write docs/parameters.md]

Default: olmoe-nano, its own calibration, and the bundled text in windows of 256 tokens. One table per parameter;
perplexity is compared with the unpatched model's.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from pages import markdown_table, write_block

from bh_routing import BHRoutingIntegration, Calibration, RoutingIntegration, calibrate
from bh_routing.data import sample_text
from bh_routing.evaluation import Measured, compare, cut_windows
from bh_routing.loading import default_calibration, load_model

Rows = dict[str, RoutingIntegration | None]

ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
LEVEL = 0.1  # for min_k and max_k
TEMPERATURES = (0.5, 1.0, 2.0)
BUDGETS = (4.0, 3.0)  # for temperature
WINDOW = 256


def experts_and_perplexity(measured: list[Measured], own: Measured) -> list[list[str]]:
    return [
        [
            row.label,
            f"{row.mean_experts:.2f} ± {row.std_experts:.2f}",
            f"{row.share_saved:.0%}",
            f"{row.share_floor:.1%}",
            f"{row.share_ceiling:.1%}",
            f"{row.perplexity:.2f}",
            f"{row.perplexity / own.perplexity - 1:+.1%}",
        ]
        for row in measured
    ]


HEADER = ["experts per token", "saved", "at min_k", "at max_k", "perplexity", "change"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="olmoe-nano")
    parser.add_argument("--calibration", help="default: the one that comes with the model")
    parser.add_argument("--text", type=Path, help="default: the bundled text")
    parser.add_argument("--limit", type=int, help="measure on so many windows only")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    args = parser.parse_args()
    logging.getLogger("bh_routing").setLevel(logging.ERROR)  # uncalibrated and at temperature 2 on purpose

    path = args.calibration or default_calibration(args.model)
    if path is None:
        sys.exit(f"expected a calibration of {args.model}, got none; give --calibration FILE.")
    calibration = Calibration.load(path)
    model, tokenizer = load_model(args.model)
    text = sample_text() if args.text is None else args.text.read_text(encoding="utf-8")
    windows = cut_windows(tokenizer, text, WINDOW, args.limit)
    own = compare(model, windows, {"own": None})[0]

    def bh(**settings: object) -> BHRoutingIntegration:
        return BHRoutingIntegration(model, **settings)  # type: ignore[arg-type]

    k = max(context.top_k for context in bh(alpha=LEVEL).plan.contexts)
    experts = calibration.num_experts
    tables: dict[str, tuple[str, Rows]] = {
        "alpha": ("alpha, calibrated", {f"{a:g}": bh(alpha=a, calibration=calibration) for a in ALPHAS}),
        "alpha-uncalibrated": ("alpha, without a calibration", {f"{a:g}": bh(alpha=a) for a in ALPHAS}),
        "softmax": (
            'alpha, pvalues="softmax"',
            {f"{a:g}": bh(alpha=a, pvalues="softmax") for a in (0.05, 0.5, 0.8, 0.9)},
        ),
        "min_k": (
            f"min_k (alpha {LEVEL:g}, calibrated)",
            {f"{m}": bh(alpha=LEVEL, min_k=m, calibration=calibration) for m in (1, 2, 3, 4, 6)},
        ),
        "max_k": (
            f"max_k (alpha {LEVEL:g}, calibrated)",
            {
                f"{m}": bh(alpha=LEVEL, max_k=m, calibration=calibration)
                for m in (2, 4, 6, k, k + k // 2, 2 * k)
                if m <= experts
            },
        ),
    }
    texts = {}
    for name, (title, rows) in tables.items():
        measured = compare(model, windows, rows)
        texts[name] = markdown_table([title, *HEADER], experts_and_perplexity(measured, own))
        print(f"{texts[name]}\n", flush=True)

    texts["temperature"] = temperatures(model, tokenizer, text, args.limit)
    print(f"{texts['temperature']}\n")
    tokens = sum(w.shape[1] for w in windows)
    texts["setup"] = (
        f"Measured on `{args.model}` and {'the bundled text' if args.text is None else args.text.name}, {tokens:,} "
        f"tokens in windows of {WINDOW}; the unpatched model runs {own.mean_experts:g} experts per token and has "
        f"perplexity {own.perplexity:.2f}."
    )
    print(texts["setup"])
    if args.write:
        for name, block in texts.items():
            write_block(args.write, name, block)


def temperatures(model: object, tokenizer: object, text: str, limit: int | None) -> str:
    """Calibrate on the first half of the text at each temperature, measure on the second, at the same budgets."""
    half = text.find("\n", len(text) // 2)
    windows = cut_windows(tokenizer, text[half:], WINDOW, limit)
    own = compare(model, windows, {"own": None})[0]
    rows = []
    for temperature in TEMPERATURES:
        calibration = calibrate(model, tokenizer, text[:half], temperature=temperature, progress=False)  # type: ignore[arg-type]
        routings: Rows = {
            f"{budget}": BHRoutingIntegration(
                model,  # type: ignore[arg-type]
                experts_per_token=budget,
                temperature=temperature,
                calibration=calibration,
                compensation=False,
                statistic="contribution",
                size="output",
            )
            for budget in BUDGETS
        }
        measured = compare(model, windows, routings)
        rows.append(
            [f"{temperature:g}"]
            + [f"{row.mean_experts:.2f}: {row.perplexity / own.perplexity - 1:+.1%}" for row in measured]
        )
    header = [
        "temperature (contribution by output size, no compensation)",
        *(f"budget {budget:g}: experts, change" for budget in BUDGETS),
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
