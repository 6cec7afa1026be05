"""The scale of the compensation: where it is measured, how, and who follows it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from bh_routing import BHRoutingIntegration, RoutingIntegration, TopKPolicy
from bh_routing._words import wanted
from bh_routing.calibration import compensation_scale
from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.compensation_scale import SpreadWindows, divergence, measure_scale, vertex
from bh_routing.calibration.passes import calibrate
from bh_routing.data import sample_text
from bh_routing.errors import CalibrationError, InvalidParameterError
from bh_routing.evaluation.specs import parse_policy
from bh_routing.patching import is_patched, make_plan
from bh_routing.text import TextStream


def documents(num: int = 40, length: int = 128) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for _ in range(num)]


@pytest.fixture(scope="module")
def stream_of():
    def make(docs, window=32, batch_tokens=128):
        return TextStream(docs, None, window=window, batch_tokens=batch_tokens, seed=0)

    return make


# -- the parabola and the divergence ---------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0.0, 0.12, 0.5, 0.83, 1.0])
def test_the_vertex_of_an_exact_parabola(best):
    assert vertex(*(3.0 + 2.0 * (s - best) ** 2 for s in (0.0, 0.5, 1.0))) == pytest.approx(best, abs=0.005)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0, 2.0, 4.0), 0.0),  # compensation only hurts
        ((4.0, 2.0, 1.0), 1.0),  # its vertex lies beyond 1
        ((1.0, 2.0, 1.5), 0.0),  # no minimum inside: the better end
        ((1.5, 2.0, 1.0), 1.0),
        ((0.0, 0.0, 0.0), 1.0),
        ((1.0, float("nan"), 1.0), 1.0),
    ],
)
def test_the_vertex_at_the_edges(values, expected):
    assert vertex(*values) == expected


def test_divergence_is_that_of_the_definition_and_leaves_padding_out():
    own, routed = torch.randn(3, 7, 11), torch.randn(3, 7, 11)
    mask = torch.rand(3, 7) < 0.6
    p, q = own.double().softmax(-1), routed.double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1)[mask].sum())
    assert divergence(own, routed, mask) == pytest.approx(expected, rel=1e-5)
    assert divergence(own, own, mask) == 0.0


# -- which windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 3, 17, 500])
def test_windows_are_few_and_evenly_over_the_text(stream_of, monkeypatch, num):
    monkeypatch.setattr(compensation_scale, "TOKENS", 8 * 32)
    stream, some = stream_of(documents(num)), SpreadWindows(32)
    most = 0
    for batch in stream:
        some.add(batch)
        most = max(most, len(some.held))
    chosen = some.result(num * 128)
    assert most <= 16
    assert 1 <= len(chosen) <= min(8, max(1, num * 128 // 8 // 32))
    steps = {b.index - a.index for a, b in pairwise(chosen)}
    assert len(steps) <= 1
    assert chosen[0].index == 0
    if num == 500:
        assert len(chosen) >= 4
        assert chosen[-1].index >= 500 // 2


def test_two_processes_keep_what_one_keeps(stream_of, monkeypatch):
    monkeypatch.setattr(compensation_scale, "TOKENS", 8 * 32)
    one, parts = SpreadWindows(32), [SpreadWindows(32), SpreadWindows(32)]
    for batch in stream_of(documents(101)):
        one.add(batch)
        parts[batch.index % 2].add(batch)
    monkeypatch.setattr(compensation_scale, "gather", lambda value: [value])
    alone = [batch.index for batch in one.result(101 * 128)]
    every, batches = max(p.every for p in parts), max(p.batches for p in parts)
    monkeypatch.setattr(
        compensation_scale, "gather", lambda value: [value, every if value in (1, 2, 4, 8) else batches]
    )
    together = sorted(batch.index for part in parts for batch in part.result(101 * 128))
    assert together == alone


# -- measured on a model -----------------------------------------------------------------------------------------


def test_what_is_measured_is_nearest_to_the_model_itself(nano_model, nano_tokenizer):
    """By predictions of the integration; and the model is left as it was."""
    model, ids = nano_model, nano_tokenizer(sample_text())["input_ids"]
    docs = [ids[first : first + 128] for first in range(0, 5120, 128)]
    before = model(torch.tensor(docs[:2])).logits
    calibration = calibrate(model, None, docs, sensitivity=True, window=128)
    assert not is_patched(model)
    assert torch.equal(model(torch.tensor(docs[:2])).logits, before)
    assert 0.0 < calibration.compensation_scale < 1.0

    ids = torch.tensor(docs)
    found = {}
    with torch.no_grad():
        own = model(ids).logits
        for value in (0.0, calibration.compensation_scale, 1.0):
            routing = BHRoutingIntegration(
                model,
                calibration=calibration,
                experts_per_token=8 / 3,
                compensation=value,
                size="sensitivity",
            )
            with routing:
                found[value] = divergence(own, model(ids).logits, torch.ones_like(ids, dtype=torch.bool))
    assert min(found, key=lambda value: found[value]) == calibration.compensation_scale, found


def test_the_model_is_restored_when_measuring_fails(tiny_olmoe, monkeypatch):
    model, docs = tiny_olmoe(), documents(8)
    calibration = calibrate(model, None, docs, window=128)
    stream = TextStream(docs, None, window=128, batch_tokens=512, seed=0)

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(compensation_scale, "divergence", broken)
    with pytest.raises(RuntimeError, match="broken"):
        measure_scale(model, make_plan(model), calibration, list(stream), lambda tokens: None)
    assert not is_patched(model)


def test_a_model_without_a_head_keeps_the_fit_and_has_no_sensitivities(tiny_olmoe):
    body = tiny_olmoe().model
    assert calibrate(body, None, documents(8), window=128).compensation_scale == 1.0
    with pytest.raises(
        CalibrationError,
        match=r"needs next-token logits, OlmoeModel gives none; load the model with its language-model head",
    ):
        calibrate(body, None, documents(8), window=128, sensitivity=True)


def test_without_a_head_every_process_still_reaches_the_sum(tiny_olmoe, monkeypatch):
    """A process that holds no window waits there for those that do."""
    model, docs = tiny_olmoe(), documents(8)
    calibration, plan = calibrate(model, None, docs, window=128), make_plan(model.model)
    batches = list(TextStream(docs, None, window=128, batch_tokens=512, seed=0))
    reached: list[list[float]] = []
    monkeypatch.setattr(compensation_scale, "gather", lambda sums: reached.append(sums) or [sums])
    paths = {old.path: new.path for old, new in zip(calibration.layers, plan.layers, strict=True)}
    layers = tuple(replace(layer, path=paths[layer.path]) for layer in calibration.layers)
    body = replace(calibration, layers=layers)
    for share in (batches, []):
        assert measure_scale(model.model, plan, body, share, lambda tokens: None) == 1.0
    assert len(reached) == 2


# -- who follows it ----------------------------------------------------------------------------------------------


def test_compensations_are_scaled(synthetic_calibration):
    calibration = synthetic_calibration(compensation_scale=0.25)
    full = calibration.compensations(1.0)
    for path, one in calibration.compensations().items():
        torch.testing.assert_close(one.vectors_JH, 0.25 * full[path].vectors_JH, rtol=1e-6, atol=0)
    assert calibration.compensations(0.0) == {}
    assert synthetic_calibration(compensation_scale=0.0).compensations() == {}


def test_file_and_merge_keep_it(synthetic_calibration, tmp_path):
    calibration = synthetic_calibration(compensation_scale=0.25)
    calibration.save(tmp_path / "c.safetensors")
    assert Calibration.load(tmp_path / "c.safetensors").compensation_scale == 0.25
    assert "at scale 0.25" in repr(calibration)
    other = synthetic_calibration(seed=1, compensation_scale=0.75, tokens=1000)
    calibration, other = (replace(c, reservoir=None) for c in (calibration, other))
    assert calibration.merge(other).compensation_scale == pytest.approx((4 * 0.25 + 0.75) / 5)


def test_the_integration_takes_a_scale(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    calibration = calibrate(model, None, documents(), window=128)
    measured = calibration.compensation_scale
    outputs = {}
    for value in (None, True, measured, 0.0, False, 1.0):
        with (
            torch.no_grad(),
            BHRoutingIntegration(
                model, calibration=calibration, alpha=0.05, compensation=value, size="deviation"
            ),
        ):
            outputs[value if value is None else (type(value), value)] = model(token_ids).logits
    own = outputs[None]
    assert torch.equal(own, outputs[bool, True])
    assert torch.equal(own, outputs[float, measured])
    assert torch.equal(outputs[bool, False], outputs[float, 0.0])
    assert not torch.allclose(own, outputs[float, 1.0], atol=1e-4)
    assert not torch.allclose(own, outputs[bool, False], atol=1e-4)
    with (
        torch.no_grad(),
        RoutingIntegration(model, TopKPolicy(2), compensations=calibration.compensations(0.5)),
    ):
        model(token_ids)


@pytest.mark.parametrize(
    ("value", "error"),
    [("mean:2", InvalidParameterError), (1.5, InvalidParameterError), (-0.1, InvalidParameterError)],
)
def test_what_is_no_scale(value, error, nano_model):
    with pytest.raises(error, match=r"^compensation must be true, false or a scale from 0 to 1, got "):
        wanted(value)
    with pytest.raises(error, match=r"^compensation must be true, false or a scale from 0 to 1, got "):
        BHRoutingIntegration(nano_model, compensation=value)


def test_a_policy_spec_takes_a_scale():
    assert parse_policy("bh:experts=4,compensation=0.5").parameters["compensation"] == 0.5
    assert parse_policy("topk:k=4,compensation=yes").text == "topk:k=4,compensation=true"
