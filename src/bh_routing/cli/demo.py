"""Show what BH routing does to a model: answers side by side, perplexity on the bundled text, experts per token
and layer, share of experts saved, and time. Without arguments: olmoe-nano, the embedded model, in less than two
minutes and without a network.

With a calibration the rows are budgets of experts per token, each beside the model's own top-k cut to the same
number; without one, levels alpha.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import common
from .tables import print_table

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration
    from ..evaluation import Measured
    from ..integration import RoutingIntegration

BUDGETS = (6.0, 4.0, 3.0, 2.0)
ALPHAS = (0.6, 0.4, 0.2, 0.05)
CUTS = (6, 4, 3, 2)  # of the model's own top-k, beside uncalibrated levels
UNCALIBRATED = 0.4  # the level of the one uncalibrated row beside calibrated ones
NO_CALIBRATION = "no calibration"  # its label
WINDOW = 256  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", default="olmoe-nano", help="default: olmoe-nano")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--alpha", type=float, nargs="+", metavar="A", help="levels, each 0 < A < 1")
    level.add_argument(
        "--experts", type=float, nargs="+", metavar="N", help="budgets, N experts per token each"
    )
    common.add_calibration_argument(parser)
    parser.add_argument("--text", metavar="FILE", help="measure on this text instead of the bundled one")
    common.add_number(parser, "max-new-tokens", "tokens per answer", default=24)
    parser.add_argument("--quick", action="store_true", help="a tenth of the text, two levels, two prompts")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    with common.muted("bh_routing.integration"), common.make_progress() as progress:
        loading = progress.add_task("loading", total=None)
        calibration = _check(args)
        text, source = _text(args.text)

        import torch

        from ..data import prompts
        from ..evaluation import compare, cut_windows
        from ..models.loading import load_model

        model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
        torch.manual_seed(args.seed)
        routings = make_routings(model, calibration, args.alpha, args.experts, quick=args.quick)
        answering = _answering(routings)
        windows = cut_windows(tokenizer, text, WINDOW)
        asked = {tier: tier_prompts[0] for tier, tier_prompts in prompts().items()}
        if args.quick:
            windows = cut_windows(tokenizer, text, WINDOW, limit=max(3, len(windows) // 10))
            asked = dict(list(asked.items())[:2])
        progress.remove_task(loading)

        bar = progress.add_task("measuring", total=len(windows) * len(routings))
        measured = compare(model, windows, routings, step=lambda: progress.advance(bar))
        bar = progress.add_task("answering", total=len(asked) * len(answering))
        answers: list[Answers] = []
        for tier, prompt in asked.items():
            texts = {}
            for label in answering:
                texts[label] = _continue(model, tokenizer, prompt, routings[label], args.max_new_tokens)
                progress.advance(bar)
            answers.append(Answers(tier=tier, prompt=prompt, texts=texts))

    tokens = sum(w.shape[1] for w in windows)
    if args.json:
        report = {
            "model": args.model,
            "tokens": tokens,
            "window": WINDOW,
            "calibrated": calibration is not None,
            "routings": [row.to_dict() for row in measured],
            "answers": [asdict(answer) for answer in answers],
        }
        print(json.dumps(report, indent=2))
        return
    common.print_text(common.describe_model(common.model_name(args.model), model))
    _show_measured(measured, tokens, source, windows[0].shape[1])
    _show_layers(measured)
    _show_answers(answers)
    if calibration is None:
        print()
        common.print_text(
            "No calibration: every token is its own null. `bh-routing calibrate MODEL --text FILE -o FILE` makes "
            "one, and keeps more quality at the same number of experts."
        )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A prompt and its continuations, by the label of the routing."""

    tier: str
    prompt: str
    texts: dict[str, str]


def _check(args: argparse.Namespace) -> Calibration | None:
    """Raise for a setting out of range before a model is loaded for it; returns the calibration to use."""
    from ..stats.procedures import check_alpha

    for alpha in args.alpha or ():
        check_alpha(alpha)
    return common.load_calibration(args.calibration, args.model, args.experts or [])


def _text(path: str | None) -> tuple[str, str]:
    """The text to measure on, and what to call it."""
    from ..data import sample_text
    from ..text import TextFile

    return (sample_text(), "the bundled text") if path is None else (TextFile(path).read(), path)


