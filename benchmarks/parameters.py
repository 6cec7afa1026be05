"""What alpha, min_k, max_k and temperature do, measured on a model: the figures of docs/parameters.md.

    python benchmarks/parameters.py [MODEL] [--text FILE --calibration-text FILE] [--write docs/parameters.md]

Default: olmoe-nano, its own calibration, and the bundled text in windows of 256 tokens. Of a text that is given, the second half
is measured (the first is for choosing). One table per parameter; perplexity is compared with the unpatched model's, with
the 95 % interval of a paired bootstrap over windows.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from pages import WINDOW, arguments, markdown_table, publish, text_name, text_windows
from torch import Tensor

from bh_routing import BHRoutingIntegration, Calibration, RoutingIntegration, calibrate
from bh_routing.data import sample_text
from bh_routing.evaluation import Measured, compare
from bh_routing.models.loading import default_calibration, load_model
from bh_routing.text import TextFile

Rows = dict[str, RoutingIntegration | None]

ALPHAS = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8)
OWN_NULL_ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
LEVEL = 0.1  # for min_k and max_k
TEMPERATURES = (0.5, 1.0, 2.0)
BUDGETS = (4.0, 3.0)  # for temperature
CALIBRATION_TOKENS = 200_000


HEADER = ["experts per token", "saved", "at min_k", "at max_k", "perplexity", "change"]


def experts_and_perplexity(measured: list[Measured], own: Measured) -> list[list[str]]:
    return [
        [
            row.label,
            f"{row.mean_experts:.2f} ± {row.std_experts:.2f}",
            f"{row.share_saved:.0%}",
            f"{row.share_floor:.1%}",
            f"{row.share_ceiling:.1%}",
            f"{row.perplexity:.2f}",
            change(row, own),
        ]
        for row in measured
    ]


def change(row: Measured, own: Measured) -> str:
    interval = row.change_from(own)
    return f"{interval.value:+.1%} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def main() -> None:
    parser = arguments(__doc__, threads=False)
    parser.add_argument("model", nargs="?", default="olmoe-nano")
    parser.add_argument("--calibration", help="default: the one that comes with the model")
    parser.add_argument("--text", type=Path, help="measure on its second half (default: the bundled text)")
    parser.add_argument(
        "--calibration-text", type=Path, help="for the temperatures (default: the bundled text)"
    )
    parser.add_argument(
        "--limit", type=int, default=120, help="measure on so many windows, spread evenly (default 120)"
    )
    args = parser.parse_args()
    logging.getLogger("bh_routing").setLevel(logging.ERROR)  # uncalibrated and at temperature 2 on purpose

    path = args.calibration or default_calibration(args.model)
    if path is None:
        sys.exit(f"expected a calibration of {args.model}, got none; give --calibration FILE.")
    calibration = Calibration.load(path)
    model, tokenizer = load_model(args.model)
    windows = text_windows(tokenizer, args.text, args.limit)
    own = compare(model, windows, {"own": None})[0]

    def bh(**settings: Any) -> BHRoutingIntegration:
        return BHRoutingIntegration(model, **settings)

    k = max(context.top_k for context in bh(alpha=LEVEL).plan.contexts)
    experts = calibration.num_experts
    tables: dict[str, tuple[str, Rows]] = {
        "alpha": ("alpha, calibrated", {f"{a:g}": bh(alpha=a, calibration=calibration) for a in ALPHAS}),
        "alpha-uncalibrated": (
            "alpha, without a calibration",
            {f"{a:g}": bh(alpha=a) for a in OWN_NULL_ALPHAS},
        ),
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
    texts["temperature"] = temperatures(model, tokenizer, args.calibration_text, windows, own)
    tokens = sum(w.shape[1] for w in windows)
    texts["setup"] = (
        f"Measured on `{args.model}` and {'the second half of ' if args.text else ''}{text_name(args.text)}, {tokens:,} tokens in windows of {WINDOW}; the unpatched "
        f"model runs {own.mean_experts:g} experts per token and has perplexity {own.perplexity:.2f}. In brackets: the 95 % "
        "interval of the change in percent, by a paired bootstrap over windows."
    )
    for name, block in texts.items():
        publish(args.write, name, block)


def temperatures(model: Any, tokenizer: Any, text: Path | None, windows: list[Tensor], own: Measured) -> str:
    """Calibrate at each temperature, and measure at the same budgets."""
    rows = []
    for temperature in TEMPERATURES:
        calibration = calibrate(
            model,
            tokenizer,
            [sample_text()] if text is None else TextFile(text),
            temperature=temperature,
            max_tokens=CALIBRATION_TOKENS,
            progress=False,
        )
        routings: Rows = {
            f"{budget}": BHRoutingIntegration(
                model,
                experts_per_token=budget,
                temperature=temperature,
                calibration=calibration,
            )
            for budget in BUDGETS
        }
        measured = compare(model, windows, routings)
        cells = [cell for row in measured for cell in (f"{row.mean_experts:.2f}", change(row, own))]
        rows.append([f"{temperature:g}", *cells])
    header = [f"temperature, calibrated on {text_name(text)}"]
    for budget in BUDGETS:
        header += [f"experts (budget {budget:g})", "change"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
