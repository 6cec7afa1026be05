"""What the vLLM plugin decides, without vLLM: settings, layer names, filtering, the ragged call, the server's checks."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bh_routing import BHRoutingIntegration
from bh_routing.calibration.data import CalibratedLayer
from bh_routing.cli import main
from bh_routing.cli import serve as serve_command
from bh_routing.engines import addresses
from bh_routing.engines.vllm import checks, plugin, serving
from bh_routing.engines.vllm.paths import match_layer
from bh_routing.engines.vllm.ragged import kept_only
from bh_routing.engines.vllm.routing import EngineRouting, LayerFacts, filled
from bh_routing.engines.vllm.settings import Settings, read_settings
from bh_routing.engines.vllm.step import DECODE, PADDING, PREFILL, REPEATED, Step, watch
from bh_routing.errors import (
    BHRoutingError,
    CalibrationMismatchError,
    InvalidParameterError,
    InvalidTypeError,
    MissingDependencyError,
    ServerError,
    UnsupportedModelError,
)
from bh_routing.models import bundled_calibration, bundled_path
from bh_routing.policies import RoutingContext, TopKPolicy

CALIBRATION = str(bundled_calibration())
HIDDEN = json.loads((bundled_path() / "config.json").read_text())["hidden_size"]
FORMAT_1 = Path(__file__).parent / "fixtures" / "olmoe-nano-format-1.safetensors"

# ---------------------------------------------------------------------------------------------- settings


def test_settings_from_additional_config_before_the_environment():
    environ = {"BH_ROUTING_CONFIG": '{"alpha": 0.2}'}
    assert read_settings({}, {}) is None
    assert read_settings(None, {}) is None
    assert read_settings({"other": 1}, environ) == Settings(alpha=0.2)
    assert read_settings({"bh_routing": {"alpha": 0.1}}, environ) == Settings(alpha=0.1)


def test_settings_from_a_file(tmp_path):
    file = tmp_path / "routing.json"
    file.write_text('{"top_k": 4}')
    assert read_settings({}, {"BH_ROUTING_CONFIG": str(file)}) == Settings(top_k=4)


def test_settings_survive_json():
    settings = Settings(calibration=CALIBRATION, experts_per_token=4, ragged=False)
    assert settings.to_dict() == {"calibration": CALIBRATION, "experts_per_token": 4, "ragged": False}
    assert Settings.from_value(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [
        (
            {"experts": 4},
            InvalidParameterError,
            r"^there is no setting 'experts'; did you mean 'experts_per_token'\?$",
        ),
        (
            {"alhpa": 0.1},
            InvalidParameterError,
            r"^there is no setting 'alhpa'; did you mean 'alpha'\?$",
        ),
        ({"alpha": 0.1, "top_k": 4}, InvalidParameterError, r"got alpha and top_k; give one\.$"),
        ({"experts_per_token": 4}, InvalidParameterError, r"^experts_per_token=4 needs a calibration: "),
        ({"compensation": True}, InvalidParameterError, r"^compensation=True needs a calibration: "),
        (
            {"compensation": "no"},
            InvalidParameterError,
            r"^compensation must be 'none', 'mean' or 'linear', got 'no'\.$",
        ),
        (
            {"compensation": 1.5},
            InvalidParameterError,
            r"must be true, false or a scale from 0 to 1, got 1\.5\.$",
        ),
        ({"ragged": 1}, InvalidTypeError, r"^ragged must be true or false, got 1\.$"),
        ({"mode": "maybe"}, InvalidParameterError, r"^mode must be 'patch' or 'analyze', got 'maybe'\.$"),
        ({"min_k": 0}, InvalidParameterError, r"^min_k must be at least 1, got 0; "),
        ([4], InvalidTypeError, r"^bh_routing must be an object such as .*, got \[4\]\.$"),
        ("missing.json", InvalidParameterError, r"got 'missing\.json', which is neither\.$"),
        ("{alpha}", InvalidParameterError, r"^the configuration of bh_routing is no JSON: "),
    ],
)
def test_wrong_settings(value, error, sentence):
    with pytest.raises(error, match=sentence):
        Settings.from_value(value)


def test_digest_tells_settings_and_calibrations_apart(tmp_path, synthetic_calibration):
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for seed, file in enumerate(files):
        synthetic_calibration(seed=seed).save(file)
    digests = {
        Settings(calibration=str(file), alpha=alpha).digest() for file in files for alpha in (0.1, 0.2)
    }
    assert len(digests) == 4
    again = Settings(calibration=str(files[0]), alpha=0.1).digest()
    assert again in digests


# ------------------------------------------------------------------------------------------- layer names


def records(*paths: str) -> list[CalibratedLayer]:
    return [
        CalibratedLayer(
            path=f"{p}.gate", experts_path=f"{p}.experts", top_k=8, score_func="softmax", route_norm="none"
        )
        for p in paths
    ]


def test_layers_are_matched_by_number_and_longest_suffix():
    layers = records(*(f"model.layers.{i}.mlp" for i in range(12)))
    for name in ("model.layers.11.mlp.experts", "language_model.model.layers.11.mlp.experts"):
        assert match_layer(name, layers) == 11
    assert match_layer("model.layers.1.block_sparse_moe.experts", layers) == 1
    towers = records("model.vision.layers.3.mlp", "model.language_model.layers.3.mlp")
    assert match_layer("language_model.layers.3.mlp.experts", towers) == 1


def test_no_layer_fits():
    with pytest.raises(
        CalibrationMismatchError,
        match=r"^the calibration has no layer for 'model\.layers\.2\.mlp\.experts': ",
    ):
        match_layer("model.layers.2.mlp.experts", records("model.layers.0.mlp", "model.layers.1.mlp"))


def test_ambiguous_layers_are_refused():
    layers = records("model.vision.layers.3.mlp", "model.text.layers.3.mlp")
    with pytest.raises(CalibrationMismatchError, match=r"^it is ambiguous which calibrated layer 'layers\.3"):
        match_layer("layers.3.mlp.experts", layers)


# --------------------------------------------------------------------------------------------- filtering


def facts(index: int, **changes) -> LayerFacts:
    fields = {
        "name": f"model.layers.{index}.mlp.experts",
        "router": "CPURouter",
        "num_experts": 64,
        "top_k": 8,
        "score_func": "softmax",
        "renormalize": False,
    }
    return LayerFacts(**(fields | changes))


def bound(**settings) -> EngineRouting:
    engine = EngineRouting(Settings(**settings))
    for index in range(4):
        engine.add(facts(index))
    engine.check_complete()
    engine.bind(torch.device("cpu"))
    return engine


@pytest.fixture
def routed(nano_model, token_ids):
    """Logits and the model's own choice in its first layer, as vLLM's router hands them over: unsorted int32."""
    captured = {}

    def keep(module, args, output):
        captured["outputs"] = output

    gate = nano_model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(keep)
    with torch.no_grad():
        nano_model(input_ids=token_ids)
    handle.remove()
    logits_TE, weights_TK, experts_TK = captured["outputs"]
    order_K = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    return logits_TE, weights_TK[:, order_K], experts_TK[:, order_K].int()


def test_the_decision_is_the_library_s_own(routed, nano_model):
    logits_TE, weights_TK, experts_TK = routed
    engine = bound(calibration=CALIBRATION, experts_per_token=4)
    layer = engine.layers[0]
    weights, experts = layer.route(logits_TE, weights_TK, experts_TK, count=True)
    integrator = BHRoutingIntegration(nano_model, calibration=CALIBRATION, experts_per_token=4)
    decision = integrator.policy.decide(
        logits_TE, weights_TK, experts_TK.long(), integrator.plan.layers[0].context
    )
    assert torch.equal(weights, decision.weights_TK)
    assert torch.equal((weights != 0).sum(-1), decision.counts_T)
    assert experts.dtype == torch.int32
    assert torch.equal(experts[weights != 0].long(), decision.own_experts_TK[~decision.dropped_TK])
    assert 1 < engine.stats()["stats"]["mean_experts_per_token"] < 8
    assert engine.alpha == integrator.alpha
    one = layer.route(logits_TE[:1], weights_TK[:1], experts_TK[:1], count=False)
    assert torch.equal(one[0], weights[:1])
    assert torch.equal(one[1], experts[:1])


def test_unused_slots_carry_the_first_kept_expert(routed):
    logits_TE, weights_TK, experts_TK = routed
    layer = bound(calibration=CALIBRATION, experts_per_token=2, min_k=1).layers[0]
    weights, experts = layer.route(logits_TE, weights_TK, experts_TK, count=False)
    for row in range(len(weights)):
        kept = experts_TK[row][weights[row] != 0].tolist()
        assert kept
        assert set(experts[row].tolist()) == set(kept)
        assert experts[row][weights[row] == 0].unique().tolist() in ([kept[0]], [])


def test_a_table_that_keeps_all_returns_the_router_s_own_bits(routed):
    logits_TE, weights_TK, experts_TK = routed
    layer = bound(top_k=8).layers[0]
    weights, experts = layer.route(logits_TE, weights_TK, experts_TK, count=True)
    assert torch.equal(weights, weights_TK)
    assert torch.equal(experts, experts_TK)
    assert weights.data_ptr() != weights_TK.data_ptr()  # an operation must not return its input


def test_counted_calls_do_not_change_with_the_buffers_they_came_in(routed):
    logits_TE, weights_TK, experts_TK = (x.clone() for x in routed)
    engine = bound(calibration=CALIBRATION, experts_per_token=4)
    weights, experts = engine.layers[0].route(logits_TE, weights_TK, experts_TK, count=True)
    kept = int((weights != 0).sum())
    for buffer in (weights_TK, experts_TK, weights, experts):
        buffer.fill_(5)  # a compiled graph uses its buffers again
    (layer, *_) = engine.telemetry.to_dict()["layers"]
    assert sum(k * n for k, n in enumerate(layer["count_histogram"])) == kept == sum(layer["expert_load"])


def test_analyze_returns_the_router_s_own(routed):
    logits_TE, weights_TK, experts_TK = routed
    engine = bound(calibration=CALIBRATION, experts_per_token=3, mode="analyze")
    weights, experts = engine.layers[0].route(logits_TE, weights_TK, experts_TK, count=True)
    assert torch.equal(weights, weights_TK)
    assert torch.equal(experts, experts_TK)
    assert 1 < engine.stats()["stats"]["bh_would_select_mean"] < 8


def test_compensation_is_added_once(routed):
    logits_TE, weights_TK, experts_TK = routed
    layer = bound(calibration=CALIBRATION, experts_per_token=2).layers[0]
    layer.route(logits_TE, weights_TK, experts_TK, count=False)
    output_TH = torch.zeros(len(logits_TE), HIDDEN)
    added_TH = layer.compensate(output_TH)
    assert added_TH.abs().max() > 1e-3
    assert torch.equal(layer.compensate(output_TH), output_TH)


def test_compensation_for_other_tokens_is_refused(routed):
    logits_TE, weights_TK, experts_TK = routed
    layer = bound(calibration=CALIBRATION, experts_per_token=2).layers[0]
    layer.route(logits_TE, weights_TK, experts_TK, count=False)
    with pytest.raises(InvalidParameterError, match=r'got 3; configure "compensation": false\.$'):
        layer.compensate(torch.zeros(3, HIDDEN))


def test_no_tokens(routed):
    layer = bound(calibration=CALIBRATION, experts_per_token=4).layers[0]
    weights, experts = layer.route(*(x[:0] for x in routed), count=True)
    assert (weights.shape, experts.shape) == ((0, 8), (0, 8))


def test_vllm_s_default_dtype_and_device_change_nothing(routed):
    expected = bound(calibration=CALIBRATION, experts_per_token=4).layers[0].route(*routed, count=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            engine = bound(calibration=CALIBRATION, experts_per_token=4)
            engine.set_level(experts_per_token=3)
            engine.set_level(experts_per_token=4)
        assert torch.get_default_dtype() == torch.bfloat16
        found = engine.layers[0].route(*routed, count=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_stats_are_json_and_reset(routed):
    engine = bound(calibration=CALIBRATION, experts_per_token=4)
    empty = json.loads(json.dumps(engine.stats(), allow_nan=False))
    engine.layers[0].route(*routed, count=True)
    engine.layers[0].pairs = 3
    assert engine.stats() != empty
    engine.reset()
    assert json.loads(json.dumps(engine.stats())) == empty


def test_set_level(routed):
    engine = bound(calibration=CALIBRATION, experts_per_token=4)
    before = engine.layers[0].route(*routed, count=False)[0]
    thresholds = next(iter(engine.policy._rows.values()))[0]
    engine.set_level(experts_per_token="2")
    assert next(iter(engine.policy._rows.values()))[0] is thresholds  # the same buffer
    after = engine.layers[0].route(*routed, count=False)[0]
    assert (after != 0).sum() < (before != 0).sum()
    fresh = bound(calibration=CALIBRATION, experts_per_token=2)
    assert torch.equal(after, fresh.layers[0].route(*routed, count=False)[0])
    assert engine.alpha == fresh.alpha


def test_each_token_of_a_step_has_the_level_of_its_phase(routed):
    phases = {"prefill": {"experts_per_token": 8}, "decode": {"experts_per_token": 3}}
    engine = bound(calibration=CALIBRATION, phases=phases)
    engine.step = Step(len(routed[0]), torch.device("cpu"))
    engine.step.write(["a", "b", "c"], [1, 40, 1], computed_R=[9, 0, 5], prompt_R=[9, 40, 6])
    weights = engine.layers[0].route(*routed, count=True)[0]
    few = bound(calibration=CALIBRATION, experts_per_token=3).layers[0].route(*routed, count=False)[0]
    assert torch.equal(weights[1:42], routed[1][1:42])  # two prompts: b's, and the end of c's
    assert torch.equal(weights[:1], few[:1])
    assert (few[1:42] == 0).any()
    assert torch.equal(weights[42:], routed[1][42:])  # padding decodes nothing
    by_phase = engine.metrics()["phases"]
    assert by_phase["prefill"]["experts"] == 8 * by_phase["prefill"]["decisions"]
    assert by_phase["decode"]["decisions"] == 1


def test_a_certified_loss_is_refused_without_a_certificate():
    from bh_routing.errors import CertificateError

    engine = bound(calibration=str(FORMAT_1), experts_per_token=4)
    with pytest.raises(CertificateError, match=r"max_kl=0\.01 needs a calibration with a certificate"):
        engine.set_level(max_kl="0.01")
    assert engine.budget == 4


@pytest.mark.parametrize(
    ("settings", "level", "sentence"),
    [
        ({"alpha": 0.1}, {"experts_per_token": 4}, r"^experts_per_token=4\.0 needs a calibration: "),
        ({"top_k": 4}, {"alpha": 0.1}, r"^this engine was started with top_k=4, which has no level; "),
        ({"alpha": 0.1}, {}, r"^expected exactly one of alpha and experts_per_token, got alpha=None"),
        ({"alpha": 0.1}, {"alpha": "much"}, r"^alpha must be a number, got 'much'\.$"),
    ],
)
def test_set_level_refuses(settings, level, sentence):
    with pytest.raises(InvalidParameterError, match=sentence):
        bound(**settings).set_level(**level)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"num_experts": 32},
            CalibrationMismatchError,
            r"num_experts was 64 when it was made, the model has 32",
        ),
        ({"top_k": 4}, CalibrationMismatchError, r"top_k was 8 when it was made, the model has 4"),
        (
            {"score_func": "sigmoid"},
            CalibrationMismatchError,
            r"score_func was 'softmax' .* the model has 'sigmoid'",
        ),
        (
            {"score_func": None},
            UnsupportedModelError,
            r"CPURouter, does not say how it turns logits into weights",
        ),
        ({"renormalize": True}, CalibrationMismatchError, r"route_norm was 'none' .* has 'renormalised'"),
        (
            {"name": "model.layers.9.mlp.experts"},
            CalibrationMismatchError,
            r"has no layer for 'model\.layers\.9",
        ),
    ],
)
def test_a_layer_that_the_calibration_does_not_fit(changes, error, sentence):
    engine = EngineRouting(Settings(calibration=CALIBRATION, experts_per_token=4))
    with pytest.raises(error, match=sentence):
        engine.add(facts(0, **changes))


def test_two_layers_for_one_row_are_refused():
    engine = EngineRouting(Settings(calibration=CALIBRATION, experts_per_token=4))
    engine.add(facts(0))
    with pytest.raises(
        CalibrationMismatchError, match=r"fit the calibrated layer 'model\.layers\.0\.mlp\.gate'"
    ):
        engine.add(facts(0, name="draft.layers.0.mlp.experts"))


def test_a_calibration_of_more_layers_is_refused():
    engine = EngineRouting(Settings(calibration=CALIBRATION, experts_per_token=4))
    engine.add(facts(0))
    with pytest.raises(
        CalibrationMismatchError, match=r"it has a layer 'model\.layers\.1\.mlp\.gate' that this"
    ):
        engine.check_complete()


@pytest.mark.parametrize("setting", ["max_k", "top_k", "min_k"])
def test_no_room_for_more_experts(setting):
    engine = EngineRouting(Settings(**{setting: 9}))
    with pytest.raises(
        InvalidParameterError, match=r"selects 8 experts, and vLLM's buffers have room for no more"
    ):
        engine.add(facts(0))


def test_filled_keeps_what_is_kept():
    context = RoutingContext(path="gate", index=0, num_experts=8, empty=8, top_k=4, route_norm="none")
    weights = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]])
    experts = torch.tensor([[5, 6, 7, 0], [1, 2, 3, 4]])
    decision = TopKPolicy(2).decide(torch.zeros(2, 8), weights, experts, context)
    assert filled(decision).tolist() == [[6, 6, 7, 6], [1, 2, 1, 1]]


# ------------------------------------------------------------------------------------------------ steps


def runner_v1(**changes):
    """What `watch` reads in vLLM's model runner."""
    batch = {
        "req_ids": ["a", "b", "c"],
        "num_reqs": 3,
        "num_computed_tokens_cpu": np.array(
            [5, 0, 9, 77], dtype=np.int32
        ),  # longer than the batch, as vLLM's
        "num_prompt_tokens": np.array([5, 2, 10, 77], dtype=np.int32),
    }
    return SimpleNamespace(
        max_num_tokens=16,
        execute_model=None,
        input_batch=SimpleNamespace(**batch | changes),
        _prepare_inputs=lambda output, scheduled: ("prepared", scheduled),
    )