def make_routings(
    model: Any,
    calibration: Calibration | None,
    alphas: list[float] | None,
    budgets: list[float] | None,
    *,
    quick: bool = False,
) -> dict[str, RoutingIntegration | None]:
    """The rows of the demo: the model itself, BH at every level or budget, the cut top-k at the same number."""
    from ..integration import BHRoutingIntegration, RoutingIntegration
    from ..patching import make_plan
    from ..policies import TopKPolicy

    top_k = min(context.top_k for context in make_plan(model).contexts)
    rows: dict[str, RoutingIntegration | None] = {f"own top-{top_k}": None}

    def cut(k: float) -> None:
        if k == int(k) and 1 <= k < top_k:
            rows[f"top-{k:g}"] = RoutingIntegration(model, TopKPolicy(int(k)))

    if budgets is None and alphas is None and calibration is not None:
        budgets = [b for b in BUDGETS if b < top_k]
    if budgets is not None:
        for budget in budgets[1:3] if quick and len(budgets) > 2 else budgets:
            rows[f"BH, {budget:g} experts"] = BHRoutingIntegration(
                model, experts_per_token=budget, calibration=calibration
            )
            cut(budget)
        rows[NO_CALIBRATION] = BHRoutingIntegration(model, alpha=UNCALIBRATED)
        return rows
    alphas = list(ALPHAS) if alphas is None else alphas
    for alpha in alphas[1:3] if quick and len(alphas) > 2 else alphas:
        rows[f"BH, alpha {alpha:g}"] = BHRoutingIntegration(model, alpha=alpha, calibration=calibration)
    for k in CUTS[1:3] if quick else CUTS:
        cut(k)
    return rows


def _answering(routings: dict[str, RoutingIntegration | None]) -> list[str]:
    """Which rows answer the prompts: the model itself and two of the BH rows."""
    own, *others = routings
    chosen = [label for label in others if label.startswith("BH, ")]
    return [own, *(chosen if len(chosen) <= 2 else [chosen[1], chosen[-1]])]


def _continue(
    model: Any, tokenizer: Any, prompt: str, integration: RoutingIntegration | None, max_new_tokens: int
) -> str:
    from contextlib import nullcontext

    from .generate import generate

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with integration or nullcontext():
        tokens = generate(model, tokenizer, inputs, max_new_tokens)
    return str(tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True))


# ------------------------------------------------------------------------------------------------- tables


def _show_measured(measured: list[Measured], tokens: int, source: str, window: int) -> None:
    own = measured[0]
    columns = ("routing", "experts", "saved", "perplexity", "change", "95 % interval", "ms")
    cells = []
    for row in measured:
        change = row.change_from(own)
        interval = f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]" if change.known else ""
        compared = (f"{change.value:+.1%}", interval)
        cells.append(
            (
                row.label,
                f"{row.mean_experts:.2f} ± {row.std_experts:.2f}",
                f"{row.share_saved:.0%}",
                f"{row.perplexity:.2f}",
                *(("", "") if row is own else compared),
                f"{row.median_seconds * 1e3:.0f}",
            )
        )
    title = f"Perplexity on {source}, experts and time"
    print_table(title, columns, cells, spare=("saved", "95 % interval", "perplexity"))
    print()
    if any(row.label == NO_CALIBRATION for row in measured):
        common.print_text(f"{NO_CALIBRATION}: BH at alpha {UNCALIBRATED:g}, every token being its own null.")
    common.print_text(
        f"{tokens:,} tokens in windows of {window}. experts: per token, mean ± standard deviation over tokens and "
        "layers. change: of the perplexity; its interval is a paired bootstrap over windows. ms: median time of a "
        f"forward pass over {window} tokens, counting included, the rows taking turns."
    )


def _show_layers(measured: list[Measured]) -> None:
    shown = [row for row in measured if row.std_experts > 0]
    layers = range(len(measured[0].layers))
    picked = [*layers] if len(layers) <= 6 else sorted({round(i * (len(layers) - 1) / 5) for i in range(6)})
    print_table(
        "Experts per token by layer (mean ± standard deviation)",
        ("routing", *(f"layer {i}" for i in picked)),
        [(row.label, *(f"{row.layers[i][0]:.1f} ± {row.layers[i][1]:.1f}" for i in picked)) for row in shown],
    )


def _show_answers(answers: list[Answers]) -> None:
    """One answer beside the other: columns of running text, which `print_table` does not fold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = common.make_console()
    for answer in answers:
        print()
        console.print(f"{answer.tier}: {answer.prompt}", style="bold", markup=False)
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            header_style="",
            expand=True,
        )
        for name in answer.texts:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(Text(" ".join(text.split())) for text in answer.texts.values()))
        with console.capture() as capture:
            console.print(table)
        print("\n".join(line.rstrip() for line in capture.get().rstrip().split("\n")))
