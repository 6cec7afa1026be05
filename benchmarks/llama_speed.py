"""llama.cpp with and without routing, on a model of OLMoE-1B-7B's shape with random weights: decoding and prefill, in turns.

    python benchmarks/llama_speed.py make q8_0 /tmp/big-q8_0.gguf       # 7.4 GB; q4_k: 3.9 GB
    python benchmarks/llama_speed.py run /tmp/big-q8_0.gguf --threads 2
    python benchmarks/llama_speed.py cold /tmp/big-q8_0.gguf --leave 4  # with 4 GB left for 7.4

All runs share one loaded model (top-4 is a second one) and take turns in random order; every ratio is of two runs of one
round. Counts follow the router: the threshold on the score is set so that 4 of 8 experts are kept on average. Compensations are random,
of the size that a calibration would choose (rank 64). With one thread time is the process's own (other processes do not count);
with two it is the clock's, which takes an idle machine. `cold` locks memory until so much is left for the file, which llama.cpp maps and does
not repack then: what is read again is what did not fit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from pages import arguments, markdown_table, table_row

LAYERS, HIDDEN, EXPERTS, SLOTS, INNER, VOCABULARY = 16, 2048, 64, 8, 1024, 50304


# --------------------------------------------------------------------------------------------------- the file


def blocks(rng: np.random.Generator, kind: str, *shape: int) -> tuple[np.ndarray, Any]:
    """Random weights of standard deviation 0.02 as quantised blocks, made directly."""
    *lead, width = shape
    types = gguf.GGMLQuantizationType
    if kind == "q4_k":
        count = int(np.prod(shape)) // 256
        made = np.empty((count, 144), np.uint8)
        made[:, 16:] = np.frombuffer(rng.bytes(count * 128), np.uint8).reshape(count, 128)
        scale = 0.02 / (32 * 4.61)
        made[:, 0:2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        made[:, 2:4] = np.frombuffer(np.float16(7.5 * scale).tobytes(), np.uint8)
        made[:, 4:12], made[:, 12:16] = 160, 0
        return made.reshape(*lead, width // 256 * 144), types.Q4_K
    count = int(np.prod(shape)) // 32
    made = np.empty((count, 34), np.uint8)
    made[:, 2:] = np.frombuffer(rng.bytes(count * 32), np.uint8).reshape(count, 32)
    made[:, 0:2] = np.frombuffer(np.float16(0.02 / 74).tobytes(), np.uint8)
    return made.reshape(*lead, width // 32 * 34), types.Q8_0


def make(kind: str, path: str) -> None:
    """Write the file; every layer has the same experts, at its own place in the file."""
    rng = np.random.default_rng(0)
    w = gguf.GGUFWriter(path, "olmoe")
    w.add_name("random, of OLMoE-1B-7B's shape")
    w.add_context_length(4096)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(INNER)
    w.add_head_count(16)
    w.add_head_count_kv(16)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(SLOTS)
    w.add_vocab_size(VOCABULARY)
    w.add_tokenizer_model("none")

    def add(name: str, pair: tuple[np.ndarray, Any]) -> None:
        w.add_tensor(name, pair[0], raw_dtype=pair[1])

    ones = np.ones(HIDDEN, np.float32)
    experts = {
        "gate": blocks(rng, kind, EXPERTS, INNER, HIDDEN),
        "up": blocks(rng, kind, EXPERTS, INNER, HIDDEN),
        "down": blocks(rng, kind, EXPERTS, HIDDEN, INNER),
    }
    add("token_embd.weight", blocks(rng, kind, VOCABULARY, HIDDEN))
    add("output.weight", blocks(rng, kind, VOCABULARY, HIDDEN))
    w.add_tensor("output_norm.weight", ones)
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
            w.add_tensor(f"blk.{i}.{name}.weight", ones)
        for name in ("q", "k", "v", "output"):
            add(f"blk.{i}.attn_{name}.weight", blocks(rng, kind, HIDDEN, HIDDEN))
        w.add_tensor(
            f"blk.{i}.ffn_gate_inp.weight", rng.normal(0, 0.03, (EXPERTS, HIDDEN)).astype(np.float32)
        )
        for name, pair in experts.items():
            add(f"blk.{i}.ffn_{name}_exps.weight", pair)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# --------------------------------------------------------------------------------------------------- the runs


class Model:
    """A loaded model."""

    def __init__(self, low: Any, path: str, experts: int | None = None, *, repack: bool = True) -> None:
        params = low.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, repack
        if experts is not None:
            given = (low.llama_model_kv_override * 2)()
            given[0].tag, given[0].key = low.LLAMA_KV_OVERRIDE_TYPE_INT, b"olmoe.expert_used_count"
            given[0].value.val_i64 = experts
            given[1].key = b""
            params.kv_overrides = given
        self.handle = low.llama_model_load_from_file(path.encode(), params)


class Run:
    """A context of a model, with or without a router in charge."""

    def __init__(self, low: Any, model: Model, threads: int, router: Any = None) -> None:
        params = low.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
        params.n_threads = params.n_threads_batch = threads
        if router is not None:
            params.cb_eval = ctypes.cast(router.function, low.ggml_backend_sched_eval_callback)
            params.cb_eval_user_data = router.user
        self.low, self.router = low, router
        self.handle = low.llama_init_from_model(model.handle, params)
        self.batch = low.llama_batch_init(512, 0, 1)
        self.past = 0

    def decode(self, tokens: list[int]) -> None:
        if self.past + len(tokens) > 450 or len(tokens) > 1:
            self.low.llama_memory_clear(self.low.llama_get_memory(self.handle), True)
            self.past = 0
        b = self.batch
        b.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, self.past + i, 1, i == len(tokens) - 1
            b.seq_id[i][0] = 0
        if self.low.llama_decode(self.handle, b):
            raise RuntimeError("llama_decode")
        self.past += len(tokens)
        if self.router is not None:
            self.router.end()


def threshold(low: Any, lib: Any, model: Model, keep: float) -> float:
    """The score at which so many experts of the own choice are kept on average, over a few tokens."""
    from bh_routing.engines.llama_cpp.ggml import numbers
    from bh_routing.engines.llama_cpp.hook import Hook

    hook, seen = Hook(lib), []

    def watch(node: Any, ask: bool) -> bool:
        wanted = node.name.startswith(b"ffn_moe_logits-")
        if wanted and not ask:
            seen.append(numbers(node)[0, 0].log_softmax(-1).topk(SLOTS).values.flatten())
        return wanted

    hook.to_python(watch)
    run = Run(
        low, model, 1, type("", (), {"function": hook.function, "user": hook.user, "end": hook.raise_error})()
    )
    run.decode(np.random.default_rng(9).integers(0, VOCABULARY, 64).tolist())
    values = torch.cat(seen).sort(descending=True).values
    low.llama_free(run.handle)
    return float(values[int(len(values) * keep / SLOTS)])


def make_router(lib: Any, level: float, form: str, rank: int) -> Any:
    """A router that keeps what has at least this log score."""
    from bh_routing.decision.compensation import Compensation
    from bh_routing.decision.types import TableSettings
    from bh_routing.engines.llama_cpp.shim import CRouter, LayerTables

    g = torch.Generator().manual_seed(0)
    row = (torch.full((EXPERTS,), level), torch.zeros(EXPERTS))
    made: Compensation | None = None
    layers = {}
    for i in range(LAYERS):
        if form == "mean":
            made = Compensation.mean(*(1e-3 * torch.randn(2, EXPERTS, HIDDEN, generator=g)))
        elif form == "linear":
            made = Compensation.linear(
                center_D=torch.zeros(EXPERTS),
                low_D=torch.full((EXPERTS,), -4.0),
                high_D=torch.full((EXPERTS,), 4.0),
                whiten_DR=torch.randn(EXPERTS, rank, generator=g) / 8,
                mean_EH=1e-3 * torch.randn(EXPERTS, HIDDEN, generator=g),
                slope_ERH=1e-4 * torch.randn(EXPERTS, rank, HIDDEN, generator=g),
            )
        layers[i] = LayerTables(row=row, how=TableSettings(empty=EXPERTS), compensation=made)
    return CRouter(
        lib,
        layers,
        experts=EXPERTS,
        slots=SLOTS,
        hidden=HIDDEN,
        logits="ffn_moe_logits",
        weights="ffn_moe_weights",
    )


def told_by(path: str) -> dict[str, int]:
    """The numbers of a file of names and numbers in /proc."""
    pairs = (line.split(":") for line in Path(path).read_text().splitlines())
    return {name: int(rest.split()[0]) for name, rest in pairs}


def lock_all_but(left: float) -> Any:
    """Memory that nobody can use until this process ends: all that is available but so many GB."""
    size = told_by("/proc/meminfo")["MemAvailable"] * 1024 - int(left * 1e9)
    Path("/proc/self/oom_score_adj").write_text(
        "1000"
    )  # where it is too much, this process ends and no other
    held = mmap.mmap(-1, size)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(held))), ctypes.c_size_t(size)):
        raise OSError(ctypes.get_errno(), f"cannot lock {size / 1e9:.1f} GB")
    return held


def cold(path: str, left: float, threads: int, rounds: int, tokens: int) -> None:
    import llama_cpp
    import llama_cpp.llama_cpp as low

    from bh_routing.engines.llama_cpp import shim

    quiet = low.llama_log_callback(lambda level, text, _: None)
    low.llama_log_set(quiet, ctypes.c_void_p(0))
    low.llama_backend_init()
    lib, model = shim.library(llama_cpp.__version__), Model(low, path, repack=False)
    levels = {8: -float("inf"), **{keep: threshold(low, lib, model, keep) for keep in (4, 2)}}
    runs = {
        keep: Run(low, model, threads, make_router(lib, level, "none", 0)) for keep, level in levels.items()
    }
    held = lock_all_but(left)
    rng = np.random.default_rng(0)
    found: dict[int, list[tuple[float, float]]] = {keep: [] for keep in runs}
    for _ in range(rounds):
        for keep in rng.permutation(list(runs)):
            for part in (tokens // 2, tokens):  # the cache is what this number of experts leaves there
                start, before = time.perf_counter(), told_by("/proc/self/io")["read_bytes"]
                for token in rng.integers(0, VOCABULARY, part).tolist():
                    runs[keep].decode([token])
            found[keep].append(
                (
                    (time.perf_counter() - start) / tokens,
                    (told_by("/proc/self/io")["read_bytes"] - before) / tokens,
                )
            )
    size = os.path.getsize(path) / 1e9
    print(
        f"\n{size:.1f} GB, {left:g} GB left ({len(held) / 1e9:.1f} GB locked), {threads} threads, {rounds} rounds of {tokens} tokens\n"
    )
    print("| experts | tokens per second | MB read per token |\n|---:|---:|---:|")
    for keep, values in found.items():
        seconds, read = np.median(np.array(values), 0)
        print(f"| {keep} | {1 / seconds:.2f} | {read / 1e6:.0f} |", flush=True)


def measure(path: str, threads: int, rounds: int, tokens: int, prefill: int, rank: int, stock4: bool) -> None:
    import llama_cpp
    import llama_cpp.llama_cpp as low

    from bh_routing.engines.llama_cpp import shim

    quiet = low.llama_log_callback(lambda level, text, _: None)
    low.llama_log_set(quiet, ctypes.c_void_p(0))
    low.llama_backend_init()
    lib = shim.library(llama_cpp.__version__)
    model = Model(low, path)
    level = threshold(low, lib, model, 4.0)
    routers = {
        "all 8 kept": make_router(lib, -torch.inf, "none", rank),
        "4 of 8": make_router(lib, level, "none", rank),
        "4 of 8, means": make_router(lib, level, "mean", rank),
        f"4 of 8, linear, rank {rank}": make_router(lib, level, "linear", rank),
    }
    runs = {"its own 8": Run(low, model, threads)}
    if stock4:
        runs["its own top-4"] = Run(low, Model(low, path, 4), threads)
    runs |= {name: Run(low, model, threads, router) for name, router in routers.items()}
    clock = time.process_time if threads == 1 else time.perf_counter
    rng = np.random.default_rng(0)
    for run in runs.values():
        run.decode([1, 2, 3])
        run.decode([4])
    for part, length, count in (("decoding", 1, tokens), (f"prefill of {prefill}", prefill, 1)):
        times: dict[str, list[float]] = {name: [] for name in runs}
        kept = dict.fromkeys(routers, 0)
        for _ in range(rounds if length == 1 else max(3, rounds // 4)):
            stream = rng.integers(0, VOCABULARY, (count, length)).tolist()
            for name in rng.permutation(list(runs)):
                run = runs[str(name)]
                if run.router is not None:
                    run.router.pairs(reset=True)
                start = clock()
                for ids in stream:
                    run.decode(ids)
                times[str(name)].append((clock() - start) / count)
                if run.router is not None:
                    kept[str(name)] += run.router.pairs()
        base = np.array(times["its own 8"])
        print(f"\n{part}, {threads} thread{'s' * (threads > 1)}, {len(base)} rounds\n")
        print(markdown_table(["", "ms", "of its own 8", "quartiles", "experts"], []))
        for name, values in times.items():
            found = np.array(values)
            low_q, high_q = np.quantile(found / base, [0.25, 0.75])
            rows = len(base) * count * length * LAYERS - (len(base) * (length - 1) if length > 1 else 0)
            mean = f"{kept[name] / rows:.2f}" if name in kept else ""
            times = [f"{1e3 * np.median(found):.1f}", f"{np.median(found / base):.3f}"]
            print(table_row([name, *times, f"{low_q:.3f} to {high_q:.3f}", mean]), flush=True)


def main() -> None:
    parser = arguments(__doc__, threads=False, write=False)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make")
    one.add_argument("kind", choices=("q8_0", "q4_k"))
    one.add_argument("path")
    two = commands.add_parser("run")
    two.add_argument("path")
    two.add_argument("--threads", type=int, default=2)
    two.add_argument("--rounds", type=int, default=20)
    two.add_argument("--tokens", type=int, default=8, help="decoded in a turn (default 8)")
    two.add_argument("--prefill", type=int, default=256)
    two.add_argument("--rank", type=int, default=64)
    two.add_argument("--no-top-4", dest="stock4", action="store_false", help="without a second loaded model")
    three = commands.add_parser("cold")
    three.add_argument("path")
    three.add_argument("--leave", type=float, default=4.0, help="GB (default 4)")
    three.add_argument("--threads", type=int, default=2)
    three.add_argument("--rounds", type=int, default=3)
    three.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    if args.command == "make":
        make(args.kind, args.path)
    elif args.command == "cold":
        cold(args.path, args.leave, args.threads, args.rounds, args.tokens)
    else:
        measure(args.path, args.threads, args.rounds, args.tokens, args.prefill, args.rank, args.stock4)


if __name__ == "__main__":
    main()
