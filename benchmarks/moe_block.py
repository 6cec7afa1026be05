"""Time one OLMoE-1B-7B MoE block (hidden 2048, intermediate 1024, 64 experts, top-8) with a mean of 4.0 experts.

    python benchmarks/moe_block.py [--dtype bfloat16] [--tokens 1 --tokens 8 ...] [--seconds S] [--write docs/performance.md]

Random weights; a table of thresholds drives the counts, whose realised mean must lie within 0.1 of 4.0 and whose
spread must reach from 1 to 8. Everything takes turns within one run on the same random tokens, new in every round,
so that a busy machine is busy for all: the stock implementations at top-8, ours with all 8 experts kept, ours with
4.0; each after the same on other tokens, as behind the layer before. Ratios are medians over rounds of the ratio to the fastest stock implementation in the same round.

The decision is timed where it happens: around what the patch adds to the router, between the products of a running
block, whose weights have just emptied the caches. So is what a linear compensation of full rank (64) adds behind the
experts: its share is of the block's time with it.

The bound is max(bytes of distinct experts / bandwidth, operations / peak), as a ratio to the same at top-8; bandwidth
and peak are measured in the same process. It assumes that reading and computing overlap perfectly.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import describe_machine, ratio
from pages import arguments, markdown_table, publish
from torch import Tensor

from bh_routing import DecisionTable, RoutingIntegration, TablePolicy
from bh_routing.decision.compensation import Compensation
from bh_routing.evaluation.bench import threshold_for
from bh_routing.evaluation.layer_speed import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, make_layer
from bh_routing.patching.instance import find_patch
from bh_routing.stats.statistic import base_statistic

EXPERT_WEIGHTS = 3 * HIDDEN * INTERMEDIATE
STOCK = ("eager", "grouped_mm", "batched_mm")
MEAN = 4.0


def make_block(dtype: torch.dtype) -> Any:
    """A block whose router has opinions: logits with a standard deviation of about 1.5."""
    block = make_layer(dtype=dtype)
    block.experts.config._experts_implementation = "grouped_mm"
    return block


def thresholds(block: Any, pool_TH: Tensor) -> tuple[DecisionTable, DecisionTable]:
    """Tables that keep everything, and 4.0 experts on average over these tokens."""
    logits_TE, _, experts_TK = block.gate(pool_TH)
    scores_TK = base_statistic(logits_TE, "logprob", "softmax").gather(-1, experts_TK)
    level = threshold_for(scores_TK, MEAN)
    counts_T = (scores_TK >= level).sum(-1).clamp_min(1)
    assert abs(float(counts_T.float().mean()) - MEAN) < 0.1
    assert (int(counts_T.min()), int(counts_T.max())) == (1, TOP_K)

    def table(value: float, label: str) -> DecisionTable:
        full = torch.full((1, EXPERTS), value)
        return DecisionTable(thresholds_LE=full, offset_LE=torch.zeros_like(full), label=label)

    return table(float("-inf"), "all"), table(level, "4.0 experts")


def linear_compensation() -> Compensation:
    """Random maps of full rank, E."""
    return Compensation.linear(
        center_D=torch.zeros(EXPERTS),
        low_D=torch.full((EXPERTS,), -6.0),
        high_D=torch.full((EXPERTS,), 6.0),
        whiten_DR=torch.randn(EXPERTS, EXPERTS) / 12.0,
        mean_EH=0.02 * torch.randn(EXPERTS, HIDDEN),
        slope_ERH=0.02 * torch.randn(EXPERTS, EXPERTS, HIDDEN),
    )


def machine_limits(dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second, operations per second) that large products of this dtype reach."""
    matrices = torch.randn(64, HIDDEN, HIDDEN).to(dtype)
    row, tile = torch.randn(1, HIDDEN).to(dtype), torch.randn(1024, HIDDEN).to(dtype)

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    read = best(lambda: [torch.nn.functional.linear(row, m) for m in matrices])
    compute = best(lambda: [torch.nn.functional.linear(tile, m) for m in matrices[:4]])
    return matrices.numel() * matrices.element_size() / read, 4 * 2 * 1024 * HIDDEN**2 / compute


