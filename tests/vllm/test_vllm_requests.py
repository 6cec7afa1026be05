"""What belongs to a request: which tokens of a step are its own."""

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


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_each_token_of_a_step_knows_its_request_and_its_phase(run_engine, eager):
    """Prompts are computed in pieces beside requests that decode already."""
    prompts = [[11 + i] * n for i, n in enumerate((3, 50, 1, 17, 30))]
    engine = {"model": NANO, "dtype": "float32", "enforce_eager": eager, "max_num_batched_tokens": 24}
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
