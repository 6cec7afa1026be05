"""Time an OLMoE-1B-7B layer in bf16 under a price on loads, replaying the decode steps of the embedded model.

    python benchmarks/price_block.py --calibration FILE [--streams 16 --loads 21] [--streams 64 --loads 34]

Random weights have neither a divergence nor realistic loads. So the embedded model, whose layers have 64 experts and choose 8
too, decodes windows of the bundled text in step; what its routers say and choose is handed out by the router of a layer of
hidden size 2048 with 64 experts of 1024, and everything behind it is computed there: the decision, with the price of the
embedded model's calibration, the experts, and a linear compensation of full rank (random maps). ``--loads``: where the
divergence is that of top-4 (docs/price.md).

Stock top-8, top-4 and the price take turns on the same steps, new in every round; ratios are medians over rounds. The bound is
max(bytes of the loads / bandwidth, operations / peak), each measured in the same process, as a ratio to the same at top-8.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from machine import describe_machine, ratio
from moe_block import EXPERT_WEIGHTS, HIDDEN, STOCK, TOP_K, linear_compensation, machine_limits, make_block
from pages import arguments, markdown_table, publish
from torch import Tensor
from whole_model import free_gigabytes, make_model

from bh_routing import BHRoutingIntegration, Calibration, RoutingIntegration, TopKPolicy
from bh_routing.data import sample_text
from bh_routing.decision.price import Step
from bh_routing.models.loading import load_model
from bh_routing.patching.calls import as_steps
from bh_routing.patching.instance import find_patch
from bh_routing.policies import FixedPrice, PricePolicy

SKIPPED = 16  # columns of a window, whose tokens have little context


@dataclass
class Recorded:
    """One layer of the embedded model at one step: what its router said of B tokens."""

    layer: int
    logits_BE: Tensor
    weights_BK: Tensor
    experts_BK: Tensor


def record(calibration: Calibration, streams: int, loads: float) -> tuple[list[Recorded], PricePolicy]:
    """Steps of the embedded model on the bundled text under a budget of loads, in an order that mixes layers; and its policy."""
    model, tokenizer = load_model("olmoe-nano", dtype="float32")
    ids_N = tokenizer(sample_text(), return_tensors="pt", verbose=False)["input_ids"][0]
    ids_BS = ids_N.unfold(0, 128, len(ids_N) // streams)[:streams]  # from all over the text
    steps: list[Recorded] = []
    integration = BHRoutingIntegration(model, calibration=calibration, distinct_experts=loads)

    def see(router: Any, context: Any, decision: Any, logits_TE: Tensor) -> None:
        parts = (logits_TE, decision.own_weights_TK, decision.own_experts_TK)
        columns = zip(*(x.view(*ids_BS.shape, -1).unbind(1) for x in parts), strict=True)
        steps.extend(Recorded(context.index, *column) for column in list(columns)[SKIPPED:])

    integration.watchers.append(see)
    with integration, as_steps(), torch.no_grad():
        model(input_ids=ids_BS)
    policy = integration.policy
    assert isinstance(policy, PricePolicy)
    return [steps[i] for i in torch.randperm(len(steps), generator=torch.Generator().manual_seed(0))], policy


class Replayed:
    """In place of a router's forward: its own products, then what was recorded."""

    def __init__(self, router: Any) -> None:
        self.inner, self.step = router.forward, None

    def __call__(self, hidden_TH: Tensor) -> Any:
        found = self.inner(hidden_TH)
        if self.step is None:
            return found
        return (
            self.step.logits_BE.to(found[0].dtype),
            self.step.weights_BK.to(found[1].dtype),
            self.step.experts_BK,
        )


class InStep(PricePolicy):
    """The policy of one layer of the embedded model after another, each call a step."""

    def __init__(self, policies: list[PricePolicy]) -> None:
        super().__init__(policies[0].table, prices=policies[0].prices, first=policies[0].first)
        self.policies, self.layer, self.in_step = policies, 0, Step(shape=(1, 1), tokens=1)

    def bind(self, contexts: Any) -> None:
        for policy in self.policies:
            policy.bind(contexts)

    def decide(self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: Any) -> Any:
        context = replace(context, step=self.in_step)
        return self.policies[self.layer].decide(logits_TE, own_weights_TK, own_experts_TK, context)