def test_a_step_says_each_token_s_request_and_phase():
    runner = runner_v1()
    step = watch(runner, torch.device("cpu"))
    held = step.request_T.data_ptr(), step.phase_T.data_ptr()
    output = SimpleNamespace(num_scheduled_tokens={"c": 3, "a": 1, "b": 2})
    assert runner._prepare_inputs(output, "scheduled") == ("prepared", "scheduled")
    assert step.requests == ("a", "b", "c")
    assert (step.tokens, step.decoding) == (6, 1)
    request_T, phase_T, _ = step.at(8)  # two rows of padding
    assert request_T.tolist() == [0, 1, 1, 2, 2, 2, 0, 0]
    assert phase_T.tolist() == [DECODE, PREFILL, PREFILL, PREFILL, REPEATED, REPEATED, PADDING, PADDING]
    runner.input_batch.num_reqs, runner.input_batch.req_ids = 1, ["a"]
    runner._prepare_inputs(output, "scheduled")
    assert step.phase_T.tolist() == [DECODE] + [PADDING] * 15  # what the step before wrote is gone
    assert (step.request_T.data_ptr(), step.phase_T.data_ptr()) == held  # a recorded graph reads these


def test_a_step_of_the_second_model_runner():
    lengths = SimpleNamespace(np=np.array([0, 4, 0, 9]))
    batch = SimpleNamespace(
        req_ids=["a", "b"], num_computed_tokens_np=np.array([0, 4]), idx_mapping_np=np.array([3, 1])
    )
    runner = SimpleNamespace(
        max_num_tokens=4,
        execute_model=None,
        req_states=SimpleNamespace(prompt_len=lengths),
        prepare_inputs=lambda output, description: batch,
    )
    step = watch(runner, torch.device("cpu"))
    assert runner.prepare_inputs(SimpleNamespace(num_scheduled_tokens={"a": 2, "b": 1}), None) is batch
    assert step.phase_T.tolist() == [PREFILL, PREFILL, DECODE, PADDING]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data_parallel_size": 2}, "the tokens of several ranks are gathered"),
        ({"use_sequence_parallel_moe": True}, "ranks share the tokens of a step"),
        ({"use_ubatching": True}, "two batches run at a time"),
    ],
)
def test_steps_whose_tokens_are_not_in_order_are_refused(changes, what):
    plain = {"data_parallel_size": 1, "prefill_context_parallel_size": 1}
    plain |= {"use_sequence_parallel_moe": False, "use_ubatching": False}
    checks.check_step(SimpleNamespace(parallel_config=SimpleNamespace(**plain)), "a price")
    with pytest.raises(
        UnsupportedModelError, match=rf"^a price needs .*, but here {what}.*; start without\.$"
    ):
        checks.check_step(SimpleNamespace(parallel_config=SimpleNamespace(**plain | changes)), "a price")


