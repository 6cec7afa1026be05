"""Time the routing decision against what a plain router does (softmax + top-k), for E = 64 experts and top-8.

    python benchmarks/decide.py [--threads N] [--device cpu|cuda] [--write docs/performance.md]

All candidates take turns within one run, in an order that rotates from round to round, so that a busy machine is
busy for all of them; the table shows medians in microseconds, and in brackets the median over rounds of the ratio
to softmax + top-k of the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from machine import Times, describe_machine, in_turn, ratio
from pages import arguments, markdown_table, publish
from torch import Tensor

from bh_routing import DecisionTable, PValuePolicy, RoutingContext, TablePolicy, TopKPolicy
from bh_routing import benjamini_hochberg_routing as bh
from bh_routing.policies import RoutingPolicy

EXPERTS, TOP_K = 64, 8
TOKENS = (1, 32, 512, 4096)
BASE = "softmax + top-k"


def candidates(logits_TE: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name, on these logits."""
    context = RoutingContext(
        path="gate",
        index=0,
        num_experts=EXPERTS,
        empty=EXPERTS,
        top_k=TOP_K,
        route_norm="none",
        can_widen=True,
        device=logits_TE.device,
    )
    own_weights_TK, own_experts_TK = torch.softmax(logits_TE, -1).topk(TOP_K, -1)
    # thresholds that keep about half of the eight, as a calibrated table would
    table = DecisionTable(
        thresholds_LE=torch.linspace(-3.0, -4.0, EXPERTS).unsqueeze(0),
        statistic="contribution",
        offset_LE=torch.randn(1, EXPERTS, generator=torch.Generator().manual_seed(1)) * 0.2,
    )

    def decide(policy: RoutingPolicy) -> Callable[[], object]:
        policy.bind([context])
        return lambda: policy.decide(logits_TE, own_weights_TK, own_experts_TK, context)

    return {
        BASE: lambda: torch.softmax(logits_TE, -1).topk(TOP_K, -1),
        "TopKPolicy(4).decide": decide(TopKPolicy(4)),
        "TablePolicy.decide (calibrated)": decide(TablePolicy(table)),
        "TablePolicy.decide, widened to 16 experts": decide(TablePolicy(table, max_k=16)),
        "PValuePolicy.decide (robust)": decide(PValuePolicy("robust", alpha=0.4)),
        "benjamini_hochberg_routing (robust)": lambda: bh(logits_TE, alpha=0.4, max_k=TOP_K, validate=False),
    }


@torch.inference_mode()
def measure(tokens: int, device: torch.device, seconds: float) -> Times:
    """Seconds per call and candidate, one value per round."""
    logits_TE = (2.0 * torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(0))).to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return in_turn(candidates(logits_TE), seconds, rounds=30, warm_up=5, before=wait, after=wait)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="per number of tokens (default 3)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    measured = {tokens: measure(tokens, device, args.seconds) for tokens in TOKENS}
    rows = []
    for name in measured[1]:
        cells = [name]
        for times in measured.values():
            brackets = "" if name == BASE else f" ({ratio(times, name, BASE):.1f}x)"
            cells.append(f"{statistics.median(times[name]) * 1e6:,.0f}{brackets}")
        rows.append(cells)
    where = describe_machine(args.threads)
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}; {where}"
    rounds = min(len(times[BASE]) for times in measured.values())
    text = (
        markdown_table(["microseconds per call (median)", *(f"T = {t:,}" for t in TOKENS)], rows)
        + f"\n\nE = {EXPERTS}, top-{TOP_K}, float32; at least {rounds} rounds. {where}."
    )
    publish(args.write, f"decide-{device.type}", text)


if __name__ == "__main__":
    main()
