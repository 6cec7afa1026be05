"""The plugin in real engines on CPU: bit identity, equality with transformers, statistics, parallelism."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing import BHRoutingIntegration
from bh_routing.data import sample_text
from bh_routing.models import bundled_calibration, bundled_path

NANO = str(bundled_path("olmoe-nano"))
CALIBRATION = str(bundled_calibration("olmoe-nano"))
NEW = 16
STRICT = 0.002  # a level at which most tokens drop most experts
STATS, RESET = ["bh_routing_stats", {}], ["bh_routing_reset", {}]


def config(**settings: Any) -> dict[str, Any]:
    return {"additional_config": {"bh_routing": settings}}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids of six passages, 5 to 64 tokens long."""
    ids = tokens_of(sample_text())
    return [ids[200 * i : 200 * i + n] for i, n in enumerate((5, 9, 17, 33, 48, 64))]


@pytest.fixture(scope="module")
def asked(prompts) -> list[Any]:
    return ["generate", {"prompts": prompts, "max_tokens": NEW}]


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    ids = tokens_of(sample_text())
    return [ids[256 * i : 256 * (i + 1)] for i in range(20)]


def tokens_of(text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NANO)(text)["input_ids"]


def histograms(worker: dict[str, Any]) -> list[list[int]]:
    return [layer["count_histogram"] for layer in worker["telemetry"]["layers"]]


def pairs(worker: dict[str, Any]) -> int:
    return sum(k * n for layer in histograms(worker) for k, n in enumerate(layer))