@pytest.mark.parametrize(
    ("runner", "missing"),
    [
        (SimpleNamespace(), r"a method _prepare_inputs or prepare_inputs"),
        (SimpleNamespace(_prepare_inputs=1, execute_model=1, max_num_tokens=1), r"its input_batch\.req_ids"),
        (SimpleNamespace(prepare_inputs=1, execute_model=1, max_num_tokens=1, req_states=1), r"its req_states\.prompt_len\.np"),
    ],
)  # fmt: skip
def test_a_model_runner_that_does_not_say_is_refused(runner, missing):
    with pytest.raises(
        MissingDependencyError, match=rf"^vLLM's SimpleNamespace does not say .*expected {missing}, "
    ):
        watch(runner, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------- ragged


class Kernel:
    """Plain loops in float64 over rows and slots; counts the pairs that it is given."""

    def __init__(self, experts: int, hidden: int) -> None:
        self.weights_EHH = torch.randn(experts, hidden, hidden)
        self.pairs = 0

    def __call__(self, out_TH, x_TH, weights_TK, experts_TK):
        assert all(t.is_contiguous() for t in (out_TH, x_TH, weights_TK, experts_TK))
        self.pairs += experts_TK.numel()
        for t, (weights, experts) in enumerate(zip(weights_TK.tolist(), experts_TK.tolist(), strict=True)):
            out_TH[t] = sum(
                w * (self.weights_EHH[e] @ x_TH[t]) for w, e in zip(weights, experts, strict=True)
            )


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("dropped", ["none", "some", "all but one", "all"])
def test_ragged_equals_padded(tokens, dropped):
    kernel = Kernel(8, 4)
    x_TH, weights_TK = torch.randn(tokens, 4), torch.rand(tokens, 3) + 0.1
    experts_TK = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)]).int()
    keep = {
        "none": torch.ones(tokens, 3, dtype=torch.bool),
        "some": (torch.arange(tokens * 3).view(tokens, 3) % 2).bool(),
        "all but one": torch.tensor([False, True, False]).expand(tokens, 3),
        "all": torch.zeros(tokens, 3, dtype=torch.bool),
    }[dropped]
    weights_TK = weights_TK * keep
    padded_TH, ragged_TH = torch.empty(tokens, 4), torch.full((tokens, 4), float("nan"))
    kernel(padded_TH, x_TH, weights_TK, experts_TK)
    kernel.pairs = 0
    computed = kept_only(kernel, ragged_TH, x_TH, weights_TK, experts_TK)
    assert computed == kernel.pairs == int(keep.sum())
    torch.testing.assert_close(ragged_TH, padded_TH, rtol=1e-6, atol=1e-6)  # another order of float32 sums


