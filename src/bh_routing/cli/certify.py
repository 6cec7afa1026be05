"""Certify a calibration's levels on held-out documents: what each loses against the model itself, with a confidence, on
text like this. The certificate is kept in the calibration file; then --max-kl 0.01 or --agreement 0.97 can be given
wherever a level can.

With --max-kl or --agreement here, named before the text is read, levels are tested from most experts down and the walk
stops at the first that is not certified. Without, every level gets a bound, and a loss may be named later.

A document of FILE counts once: a JSON line {"text": ..., "source": ...} (lines of one source count once together), a
part of a text that ends at a blank line (--split-on-blank-lines), or else about 65,000 characters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import TEXT_OPTIONS, RoutingSettings
from . import common
from .tables import print_table

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration

LEVELS = ("alpha", "experts", "max_kl", "agreement", "phases", "loads", "price")
OPTIONS = {name: option for name, option in TEXT_OPTIONS.items() if name not in (*LEVELS, "mode")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="olmoe-nano, a folder, or a hub id")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="the calibration of the model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", nargs="+", metavar="FILE", help="held-out documents: .jsonl or text, plain or compressed"
    )
    source.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="certify nothing: say how unlike the certificate's text this one is",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write there (default: into the calibration's file)"
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--max-kl", type=common.positive, metavar="NATS", help="certify this loss, per token")
    target.add_argument(
        "--agreement",
        type=common.positive,
        metavar="SHARE",
        help="certify this share of unchanged next words",
    )
    add_certificate_arguments(parser)
    parser.add_argument(
        "--levels",
        nargs="+",
        type=common.positive,
        metavar="EXPERTS",
        help="budgets to certify (default: 1/16 steps)",
    )
    common.add_flag(parser, "split-on-blank-lines", "a blank line of a text ends a document")
    common.add_number(parser, "document-tokens", "at most N tokens of each document, evenly over it", least=2)
    common.add_window_argument(parser)
    common.add_number(parser, "batch-tokens", "tokens per forward", default=4096)
    common.add_flag(
        parser, "resume", "go on from the sums that an interrupted run left beside the calibration"
    )
    common.add_options(parser.add_argument_group("routing"), OPTIONS)
    common.add_config_argument(parser)
    common.add_model_arguments(parser)


def add_certificate_arguments(parser: argparse._ActionsContainer) -> None:
    """--confidence and --bound."""
    parser.add_argument(
        "--confidence", type=common.positive, default=0.95, metavar="SHARE", help="(default 0.95)"
    )
    parser.add_argument(
        "--bound",
        default="betting",
        choices=("betting", "hoeffding-bentkus"),
        help="where the bounds come from (default betting, the sharper one)",
    )


def run(args: argparse.Namespace) -> None:
    from ..calibration.calibration import Calibration
    from ..text import TextFile

    output = Path(args.output or args.calibration)
    common.check_output(output, "file", ".safetensors")
    for path in args.text or args.compare:
        TextFile(path)  # raises before the model is loaded
    calibration = Calibration.load(args.calibration)
    documents = documents_of(args.text or args.compare, args.split_on_blank_lines)
    settings = RoutingSettings.from_dict(common.values_of(args, OPTIONS))
    window = common.window_of(args.model, args.window)

    model, tokenizer = common.load(args)
    if args.compare:
        from ..evaluation.unlike import unlike

        show_unlike(unlike(model, tokenizer, documents, calibration, batch_tokens=args.batch_tokens))
        return
    parts = output.with_suffix(".certify-parts")
    if not args.resume:
        from ..calibration.checkpoint import remove

        remove(parts)
    certify_file(
        model,
        tokenizer,
        documents,
        calibration,
        output,
        settings=settings,
        window=window,
        resume=parts,
        **common.chosen(args, "max_kl", "agreement", "confidence", "bound", "levels"),
        **common.chosen(args, "document_tokens", "batch_tokens"),
    )


def certify_file(
    model: Any, tokenizer: Any, documents: Any, calibration: Calibration, output: Path, **asked: Any
) -> None:
    """Certify, write the file, and print what was certified."""
    from ..evaluation.certify import certify

    certified = certify(model, tokenizer, documents, calibration, **asked)
    certified.save(output)
    show_certificate(certified)
    print()
    common.print_text(
        f"kept in {output}; use it with `--calibration {output} --max-kl NATS`, or `--agreement SHARE`."
    )


def documents_of(paths: list[str], split_on_blank_lines: bool) -> Iterator[tuple[str, str]]:
    """(source or "", text) of every document of some files."""
    from ..text import PIECE, TextFile

    for path in paths:
        yield from TextFile(path, None if split_on_blank_lines else PIECE).with_named_sources()


def show_certificate(calibration: Calibration) -> None:
    """A calibration's certificate: its levels, and what they hold for."""
    held = calibration.certificate
    assert held is not None
    words = {"kl": "KL, nats per token", "agreement": "share of next words that change"}
    for loss, title in words.items():
        levels = getattr(held, loss)
        if levels:
            rows = [
                [
                    f"{level.experts_per_token:g}",
                    f"{level.experts:.2f}",
                    "" if level.bytes_per_token is None else f"{level.bytes_per_token / 1e6:.3g}",
                    f"{level.risk:.4f}",
                    f"{level.bound:.4f}",
                    f"{level.clipped:.1%}",
                ]
                for level in levels
            ]
            columns = ["budget", "experts", "MB", "measured", "at most", "clipped"]
            print_table(title, columns, rows, spare=("MB", "clipped"))
            print()
    named = (
        "at this loss, named beforehand"
        if held.target is not None
        else "at the bound beside it, all of them together"
    )
    common.print_text(
        f"With {held.confidence:.0%} confidence each level loses at most that ({named}), on text of which these "
        f"{held.documents:,} documents ({held.tokens:,} tokens, digest {held.text_digest[:8]}) are independent draws, each "
        f"document counting once"
        + (f" and at most {held.clip:g} nats" if held.kl else "")
        + f". Certified on {held.weights} weights in {held.engine}, compensation {held.compensation[0]} at "
        f"{held.compensation[1]:g}, windows of {held.window}, by {held.bound} bounds, on {held.date}."
    )
    if held.target is not None:
        last = (held.kl or held.agreement)[-1]
        common.print_text(f"Last level certified: {last.experts_per_token:g} experts per token.")


def show_unlike(found: dict[str, dict[str, float]]) -> None:
    """How unlike a text is."""
    names = {"usage": "usage of experts (share of pairs)", "score": "mean log score of the choice (nats)"}
    columns = ["distance", "this text", "certificate's documents, 5 % to 95 %", "beyond"]
    rows = [
        [title, f"{row['here']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", f"{row['beyond']:.0%}"]
        for (name, title) in names.items()
        for row in [found[name]]
    ]
    print_table(None, columns, rows)
    print()
    common.print_text(
        "Median distance of this text's documents from the certificate's text, means over layers; the same of the "
        "certificate's own documents; and the share of these documents beyond their 95 % (5 % for text of the same kind and "
        "length). A figure for people: it tests nothing, and a certificate says nothing about other text."
    )
