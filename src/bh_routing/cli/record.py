"""Write a routing log: what a model's routers say and choose for a sample of tokens (logits, experts, weights, token ids). For one's
own analysis (examples/logs_eda.ipynb), and to solve budgets on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="olmoe-nano, a folder, or a hub id")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, plain or compressed")
    parser.add_argument("-o", "--output", required=True, metavar="LOG.safetensors", help="the file to write")
    common.add_number(parser, "max-tokens", "keep N tokens, spread over the text", default=8192)
    common.add_window_argument(parser)
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from ..text import TextFile

    common.check_output(Path(args.output), "file", ".safetensors")

    text = TextFile(args.text).read()

    from ..evaluation import cut_windows
    from ..evaluation.routing_log import log_routing

    length = common.window_of(args.model, args.window)
    model, tokenizer = common.load(args)
    windows = cut_windows(tokenizer, text, length, limit=max(1, 4 * args.max_tokens // length))
    with common.make_progress() as progress:
        bar = progress.add_task("logging", total=len(windows))
        log = log_routing(
            model,
            windows,
            max_tokens=args.max_tokens,
            model_id=common.model_name(args.model),
            step=lambda: progress.advance(bar),
        )
    log.save(args.output)
    common.print_text(f"{log!r}, saved to {args.output}.")