# ----------------------------------------------------------------------------------------------- plugin


def test_entry_point_leads_to_the_plugin():
    found = {e.name: e.value for e in metadata.entry_points(group="vllm.general_plugins")}
    if "bh_routing" not in found:
        pytest.skip("the package was installed before it had the entry point; install it again")
    assert found["bh_routing"] == "bh_routing.engines.vllm.plugin:register"


def test_importing_the_plugin_imports_no_vllm():
    code = (
        "import sys, bh_routing.engines.vllm.plugin; assert 'vllm' not in sys.modules; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_done_without_configuration(monkeypatch):
    monkeypatch.delenv("BH_ROUTING_CONFIG", raising=False)
    config = SimpleNamespace(additional_config={"other": 1})
    runner = SimpleNamespace()
    plugin.prepare(config)
    plugin.attach(runner, config)
    plugin.finish(config, torch.nn.Linear(1, 1), torch.device("cpu"))
    assert (vars(config), vars(runner)) == ({"additional_config": {"other": 1}}, {})


def test_wrapping_twice_wraps_once():
    class Owner:
        def method(self, x):
            return [x]

    def around(original, self, x):
        return [*original(self, x), "around"]

    plugin._wrap(Owner, "method", around)
    plugin._wrap(Owner, "method", around)
    assert Owner().method(1) == [1, "around"]


def test_a_refusal_is_logged_in_one_line(caplog):
    def refuse():
        raise UnsupportedModelError("no\nway.")

    with pytest.raises(UnsupportedModelError):
        plugin._told(refuse)
    assert caplog.messages == ["bh-routing refuses to start: no way."]


class FakeRunner:
    """What `read_facts` looks at in a runner."""

    def __init__(self, **changes):
        router = {"top_k": 8, "scoring_func": "softmax", "renormalize": False, "_compute_routing": None}
        self.layer_name = "model.layers.0.mlp.experts"
        self.router = SimpleNamespace(**(router | changes.pop("router", {})))
        self.moe_config = SimpleNamespace(
            num_logical_experts=64,
            hidden_dim=HIDDEN,
            hidden_dim_unpadded=HIDDEN,
            in_dtype=torch.float32,
            **({"skip_final_all_reduce": False, "is_sequence_parallel": False, "dp_size": 1, "pcp_size": 1}),
        )
        self.is_monolithic = False
        self.routed_scaling_factor = 1.0
        self.routed_input_transform = self.routed_output_transform = None
        self.enable_dbo = False
        self._quant_method = SimpleNamespace()
        for name, value in changes.items():
            setattr(self, name, value)


def test_facts_of_a_runner():
    assert checks.read_facts(FakeRunner()) == facts(0, router="SimpleNamespace", hidden_size=HIDDEN)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"is_monolithic": True}, r"routes by itself, so that nothing can be decided in between"),
        (
            {"router": {"custom_routing_function": max}},
            r"calls a function of the model \(max\), whose scores",
        ),
        ({"router": {"_hash_indices_table": 1}}, r"routes by token id, not by logits"),
    ],
)
def test_routers_that_are_refused(changes, sentence):
    with pytest.raises(UnsupportedModelError, match=sentence):
        checks.read_facts(FakeRunner(**changes))


