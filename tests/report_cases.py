"""Results for the tests of the report: two policies on a text whose tokens are hostile."""

from __future__ import annotations

from typing import Any

import numpy as np

from bh_routing.evaluation.paired import block_sums

EVIL = "<script>window.injected = 1</script>"
TOKENS = ["It", " was", EVIL, " &amp;", "<!--", "\n", ' "quoted"', " '", " é", " end"]


def make_run() -> dict[str, Any]:
    return {
        "format": 1,
        "model": f"a model {EVIL}",
        "data": {"night": {"shown": TOKENS}},
    }


def make_result(policy: str, experts: float, loss: float, seed: int, **changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    losses = random.normal(3.0, 1.0, 8192) * 0 + np.random.default_rng(0).normal(3.0, 1.0, 8192) + loss
    losses += random.normal(0.0, 0.05, 8192)
    name, _, value = policy.partition(":k=")
    spread = 0.0 if name in ("topk", "full", "original") else 1.2
    counts = (
        random.integers(1, 9, (2, len(TOKENS))).tolist() if spread else [[int(experts)] * len(TOKENS)] * 2
    )
    histogram = [0] * 9
    histogram[round(experts)] = 4096
    load = random.integers(1, 90, 8)
    layer = {
        "tokens": 4096,
        "mean_experts": experts,
        "std_experts": spread,
        "jaccard": experts / 8,
        "lost_weight_share": 0.2,
        "count_histogram": histogram,
        "load_imbalance": 1.5,
        "own_load_imbalance": 1.3,
        "unused_experts": 0,
        "own_unused_experts": 0,
        "expert_load": (load // 2).tolist(),
        "own_expert_load": load.tolist(),
    }
    return {
        "format": 1,
        "key": f"{policy}{seed}",
        "policy": policy,
        "dataset": "night",
        "model": f"a model {EVIL}",
        "perplexity": float(np.exp(losses.mean())),
        "word_perplexity": 100.0,
        "loss": float(losses.mean()),
        "token_accuracy": 0.3,
        "kl": None,
        "tokens": 4104,
        "window": 512,
        "stride": 512,
        "blocks": block_sums(losses),
        "seconds": 1.0,
        "tokens_per_second": 4104.0,
        "mean_experts_per_token": experts,
        "std_experts_per_token": spread,
        "count_histogram": histogram,
        "layers": [layer | {"path": str(i)} for i in range(2)],
        "active_parameters": 2e6,
        "flops_per_token": 4e6,
        "arithmetic_per_token": 1.1 * experts,
        "bytes_per_token": 1e6 * experts,
        "settings": {"policy": name, "k": int(value) if value else None, "weights": "model"},
        "shown_counts": counts,
        "versions": {"torch": "2"},
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "seed": 0,
    } | changes


def make_results() -> list[dict[str, Any]]:
    return [
        make_result("full", 8.0, 0.0, 1),
        make_result("topk:k=4", 4.0, 0.05, 2),
        make_result(f"bh:experts=4,statistic={EVIL}", 4.0, 0.02, 3),
        make_result("bh:experts=3", 3.0, 0.05, 4),
        make_result("original", 1.0, 0.8, 5),
    ]