def largest_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Of any log-probability, of prompts and of continuations."""
    return max(
        abs(a - b)
        for x, y in zip(one, other, strict=True)
        for name in ("prompt_logprobs", "logprobs")
        for a, b in zip(x[name], y[name], strict=True)
    )


# ------------------------------------------------------------------------------------------ transformers


class InTransformers:
    """The same prompts through the transformers integration, in float32."""

    def __init__(self, model: Any, prompts: list[list[int]], **settings: Any) -> None:
        self.answers: list[dict[str, Any]] = []
        with torch.inference_mode(), BHRoutingIntegration(model, **settings) as integrator:
            for prompt in prompts:
                rows = torch.tensor([prompt])
                whole = model.generate(
                    rows,
                    attention_mask=torch.ones_like(rows),
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=False,
                )
                self.answers.append({"tokens": whole[0, len(prompt) :].tolist()})
            self.telemetry = integrator.telemetry.to_dict()
            for prompt, answer in zip(prompts, self.answers, strict=True):
                logprobs = token_logprobs(model, prompt + answer["tokens"])
                answer["prompt_logprobs"] = logprobs[: len(prompt) - 1]
                answer["logprobs"] = logprobs[len(prompt) - 1 :]

    @property
    def worker(self) -> dict[str, Any]:
        return {"telemetry": self.telemetry}


def token_logprobs(model: Any, ids: list[int]) -> list[float]:
    inputs = torch.tensor([ids])
    logits = model(input_ids=inputs).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, inputs[0, 1:, None])[:, 0].tolist()


def perplexity(answers: list[list[float]]) -> float:
    every = [x for answer in answers for x in answer]
    return math.exp(-math.fsum(every) / len(every))


# ----------------------------------------------------------------------------------------- bit identity


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_a_table_that_keeps_all_eight_changes_no_bit(run_engine, asked, eager):
    base = {"model": NANO, "dtype": "bfloat16", "enforce_eager": eager}
    (plain,) = run_engine(base, [asked])
    assert 3 < -sum(plain[-1]["prompt_logprobs"]) / 63 < 5  # a model that works: nats per token
    kept, (worker,) = run_engine(base | config(top_k=8), [asked, STATS])
    assert kept == plain  # tokens and log-probabilities, as Python floats
    tokens = sum(len(answer["prompt_logprobs"]) + 1 + NEW - 1 for answer in plain)
    assert histograms(worker) == [[0] * 8 + [tokens]] * 4
    assert pairs(worker) == worker["pairs_computed"] == 4 * 8 * tokens


def test_without_configuration_nothing_changes(run_engine, asked):
    base = {"model": NANO, "dtype": "bfloat16", "enforce_eager": True}
    (loaded,) = run_engine(base, [asked])
    (absent,) = run_engine(base, [asked], env={"VLLM_PLUGINS": ""})
    assert loaded == absent


def test_analyze_counts_and_changes_no_bit(run_engine, asked):
    base = {"model": NANO, "dtype": "bfloat16", "enforce_eager": True}
    (plain,) = run_engine(base, [asked])
    watched, (worker,) = run_engine(
        base | config(calibration=CALIBRATION, alpha=STRICT, mode="analyze"), [asked, STATS]
    )
    assert watched == plain
    assert worker["stats"]["mode"] == "analyze"
    assert 1 < worker["stats"]["bh_would_select_mean"] < 5
    assert worker["pairs_computed"] == 0


# ---------------------------------------------------------------------------------- equality, statistics


@pytest.fixture(scope="module")
def calibrated(run_engine, asked, windows) -> list[Any]:
    """One engine with the calibration that ships, compensation included: budget 4, then 2, then text."""
    engine = {"model": NANO, "dtype": "float32", "enforce_eager": True}
    steps = [
        STATS,
        asked,
        STATS,
        ["bh_routing_set", {"experts_per_token": "2"}],  # text, as over HTTP
        RESET,
        asked,
        STATS,
        ["bh_routing_set", {"alpha": 7}],
        ["bh_routing_set", {"experts_per_token": 4}],
        RESET,
        ["generate", {"prompts": windows, "max_tokens": 1}],
        STATS,
    ]
    return run_engine(engine | config(calibration=CALIBRATION, experts_per_token=4), steps)


def test_warm_up_is_not_counted(calibrated):
    (worker,) = calibrated[0]
    assert worker["telemetry"]["total"]["tokens"] == 0
    assert worker["pairs_computed"] == 0
    assert worker["moe_layers"] == len(worker["layers"]) == 4


@pytest.mark.parametrize(("budget", "place"), [(4, 1), (2, 5)])
def test_float32_equals_transformers(calibrated, nano_model, prompts, budget, place):
    theirs = InTransformers(nano_model, prompts, calibration=CALIBRATION, experts_per_token=budget)
    ours, (worker,) = calibrated[place : place + 2]
    assert [x["tokens"] for x in ours] == [x["tokens"] for x in theirs.answers]
    assert histograms(worker) == histograms(theirs.worker)
    without = sum(
        layer[0] for layer in histograms(worker)
    )  # the linear compensation alone: min_k is 0 at 2 of 8
    assert (without > 0) == (budget == 2)
    difference = largest_difference(ours, theirs.answers)
    print(f"budget {budget}: largest difference of a log-probability {difference:.1e}")
    assert difference < 1e-5


def test_statistics_have_the_telemetry_s_names(calibrated, nano_model, prompts):
    theirs = InTransformers(nano_model, prompts[:1], calibration=CALIBRATION, experts_per_token=4)
    (worker,) = calibrated[2]
    assert set(worker["telemetry"]["total"]) == set(theirs.telemetry["total"])
    assert [set(x) for x in worker["telemetry"]["layers"]] == [set(x) for x in theirs.telemetry["layers"]]
    assert [x["path"] for x in worker["telemetry"]["layers"]] == [
        x["path"] for x in theirs.telemetry["layers"]
    ]


def test_strict_tables_compute_what_the_histogram_says(calibrated):
    for place in (2, 6, 11):
        (worker,) = calibrated[place]
        assert 0 < worker["pairs_computed"] == pairs(worker) < 8 * worker["telemetry"]["total"]["decisions"]


def test_level_changes_while_it_runs(calibrated):
    (changed,), (refused,), (back,) = calibrated[3], calibrated[7], calibrated[8]
    assert changed["experts_per_token"] == 2
    assert changed["alpha"] < back["alpha"]
    assert refused["error"].startswith("alpha must be a number strictly between 0 and 1, got 7.0")
    assert refused["alpha"] == changed["alpha"]


def test_perplexity_by_prompt_logprobs_equals_transformers(calibrated, nano_model, windows):
    ours = perplexity([answer["prompt_logprobs"] for answer in calibrated[10]])
    with torch.inference_mode():
        plain = perplexity([token_logprobs(nano_model, ids) for ids in windows])
        with BHRoutingIntegration(nano_model, calibration=CALIBRATION, experts_per_token=4):
            theirs = perplexity([token_logprobs(nano_model, ids) for ids in windows])
    print(f"perplexity: vLLM {ours:.5f}, transformers {theirs:.5f}, plain top-8 {plain:.5f}")
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert abs(ours - plain) > 1e-3


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "padded"])
def test_without_compensation_equals_transformers(run_engine, asked, nano_model, prompts, ragged):
    settings = {"calibration": CALIBRATION, "alpha": STRICT, "compensation": False}
    engine = {"model": NANO, "dtype": "float32", "enforce_eager": True}
    ours, (worker,) = run_engine(engine | config(**settings, ragged=ragged), [asked, STATS])
    theirs = InTransformers(nano_model, prompts, **settings)
    assert [x["tokens"] for x in ours] == [x["tokens"] for x in theirs.answers]
    assert histograms(worker) == histograms(theirs.worker)
    assert worker["pairs_computed"] == (pairs(worker) if ragged else 0)
    difference = largest_difference(ours, theirs.answers)
    print(f"ragged {ragged}: largest difference of a log-probability {difference:.1e}, {pairs(worker)} pairs")
    assert difference < 1e-5


def test_compiled_engine_routes_alike_and_takes_another_level(
    run_engine, asked, calibrated, vllm_environment
):
    engine = {"model": NANO, "dtype": "float32"}
    settings = config(calibration=CALIBRATION, experts_per_token=4)
    steps = [asked, STATS, ["bh_routing_set", {"experts_per_token": 2}], RESET, asked, STATS]
    results = run_engine(engine | settings, steps)
    for place, eager in ((0, 1), (4, 5)):
        assert largest_difference(results[place], calibrated[eager]) < 1e-4  # other fusions, other rounding
        assert histograms(results[place + 1][0]) == histograms(calibrated[eager + 1][0])


def test_digest_is_part_of_the_compile_cache_key(run_engine, asked, vllm_environment):
    """The compiled engines of this file that differ in nothing but the routing have graphs of their own."""
    base = {"model": NANO, "dtype": "bfloat16", "enforce_eager": False}
    run_engine(base, [asked])
    run_engine(base | config(top_k=8), [asked, STATS])
    run_engine(
        {"model": NANO, "dtype": "float32"} | config(calibration=CALIBRATION, experts_per_token=4),
        [asked, STATS, ["bh_routing_set", {"experts_per_token": 2}], RESET, asked, STATS],
    )
    keys = list(Path(vllm_environment["VLLM_CACHE_ROOT"]).glob("torch_compile_cache/torch_aot_compile/*"))
    assert len(keys) == 3


def test_tensor_parallel_ranks_count_the_same(run_engine, asked, calibrated):
    engine = {"model": NANO, "dtype": "float32", "enforce_eager": True, "tensor_parallel_size": 2}
    settings = config(calibration=CALIBRATION, experts_per_token=4)
    ours, workers = run_engine(engine | settings, [asked, STATS])
    assert sorted(worker["rank"] for worker in workers) == [0, 1]
    assert histograms(workers[0]) == histograms(workers[1]) == histograms(calibrated[2][0])
    difference = largest_difference(ours, calibrated[1])
    print(f"tensor parallel 2: largest difference of a log-probability to one rank {difference:.1e}")
    assert difference < 1e-4  # sums of two halves


def test_configuration_by_environment(run_engine, asked, calibrated):
    value = f'{{"calibration": "{CALIBRATION}", "experts_per_token": 4}}'
    engine = {"model": NANO, "dtype": "float32", "enforce_eager": True}
    ours, (worker,) = run_engine(engine, [asked, STATS], env={"BH_ROUTING_CONFIG": value})
    assert ours == calibrated[1]
    assert histograms(worker) == histograms(calibrated[2][0])
