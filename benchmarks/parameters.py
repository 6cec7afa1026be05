"""What alpha, min_k, max_k and temperature do, measured on olmoe-nano: the figures of docs/parameters.md.

    python benchmarks/parameters.py --data DIR [--tokens N] [--write docs/parameters.md]

Measured on equal parts of DIR's mixed test files, with the calibration that ships with the model; other temperatures are
calibrated on equal parts of the calibration files. One table per parameter; perplexity is compared with the unpatched
model's, with the 95 % interval of a paired bootstrap over windows.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pages import WINDOW, arguments, markdown_table, mixed_documents, publish, spread_windows
from torch import Tensor

from bh_routing import BHRoutingIntegration, Calibration, RoutingIntegration, calibrate
from bh_routing.evaluation import Measured, compare
from bh_routing.models import bundled_calibration
from bh_routing.models.loading import load_model

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
    parser = arguments(__doc__, threads=False, data=True)
    parser.add_argument("--tokens", type=int, default=32_768, help="to measure on (default 32,768)")
    args = parser.parse_args()
    logging.getLogger("bh_routing").setLevel(logging.ERROR)  # uncalibrated and at temperature 2 on purpose

    calibration = Calibration.load(bundled_calibration())
    model, tokenizer = load_model("olmoe-nano")
    windows = spread_windows(tokenizer, args.data, "mixed-test", args.tokens)
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
    texts["temperature"] = temperatures(model, tokenizer, args.data, windows, own)
    texts["setup"] = (
        f"Measured on `olmoe-nano` and equal parts of six kinds of held-out text, {len(windows) * WINDOW:,} tokens in windows of "
        f"{WINDOW}; the unpatched model runs {own.mean_experts:g} experts per token and has perplexity {own.perplexity:.2f}. In "
        "brackets: the 95 % interval of the change in percent, by a paired bootstrap over windows."
    )
    for name, block in texts.items():
        publish(args.write, name, block)


def temperatures(model: Any, tokenizer: Any, data: Path, windows: list[Tensor], own: Measured) -> str:
    """Calibrate at each temperature, and measure at the same budgets."""
    rows = []
    for temperature in TEMPERATURES:
        calibration = calibrate(
            model,
            tokenizer,
            mixed_documents(data, "calibration"),
            window=WINDOW,
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
    header = ["temperature, calibrated"]
    for budget in BUDGETS:
        header += [f"experts (budget {budget:g})", "change"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
