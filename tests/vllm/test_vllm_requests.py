"""What belongs to a request: which tokens of a step are its own, its level, its part of the prefix cache."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from bh_routing.engines.vllm.step import DECODE, PREFILL
from bh_routing.models import bundled_calibration, bundled_path

NANO = str(bundled_path("olmoe-nano"))
CALIBRATION = str(bundled_calibration("olmoe-nano"))
NEW = 6


def config(**settings: Any) -> dict[str, Any]:
    return {"additional_config": {"bh_routing": settings}}


def test_each_token_of_a_step_knows_its_request_and_its_phase(run_engine):
    """Prompts are computed in pieces beside requests that decode already."""
    prompts = [[11 + i] * n for i, n in enumerate((3, 50, 1, 17, 30))]
    engine = {"model": NANO, "dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 24}
    extension = {"worker_extension_cls": "recording.Recording"}
    _, _, (steps,) = run_engine(
        engine | extension | config(calibration=CALIBRATION, experts_per_token=4),
        [["record", {}], ["generate", {"prompts": prompts, "max_tokens": NEW}], ["recordings", {}]],
    )
    counts = Counter(
        (name, phase) for s in steps for name, phase in zip(s["requests"], s["phases"], strict=True)
    )
    names = sorted({name for name, _ in counts}, key=lambda name: int(name.split("-")[0]))
    assert [counts[name, PREFILL] for name in names] == [len(ids) for ids in prompts]
    assert [counts[name, DECODE] for name in names] == [NEW - 1] * 5  # the last token is not computed
    assert counts.total() == sum(map(len, prompts)) + 5 * (NEW - 1)  # and nothing else
    mixed = [s for s in steps if 0 < s["decoding"] < s["tokens"]]
    assert mixed
    for s in steps:
        assert s["tokens"] == len(s["requests"]) <= 24
        assert s["decoding"] == s["phases"].count(DECODE)
        decoding = [name for name, phase in zip(s["requests"], s["phases"], strict=True) if phase == DECODE]
        assert len(set(decoding)) == len(decoding)  # one token of a sequence


# --------------------------------------------------------------------------------------------- levels

LEVELS: list[dict[str, Any] | None] = [
    None,
    {"bh_routing": {"experts_per_token": 2}},
    {"bh_routing.alpha": 1e-4},
    {"bh_routing.experts_per_token": "3"},  # text, as some clients send it
    {"bh_routing": {"experts_per_token": 8}},
]
SET = [{"experts_per_token": 4}, {"experts_per_token": 2}, {"alpha": 1e-4}, {"experts_per_token": 3}, {"experts_per_token": 8}]  # fmt: skip
WRONG = [
    ({"bh_routing": {"experts": 3}}, "a level has no 'experts'; did you mean 'experts_per_token'?"),
    ({"bh_routing.experts_per_token": 9}, "no level selects 9 experts per token in the model on average: "),
    ({"bh_routing.alpha": "much"}, "alpha must be a number, got 'much'."),
    ({"bh_routing": {"alpha": 0.1}, "bh_routing.alpha": 0.1}, "a request's level was given twice, "),
    ({"bh_routing": {"alpha": 0.1, "experts_per_token": 3}}, "expected "),
]
PREFIX = [7 + i % 90 for i in range(140)]  # more than a block


@pytest.fixture(scope="module")
def mixed(run_engine) -> dict[str, Any]:
    """One compiled engine, budget 4, prefix cache on: requests of five levels together, then each level alone."""
    prompts = [[11 + i, *range(200 + 9 * i, 200 + 9 * i + n)] for i, n in enumerate((3, 40, 6, 17, 30))]
    steps: list[Any] = []
    place: dict[str, int] = {}

    def add(name: str, method: str, **arguments: Any) -> None:
        place[name] = len(steps)
        steps.append([method, arguments])

    add("", "bh_routing_reset")
    add("together", "generate", prompts=prompts, max_tokens=NEW, extra_args=LEVELS)
    add("together stats", "bh_routing_stats")
    for i, (extra, _) in enumerate(WRONG):
        add(f"wrong {i}", "generate", prompts=[[5, 6]], max_tokens=1, extra_args=[extra])
    cached = {"prompts": [[*PREFIX, 3]], "max_tokens": 2, "prompt_logprobs": None}
    for name, extra in (
        ("default", LEVELS[0]),
        ("two", LEVELS[1]),
        ("two again", LEVELS[1]),
        ("default again", LEVELS[0]),
    ):
        add(name, "generate", **cached, extra_args=[extra])
    for i, level in enumerate(SET):
        add("", "bh_routing_set", **level)
        if i == 1:
            add("two by set", "generate", **cached)
        add("", "reset_prefix_cache")
        add("", "bh_routing_reset")
        add(f"alone {i}", "generate", prompts=[prompts[i]], max_tokens=NEW)
        add(f"alone {i} stats", "bh_routing_stats")
    # The mean compensation: the linear one computes a token that is alone in its step in bfloat16, and others in float32.
    engine = {"model": NANO, "dtype": "float32", "enable_prefix_caching": True, "max_num_batched_tokens": 64}
    routing = {"calibration": CALIBRATION, "experts_per_token": 4, "compensation": "mean"}
    results = run_engine(engine | config(**routing), steps)
    return {name: results[at] for name, at in place.items()}


def histograms(worker: dict[str, Any]) -> list[list[int]]:
    return [layer["count_histogram"] for layer in worker["telemetry"]["layers"]]


def test_requests_of_several_levels_get_what_they_get_alone(mixed):
    largest = 0.0
    for i, ours in enumerate(mixed["together"]):
        (alone,) = mixed[f"alone {i}"]
        assert ours["tokens"] == alone["tokens"]
        for name in ("prompt_logprobs", "logprobs"):
            assert len(ours[name]) == len(alone[name]) > 1
            largest = max(largest, *(abs(a - b) for a, b in zip(ours[name], alone[name], strict=True)))
    print(f"largest difference of a log-probability to the same request alone: {largest:.1e}")
    assert largest < 1e-5  # other sizes of matrix products
    (together,) = mixed["together stats"]
    each = [histograms(mixed[f"alone {i} stats"][0]) for i in range(len(SET))]
    assert histograms(together) == [
        [sum(x) for x in zip(*layer, strict=True)] for layer in zip(*each, strict=True)
    ]
    assert len({str(x) for x in each}) == len(SET)  # the levels differ
    assert together["requests"] == {
        "default": {"default": 1},
        "own": {
            "experts_per_token=2.0": 1,
            "alpha=0.0001": 1,
            "experts_per_token=3.0": 1,
            "experts_per_token=8.0": 1,
        },
    }


@pytest.mark.parametrize("i", range(len(WRONG)))
def test_levels_that_cannot_be_served_are_the_request_s_error(mixed, i):
    assert mixed[f"wrong {i}"]["error"].startswith(WRONG[i][1])


def test_prefixes_are_shared_within_a_level_only(mixed):
    one, two, again, other = (mixed[name][0] for name in ("default", "two", "two again", "default again"))
    assert one["cached"] == two["cached"] == 0
    assert again["cached"] == other["cached"] > 0
    assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)
    assert two["logprobs"] == pytest.approx(again["logprobs"], abs=1e-5)
    assert abs(one["logprobs"][0] - two["logprobs"][0]) > 1e-4  # it matters
    changed = mixed["two by set"][
        0
    ]  # the default is another level now: its keys and values are not the old ones
    assert changed["cached"] == 0
    assert changed["logprobs"] == pytest.approx(two["logprobs"], abs=1e-5)


def test_the_second_model_runner_has_what_is_read():
    """It needs Triton and does not run here: its own description of a batch has the fields that `step` reads."""
    import inspect

    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.states import RequestState

    assert list(inspect.signature(GPUModelRunner.prepare_inputs).parameters)[:2] == [
        "self",
        "scheduler_output",
    ]
    assert {"req_ids", "num_computed_tokens_np", "idx_mapping_np"} <= set(InputBatch.__dataclass_fields__)
    assert "self.prompt_len.np[req_idx] = prompt_len" in inspect.getsource(RequestState.add_request)
