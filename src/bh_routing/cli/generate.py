"""Continue a text under BH routing and print the text and what the routers did, exact per token and layer.

With --mode analyze the model routes as always, and the statistics say what BH would have selected.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from ..settings import TEXT_OPTIONS, RoutingSettings
from . import common
from .tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="olmoe-nano, a folder, or a hub id")
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="the text to continue")
    common.add_number(parser, "max-new-tokens", "tokens to generate", default=40)
    common.add_flag(parser, "sample", "sample (default: greedy)")
    common.add_flag(parser, "json", "print one JSON object: text, stats, telemetry")
    common.add_routing_arguments(parser)
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    calibration = common.load_calibration(
        args.calibration, args.model, [] if args.experts is None else [args.experts]
    )
    settings = RoutingSettings.from_dict(common.values_of(args, TEXT_OPTIONS))

    import torch

    from ..integration import BHRoutingIntegration

    model, tokenizer = common.load(args)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise common.InvalidParameterError(f"prompt must have at least one token, got {args.prompt!r}.")
    integrator = BHRoutingIntegration(model, calibration=calibration, **settings.to_dict())
    torch.manual_seed(args.seed)
    with integrator:
        start = time.perf_counter()
        tokens = generate(model, tokenizer, inputs, args.max_new_tokens, sample=args.sample)
        seconds = time.perf_counter() - start
        stats = integrator.get_routing_stats()
    new = len(tokens) - inputs["input_ids"].shape[1]
    result = {
        "model": args.model,
        "prompt": args.prompt,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "new_tokens": new,
        "seconds": seconds,
        "stats": stats,
        "telemetry": integrator.telemetry.to_dict(),
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _show(result, common.describe_model(args.model, model))


def generate(
    model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, *, sample: bool = False
) -> list[int]:
    """Token ids of prompt and continuation."""
    tokens = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    ids: list[int] = tokens[0].tolist()
    return ids


def _show(result: dict[str, Any], heading: str) -> None:
    stats, layers, total = result["stats"], result["telemetry"]["layers"], result["telemetry"]["total"]
    print(result["text"])
    print()
    common.print_text(heading)
    common.print_text(settings_line(stats))
    own = {layer["top_k"] for layer in layers}
    rows = [(layer["path"], *_figures(layer)) for layer in layers]
    rows.append(("all", *_figures(total | {"top_k": own.pop() if len(own) == 1 else ""})))
    columns = ("router", who_selects(stats), "std", "own top-k", "saved", "weight lost")
    print_table(None, columns, rows, spare=("own top-k", "std", "weight lost"), total=True)
    print()
    common.print_text(
        f"{result['new_tokens']} new tokens in {result['seconds']:.2f} s; experts per token over the "
        f"{total['tokens']} tokens that went through the model ({stats['total_forward_passes']} router calls)."
    )


def _figures(part: dict[str, Any]) -> list[str]:
    return [
        f"{part['mean_experts']:.2f}",
        f"{part['std_experts']:.2f}",
        str(part["top_k"]),
        f"{part['share_saved']:.0%}",
        f"{part['lost_weight_share']:.0%}",
    ]


def who_selects(stats: dict[str, Any]) -> str:
    """What to call the experts that were counted."""
    return "BH would select" if stats["mode"] == "analyze" else "BH selected"


def settings_line(stats: dict[str, Any]) -> str:
    """The routing's settings in one line."""
    parts = [f"procedure {stats['procedure']}"]
    if "experts_per_token" in stats:
        parts.append(f"budget {stats['experts_per_token']:g}")
    named = {"max_kl": "KL at most", "agreement": "agreement at least", "phases": "experts to read/write"}
    parts += [f"{words} {stats[name]}" for name, words in named.items() if name in stats]
    if stats["alpha"] is not None:
        parts.append(f"alpha {stats['alpha']:.4g}")
    parts.append(f"{stats['min_k']} to {stats['max_k']} experts")
    parts.append("calibrated null" if stats["calibrated"] else "the token's own null (uncalibrated)")
    parts.append(f"mode {stats['mode']}")
    return ", ".join(parts)