def by_layer(policy: PricePolicy, streams: int) -> InStep:
    """Its decisions for a router of any name."""
    table = policy.table
    found = []
    for row, price in enumerate(policy.prices.at(streams)):
        one = {
            name: getattr(table, name)[row : row + 1]
            for name in ("thresholds_LE", "offset_LE", "slopes_LDE", "center_LD")
            if getattr(table, name) is not None
        }
        found.append(
            PricePolicy(replace(table, paths=(), **one), prices=FixedPrice(price, 1), first=policy.first)
        )
    return InStep(found)


def measure(
    block: Any, calibration: Calibration, streams: int, loads: float, seconds: float, limits: Any
) -> list[str]:
    """A row of the table."""
    steps, policy = record(calibration, streams, loads)
    ours = by_layer(policy, streams)
    ours.in_step = Step(shape=(streams, 1), tokens=streams)
    replayed = Replayed(block.gate)
    block.gate.forward = replayed
    x_BSH = torch.randn(1, streams, HIDDEN).to(torch.bfloat16)
    linear = {"gate": linear_compensation()}
    variants = {
        "top-4": RoutingIntegration(block, TopKPolicy(4)),
        "price": RoutingIntegration(block, ours, compensations=linear),
        "no compensation": RoutingIntegration(block, ours),
    }
    times: dict[str, list[float]] = {name: [] for name in ("stock", *variants)}
    shares, read, own_read, pairs = [], [], [], []
    variants["price"].watchers.append(
        lambda router, context, decision, logits_TE: (
            read.append(decision.own_experts_TK[~decision.dropped_TK].unique().numel()),
            own_read.append(decision.own_experts_TK.unique().numel()),
            pairs.append(int(decision.counts_T.sum()) / streams),
        )
    )
    near = {}
    for name in STOCK[:2]:  # batched_mm gathers the weights of every pair
        block.experts.config._experts_implementation = name
        replayed.step = steps[0]
        block(x_BSH)
        near[name] = min(_clock(lambda: block(x_BSH)) for _ in range(5))
    block.experts.config._experts_implementation = min(near, key=near.__getitem__)
    start, turn = time.perf_counter(), 0
    while turn < 8 or time.perf_counter() - start < seconds:
        replayed.step = steps[turn % len(steps)]
        ours.layer = replayed.step.layer
        names = list(times)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name == "stock":
                elapsed = _clock(lambda: block(x_BSH))
            else:
                with variants[name]:
                    elapsed = _clock(lambda: block(x_BSH))
            if turn:
                times[name].append(elapsed)
        with variants["no compensation"], find_patch(block.gate).clocked() as part:
            elapsed = _clock(lambda: block(x_BSH))
            shares.append((part["run"] - part["inner"]) / elapsed)
        turn += 1
    del block.gate.forward
    replayed.step = None
    each = EXPERT_WEIGHTS * 2

    def bound(experts: float, per_token: float) -> float:
        return max(experts * each / limits[0], 2 * EXPERT_WEIGHTS * streams * per_token / limits[1])

    loads_own, loads_ours = statistics.fmean(own_read), statistics.fmean(read)
    ours_bound, own_bound = bound(loads_ours, statistics.fmean(pairs)), bound(loads_own, TOP_K)
    return [
        str(streams),
        f"{loads_own:.1f} / {loads_ours:.1f}",
        f"{statistics.fmean(pairs):.2f}",
        f"{1e3 * statistics.median(times['stock']):.3g}",
        f"{ratio(times, 'top-4', 'stock'):.2f}",
        f"{ratio(times, 'price', 'stock'):.2f}",
        f"{ratio(times, 'no compensation', 'stock'):.2f}",
        f"{ours_bound / own_bound:.2f}",
        f"{statistics.median(shares):.1%}",
        str(turn - 1),
    ]


NEW, PROMPT = 8, 32  # tokens decoded in a round, after so many


