"""Time the model as it is and with fewer experts per token, side by side in one run on this machine: tokens per second
for prefill and decoding, time per MoE layer, the share that the decision takes, and the work behind each figure (bytes of
expert weights touched, floating-point operations), which bounds what can be saved.

Budgets are solved on the calibration where there is one; without, a threshold per layer keeps as many experts on the
text that is timed. That is for timing only: what fewer experts cost in quality is what `bh-routing evaluate` says.
"""

from __future__ import annotations

import argparse
import json

from ..settings import TEXT_OPTIONS, RoutingSettings
from . import common
from .tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="olmoe-nano, a folder, or a hub id")
    number, whole = common.positive, common.whole(1)
    common.add_numbers(
        parser, "experts", number, "experts per token on average (default: 3/4, 1/2 and 1/4 of its own)"
    )
    common.add_numbers(parser, "tokens", whole, "tokens per forward, 1 is decoding (default: 64 and 512)")
    common.add_numbers(
        parser, "sequences", whole, "decode so many sequences together (default: 1, 4, 16 and 64)"
    )
    common.add_numbers(
        parser, "loads", number, "of these: experts read in a step (default: 3/8; needs a calibration)"
    )
    common.add_number(parser, "rounds", "rounds", default=7)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to run on (default: the bundled one)")
    common.add_calibration_argument(parser)
    common.add_options(parser, {"compensation": TEXT_OPTIONS["compensation"]})
    common.add_flag(parser, "json", "print one JSON object")
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    calibration = common.load_calibration(args.calibration, args.model, [])
    settings = common.values_of(args, {"compensation": TEXT_OPTIONS["compensation"]})
    RoutingSettings.from_dict(settings).check_calibrated(calibration)

    import torch

    from ..data import sample_text
    from ..evaluation import bench
    from ..integration import BHRoutingIntegration, RoutingIntegration
    from ..patching import make_plan
    from ..text import TextFile

    model, tokenizer = common.load(args)
    neither = args.tokens is None and args.sequences is None
    tokens = sorted(set((64, 512) if neither else args.tokens or ()))
    sequences = sorted(set((1, 4, 16, 64) if neither else args.sequences or ()))
    text = sample_text() if args.text is None else TextFile(args.text).read()
    needed = max(*tokens, bench.CONTEXT, *(min(4096, 64 * count) for count in sequences))
    ids = tokenizer(text[: 8 * needed])["input_ids"][:needed]
    input_ids = torch.tensor([ids], device=model.device)
    contexts = make_plan(model).contexts
    top_k = max(context.top_k for context in contexts)
    budgets = args.experts or sorted({max(1.0, top_k * share) for share in (0.75, 0.5, 0.25)}, reverse=True)
    torch.manual_seed(args.seed)
    variants: dict[str, RoutingIntegration]
    if calibration is None:
        variants = bench.threshold_variants(model, input_ids, budgets)
    else:
        variants = {
            f"{n:g} experts": BHRoutingIntegration(
                model, calibration=calibration, experts_per_token=n, **settings
            )
            for n in budgets
        }
    results = bench.measure(model, variants, input_ids, tokens, rounds=args.rounds) if tokens else []
    if sequences:
        if args.experts is None and len(budgets) > 1:  # the half beside the loads
            variants = dict([list(variants.items())[1]])
        if calibration is not None:
            for n in args.loads or [max(1, 3 * max(context.num_experts for context in contexts) // 8)]:
                variants[f"{n:g} loads"] = BHRoutingIntegration(
                    model, calibration=calibration, distinct_experts=n, **settings
                )
        results += bench.measure(model, variants, input_ids, sequences=sequences, rounds=args.rounds)
    stock = {(r.tokens, r.sequences): r for r in results if r.variant == "stock"}
    figures = [r.figures(stock[r.tokens, r.sequences]) for r in results]
    if calibration is not None and args.text is not None:
        for count in sequences:
            kl = bench.divergences(model, variants, input_ids, count)
            for row in figures:
                row |= {"kl": kl[row["variant"]]} if row["sequences"] == count else {}
    if args.json:
        told = {"model": args.model, "calibrated": calibration is not None, "figures": figures}
        print(json.dumps(told, indent=2))
        return
    common.print_text(common.describe_model(args.model, model))
    if calibration is None:
        common.print_text(
            "Without a calibration: a threshold per layer sets the number of experts, for timing only."
        )
    for count, together in stock:
        title = f"{count} tokens per forward" if together is None else f"Decoding {count} sequences together"
        title = "Decoding, one token at a time" if together == 1 else title
        held = [f for f in figures if (f["tokens"], f["sequences"]) == (count, together)]
        rows = [[name, *(format(f[key], style) for f in held)] for name, key, style in ROWS if key in held[0]]
        print_table(title, ["", *(f["variant"] for f in held)], rows)


ROWS = (
    ("KL to the model itself, nats per token", "kl", ".4f"),
    ("experts per token and layer", "experts_per_token", ".2f"),
    ("tokens per second", "tokens_per_second", ",.4g"),
    ("  time, ratio to stock", "forward_ratio", ".2f"),
    ("MoE layer (router, decision, experts), ms", "layer_ms", ".3g"),
    ("  ratio to stock", "layer_ratio", ".2f"),
    ("  share of decision and statistics", "decision_share", ".1%"),
    ("experts of a layer that are read", "distinct_experts", ".1f"),
    ("their weights, MB", "megabytes", ".3g"),
    ("  ratio: bound where memory bounds", "bytes_ratio", ".2f"),
    ("operations of a layer, MFLOP", "megaflops", ".4g"),
    ("  ratio: bound where arithmetic bounds", "operations_ratio", ".2f"),
)
