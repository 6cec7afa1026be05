"""Calibrate a model on text: what its routers' statistics look like for experts that the model itself passed over,
how large each expert's output is, and (--sensitivity) how much the loss feels it. Constant memory; the model is not
changed. Levels, budgets and procedures are chosen later, from the same file.

Several processes: torchrun --nproc-per-node N -m bh_routing calibrate MODEL --text FILE -o OUT.safetensors
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._lazy import needed
from ..errors import CalibrationError, InvalidParameterError
from . import common
from .certify import certify_file, documents_of
from .gguf import add_llama_arguments, is_gguf, llama_arguments
from .tables import print_table

DATASET_TOKENS = 1_000_000  # where --max-tokens does not say: a data set may have no end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="olmoe-nano, a folder, a hub id, or a GGUF file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text or JSON lines, plain or .xz, .gz, .bz2; several take turns, so that --max-tokens takes as much of each",
    )
    source.add_argument(
        "--dataset", metavar="HUB_ID", help="a data set of the hub, streamed (needs the extra `datasets`)"
    )
    common.add_flag(
        parser,
        "split-on-blank-lines",
        "a blank line of FILE ends a document (books joined by one); else one is about 65,000 characters",
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT.safetensors", help="the file to write")
    common.add_number(parser, "max-tokens", "stop after N tokens (data set: default 1,000,000)")
    common.add_number(
        parser,
        "document-tokens",
        "at most N tokens of each document, evenly over it: no long one outweighs the others",
    )
    common.add_flag(parser, "sensitivity", "also loss sensitivities: a second pass, with backward")
    common.add_number(parser, "sensitivity-tokens", "stop the second pass after N tokens")
    common.add_number(
        parser,
        "rank",
        "rank of the linear compensation (with --sensitivity; default: by what it explains, up to 16, or 3 %% of "
        "the experts' memory)",
    )
    common.add_flag(
        parser,
        "no-robust-fit",
        "fit the linear compensation to text alone, not also to shuffled and random tokens",
    )
    common.add_flag(parser, "no-linear", "no linear compensation and no sizes that follow the token")
    common.add_flag(
        parser,
        "resume",
        "go on from the sums that an interrupted run with the same arguments left in OUT.parts",
    )
    common.add_flag(parser, "no-means", "leave the experts' mean outputs out (no compensation)")
    common.add_flag(parser, "no-outputs", "leave the experts' outputs out: faster, logit and logprob only")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="divides the router logits (default 1)"
    )
    common.add_window_argument(parser)
    common.add_number(parser, "batch-tokens", "tokens per forward", default=4096)
    parser.add_argument(
        "--certify",
        nargs="+",
        metavar="FILE",
        help="then certify the levels on these held-out documents (`bh-routing certify`), also into OUT",
    )
    group = parser.add_argument_group("data set")
    group.add_argument("--dataset-config", metavar="NAME", help="its configuration")
    group.add_argument("--split", default="train", help="its split (default train)")
    group.add_argument("--column", default="text", help="the column that holds the text (default text)")
    common.add_model_arguments(parser)
    add_llama_arguments(parser, context=False)


def run(args: argparse.Namespace) -> None:
    common.check_output(Path(args.output), "file", ".safetensors")
    for path in args.certify or ():
        _files([path], False)  # raises before the pass over the text
    texts = _files(args.text, args.split_on_blank_lines) if args.text else _dataset(args)
    if args.sensitivity_tokens is not None and not args.sensitivity:
        raise InvalidParameterError(
            "--sensitivity-tokens is of the second pass, which was not asked for; give --sensitivity too, or leave it out."
        )
    if is_gguf(args.model):
        return _calibrate_gguf(args, texts)
    from ..decision.types import check_temperature

    check_temperature(args.temperature)

    from ..calibration.checkpoint import remove
    from ..calibration.forwards import distributed, gather
    from ..calibration.passes import calibrate

    parts = Path(args.output).with_suffix(".parts")
    window = common.window_of(args.model, args.window)
    model, tokenizer = common.load(args)
    rank, world = distributed()
    if rank == 0 and not args.resume:
        remove(parts)
    gather(None)  # nobody reads what is being removed
    try:
        calibration = calibrate(
            model,
            tokenizer,
            texts,
            window=window,
            outputs=not args.no_outputs,
            means=not args.no_means,
            resume=parts,
            model_id=args.model,
            **_asked(args),
            **common.chosen(args, "batch_tokens", "temperature", "sensitivity", "sensitivity_tokens"),
        )
        if rank == 0:
            calibration.save(args.output)
    finally:
        if world > 1:
            import torch

            torch.distributed.destroy_process_group()
    if rank == 0:
        show_calibration(calibration)
        _show_saved(args, f"generate {args.model} -p TEXT", ".")
        if args.certify:
            documents = documents_of(args.certify, args.split_on_blank_lines)
            asked = {"window": window} | common.chosen(args, "document_tokens", "batch_tokens")
            print()
            certify_file(model, tokenizer, documents, calibration, Path(args.output), **asked)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked of a calibration in any engine."""
    most = args.max_tokens or (DATASET_TOKENS if args.dataset else None)
    flags = {"linear": not args.no_linear, "robust_fit": not args.no_robust_fit}
    return {"max_tokens": most} | flags | common.chosen(args, "document_tokens", "rank", "seed")


