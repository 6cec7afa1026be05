"""What the decision costs and why: by tokens, by level, by step, against a cache of decisions, in cold caches.

    python benchmarks/decision_cost.py [--threads N] [--write docs/performance.md]

All on the logits of 64 experts and top-8, bfloat16, with a calibrated kind of table (contribution, 4.0 experts).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from machine import describe_machine, in_turn, ratio
from pages import WINDOW, arguments, markdown_table, publish
from torch import Tensor

from bh_routing import DecisionTable, RoutingContext, TablePolicy, Telemetry
from bh_routing.decision.select import decide_by_table, not_finite, rank_by_table
from bh_routing.decision.types import TableSettings
from bh_routing.evaluation.bench import threshold_for
from bh_routing.stats.statistic import full_statistic

EXPERTS, TOP_K = 64, 8
HOW = TableSettings(empty=EXPERTS, statistic="contribution")


def microseconds(call: Callable[[], object], seconds: float = 0.5) -> float:
    """Median of single calls."""
    return statistics.median(in_turn({"": call}, seconds, rounds=23)[""]) * 1e6


class Setting:
    """A bound policy, and router outputs for any number of tokens."""

    def __init__(self) -> None:
        self.context = RoutingContext(
            path="gate", index=0, num_experts=EXPERTS, empty=EXPERTS, top_k=TOP_K, route_norm="none"
        )
        self.offset_E = 0.2 * torch.randn(EXPERTS)
        self.level = 0.0
        logits_TE, _, own_TK = self.outputs(4096)
        statistic_TE = full_statistic(logits_TE, self.offset_E, "contribution", "softmax")
        statistic_TK = statistic_TE.gather(-1, own_TK)
        self.level = threshold_for(statistic_TK, 4.0)
        self.policy = self.bound(self.level)

    def bound(self, level: float) -> TablePolicy:
        policy = TablePolicy(
            DecisionTable(
                thresholds_LE=torch.full((1, EXPERTS), level),
                statistic="contribution",
                offset_LE=self.offset_E.unsqueeze(0),
            )
        )
        policy.bind([self.context])
        return policy

    def outputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = (1.5 * torch.randn(tokens, EXPERTS)).to(torch.bfloat16)
        weights_TK, experts_TK = torch.softmax(logits_TE.float(), -1).topk(TOP_K, -1)
        return logits_TE, weights_TK.to(torch.bfloat16), experts_TK


def by_tokens(s: Setting) -> str:
    rows = []
    for tokens in (1, 8, 64, 512, 4096, 32768):
        outputs = s.outputs(tokens)
        telemetry = Telemetry([s.context], [TOP_K])
        decision = s.policy.decide(*outputs, s.context)
        times = in_turn(
            {
                "decide": lambda outputs=outputs: s.policy.decide(*outputs, s.context),
                "count": lambda t=telemetry, d=decision: t.update(s.context, d),
                "plain": lambda outputs=outputs: torch.softmax(outputs[0].float(), -1).topk(TOP_K, -1),
            },
            1.5,
        )
        decide, count, plain = (statistics.median(times[name]) * 1e6 for name in ("decide", "count", "plain"))
        cells = [decide, count, plain, ratio(times, "decide", "plain"), (decide + count) / tokens]
        rows.append([f"{tokens:,}", *(f"{c:,.1f}" for c in cells[:3]), f"{cells[3]:.2f}", f"{cells[4]:.3f}"])
    header = ["tokens", "decision, µs", "statistics, µs", "softmax + top-k, µs", "ratio", "µs per token"]
    return markdown_table(header, rows)


def by_level(s: Setting) -> str:
    outputs = s.outputs(4096)
    rows = []
    for label, level in (("keeps 1", float("inf")), ("4.0 on average", s.level), ("keeps 8", float("-inf"))):
        policy = s.bound(level)
        experts = float(policy.decide(*outputs, s.context).counts_T.float().mean())
        time_ = microseconds(lambda policy=policy: policy.decide(*outputs, s.context))
        rows.append([label, f"{experts:.2f}", f"{time_:,.0f}"])
    return markdown_table(["threshold", "experts per token", "decision at T = 4,096, µs"], rows)


def by_step(s: Setting) -> str:
    """The steps of the PyTorch path, each alone; and the host path of one token."""
    rows = []
    thresholds_E, offset_E = s.policy._rows["gate"]
    for tokens in (1, 4096):
        logits_TE, weights_TK, own_TK = s.outputs(tokens)
        statistic_TE = full_statistic(logits_TE, offset_E, "contribution", "softmax")
        statistic_TK = statistic_TE.gather(-1, own_TK)
        kept = rank_by_table(statistic_TK, thresholds_E).kept()
        steps: dict[str, Callable[[], Any]] = {
            "statistic": lambda x=logits_TE: full_statistic(x, offset_E, "contribution", "softmax"),
            "gather": lambda x=statistic_TE, own=own_TK: x.gather(-1, own),
            "order, compare, count": lambda x=statistic_TK: rank_by_table(x, thresholds_E).kept(),
            "finite?": lambda x=logits_TE: not_finite(x),
            "mask weights": lambda w=weights_TK, k=kept: w.masked_fill(~k.keep_TK, 0.0),
            "mask indices": lambda o=own_TK, k=kept: o.masked_fill(~k.keep_TK, EXPERTS),
            "all of it": lambda a=(logits_TE, weights_TK, own_TK): decide_by_table(
                *a, thresholds_E, offset_E, HOW
            ),
            "the policy": lambda a=(logits_TE, weights_TK, own_TK): s.policy.decide(*a, s.context),
        }
        rows.append([f"{tokens:,}", *(f"{microseconds(step, 0.2):,.1f}" for step in steps.values())])
    return markdown_table(["tokens", *steps], rows)


def cold(s: Setting) -> str:
    """One token: alone, and right after products whose weights have emptied the caches."""
    matrices = torch.randn(16, 2048, 2048).to(torch.bfloat16)  # 134 MB
    row = torch.randn(1, 2048).to(torch.bfloat16)
    outputs = s.outputs(1)
    thresholds_E, offset_E = s.policy._rows["gate"]
    telemetry = Telemetry([s.context], [TOP_K])
    decision = s.policy.decide(*outputs, s.context)
    cache = {outputs[0].view(torch.int16).numpy().tobytes(): decision}
    calls: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "one tensor operation (masked_fill)": lambda: outputs[1].masked_fill(decision.dropped_TK, 0.0),
        "a cache: hash the logits, look them up": lambda: cache[
            outputs[0].view(torch.int16).numpy().tobytes()
        ],
        "decision, in PyTorch": lambda: decide_by_table(*outputs, thresholds_E, offset_E, HOW),
        "decision, on the host": lambda: s.policy.decide(*outputs, s.context),
        "statistics": lambda: telemetry.update(s.context, decision),
    }
    quarters = itertools.cycle(matrices.split(4))

    def empty_caches() -> None:
        for matrix in next(quarters):
            torch.nn.functional.linear(row, matrix)

    times = in_turn(calls, 0.0, rounds=63, before=empty_caches)
    rows = [
        [name, f"{microseconds(call, 0.2):.1f}", f"{statistics.median(times[name]) * 1e6:.0f}"]
        for name, call in calls.items()
    ]
    return markdown_table(["one token, µs", "alone", "after 34 MB of products"], rows)


def repeats(s: Setting) -> str:
    """How often a decision repeats: logits of a layer are never the same for two tokens of a text."""
    from bh_routing.data import sample_text
    from bh_routing.models.loading import load_model
    from bh_routing.patching import make_plan, watch

    model, tokenizer = load_model("olmoe-nano", device="cpu", dtype="bfloat16")
    ids = torch.tensor(tokenizer(sample_text()[:12_000])["input_ids"][: 2 * WINDOW]).view(2, WINDOW)
    seen: dict[int, list[bytes]] = {}

    def collect(layer: Any, logits_TE: Tensor, *_: Any) -> None:
        keys = logits_TE.to(torch.bfloat16).view(torch.int16).numpy()
        seen.setdefault(layer.context.index, []).extend(key.tobytes() for key in keys)

    with watch(make_plan(model), collect):
        model(input_ids=ids, use_cache=False)
    share = [1 - len(set(keys)) / len(keys) for keys in seen.values()]
    words = 1 - ids.unique().numel() / ids.numel()
    return (
        f"Of {ids.numel():,} tokens of the bundled text {words:.0%} repeat an earlier token; the bfloat16 logits of "
        f"olmoe-nano's layers repeat earlier ones for {', '.join(f'{x:.1%}' for x in share)} of the tokens."
    )


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    setting = Setting()
    for part in (by_tokens, by_level, by_step, cold, repeats):
        text = f"{part(setting)}\n\n{describe_machine(args.threads)}."
        publish(args.write, part.__name__.replace("_", "-"), text)


if __name__ == "__main__":
    main()