@pytest.mark.parametrize(
    "changes",
    [{"routed_scaling_factor": 2.5}, {"enable_dbo": True}, {"routed_output_transform": torch.nn.Identity()}],
)
def test_compensation_that_cannot_be_added_is_refused(changes):
    checks.check_compensation(FakeRunner())
    with pytest.raises(UnsupportedModelError, match=r'cannot be added: configure "compensation": false\.$'):
        checks.check_compensation(FakeRunner(**changes))


def test_load_balancing_is_refused():
    config = SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=True))
    with pytest.raises(UnsupportedModelError, match=r"^expert-parallel load balancing \(enable_eplb\)"):
        checks.check_engine(config)


def test_a_calibration_among_the_weights_is_refused(tmp_path):
    settings = Settings(calibration=str(tmp_path / "calib.safetensors"), alpha=0.1)
    with pytest.raises(
        CalibrationMismatchError, match=r"lies in the model's folder, where vLLM would read it"
    ):
        checks.check_folder(settings, str(tmp_path))
    checks.check_folder(settings, "allenai/OLMoE-1B-7B-0924")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    checks.check_folder(settings, str(tmp_path))


def with_gate(weight_EH):
    """A model whose router's weights were packed away: only its forward tells them."""
    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.gate = torch.nn.Module()
    model.mlp.gate.weight = torch.nn.Parameter(torch.empty(0))
    model.mlp.gate.forward = lambda x: (x @ weight_EH.T, None)
    return model


