"""A price on loads in vLLM on CPU: its experts' kernel at OLMoE-1B-7B's shape, and the embedded model end to end.

    .venv-vllm/bin/python benchmarks/vllm_price.py [--sequences 16] [--loads 21] [--seconds 30] [--engine]

The first table replays decode steps of the embedded model (`price_block`) in vLLM's kernel: all eight experts of every token, the
plugin's ragged call with top-4, and with the price. ``--engine`` instead generates with a model of four such layers and random
weights, so many requests at a time, whose decode steps replay those of the embedded model's four layers: as vLLM computes it
(nothing is decided), and with the price and a linear compensation of full rank, in turn within one engine. ``--small`` does so with
the embedded model itself, against a price of 0, which decides and drops nothing: its experts fit into the processor's caches, so
that reading them is not what takes the time there.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import Times, describe_machine, ratio
from moe_block import EXPERT_WEIGHTS, EXPERTS, HIDDEN, INTERMEDIATE, linear_compensation
from pages import arguments, markdown_table, publish
from price_block import Recorded, by_layer, record
from torch import Tensor
from transformers import OlmoeConfig
from vllm import __version__ as vllm_version
from vllm import _custom_ops

from bh_routing import Calibration, TopKPolicy
from bh_routing.decision.price import Step
from bh_routing.engines.vllm.ragged import kept_only
from bh_routing.engines.vllm.routing import EngineRouting, LayerRouting, filled
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


class Replay:
    """In place of `LayerRouting.route`: where so many sequences decode, what a router of the embedded model said and chose."""

    on = False  # whether the price decides; else the model's own choice is handed on as it is

    def __init__(self, layer: LayerRouting, steps: list[Recorded], sequences: int) -> None:
        self.inner, self.steps, self.sequences, self.turn = layer.route, steps, sequences, 0

    def __call__(
        self, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor, *, count: bool
    ) -> tuple[Tensor, Tensor]:
        if count and len(logits_TE) == self.sequences:
            step = self.steps[self.turn % len(self.steps)]
            self.turn += 1
            logits_TE, weights_TK = step.logits_BE.to(logits_TE.dtype), step.weights_BK.to(weights_TK.dtype)
            experts_TK = step.experts_BK.to(experts_TK.dtype)
        if not Replay.on:
            return weights_TK.clone(), experts_TK.clone()
        return self.inner(logits_TE, weights_TK, experts_TK, count=count)


def make_engine(model: str, settings: dict[str, Any], sequences: int, **more: Any) -> Any:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM

    return LLM(
        model, dtype="bfloat16", max_model_len=512, additional_config={"bh_routing": settings}, max_num_seqs=sequences, enable_prefix_caching=False, **more
    )  # fmt: skip


def rates(
    llm: Any, sequences: int, rounds: int, variants: dict[str, Callable[[], object]]
) -> dict[str, list[float]]:
    """Tokens generated per second, prompts of 32 tokens included; variants in turn."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in torch.randint(5, 4000, (sequences, 32)).tolist()]
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        names = list(variants)
        for name in names if turn % 2 else reversed(names):
            variants[name]()
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            if turn:
                found[name].append(64 * sequences / (time.perf_counter() - began))
        print(turn, {name: f"{rate[-1]:.1f}" for name, rate in found.items() if rate}, flush=True)
    return found


def generated_small(calibration: str, sequences: int, loads: float, rounds: int) -> dict[str, list[float]]:
    """With the embedded model: a price of 0, and the price."""
    settings = {"calibration": calibration, "distinct_experts": loads}
    llm = make_engine(str(bundled_path()), settings, sequences)

    def level(**level: float) -> Callable[[], object]:
        return lambda: llm.collective_rpc("bh_routing_set", kwargs=level)

    variants = {"without": level(price_load=0.0), "price": level(distinct_experts=loads)}
    return rates(llm, sequences, rounds, variants)


def generated(
    calibration: str, sequences: int, loads: float, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """With four layers of OLMoE-1B-7B's shape, in this process: as vLLM computes it, and with the price; and the price's loads."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with torch.inference_mode():
        steps, _ = record(Calibration.load(calibration), sequences, loads)
    engines: list[EngineRouting] = []
    bind = EngineRouting._bind

    def replaying(self: EngineRouting, *args: Any) -> None:
        bind(self, *args)
        for row, layer in enumerate(self.layers):  # the embedded model's maps are of another width
            layer.compensation = linear_compensation()
            layer.route = Replay(layer, [one for one in steps if one.layer == row], sequences)  # type: ignore[method-assign]
        engines.append(self)

    EngineRouting._bind = replaying  # type: ignore[method-assign]
    config = OlmoeConfig(
        num_hidden_layers=4, vocab_size=4096, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_experts=EXPERTS,
        num_experts_per_tok=8, architectures=["OlmoeForCausalLM"], eos_token_id=None, pad_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    # Its gates are random: nothing of the calibration would fit them.
    settings = {"calibration": calibration, "distinct_experts": loads, "strict": False}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        llm = make_engine(
            folder, settings, sequences, load_format="dummy", skip_tokenizer_init=True,
            enforce_eager=True, distributed_executor_backend="uni",
        )  # fmt: skip

    def turn(on: bool) -> Callable[[], object]:
        def start() -> None:
            Replay.on = on
            for layer in engines[0].layers:
                layer.route.turn = 0  # type: ignore[attr-defined]

        return start

    found = rates(llm, sequences, rounds, {"without": turn(False), "price": turn(True)})
    assert engines[0].telemetry is not None
    return found, engines[0].telemetry.to_dict()["total"]["mean_loads"]


def engine_table(found: dict[str, list[float]], sequences: int, what: str) -> str:
    told = [f"{statistics.median(found[name]):.4g}" for name in ("without", "price")]
    both = ratio(found, "price", "without")
    header = ("requests at a time", f"tokens per second, {what}", "with the price", "ratio", "rounds")
    return markdown_table(header, [[str(sequences), *told, f"{both:.2f}", str(len(found["price"]))]])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--loads", type=float, default=21.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--engine", action="store_true", help="instead four layers in an engine (6 GB)")
    parser.add_argument("--small", action="store_true", help="instead the embedded model in an engine")
    parser.add_argument("--rounds", type=int, default=5, help="of an engine (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    calibration = str(bundled_calibration())
    about = f"{describe_machine(args.threads)}; vLLM {vllm_version}"
    if args.small:
        found = generated_small(calibration, args.sequences, args.loads, args.rounds)
        table = engine_table(found, args.sequences, "price 0")
        publish(args.write, "vllm-price-small", f"{table}\n\n{args.loads:g} loads; {about}.")
        return
    if args.engine:
        found, read = generated(calibration, args.sequences, args.loads, args.rounds)
        table = engine_table(found, args.sequences, "as it is")
        publish(args.write, "vllm-price-engine", f"{table}\n\n{read:.1f} loads with the price; {about}.")
        return
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
    text = f"{markdown_table(header, [cells])}\n\n{about}; {size}."
    publish(args.write, "vllm-price", text)


if __name__ == "__main__":
    main()