def measure_model(
    calibration: Calibration, streams: int, loads: float, layers: int, rounds: int
) -> list[str]:
    """Greedy decoding of a model of OLMoE-1B-7B's shape, so many sequences at a time; every layer replays one of the embedded model's."""
    steps, policy = record(calibration, streams, loads)
    model = make_model(layers)
    gates = [layer.mlp.gate for layer in model.model.layers]
    rows = [row % policy.table.num_layers for row in range(layers)]
    recorded = [[one for one in steps if one.layer == row] for row in rows]
    routers = [Replayed(gate) for gate in gates]
    (price,) = set(policy.prices.at(streams))  # one for the whole model
    paths = tuple(f"model.layers.{row}.mlp.gate" for row in range(layers))
    held = {
        name: getattr(policy.table, name)[rows]
        for name in ("thresholds_LE", "offset_LE", "slopes_LDE", "center_LD")
        if getattr(policy.table, name) is not None
    }
    priced = PricePolicy(
        replace(policy.table, paths=paths, **held), prices=FixedPrice(price, layers), first=policy.first
    )
    linear = {path: linear_compensation() for path in paths}
    variants = {
        "top-4": RoutingIntegration(model, TopKPolicy(4)),
        "price": RoutingIntegration(model, priced, compensations=linear),
    }
    cache = model(torch.randint(5, 4000, (streams, PROMPT)), use_cache=True).past_key_values
    for gate, router in zip(gates, routers, strict=True):
        gate.forward = router

    def decode(turn: int, new: int = NEW) -> None:
        ids_B1 = torch.ones(streams, 1, dtype=torch.int64)
        for number in range(new):
            for layer, router in enumerate(routers):
                own = recorded[layer]
                router.step = own[(turn * NEW + number + layer) % len(own)]
            ids_B1 = model(ids_B1, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.crop(-new)

    near = {}
    for name in STOCK[:2]:
        model.config._experts_implementation = name
        decode(0, 1)
        near[name] = min(_clock(lambda: decode(0, 1)) for _ in range(2))
    model.config._experts_implementation = min(near, key=near.__getitem__)
    times: dict[str, list[float]] = {name: [] for name in ("stock", *variants)}
    for turn in range(rounds + 1):
        names = list(times)
        for name in names[turn % 3 :] + names[: turn % 3]:
            with variants.get(name, nullcontext()):
                elapsed = _clock(lambda turn=turn: decode(turn))
            if turn:
                times[name].append(elapsed)
        print(turn, {name: f"{found[-1]:.2f}" for name, found in times.items() if found}, flush=True)
    told = variants["price"].telemetry.to_dict()["total"]
    return [
        str(streams),
        f"{told['own_mean_loads']:.1f} / {told['mean_loads']:.1f}",
        f"{told['mean_experts']:.2f}",
        f"{1e3 * statistics.median(times['stock']) / NEW:.0f}",
        f"{streams * NEW / statistics.median(times['stock']):.1f}",
        *(f"{1 / ratio(times, name, 'stock'):.2f}" for name in variants),
        str(rounds),
    ]


MODEL_HEADER = (
    "sequences",
    "loads, stock / price",
    "experts per token",
    "ms per step, stock top-8",
    "tokens per second",
    "top-4, times as many",
    "price",
    "rounds",
)


def _clock(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


HEADER = (
    "sequences",
    "loads, stock / price",
    "experts per token",
    "ms, stock top-8",
    "top-4",
    "price",
    "without the compensation",
    "bound",
    "decision and statistics",
    "rounds",
)


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--streams", type=int, action="append")
    parser.add_argument("--loads", type=float, action="append")
    parser.add_argument(
        "--model", type=int, metavar="LAYERS", help="instead decode with so many such layers (16: 15 GB)"
    )
    parser.add_argument(
        "--rounds", type=int, default=8, help="of --model, 8 tokens of each sequence in each (default 8)"
    )
    parser.add_argument("--seconds", type=float, default=25.0, help="per row (default 25)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    calibration = Calibration.load(args.calibration)
    asked = list(zip(args.streams or (16, 64), args.loads or (21.0, 34.0), strict=True))
    machine = describe_machine(args.threads)
    if args.model:
        if free_gigabytes() < (needed := 0.9 * args.model + 1.5):
            raise SystemExit(f"needs {needed:.0f} GB of free memory, got {free_gigabytes():.0f}.")
        row = measure_model(calibration, *asked[0], args.model, args.rounds)
        text = f"{markdown_table(MODEL_HEADER, [row])}\n\n{args.model} layers, random weights; {machine}."
        publish(args.write, "price-model", text)
        return
    block = make_block(torch.bfloat16)
    limits = machine_limits(torch.bfloat16)
    rows = [measure(block, calibration, *one, args.seconds, limits) for one in asked]
    reached = f"{limits[0] / 1e9:.1f} GB/s and {limits[1] / 1e9:.0f} GFLOP/s"
    text = f"{markdown_table(HEADER, rows)}\n\n{machine}; reached: {reached}."
    publish(args.write, "price-block", text)


if __name__ == "__main__":
    main()