@pytest.mark.parametrize("strict", [True, False])
def test_other_router_weights_are_refused(nano_model, caplog, strict):
    engine = EngineRouting(Settings(calibration=CALIBRATION, experts_per_token=4, strict=strict))
    layer = engine.add(facts(0, hidden_size=HIDDEN))
    layer.facts = facts(0, name="mlp.experts", hidden_size=HIDDEN)
    weight_EH = nano_model.model.layers[0].mlp.gate.weight.detach()
    cpu = torch.device("cpu")
    checks.check_weights(engine, layer, with_gate(weight_EH), cpu)
    checks.check_weights(engine, layer, with_gate(weight_EH.bfloat16().float()), cpu)
    assert caplog.messages == []
    other = with_gate(weight_EH + 0.05 * torch.randn_like(weight_EH))
    if strict:
        with pytest.raises(
            CalibrationMismatchError, match=r'configure "strict": false to use the calibration'
        ):
            checks.check_weights(engine, layer, other, cpu)
    else:
        checks.check_weights(engine, layer, other, cpu)
        assert "differ from those that were calibrated" in caplog.text


def test_the_embedded_model_has_the_files_that_vllm_needs():
    """An output layer of its own, and an index: without one vLLM would read the calibration as weights."""
    from safetensors import safe_open

    folder = bundled_path()
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"model.safetensors"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(index) == set(file.keys())
    assert "lm_head.weight" in index
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


