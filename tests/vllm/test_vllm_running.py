"""Phases, certified losses and two ranks in engines that run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bh_routing import Calibration
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


SAME = {"experts_per_token": 3.0}


@pytest.fixture(scope="module")
def ranks(run_engine) -> dict[int, list[Any]]:
    """Requests of four levels together, then one at a named budget, on one rank and on two."""
    certificate = Calibration.load(CALIBRATION).certificate
    kl, changed = (
        {level.experts_per_token: level.bound for level in levels}
        for levels in (certificate.kl, certificate.agreement)
    )
    # What the certificate grants at 3 and at 4 experts.
    levels = [None, {"max_kl": kl[3.0]}, {"agreement": 1 - changed[4.0]}, {"experts_per_token": 2}]
    extra = [None if level is None else {"bh_routing": level} for level in levels]
    steps = [
        ["generate", {"prompts": PROMPTS, "max_tokens": NEW, "extra_args": extra}],
        STATS,
        ["generate", {"prompts": PROMPTS, "max_tokens": NEW, "extra_args": [{"bh_routing": SAME}] * 4}],
    ]
    engine = ENGINE | config(experts_per_token=5)
    return {n: run_engine(engine | {"tensor_parallel_size": n}, steps) for n in (1, 2)}


def test_two_ranks_agree_with_one_on_a_level_for_each_request(ranks):
    (one, (alone,), _), (two, workers, _) = ranks[1], ranks[2]
    assert len(workers) == 2
    for worker in workers:
        assert histograms(worker["telemetry"]) == histograms(alone["telemetry"])
        assert worker["requests"] == alone["requests"]
    assert sum(alone["requests"]["own"].values()) == 3
    for ours, theirs in zip(one, two, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for name in ("prompt_logprobs", "logprobs"):  # sums of two halves of a product
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4)


@pytest.mark.parametrize("ranks_used", [1, 2])
def test_a_certified_loss_is_the_budget_that_was_certified_for_it(ranks, ranks_used):
    together, _, named = ranks[ranks_used]
    assert together[1]["tokens"] == named[1]["tokens"]
    for name in ("prompt_logprobs", "logprobs"):
        assert together[1][name] == pytest.approx(named[1][name], abs=1e-5)
        assert together[0][name] != pytest.approx(named[0][name], abs=1e-3)  # it matters