def _show_saved(args: argparse.Namespace, command: str, more: str) -> None:
    print()
    common.print_text(
        f"saved to {args.output} ({os.path.getsize(args.output) / 1e6:.1f} MB); use it with `bh-routing {command} "
        f"--calibration {args.output} --experts 4`{more}"
    )


def _calibrate_gguf(args: argparse.Namespace, texts: Callable[[], Iterator[str]]) -> None:
    """In llama.cpp, without what takes gradients."""
    if args.sensitivity:
        raise InvalidParameterError(
            "--sensitivity takes gradients, which llama.cpp does not compute: leave it out (the linear compensation is fitted all the "
            "same), or calibrate the model in transformers; its calibration serves every GGUF file of it."
        )
    for name in ("resume", "no_means", "no_outputs", "certify"):
        if getattr(args, name):
            raise InvalidParameterError(
                f"--{name.replace('_', '-')} is not there for GGUF files; leave it out, or calibrate the model in transformers."
            )
    if args.temperature != 1.0:
        raise InvalidParameterError(f"temperature must be 1 for GGUF files, got {args.temperature:g}.")
    from ..engines.llama_cpp import calibrate
    from ..engines.llama_cpp.ggml import modules

    package, _ = modules()
    calibration = calibrate(
        package.Llama,
        model_path=args.model,
        texts=texts,
        window=args.window or 512,
        **_asked(args),
        **llama_arguments(args),
    )
    calibration.save(args.output)
    show_calibration(calibration)
    more = ", or with the same model in transformers. It holds no loss sensitivities, which take gradients."
    _show_saved(args, f"chat {args.model}", more)


# column of the printed table: key of Calibration.summary()
COLUMNS = {
    "passed": "logprob unselected",
    "selected": "logprob selected",
    "unused": "unused",
    "output": "output",
    "deviation": "deviation",
    "sensitivity": "sensitivity",
    "rank": "rank",
    "explained": "explained",
    "(means)": "explained by means",
    "cost": "cost",
    "size": "size explained",
}


def show_calibration(calibration: Any) -> None:
    """The summary of a calibration: what it holds, and a table per layer."""
    head, *_ = repr(calibration).split("\n")
    common.print_text(head)
    rows = calibration.summary()
    columns = {title: key for title, key in COLUMNS.items() if key in rows[0]}
    cells = [[row[key] for key in ("router", *columns.values())] for row in rows]
    print_table(
        None,
        ("router", *columns),
        [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in cells],
        spare=[title for title in ("unused", "deviation", "output") if title in columns],
    )
    print()
    common.print_text(
        "passed, selected: mean log routing score of the experts that the model passed over, and of those it selected; "
        "unused: experts it never selected; output, deviation, sensitivity: median over experts of the size of the "
        "output, of its deviation from its mean, and of what the loss feels of that (where collected)."
    )
    if "rank" in rows[0]:
        common.print_text(
            "rank of the linear compensation (0: fixed vectors); explained: the share of dropped outputs' squares that it, "
            "and one mean per expert, explain on held-out windows; cost: of a dropped pair, in experts, and of its memory, in "
            "the experts' own; size: the share of the variance of log sizes that the token explains."
        )


def _files(paths: list[str], split_on_blank_lines: bool) -> Callable[[], Iterator[str]]:
    from ..text import PIECE, TextFile, in_turn

    files = [TextFile(path, None if split_on_blank_lines else PIECE) for path in paths]
    return lambda: in_turn(files)


def _dataset(args: argparse.Namespace) -> Callable[[], Iterator[str]]:
    datasets = needed("datasets", "--dataset", "datasets", ", or give a file with --text")
    try:
        rows = datasets.load_dataset(args.dataset, args.dataset_config, split=args.split, streaming=True)
        columns = rows.column_names
    except Exception as error:  # whatever the hub, the network or a loading script raises
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CalibrationError(
            f"expected to open the data set {args.dataset} (split {args.split}), got {type(error).__name__}: {reason}."
        ) from error
    if columns is not None and args.column not in columns:
        raise InvalidParameterError(
            f"column must be one of the data set's columns ({', '.join(columns)}), got {args.column!r}."
        )

    return lambda: (row[args.column] for row in rows)
