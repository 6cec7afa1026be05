"""What reading fewer experts per decoding step costs: a price on loads beside top-k, OEA, XShare and batch top-k at equal loads.

    python benchmarks/price_quality.py --data DIR [--tokens N] [--write docs/price.md]

Windows of 512 tokens, from places that are spread evenly over all of DIR's mixed test files (and over WikiText-2's test
text), are decoded in step (teacher-forced, column by column): so many sequences at a time. KL is to the model itself. The
last two columns: the divergence of the price at the loads of the row, between its own rows on a logarithmic scale, and how
much of the row's divergence that is. Nothing is chosen on these texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from pages import WINDOW, arguments, markdown_table, publish, spread_windows
from torch import Tensor

from bh_routing import Calibration
from bh_routing.evaluation.specs import make_routing
from bh_routing.evaluation.workbench import Workbench
from bh_routing.models import bundled_calibration
from bh_routing.models.loading import load_model
from bh_routing.patching.calls import as_steps
from bh_routing.stats.divergence import kl_divergence

MEASURED = (("mixed-test", 16), ("mixed-test", 64), ("wikitext2-test", 16))  # text, sequences in step
PRICED = {16: (48, 40, 34, 28, 24, 20, 16, 13), 64: (58, 52, 48, 44, 40, 36, 32, 28)}
OTHERS = {
    16: ("topk:k=8", "topk:k=6", "topk:k=4", "topk:k=3", "topk:k=2", "oea:k0=4", "oea:k0=3", "oea:k0=2", "oea:k0=1", "xshare:loads=40", "xshare:loads=32", "xshare:loads=20", "batchtopk:loads=32", "batchtopk:loads=20"),
    64: ("topk:k=8", "bh:loads=36,min_k=1", "topk:k=4", "topk:k=3", "topk:k=2", "oea:k0=3", "oea:k0=2", "oea:k0=1", "xshare:loads=52", "xshare:loads=44", "xshare:loads=34", "batchtopk:loads=44", "batchtopk:loads=34"),
}  # fmt: skip


class Point(NamedTuple):
    """A rule: experts that a layer reads in a step, experts per token, millinats per token."""

    rule: str
    loads: float
    experts: float
    kl: float


def steps_of(tokenizer: object, data: Path, text: str, streams: int, tokens: int) -> list[Tensor]:
    """Batches [streams, 512] of windows; those of a batch are from all over the text."""
    batches = tokens // (WINDOW * streams)
    windows_NS = torch.cat(spread_windows(tokenizer, data, text, batches * streams * WINDOW))
    return [windows_NS[i::batches] for i in range(batches)]


@torch.inference_mode()
def measure(
    bench: Workbench, rules: Sequence[str], steps: Sequence[Tensor], own: Sequence[Tensor]
) -> list[Point]:
    """Every rule on the same steps."""
    found = []
    for rule in rules:
        routing = make_routing(rule, bench)
        total = 0.0
        for ids_BS, own_BSV in zip(steps, own, strict=True):
            with routing, as_steps():
                routed_BSV = bench.model(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1)
            total += float(kl_divergence(own_BSV, routed_BSV).double().mean())
        told = routing.telemetry.to_dict()["total"]
        found.append(Point(rule, told["mean_loads"], told["mean_experts"], 1e3 * total / len(steps)))
        print(found[-1], flush=True)
    return found


def at_loads(curve: Sequence[Point], loads: float) -> float | None:
    """The divergence of a curve at some loads, on a logarithmic scale between its points; None beyond them."""
    points = sorted((p.loads, p.kl) for p in curve)
    for (low, more), (high, less) in pairwise(points):
        if low <= loads <= high:
            part = (loads - low) / (high - low)
            return math.exp((1 - part) * math.log(more) + part * math.log(less))
    return None


HEADER = (
    "rule",
    "loads per layer and step",
    "experts per token",
    "KL, millinats",
    "price at these loads",
    "share",
)


def main() -> None:
    parser = arguments(__doc__, threads=False, data=True)
    parser.add_argument("--tokens", type=int, default=32_768, help="of each text (default 32,768)")
    args = parser.parse_args()
    model, tokenizer = load_model("olmoe-nano", dtype="float32")
    calibration = Calibration.load(bundled_calibration())
    for name, streams in MEASURED:
        steps = steps_of(tokenizer, args.data, name, streams, args.tokens)
        with torch.inference_mode():
            own = [model(input_ids=ids, use_cache=False).logits.log_softmax(-1) for ids in steps]
        bench = Workbench(model, calibration, streams=streams)
        curve = measure(bench, [f"bh:loads={n}" for n in PRICED[streams]], steps, own)
        rows = []
        for point in (*curve, *measure(bench, OTHERS[streams], steps, own)):
            ours = None if point in curve else at_loads(curve, point.loads)
            told = ["", ""] if ours is None or not point.kl else [f"{ours:.2f}", f"{ours / point.kl:.2f}"]
            rows.append([point.rule, f"{point.loads:.1f}", f"{point.experts:.2f}", f"{point.kl:.2f}", *told])
        note = f"{len(steps) * steps[0].numel():,} tokens of {name}, {streams} sequences in step."
        publish(args.write, f"price-{name}-{streams}", f"{markdown_table(HEADER, rows)}\n\n{note}")


if __name__ == "__main__":
    main()