class Bench:
    """One block, its inputs, and the two tables."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.block = make_block(dtype)
        self.pool_TH = torch.randn(4096, HIDDEN).to(dtype)
        self.all_table, self.mean_table = thresholds(self.block, self.pool_TH)
        self.dtype, self.bytes = dtype, EXPERT_WEIGHTS * torch.finfo(dtype).bits // 8

    def stock(self, name: str, x: Tensor) -> Tensor:
        self.block.experts.config._experts_implementation = name
        return self.block(x)

    def _inputs(self, tokens: int) -> list[Tensor]:
        """The pool in pieces of this many tokens, in an order whose running mean of experts stays at 4.0."""
        logits_TE, _, experts_TK = self.block.gate(self.pool_TH)
        scores_TK = base_statistic(logits_TE, "logprob", "softmax").gather(-1, experts_TK)
        level = float(self.mean_table.thresholds_LE[0, 0])
        counts = (scores_TK >= level).sum(-1).clamp_min(1).view(-1, tokens).float().mean(-1).tolist()
        more = [i for i, count in enumerate(counts) if count >= MEAN]
        less = [i for i, count in enumerate(counts) if count < MEAN]
        order, excess = [], 0.0
        while more and less:
            order.append((less if excess > 0 else more).pop())
            excess += counts[order[-1]] - MEAN
        return [self.pool_TH[i * tokens : (i + 1) * tokens].unsqueeze(0) for i in order]

    def measure(self, tokens: int, seconds: float, limits: tuple[float, float]) -> dict[str, Any]:
        """Times of all variants at one number of tokens, and what is derived from them."""
        inputs = self._inputs(tokens)
        first = {}
        for name in STOCK:
            if name == "batched_mm" and tokens > 1:
                continue  # gathers the weights of every pair: seconds
            self.stock(name, inputs[0])
            first[name] = min(_clock(lambda name=name: self.stock(name, inputs[1]))[0] for _ in range(8))
        near = [name for name in first if first[name] < 1.5 * min(first.values())]

        keep_all = RoutingIntegration(self.block, TablePolicy(self.all_table))
        fewer = RoutingIntegration(self.block, TablePolicy(self.mean_table))
        path = fewer.plan.layers[0].path
        linear = RoutingIntegration(
            self.block, TablePolicy(self.mean_table), compensations={path: linear_compensation()}
        )
        patched = {"all 8": keep_all, "4.0": fewer, "4.0, linear": linear}
        times: dict[str, list[float]] = {name: [] for name in (*near, *patched, "share", "linear share")}
        distinct: dict[str, list[float]] = {"all 8": [], "4.0": []}
        fastest = configured = min(near, key=first.__getitem__)
        start, turn = time.perf_counter(), 0
        while turn < 6 or time.perf_counter() - start < seconds:
            x, other = inputs[turn % len(inputs)], inputs[(turn + 1) % len(inputs)]
            names = [*near, *patched, "4.0", "4.0, linear"]  # the last two with clocks in them
            order = [(turn + i) % len(names) for i in range(len(names))]
            for place in order:
                name, clocks = names[place], place >= len(names) - 2
                if name in near:
                    self.stock(name, other)
                    elapsed, _ = _clock(lambda name=name, x=x: self.stock(name, x))
                else:
                    self.block.experts.config._experts_implementation = configured
                    with patched[name]:
                        self.block(other)
                        if clocks:
                            which = self.block.experts if name == "4.0, linear" else self.block.gate
                            with find_patch(which).clocked() as part:
                                elapsed, _ = _clock(lambda x=x: self.block(x))
                            share = "linear share" if name == "4.0, linear" else "share"
                            times[share].append((part["run"] - part["inner"]) / elapsed)
                            continue
                        elapsed, _ = _clock(lambda x=x: self.block(x))
                if turn:
                    times[name].append(elapsed)
            _, _, own_TK = self.block.gate(x)
            distinct["all 8"].append(float(own_TK.unique().numel()))
            with fewer:
                _, weights_TK, own_TK = self.block.gate(x)
            distinct["4.0"].append(float(own_TK[weights_TK != 0].unique().numel()))
            turn += 1
        fastest = min(near, key=lambda name: statistics.median(times[name]))
        experts = fewer.telemetry.mean_experts_per_token
        assert abs(experts - MEAN) < 0.1, experts

        def bound(name: str, per_token: float) -> float:
            reading = statistics.fmean(distinct[name]) * self.bytes / limits[0]
            return max(reading, 2 * EXPERT_WEIGHTS * tokens * per_token / limits[1])

        return {
            "tokens": tokens,
            "stock": fastest,
            "times": {name: statistics.median(ts) * 1e3 for name, ts in times.items() if "share" not in name},
            "ratio": {
                label: ratio(times, name, base)
                for label, name, base in (
                    ("all 8", "all 8", fastest),
                    ("all 8, same", "all 8", configured),
                    ("4.0", "4.0", fastest),
                    ("4.0, linear", "4.0, linear", fastest),
                )
            },
            "share": statistics.median(times["share"]),
            "linear share": statistics.median(times["linear share"]),
            "experts": experts,
            "distinct": statistics.fmean(distinct["4.0"]) / statistics.fmean(distinct["all 8"]),
            "bound": bound("4.0", experts) / bound("all 8", TOP_K),
            "rounds": turn - 1,
        }


def _clock(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


HEADER = (
    "work",
    "fastest stock",
    "ms, top-8",
    "ms, ours, all 8",
    "ratio (to the same implementation)",
    "ms, ours, 4.0",
    "ratio",
    "with a linear compensation",
    "its share",
    "bound",
    "distinct experts",
    "decision and statistics",
    "rounds",
)


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--seconds", type=float, default=25.0, help="per row (default 25)")
    parser.add_argument("--block", default="moe-block", help="where in that page (default: moe-block)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, notes = [], []
    for name in args.dtype or ("bfloat16", "float32"):
        bench = Bench(getattr(torch, name))
        limits = machine_limits(bench.dtype)
        notes.append(f"{name}: {limits[0] / 1e9:.1f} GB/s and {limits[1] / 1e9:.0f} GFLOP/s")
        for tokens in args.tokens or (1, 8, 64, 512):
            row = bench.measure(tokens, args.seconds, limits)
            cells = [
                f"{name}, T = {tokens}",
                row["stock"],
                _milliseconds(row["times"][row["stock"]]),
                _milliseconds(row["times"]["all 8"]),
                f"{row['ratio']['all 8']:.3f} ({row['ratio']['all 8, same']:.3f})",
                _milliseconds(row["times"]["4.0"]),
                f"{row['ratio']['4.0']:.3f}",
                f"{row['ratio']['4.0, linear']:.3f}",
                f"{row['linear share']:.1%}",
                f"{row['bound']:.2f}",
                f"{row['distinct']:.2f}",
                f"{row['share']:.1%}",
                str(row["rounds"]),
            ]
            print(" | ".join(cells), f"| mean {row['experts']:.2f}", row["times"], flush=True)
            rows.append(cells)
        del bench
    text = f"{markdown_table(HEADER, rows)}\n\n{describe_machine(args.threads)}; reached: {'; '.join(notes)}."
    publish(args.write, args.block, text)


if __name__ == "__main__":
    main()
