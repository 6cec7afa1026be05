"""The first minute: how long a real-sized layer takes with fewer experts, how near the predictions stay to the full
model's, which tokens get the experts, and answers side by side. Without arguments: olmoe-nano, the embedded model, on
the bundled text, in less than two minutes and without a network.

With a calibration the rows are budgets of experts per token, each beside the model's own top-k cut to the same
number; without one, levels alpha.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..settings import TEXT_OPTIONS, RoutingSettings
from . import common
from .demo_parts import (
    PROMPTS,
    USUAL,
    WINDOW,
    Answers,
    Report,
    Speed,
    Strip,
    certified,
    continued,
    cut_pieces,
    make_routings,
    measure_speed,
    nearest_to_half,
    read_documents,
    strips_of,
    verdict,
)

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration


COMPENSATION = {"compensation": TEXT_OPTIONS["compensation"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", default="olmoe-nano", help="default: olmoe-nano")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--alpha", type=float, nargs="+", metavar="A", help="levels, each 0 < A < 1")
    level.add_argument(
        "--experts", type=float, nargs="+", metavar="N", help="budgets, N experts per token each"
    )
    common.add_calibration_argument(parser)
    common.add_options(parser, COMPENSATION)
    parser.add_argument("--text", metavar="FILE", help="measure on this text instead of the bundled one")
    common.add_number(parser, "max-new-tokens", "tokens per answer", default=24)
    common.add_flag(parser, "quick", "a fifth of the text, two levels, two prompts, a smaller layer")
    common.add_flag(parser, "json", "print one JSON object instead of tables")
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from . import demo_tables as show

    with common.muted("bh_routing.integration"), common.make_progress() as progress:
        loading = progress.add_task("loading", total=None)
        calibration = _check(args)
        settings = common.values_of(args, COMPENSATION)
        RoutingSettings.from_dict(settings).check_calibrated(calibration)
        source, documents = read_documents(args.text, quick=args.quick)

        import torch

        from ..evaluation import compare
        from ..models.loading import resolve

        model, tokenizer = common.load(args)
        torch.manual_seed(args.seed)
        routings = make_routings(model, calibration, args.alpha, args.experts, quick=args.quick, **settings)
        pieces = cut_pieces(tokenizer, documents, args.quick)
        progress.remove_task(loading)
        if not args.json:
            common.print_text(common.describe_model(args.model, model))

        speed: Speed | None = None
        if (
            resolve(args.model)[0] == "bundled"
        ):  # of others `bh-routing bench MODEL` times the layers themselves
            bar = progress.add_task("timing a layer", total=None)
            speed = measure_speed(quick=args.quick)
            progress.remove_task(bar)
            if not args.json:
                show.speed(speed)

        bar = progress.add_task("measuring", total=len(pieces) * len(routings))
        measured = compare(
            model,
            [piece.window_1S for piece in pieces],
            routings,
            units=[piece.unit for piece in pieces],
            step=lambda: progress.advance(bar),
        )
        progress.remove_task(bar)
        half = nearest_to_half(measured)
        report = Report(
            source=source,
            tokens=sum(piece.window_1S.shape[1] for piece in pieces),
            units=len({piece.unit for piece in pieces}),
            measured=[row for row in measured if row.label not in USUAL],
            usual=[row for row in measured if row.label in USUAL],
            half=half,
            verdict=verdict(measured, half, speed),
            certified=certified(calibration),
        )
        if not args.json:
            show.fidelity(report)

        bar = progress.add_task("reading tokens", total=None)
        strips = strips_of(model, tokenizer, routings[half.label], pieces)
        progress.remove_task(bar)
        if not args.json:
            show.strips(strips, half.label, round(measured[0].mean_experts))

        asked = PROMPTS[: 2 if args.quick else None]
        bar = progress.add_task("answering", total=2 * len(asked))
        answers: list[Answers] = []
        for prompt in asked:
            texts = {}
            for label in (measured[0].label, half.label):
                texts[label] = continued(model, tokenizer, prompt, routings[label], args.max_new_tokens)
                progress.advance(bar)
            answers.append(Answers(prompt=prompt, texts=texts))

    if args.json:
        print(json.dumps(_as_json(args.model, calibration, speed, report, strips, answers), indent=2))
        return
    show.answers(answers)
    if calibration is None:
        print()
        common.print_text(
            "No calibration: every token is its own null. `bh-routing calibrate MODEL --text FILE -o FILE` makes "
            "one, and keeps more quality at the same number of experts."
        )


def _check(args: argparse.Namespace) -> Calibration | None:
    """Raise for a setting out of range before a model is loaded for it; returns the calibration to use."""
    from ..stats.procedures import check_alpha

    for alpha in args.alpha or ():
        check_alpha(alpha)
    return common.load_calibration(args.calibration, args.model, args.experts or [])


def _as_json(
    model: str,
    calibration: Calibration | None,
    speed: Speed | None,
    report: Report,
    strips: Sequence[Strip],
    answers: Sequence[Answers],
) -> dict[str, Any]:
    timed: dict[str, Any] | None = None
    if speed is not None:
        timed = {"experts": speed.experts, "megabytes_each": speed.megabytes_each}
        timed["rows"] = [row.to_dict() for row in speed.rows]
        timed["batch"] = [row.to_dict() for row in speed.batch]
    return {
        "model": model,
        "tokens": report.tokens,
        "documents": report.units,
        "window": WINDOW,
        "calibrated": calibration is not None,
        "layer": timed,
        "routings": [row.to_dict() for row in (*report.measured, *report.usual)],
        "against_top_k": [
            {
                "routing": ours.label,
                "top_k": cut.label,
                "agreement": ours.agreement(cut).to_dict(),
                "kl": ours.kl(cut).to_dict(),
            }
            for ours, cut in report.pairs()
        ],
        "verdict": report.verdict,
        "certified": report.certified,
        "strips": [asdict(strip) for strip in strips],
        "answers": [asdict(answer) for answer in answers],
    }