# ----------------------------------------------------------------------------------------------- serve


def plan_of(*argv):
    from bh_routing.cli import build_parser

    return serve_command.make_plan(build_parser().parse_args(["serve", *map(str, argv)]))


def test_serve_plan():
    plan = plan_of(
        "olmoe-nano", "--experts", 4, "--port", 8123, "--vllm", "--max-model-len 256 --enforce-eager"
    )
    assert plan.settings == Settings(calibration=CALIBRATION, experts_per_token=4.0)
    assert plan.url == "http://127.0.0.1:8123"
    assert plan.name == "olmoe-nano"
    command = plan.command
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert json.loads(command[command.index("--additional-config") + 1]) == {
        "bh_routing": plan.settings.to_dict()
    }
    assert command[-3:] == ["--max-model-len", "256", "--enforce-eager"]
    assert plan.environment({"A": "b"}) == {"A": "b", "VLLM_SERVER_DEV_MODE": "1"}
    assert "bh_routing_stats" in serving.how_to_talk(plan)


def test_statistics_over_http_only_on_loopback():
    plan = plan_of("olmoe-nano", "--host", "0.0.0.0")
    assert plan.environment({}) == {}
    assert plan.url == "http://127.0.0.1:8000"
    assert "not over HTTP" in serving.how_to_talk(plan)


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False), ("example.org", False)])  # fmt: skip
def test_loopback(host, local):
    assert addresses.is_loopback(host) is local


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--experts", "4", "--calibration", "missing.safetensors"], "there is no calibration file missing"),
        (["--experts", "4", "--calibration", "none"], "a budget of 4 experts needs a calibration"),
        (["--alpha", "2"], "alpha must be a number strictly between 0 and 1, got 2.0"),
        (["--port", "0"], "port must lie in 1..65535, got 0."),
        (["--vllm", "--additional-config {}"], "--additional-config is what carries the routing"),
        (["--dtype", "int8"], "dtype must be one of auto"),
    ],
)
def test_wrong_serve_arguments(capsys, argv, sentence):
    assert main(["serve", "olmoe-nano", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"bh-routing serve: {sentence}")


def test_serve_without_vllm(capsys, monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match=r"^serving needs vLLM, which is not installed; "):
        serving.check_installed()
    assert main(["serve", "olmoe-nano", "--experts", "4"]) == 2


def test_serve_with_the_plugin_left_out():
    with pytest.raises(
        InvalidParameterError, match=r"^VLLM_PLUGINS='other' leaves the plugin 'bh_routing' out"
    ):
        plan_of("olmoe-nano").environment({"VLLM_PLUGINS": "other"})
    assert plan_of("olmoe-nano").environment({"VLLM_PLUGINS": "other,bh_routing"})


class Stub(serving.ServerPlan):
    """A plan whose server is a short program."""

    code = ""

    @property
    def command(self):
        return [sys.executable, "-c", self.code]


def stub(code: str) -> Stub:
    kind = type("Stubbed", (Stub,), {"code": code})
    return kind(model="m", name="m", settings=Settings(alpha=0.1), port=1)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["ERROR x] bh-routing refuses to start: wrong file.", "RuntimeError: see above"], "wrong file."),
        (["(Worker) ValueError: no port"], "no port"),
        (["nothing"], "vLLM ended with exit code 3; its log above says why."),
    ],
)
def test_a_server_that_ends_says_why(lines, sentence):
    code = f"import sys; print({chr(10).join(lines)!r}); sys.exit(3)"
    log = io.StringIO()
    with serving.Server(stub(code), log) as server, pytest.raises(ServerError) as caught:
        server.wait_until_ready(30)
    assert str(caught.value) == sentence
    assert lines[0] in log.getvalue()


