"""A price on loads in vLLM on CPU: its experts' kernel at OLMoE-1B-7B's shape, and the embedded model end to end.

    .venv-vllm/bin/python benchmarks/vllm_price.py [--sequences 16] [--loads 20] [--seconds 30] [--engine]

The first table replays decode steps of the embedded model (`price_block`) in vLLM's kernel: all eight experts of every token, the
plugin's ragged call with top-4, and with the price. ``--engine`` also generates with the embedded model, so many requests at a
time, the price on and off (0, which decides and drops nothing) in turn within one engine. That model's experts fit into the
processor's caches, so that reading them is not what takes the time there.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from machine import Times, describe_machine, ratio
from moe_block import EXPERT_WEIGHTS, EXPERTS, HIDDEN, INTERMEDIATE
from pages import arguments, markdown_table, publish
from price_block import Recorded, by_layer, record
from torch import Tensor
from vllm import __version__ as vllm_version
from vllm import _custom_ops

from bh_routing import Calibration, TopKPolicy
from bh_routing.decision.price import Step
from bh_routing.engines.vllm.ragged import kept_only
from bh_routing.engines.vllm.routing import filled
from bh_routing.models import bundled_calibration, bundled_path
from bh_routing.policies import RoutingContext

CONTEXT = RoutingContext(path="gate", index=0, num_experts=EXPERTS, empty=EXPERTS, top_k=8, route_norm="none")


class Kernel:
    """Packed random weights of one layer."""

    def __init__(self) -> None:
        w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16) * 0.02
        w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16) * 0.02
        self.isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        self.w13, self.w2 = (_custom_ops.cpu_prepack_moe_weight(w, self.isa) for w in (w13, w2))

    def __call__(self, out_TH: Tensor, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> None:
        _custom_ops.cpu_fused_moe(
            out_TH, x_TH, self.w13, self.w2, None, None, weights_TK, experts_TK, "silu", self.isa, False
        )


@torch.inference_mode()
def replayed(
    calibration: Calibration, sequences: int, loads: float, seconds: float
) -> tuple[Times, float, float]:
    """Times by variant, and the mean loads of the model's own choice and of the price."""
    steps, policy = record(calibration, sequences, loads)
    ours, top, kernel = by_layer(policy, sequences), TopKPolicy(4), Kernel()
    ours.in_step = Step(shape=(sequences, 1), tokens=sequences)
    ours.bind([CONTEXT])
    x_TH = torch.randn(sequences, HIDDEN).bfloat16()
    out_TH = torch.empty_like(x_TH)
    times: Times = {"8": [], "top-4": [], "price": [], "decision": []}
    own, read = [], []

    def decided(step: Recorded, which: Any) -> Any:
        ours.layer = step.layer
        return which.decide(step.logits_BE, step.weights_BK, step.experts_BK, CONTEXT)

    start, turn = time.perf_counter(), 0
    while turn < 10 or time.perf_counter() - start < seconds:
        step = steps[turn % len(steps)]
        four, priced = decided(step, top), decided(step, ours)
        calls = {
            "8": lambda step=step: kernel(out_TH, x_TH, step.weights_BK.float(), step.experts_BK.int()),
            "top-4": lambda d=four: kept_only(
                kernel, out_TH, x_TH, d.weights_TK.float(), filled(d, torch.int32)
            ),
            "price": lambda d=priced: kept_only(
                kernel, out_TH, x_TH, d.weights_TK.float(), filled(d, torch.int32)
            ),
            "decision": lambda step=step: decided(step, ours),
        }
        names = list(calls)
        for name in names[turn % 4 :] + names[: turn % 4]:
            began = time.perf_counter()
            calls[name]()
            if turn > 1:
                times[name].append(time.perf_counter() - began)
        own.append(step.experts_BK.unique().numel())
        read.append(step.experts_BK[~priced.dropped_TK].unique().numel())
        turn += 1
    return times, statistics.fmean(own), statistics.fmean(read)


def generated(calibration: str, sequences: int, loads: float, rounds: int = 5) -> list[str]:
    """Tokens per second of the embedded model with the price and without, in turn, in one engine."""
    from vllm import LLM, SamplingParams

    settings = {"calibration": calibration, "distinct_experts": loads}
    llm = LLM(
        str(bundled_path()), dtype="bfloat16", max_model_len=512, additional_config={"bh_routing": settings}, max_num_seqs=sequences, enable_prefix_caching=False
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in torch.randint(5, 4000, (sequences, 32)).tolist()]
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
    rates: dict[str, list[float]] = {"price": [], "without": []}
    for turn in range(rounds + 1):
        for name, level in (("price", {"distinct_experts": loads}), ("without", {"price_load": 0.0})):
            llm.collective_rpc("bh_routing_set", kwargs=level)
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            if turn:
                rates[name].append(64 * sequences / (time.perf_counter() - began))
    told = [statistics.median(rates[name]) for name in ("without", "price")]
    both = statistics.median(a / b for a, b in zip(rates["price"], rates["without"], strict=True))
    return [str(sequences), *(f"{rate:.0f}" for rate in told), f"{both:.2f}"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--loads", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--engine", action="store_true", help="the embedded model, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    calibration = str(bundled_calibration())
    times, own, read = replayed(Calibration.load(calibration), args.sequences, args.loads, args.seconds)
    cells = [
        str(args.sequences),
        f"{own:.1f} / {read:.1f}",
        f"{1e3 * statistics.median(times['8']):.3g}",
        *(f"{ratio(times, name, '8'):.2f}" for name in ("top-4", "price")),
        f"{read / own:.2f}",
        f"{1e3 * statistics.median(times['decision']):.2f}",
        str(len(times["8"])),
    ]
    header = (
        "sequences",
        "loads, all / price",
        "ms, all 8",
        "top-4",
        "price",
        "bytes",
        "ms, decision",
        "rounds",
    )
    size = f"an expert is {EXPERT_WEIGHTS * 2 / 1e6:.1f} MB"
    text = (
        f"{markdown_table(header, [cells])}\n\n{describe_machine(args.threads)}; vLLM {vllm_version}; {size}."
    )
    if args.engine:
        header = ("requests at a time", "tokens per second, price 0", f"{args.loads:g} loads", "ratio")
        text += f"\n\n{markdown_table(header, [generated(calibration, args.sequences, args.loads)])}"
    publish(args.write, "vllm-price", text)


if __name__ == "__main__":
    main()
