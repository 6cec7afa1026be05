"""Phases in an engine that runs."""

from __future__ import annotations

from typing import Any

import torch

from bh_routing.models import bundled_calibration, bundled_path

NANO = str(bundled_path("olmoe-nano"))
CALIBRATION = str(bundled_calibration("olmoe-nano"))
ENGINE = {"model": NANO, "dtype": "float32", "enforce_eager": True}
PROMPTS = torch.randint(5, 4000, (4, 20), generator=torch.Generator().manual_seed(2)).tolist()
NEW = 6
STATS: list[Any] = ["bh_routing_stats", {}]


def config(**settings: Any) -> dict[str, Any]:
    return {"additional_config": {"bh_routing": {"calibration": CALIBRATION, **settings}}}


def histograms(told: dict[str, Any]) -> list[list[int]]:
    return [layer["count_histogram"] for layer in told["layers"]]


def test_phases_are_those_of_transformers(run_engine):
    from transformers import AutoModelForCausalLM

    from bh_routing import BHRoutingIntegration

    phases = {"prefill": {"experts_per_token": 8}, "decode": {"experts_per_token": 3}}
    asked = ["generate", {"prompts": PROMPTS, "max_tokens": NEW}]
    answers, (worker,) = run_engine(ENGINE | config(phases=phases), [asked, STATS])
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    ids = torch.tensor(PROMPTS)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with BHRoutingIntegration(model, calibration=CALIBRATION, phases=phases) as integration:
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
        told = integration.telemetry.to_dict()
    assert [answer["tokens"] for answer in answers] == tokens.tolist()
    assert histograms(worker["telemetry"]) == histograms(told)
    prefill, decode = (worker["phases"][name] for name in ("prefill", "decode"))
    assert prefill["experts"] == 8 * prefill["decisions"] == 8 * 4 * ids.numel()
    assert decode["decisions"] == 4 * len(PROMPTS) * (NEW - 1)
    assert decode["experts"] < 4 * decode["decisions"]