def test_a_server_that_never_answers_is_ended():
    with (
        serving.Server(stub("import time; time.sleep(600)"), io.StringIO()) as server,
        pytest.raises(ServerError, match=r"^vLLM did not answer at http://127\.0\.0\.1:1 within 1 seconds"),
    ):
        server.wait_until_ready(1)
    assert server.process.poll() is not None


@pytest.mark.parametrize(
    ("line", "workers", "sentence"),
    [
        ("INFO bh-routing: 4 of 4 MoE layers routed: bh", [{"rank": 0, "layers": [1] * 4, "moe_layers": 4}], None),
        ("INFO bh-routing: 4 of 4 MoE layers routed: bh", [{"rank": 1, "layers": [1] * 3, "moe_layers": 4}], r"^worker 1 routes 3 of 4 MoE layers: expected all"),
        ("INFO bh-routing: 4 of 4 MoE layers routed: bh", [{"rank": 0, "layers": [], "error": "Not configured."}], r"Not configured\.$"),
        ("INFO nothing", [{"rank": 0, "layers": [1], "moe_layers": 1}], r"the plugin was not loaded"),
    ],
)  # fmt: skip
def test_a_server_is_checked(monkeypatch, line, workers, sentence):
    with serving.Server(stub(""), io.StringIO()) as server:
        monkeypatch.setattr(server, "stats", lambda: workers)
        server.note(line)
        if sentence is None:
            assert server.check_routed() == "4 of 4 MoE layers routed: bh"
        else:
            with pytest.raises(BHRoutingError, match=sentence):
                server.check_routed()
