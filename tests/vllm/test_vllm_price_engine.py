"""A price on loads in a real engine: the steps, the loads and the tokens of transformers, and of every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bh_routing.models import bundled_calibration, bundled_path

NANO = str(bundled_path("olmoe-nano"))
CALIBRATION = str(bundled_calibration("olmoe-nano"))
PROMPTS = torch.randint(5, 4000, (6, 20), generator=torch.Generator().manual_seed(1)).tolist()
NEW = 7
ASKED = ["generate", {"prompts": PROMPTS, "max_tokens": NEW}]
STATS = ["bh_routing_stats", {}]
SETTINGS: dict[str, Any] = {"calibration": CALIBRATION, "distinct_experts": 14}


def histograms(worker: dict[str, Any]) -> list[list[int]]:
    return [layer["load_histogram"] for layer in worker["telemetry"]["layers"]]


@pytest.fixture(scope="module")
def expected() -> tuple[list[list[int]], list[list[int]], dict[str, Any]]:
    """Tokens, loads by layer, and totals of transformers' generate on the same batch."""
    from transformers import AutoModelForCausalLM

    from bh_routing import BHRoutingIntegration

    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    ids = torch.tensor(PROMPTS)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with BHRoutingIntegration(model, **SETTINGS) as integration:
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 20:]
        told = integration.telemetry.to_dict()
    return tokens.tolist(), [layer["load_histogram"] for layer in told["layers"]], told["total"]


@pytest.mark.parametrize(
    "engine",
    [{"enforce_eager": True}, {}, {"enforce_eager": True, "tensor_parallel_size": 2}],
    ids=["eager", "compiled", "two ranks"],
)
def test_the_loads_of_transformers(run_engine, expected, engine):
    settings = {"model": NANO, "dtype": "float32", "additional_config": {"bh_routing": SETTINGS}}
    # The engine in this process, so that no step begins before all requests are there: loads depend on who is in a step.
    together = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    answers, workers = run_engine(settings | engine, [ASKED, STATS], env=together)
    tokens, loads, total = expected
    assert [answer["tokens"] for answer in answers] == tokens
    for worker in workers:
        assert histograms(worker) == loads
        for name in ("steps", "mean_loads", "own_mean_loads", "shared_pairs"):
            assert worker["telemetry"]["total"][name] == total[name], name
    assert total["steps"] == 4 * (NEW - 1)
    assert workers[0]["telemetry"]["total"]["bytes_saved"] > 0


def test_batch_invariant_mode_refuses_it(run_engine):
    settings = {
        "model": NANO,
        "dtype": "float32",
        "enforce_eager": True,
        "additional_config": {"bh_routing": SETTINGS},
    }
    log = run_engine(settings, [ASKED], fails=True, env={"VLLM_BATCH_INVARIANT": "1"})
    assert (
        "bh-routing refuses to start: a price on loads makes a token's output depend on the other sequences"
        in log
    )
