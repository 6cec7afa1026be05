"""Check and time what runs on a GPU: the fused decision, the grouped experts, compensation, price, compilation, CUDA graphs.

    python benchmarks/gpu.py                  # on a CUDA device; writes benchmarks/results/gpu-NAME-DATE.md
    python benchmarks/gpu.py --device cpu     # the same checks, small, the kernel in Triton's interpreter

Every check says what it compared; the first that fails ends the run. Times are medians of calls in turn (events on a
GPU), after the checks; ratios are to what transformers runs there by itself: `batched_mm` in decoding (``generate``
moves to it), `grouped_mm` in prefill. It takes about ten minutes.

Over 350 lines: the checks in the order of a layer, each with its timing.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from gpu_layers import check_compensation, check_price, decided, linear_compensation, with_loads
from machine import describe_machine
from pages import arguments, markdown_table
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from bh_routing import DecisionTable, RoutingIntegration, TablePolicy, TopKPolicy
from bh_routing.decision import select_triton as triton_decide
from bh_routing.decision.linear_products import grouped
from bh_routing.decision.select import decide_by_table
from bh_routing.decision.types import TableSettings
from bh_routing.evaluation.bench import threshold_variants
from bh_routing.patching.expert_math import grouped_forward

TOP_K = 8


class Device:
    """Where to run, and how large."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.gpu = self.device.type == "cuda"
        # OLMoE-1B-7B's layer on a GPU; on CPU what the interpreter can do
        self.hidden, self.intermediate, self.experts = (2048, 1024, 64) if self.gpu else (64, 32, 16)
        self.tokens = (1, 8, 64, 512, 4096) if self.gpu else (1, 8)
        self.dtype = torch.bfloat16

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Any synchronisation with the host is an error (on a GPU; elsewhere there is none)."""
        if not self.gpu:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def microseconds(self, calls: dict[str, Callable[[], Any]], rounds: int = 50) -> dict[str, float]:
        """Median time of each call, the calls taking turns."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range((rounds if self.gpu else 3) + 3):
            for name, call in calls.items():
                if self.gpu:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    call()
                    end.record()
                    torch.cuda.synchronize(self.device)
                    elapsed = start.elapsed_time(end) * 1e3
                else:
                    begin = time.perf_counter()
                    call()
                    elapsed = (time.perf_counter() - begin) * 1e6
                if turn >= 3:
                    times[name].append(elapsed)
        return {name: statistics.median(ts) for name, ts in times.items()}

    def in_graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph (itself where there is no GPU): what a serving engine would run."""
        if not self.gpu:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


# ---------------------------------------------------------------------------------------------------- decision


def decision_inputs(d: Device, tokens: int, dtype: torch.dtype, exact: bool) -> tuple[Tensor, ...]:
    """logits, own weights, own experts, thresholds, offset; ``exact``: small integers."""
    logits_TE = 2.0 * torch.randn(tokens, d.experts)
    if exact:
        logits_TE = logits_TE.round()
    logits_TE = logits_TE.to(d.device, dtype)
    weights_TK, experts_TK = torch.softmax(logits_TE.float(), -1).topk(TOP_K, -1)
    thresholds_E = torch.linspace(2, -2, d.experts) if exact else torch.linspace(-1.5, -3.5, d.experts)
    offset_E = 0.2 * torch.randn(d.experts)
    if exact:
        thresholds_E, offset_E = thresholds_E.round(), torch.zeros(d.experts)
    rows = (x.to(d.device) for x in (thresholds_E, offset_E))
    return (logits_TE, weights_TK.to(dtype), experts_TK, *rows)


def check_kernel(d: Device) -> str:
    """The fused decision against its reference."""
    compared = 0
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in d.tokens:
            for weights in ("own", "preserve", "sum"):
                for rule in ("step_up", "step_down"):
                    settings = TableSettings(empty=d.experts, weights=weights, rule=rule, statistic="logit")
                    inputs = decision_inputs(d, tokens, dtype, exact=True)
                    got = triton_decide.decide_by_table(*inputs, settings)
                    expected = decide_by_table(*inputs, settings)
                    for name in ("experts_TK", "counts_T", "raw_counts_T", "dropped_TK", "fallback_T"):
                        assert torch.equal(getattr(got, name), getattr(expected, name)), (name, settings)
                    tolerance = 8 * 2**-23 if dtype == torch.float32 else 2**-7
                    torch.testing.assert_close(got.weights_TK, expected.weights_TK, rtol=tolerance, atol=0.0)
                    compared += tokens
            inputs = decision_inputs(d, tokens, dtype, exact=False)
            got = triton_decide.decide_by_table(*inputs, TableSettings(empty=d.experts))
            expected = decide_by_table(*inputs, TableSettings(empty=d.experts))
            same = float((got.counts_T == expected.counts_T).float().mean())
            assert same > 0.999 or tokens < 1000, same
    return (
        f"fused decision equals its reference on {compared:,} tokens of small integers; on random logits too"
    )


def time_decision(d: Device) -> str:
    """The fused decision against softmax + top-k + gather, launched and as CUDA graphs."""
    rows = []
    for tokens in d.tokens:
        inputs = decision_inputs(d, tokens, d.dtype, exact=False)
        logits_TE, _, experts_TK = inputs[:3]

        def plain(logits_TE: Tensor = logits_TE, experts_TK: Tensor = experts_TK) -> Tensor:
            probability_TE = torch.softmax(logits_TE.float(), -1)
            _, best_TK = probability_TE.topk(TOP_K, -1)
            return probability_TE.gather(-1, best_TK)

        calls = {
            "softmax + top-k + gather": plain,
            "fused decision": lambda i=inputs: triton_decide.decide_by_table(
                *i, TableSettings(empty=d.experts)
            ),
            "decision in PyTorch": lambda i=inputs: decide_by_table(*i, TableSettings(empty=d.experts)),
        }
        launched = d.microseconds(calls)
        graphs = d.microseconds({name: d.in_graph(call) for name, call in calls.items()})
        base, base_graph = launched["softmax + top-k + gather"], graphs["softmax + top-k + gather"]
        for name in calls:
            rows.append(
                [
                    f"T = {tokens:,}, {name}",
                    f"{launched[name]:,.1f}",
                    f"{launched[name] / base:.2f}",
                    f"{graphs[name]:,.1f}",
                    f"{graphs[name] / base_graph:.2f}",
                ]
            )
    return markdown_table(["decision", "launched, µs", "ratio", "CUDA graph, µs", "ratio"], rows)


# ----------------------------------------------------------------------------------------------------- experts


def make_model(d: Device, layers: int = 2) -> Any:
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=d.hidden,
        intermediate_size=d.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=d.experts,
        num_experts_per_tok=TOP_K,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
        max_position_embeddings=8192,
    )
    model = OlmoeForCausalLM(config).to(d.device, d.dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_(0.0, 1.5 * d.hidden**-0.5)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
    model.set_experts_implementation("grouped_mm")
    return model


def routed(d: Device, tokens: int, keep: float) -> tuple[Tensor, Tensor, Tensor]:
    """hidden states, expert indices and weights with this share of the slots kept."""
    hidden_TH = torch.randn(tokens, d.hidden, device=d.device, dtype=d.dtype)
    experts_TK = torch.rand(tokens, d.experts, device=d.device).topk(TOP_K, -1).indices
    empty_TK = torch.rand(tokens, TOP_K, device=d.device) >= keep
    weights_TK = torch.rand(tokens, TOP_K, device=d.device, dtype=d.dtype).masked_fill(empty_TK, 0.0)
    return hidden_TH, experts_TK.masked_fill(empty_TK, d.experts), weights_TK


@torch.no_grad()
def check_experts(d: Device) -> str:
    """The grouped products: against every expert on every token, on memory full of NaN, without waiting."""
    experts = make_model(d, 1).model.layers[0].mlp.experts
    torch.use_deterministic_algorithms(d.gpu is False)
    worst = 0.0
    for tokens in d.tokens:
        for keep in (0.5, 0.0, 1.0):
            hidden_TH, experts_TK, weights_TK = routed(d, tokens, keep)
            dirty = [
                torch.full((tokens * TOP_K, 2 * d.intermediate), torch.nan, device=d.device) for _ in range(4)
            ]
            del dirty  # what the allocator hands out next
            with d.without_waiting():
                got_TH = grouped_forward(experts, hidden_TH, experts_TK, weights_TK)
            weights_TE = torch.zeros(tokens, d.experts + 1, device=d.device).scatter_(
                1, experts_TK, weights_TK.float()
            )
            expected_TH = torch.zeros(tokens, d.hidden, device=d.device)
            for e in range(d.experts):
                gate, up = (hidden_TH @ experts.gate_up_proj[e].t()).chunk(2, -1)
                out_TH = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].t()
                expected_TH += weights_TE[:, e : e + 1] * out_TH.float()
            assert bool(got_TH.isfinite().all())
            scale = float(expected_TH.abs().max())
            worst = max(worst, float((got_TH.float() - expected_TH).abs().max()) / max(scale, 1e-6))
            if keep == 1.0:
                assert torch.equal(got_TH, experts(hidden_TH, experts_TK, weights_TK))
    torch.use_deterministic_algorithms(False)
    assert worst < 2e-2, worst  # bfloat16: roundings of 2**-8 in two products, the gate and the sum
    return f"grouped products: within {worst:.1e} of the largest value; all slots kept: bit-identical to grouped_mm"


DECODING = 64  # tokens of a step, at most


def time_experts(d: Device) -> str:
    """One layer's experts: all eight, a mean of 4.0 with and without compensation, and half of the loads."""
    experts = make_model(d, 1).model.layers[0].mlp.experts
    config = experts.config
    held = linear_compensation(d)
    rows = []
    for tokens in d.tokens:
        full, half = routed(d, tokens, 1.0), routed(d, tokens, 0.5)
        decision = decided(d, tokens, 1, TOP_K)

        def stock(name: str, full: tuple[Tensor, ...] = full) -> Tensor:
            config._experts_implementation = name
            return experts(*full)

        def compensated(half: tuple[Tensor, ...] = half, decision: Any = decision) -> Tensor:
            out_TH = grouped_forward(experts, *half)
            return out_TH + grouped(held.maps_EQH, held.regressors(decision.logits_TE), decision).to(
                out_TH.dtype
            )

        base = "batched_mm" if tokens <= DECODING else "grouped_mm"
        calls: dict[str, Callable[[], Any]] = {base: lambda base=base: stock(base)}
        calls["ours, 8"] = lambda full=full: grouped_forward(experts, *full)
        calls["ours, 4.0"] = lambda half=half: grouped_forward(experts, *half)
        calls["ours, 4.0, linear compensation"] = compensated
        loads = len(full[1].unique())
        if 1 < tokens <= DECODING:
            priced = (full[0], *with_loads(full[1], full[2], max(1, loads // 2), d.experts))
            calls[f"ours, {loads // 2} of {loads} loads"] = lambda priced=priced: grouped_forward(
                experts, *priced
            )
        launched = d.microseconds(calls)
        graphs = d.microseconds({name: d.in_graph(call) for name, call in calls.items()})
        for name in calls:
            rows.append(
                [
                    f"T = {tokens:,}, {name}",
                    f"{launched[name]:,.0f}",
                    f"{launched[name] / launched[base]:.2f}",
                    f"{graphs[name]:,.0f}",
                    f"{graphs[name] / graphs[base]:.2f}",
                ]
            )
    return markdown_table(["experts of one layer", "launched, µs", "ratio", "CUDA graph, µs", "ratio"], rows)


# ------------------------------------------------------------------------------------------------------- model


def table_policy(model: Any, ids: Tensor, backend: str) -> TablePolicy:
    """About 4.0 experts per token, with this backend."""
    (variant,) = threshold_variants(model, ids, [4.0]).values()
    assert isinstance(variant.policy, TablePolicy)
    table: DecisionTable = variant.policy.table
    return TablePolicy(table, backend=backend)  # type: ignore[arg-type]


@torch.no_grad()
def check_model(d: Device) -> str:
    """A patched model: fused and plain decisions agree; compiled in one graph; captured; the level moves in both."""
    torch._dynamo.reset()
    model = make_model(d)
    ids = torch.randint(0, 512, (1, 24), device=d.device)
    stock = model(input_ids=ids).logits
    with RoutingIntegration(model, TopKPolicy()):
        assert torch.equal(model(input_ids=ids).logits, stock), "keeping everything must change nothing"
    outputs = {}
    for backend in ("torch", "triton"):
        with RoutingIntegration(model, table_policy(model, ids, backend)) as integration:
            outputs[backend] = model(input_ids=ids).logits
            experts = integration.telemetry.mean_experts_per_token
    assert 3.0 < experts < 5.0, experts
    torch.testing.assert_close(outputs["triton"], outputs["torch"], rtol=2e-2, atol=2e-2)
    assert not torch.equal(outputs["torch"], stock)

    policy = table_policy(model, ids, "triton")
    with RoutingIntegration(model, policy) as integration:
        compiled = torch.compile(model, backend="inductor" if d.gpu else "aot_eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(input_ids=ids, use_cache=False).logits, outputs["torch"], rtol=3e-2, atol=3e-2
        )
        everything = torch.full_like(policy.table.thresholds_LE, -torch.inf)
        with torch._dynamo.config.patch(error_on_recompile=True):
            policy.set_table(policy.table.with_thresholds(everything))
            torch.testing.assert_close(
                compiled(input_ids=ids, use_cache=False).logits, stock, rtol=3e-2, atol=3e-2
            )
    said = [
        "patched model: fused and plain decisions agree, compiled with fullgraph, the level moves in place"
    ]
    torch._dynamo.reset()

    if d.gpu:
        block = model.model.layers[0].mlp
        policy = table_policy(model, ids, "triton")
        with RoutingIntegration(model, policy) as integration:
            hidden = torch.randn(1, 8, d.hidden, device=d.device, dtype=d.dtype)
            with d.without_waiting():
                eager = block(hidden)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    block(hidden)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = block(hidden)
            integration.reset_stats()
            graph.replay()
            assert torch.equal(out, eager)
            assert integration.telemetry.to_dict()["layers"][0]["tokens"] == 8, "the graph counts"
            hidden.copy_(torch.randn_like(hidden))
            graph.replay()
            torch.testing.assert_close(out, block(hidden), rtol=1e-2, atol=1e-2)
        said.append(
            "a block in a CUDA graph: the same values, counted at each replay; nothing waits for the device"
        )
    return "; ".join(said)


def main() -> None:
    parser = arguments(__doc__, threads=False, write=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-times", action="store_true", help="only the checks")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu runs the same checks, small, in Triton's interpreter.")
    torch.manual_seed(0)
    d = Device(args.device)
    where = torch.cuda.get_device_name(d.device) if d.gpu else "CPU, Triton's interpreter"
    lines = [f"# {where}, {datetime.date.today().isoformat()}", ""]
    checks: list[Callable[[Device], str]] = [
        check_kernel,
        check_experts,
        lambda d: check_compensation(d, make_model(d, 1).model.layers[0].mlp.experts, TOP_K),
        lambda d: check_price(d, TOP_K),
        check_model,
    ]
    for check in checks:
        lines.append(f"- ok: {check(d)}.")
        print(lines[-1], flush=True)
    if not args.no_times:
        with torch.inference_mode():
            lines += ["", time_decision(d), "", time_experts(d)]
        print("\n".join(lines[-3:]))
    lines += ["", f"{describe_machine(torch.get_num_threads())}."]
    if d.gpu:
        name = "-".join(where.lower().replace("/", " ").split())
        path = Path(__file__).parent / "results" / f"gpu-{name}-{datetime.date.today().isoformat()}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"\nwritten: {path.name}")


if __name__ == "__main__":
    main()
