"""`bh-routing serve` as people use it: many clients at once, of mixed levels, some of whom hang up.

    .venv-vllm/bin/python benchmarks/vllm_serving.py soak [--minutes 10] [--write docs/reliability.md]
    .venv-vllm/bin/python benchmarks/vllm_serving.py load [--seconds 20] [--model FOLDER --calibration FILE] [--write docs/serving.md]

`soak`: 16 clients, of every level and of wrong ones, a tenth of whom hang up while they are answered; meanwhile statistics are
read and the default level is changed. Afterwards a quiet minute: histograms, pairs, phases and usage must agree, the memory
of the server's processes must not have grown, and nothing may have failed. A request whose connection ended before its answer
began is sent once more, as OpenAI's client does, and counted.

`load`: 32 clients, of whom 8 run at a time, against one server with ``--experts 8 --under-load 3``; rounds in turn with a level of
their own (8: what a server of a fixed level does) and without (what the server sheds). The embedded model is tiny; `large_model` makes
a random one with experts of 1.6 million weights (``--make FOLDER``), which `bh-routing calibrate --no-means` calibrates.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from machine import describe_machine
from pages import arguments, markdown_table, publish
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM
from vllm import __version__ as vllm_version

from bh_routing.data import sample_text
from bh_routing.models import bundled_path

KEY = "bh_routing."
LEVELS: list[dict[str, Any]] = [
    {},
    {},
    *({f"{KEY}experts_per_token": n} for n in (2, 3, 5, 8)),
    {f"{KEY}alpha": 1e-4},
]
WRONG: list[dict[str, Any]] = [{f"{KEY}experts": 3}, {f"{KEY}experts_per_token": 99}, {f"{KEY}alpha": "much"}]
WORDS = sample_text().split()


class Server:
    """A server in a process of its own, and what is said to it."""

    def __init__(self, *argv: str, vllm: str, model: str = "olmoe-nano", **environment: str) -> None:
        self.environment = environment
        self.resent = 0  # requests
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.argv = ["serve", model, "--name", "model", *argv, "--port", str(self.port), "--vllm", vllm]

    async def __aenter__(self) -> Server:
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
            **self.environment,
        }  # fmt: skip
        self.log = (Path("/tmp") / f"bh-routing-serving-{self.port}.log").open("w+")
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bh_routing", *self.argv, stdout=asyncio.subprocess.PIPE, stderr=self.log, env=environment
        )  # fmt: skip
        # vLLM's server closes a connection that was idle for five seconds: a request sent on it just then is lost.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300), connector=connector)
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if b"Ctrl-C" in line:
                return self
        raise SystemExit(f"the server did not start; {self.log.name} says why")

    async def __aexit__(self, *exception: object) -> None:
        await self.session.close()
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()

    async def post(self, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """An answer that has begun. A request that is lost with its connection is sent once more: OpenAI's client does so (twice), aiohttp only for GET."""
        try:
            return await self.session.post(self.url + path, json=body)
        except aiohttp.ClientConnectionError:
            self.resent += 1
            return await self.session.post(self.url + path, json=body)

    async def rpc(self, method: str, **kwargs: Any) -> dict[str, Any]:
        async with await self.post("/collective_rpc", {"method": method, "kwargs": kwargs}) as response:
            return (await response.json())["results"][0]

    async def metrics(self) -> dict[str, float]:
        async with self.session.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return {k: float(v) for k, _, v in (x.rpartition(" ") for x in lines) if k.startswith("bh_routing")}

    def memory(self) -> list[float]:
        """Megabytes that nobody shares, of the process and each of its children."""
        parent = psutil.Process(self.process.pid)
        return [p.memory_full_info().uss / 2**20 for p in (parent, *parent.children(recursive=True))]

    async def complete(
        self, prompt: str, tokens: int, level: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer; {"error": ..., "status": ...} where it is refused."""
        body = {
            "model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, "vllm_xargs": level or None,
        }  # fmt: skip
        async with await self.post("/v1/completions", body) as response:
            if response.status != 200:
                yield {"status": response.status, **(await response.json())}
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])


def prompt_of(chance: random.Random) -> str:
    start = chance.randrange(len(WORDS) - 200)
    return " ".join(WORDS[start : start + chance.randint(3, 60)])


# ------------------------------------------------------------------------------------------------- soak


KINDS = ("answered", "refused", "hung up")


class Soak:
    """What 16 clients saw."""

    def __init__(self, server: Server) -> None:
        self.server, self.seen, self.failures, self.tokens, self.cached = server, Counter(), [], 0, 0
        self.memory: list[tuple[int, float]] = []  # requests so far, megabytes
        self.pause = 0.0  # seconds that the clients' process stood still at most

    async def client(self, number: int, end: float, hangs_up: bool) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            wrong = chance.random() < 0.05
            level = chance.choice(WRONG if wrong else LEVELS)
            leaves = hangs_up and chance.random() < 0.1
            kind = "refused" if wrong else "hung up" if leaves else "answered"
            try:
                await self.ask(chance, level, leaves, kind)
            except Exception as error:
                self.failures.append(f"{kind}: {error!r}")

    async def ask(self, chance: random.Random, level: dict[str, Any], leaves: bool, kind: str) -> None:
        usage = None
        asked = self.server.complete(prompt_of(chance), chance.randint(4, 40), level)
        async with contextlib.aclosing(asked) as chunks:
            async for chunk in chunks:
                if "status" in chunk or "error" in chunk:
                    told = chunk["error"]["message"]
                    if kind != "refused" or chunk["status"] != 400 or "\n" in told:
                        raise RuntimeError(f"{chunk}")
                    self.seen["refused"] += 1
                    return
                if leaves:
                    self.seen["hung up"] += 1
                    return
                usage = chunk.get("usage") or usage
        if kind == "refused" or usage is None:
            raise RuntimeError(f"answered {level}, usage {usage}")
        self.seen["answered"] += 1
        self.tokens += usage["prompt_tokens"] + usage["completion_tokens"] - 1  # the last token is not routed
        self.cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    async def watch(self, end: float) -> None:
        """Read statistics every two seconds, change the default level every eight."""
        turn = 0
        while time.monotonic() < end:
            await asyncio.sleep(2)
            turn += 1
            if turn % 10 == 0:
                each = self.server.memory()
                self.memory.append((sum(self.seen[kind] for kind in KINDS), sum(each)))
                told = [f"{megabytes:.0f}" for megabytes in each]
                print(f"{self.memory[-1][0]} requests, MB:", *told, file=sys.stderr, flush=True)
            try:
                stats, metrics = await self.server.rpc("bh_routing_stats"), await self.server.metrics()
                assert stats["telemetry"]["total"]["tokens"] >= 0
                assert metrics['bh_routing_experts_total{phase="decode"}'] > 0
                self.seen["statistics read"] += 2
                if turn % 4 == 0:
                    changed = await self.server.rpc(
                        "bh_routing_set", experts_per_token=(8, 4, 6)[turn // 4 % 3]
                    )
                    assert "error" not in changed, changed
                    self.seen["levels changed"] += 1
            except Exception as error:
                self.failures.append(f"watching: {error!r}")

    async def pulse(self, end: float) -> None:
        """A process that stands still for seconds, or a machine, finds its connections closed: was it so?"""
        while (before := time.monotonic()) < end:
            await asyncio.sleep(0.1)
            self.pause = max(self.pause, time.monotonic() - before - 0.1)


async def idle(server: Server) -> None:
    """Wait until no tokens come any more: who hung up is cancelled between two steps."""
    before = -1
    while (now := (await server.rpc("bh_routing_stats"))["telemetry"]["total"]["tokens"]) != before:
        before = now
        await asyncio.sleep(2)


async def soak(minutes: float, page: Path | None) -> None:
    # So few blocks of keys and values that the warm-up touches all of them: what grows later is not their pages.
    vllm = "--max-num-seqs 8 --max-model-len 512 --enforce-eager --enable-prompt-tokens-details --num-gpu-blocks-override 64"
    # oneDNN keeps what it compiled for each size of a product, 1024 by default: a hundred megabytes, which look like a leak.
    argv = ("--experts", "8", "--under-load", "3")
    async with Server(*argv, vllm=vllm, ONEDNN_PRIMITIVE_CACHE_CAPACITY="8") as server:
        run = Soak(server)
        await asyncio.gather(
            *(run.client(100 + i, time.monotonic() + 20, True) for i in range(16))
        )  # warm-up
        await idle(server)
        await server.rpc("bh_routing_reset")
        warm, start = sum(server.memory()), time.monotonic()
        run, server.resent = Soak(server), 0
        end = start + 60 * minutes
        clients = (run.client(i, end, True) for i in range(16))
        await asyncio.gather(*clients, run.watch(end), run.pulse(end))
        await idle(server)
        stats = await server.rpc("bh_routing_stats")
        problems = disagreements(stats)
        after = sum(server.memory())
        # The usage of answers counts every routed token where nobody hangs up.
        await server.rpc("bh_routing_reset")
        quiet = Soak(server)
        await asyncio.gather(*(quiet.client(1000 + i, time.monotonic() + 15, False) for i in range(16)))
        await idle(server)
        last = await server.rpc("bh_routing_stats")
        routed = last["telemetry"]["total"]["tokens"]
        problems += disagreements(last)
        if routed != quiet.tokens - quiet.cached:
            problems.append(f"usage {quiet.tokens - quiet.cached} != routed {routed}")
        failures = run.failures + quiet.failures
        requests = {why: sum(n.values()) for why, n in stats["requests"].items()}
    rows = [
        ["minutes", f"{minutes:g}"],
        ["clients", "16, of whom 8 run at a time"],
        ["requests answered", f"{run.seen['answered']:,}"],
        ["wrong levels, refused with status 400 and one sentence", f"{run.seen['refused']:,}"],
        ["answers left by the client", f"{run.seen['hung up']:,}"],
        ["statistics and /metrics read", f"{run.seen['statistics read']:,}"],
        ["default level changed", f"{run.seen['levels changed']:,}"],
        ["requests by level: own, default, shed under load", " / ".join(f"{requests.get(why, 0):,}" for why in ("own", "default", "load"))],
        ["(token, layer) decisions", f"{stats['telemetry']['total']['decisions']:,}"],
        ["requests sent again, because their connection was closed", f"{server.resent:,}"],
        ["the clients' process stood still, s, at most", f"{run.pause:.1f}"],
        ["errors", f"{len(failures)}"],
        ["disagreements of histograms, pairs, phases and usage", f"{len(problems)}"],
        ["memory of the server, MB: after 20 s, at the end", f"{warm:,.0f} / {after:,.0f}"],
        ["of it in the second half, MB per thousand requests", f"{late_growth(run.memory):+.1f}"],
    ]  # fmt: skip
    table = markdown_table(["soak of `bh-routing serve olmoe-nano --experts 8 --under-load 3`", ""], rows)
    publish(page, "soak", f"{table}\n\n{describe_machine(1)}; vLLM {vllm_version}.")
    for line in failures[:10] + problems:
        print(line, file=sys.stderr)
    if failures or problems or after > 1.1 * warm:
        raise SystemExit(1)


def late_growth(memory: list[tuple[int, float]]) -> float:
    """Megabytes per thousand requests, by least squares over the second half of (requests, megabytes)."""
    half = memory[len(memory) // 2 :]
    return (
        1e3 * statistics.linear_regression(*zip(*half, strict=True)).slope if len(half) > 1 else float("nan")
    )


def disagreements(stats: dict[str, Any]) -> list[str]:
    """Where the server's own figures do not fit each other."""
    layers, found = stats["telemetry"]["layers"], []
    pairs = sum(k * n for layer in layers for k, n in enumerate(layer["count_histogram"]))
    decisions = sum(layer["tokens"] for layer in layers)
    phases = stats["phases"].values()
    for name, one, other in (
        ("pairs computed, histogram", stats["pairs_computed"], pairs),
        ("decisions by phase, histogram", sum(p["decisions"] for p in phases), decisions),
        ("experts by phase, histogram", sum(p["experts"] for p in phases), pairs),
        ("tokens of the layers", len({layer["tokens"] for layer in layers}), 1),
    ):
        if one != other:
            found.append(f"{name}: {one} != {other}")
    return found


# ------------------------------------------------------------------------------------------------- load


async def load_round(server: Server, seconds: float, level: dict[str, Any], seed: int) -> dict[str, float]:
    """32 clients for so many seconds: tokens per second, and the median time to the first token."""
    first: list[float] = []
    tokens = 0
    end = time.monotonic() + seconds
    start = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal tokens
        chance = random.Random(1000 * seed + number)
        while time.monotonic() < end:
            began, at = time.perf_counter(), None
            async for chunk in server.complete(prompt_of(chance), 32, level):
                assert "error" not in chunk, chunk
                at = at or time.perf_counter()
                if chunk.get("usage"):
                    tokens += chunk["usage"]["prompt_tokens"] + chunk["usage"]["completion_tokens"]
            assert at is not None
            first.append(at - began)

    await asyncio.gather(*(client(i) for i in range(32)))
    return {"rate": tokens / (time.perf_counter() - start), "first": statistics.median(first)}


async def load(seconds: float, rounds: int, model: str, calibration: str | None, page: Path | None) -> None:
    vllm = "--max-num-seqs 8 --max-model-len 512 --enforce-eager --no-enable-prefix-caching"
    fixed = {f"{KEY}experts_per_token": 8}
    found: dict[str, list[dict[str, float]]] = {"fixed": [], "shed": []}
    experts: dict[str, list[float]] = {"fixed": [], "shed": []}
    argv = ["--experts", "8", "--under-load", "3", *(["--calibration", calibration] if calibration else [])]
    async with Server(*argv, vllm=vllm, model=model) as server:
        await load_round(server, 10, fixed, 0)  # warm-up
        for turn in range(1, rounds + 1):
            for name in ("fixed", "shed") if turn % 2 else ("shed", "fixed"):
                await server.rpc("bh_routing_reset")
                found[name].append(await load_round(server, seconds, fixed if name == "fixed" else {}, turn))
                stats = await server.rpc("bh_routing_stats")
                experts[name].append(stats["telemetry"]["total"]["mean_experts"])
                print(name, found[name][-1], stats["requests"], file=sys.stderr, flush=True)
    rows = [
        [what, f"{statistics.median(experts[name]):.2f}", f"{median(found[name], 'rate'):.0f}", f"{1e3 * median(found[name], 'first'):.0f}"]
        for name, what in (("fixed", "8 experts, fixed"), ("shed", "`--experts 8 --under-load 3`"))
    ]  # fmt: skip
    ratios = [
        f"{statistics.median(s[key] / f[key] for s, f in zip(found['shed'], found['fixed'], strict=True)):.2f}" for key in ("rate", "first")
    ]  # fmt: skip
    rows.append(["ratio within a round, median", "", *ratios])
    header = [
        f"{Path(model).name}, 32 clients, 8 at a time",
        "experts per token",
        "tokens per second",
        "ms to the first token",
    ]
    text = f"{rounds} rounds of {seconds:g} s each, in turn. {describe_machine(1)}; vLLM {vllm_version}."
    publish(page, "serving-load", f"{markdown_table(header, rows)}\n\n{text}")


def large_model(folder: Path) -> None:
    """Save a random OLMoE of two layers, hidden 512, 64 experts of intermediate 1024, in bfloat16, with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("olmoe-nano"))
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, num_experts=64, num_experts_per_tok=8, max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_(0.0, 1.5 * config.hidden_size**-0.5)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def median(rounds: list[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


def main() -> None:
    parser = arguments(__doc__, threads=False)
    parser.add_argument("what", choices=["soak", "load"])
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak (default 10)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round of the load (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="of the load (default 5)")
    parser.add_argument("--model", default="olmoe-nano", help="of the load: olmoe-nano, a folder or a hub id")
    parser.add_argument("--calibration", help="of that model")
    parser.add_argument(
        "--make", type=Path, metavar="FOLDER", help="only make the random model of the load there"
    )
    args = parser.parse_args()
    if args.make is not None:
        large_model(args.make)
    elif args.what == "soak":
        asyncio.run(soak(args.minutes, args.write))
    else:
        asyncio.run(load(args.seconds, args.rounds, args.model, args.calibration, args.write))


if __name__ == "__main__":
    main()
