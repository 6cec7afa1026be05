"""A level for reading the prompt, another for writing the answer: what decides when, what is counted, what is refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from bh_routing import BHRoutingIntegration
from bh_routing.errors import InvalidParameterError, InvalidTypeError
from bh_routing.evaluation.specs import parse_policy
from bh_routing.patching.forward import Call
from bh_routing.policies import PhasePolicy, RoutingContext, TopKPolicy
from bh_routing.settings import RoutingSettings
from bh_routing.settings.levels import of_phases, read_phases
from bh_routing.telemetry.phases import PhaseTelemetry
from caches import after

PHASES = {"prefill": {"experts_per_token": 8}, "decode": {"experts_per_token": 3}}


@pytest.fixture
def calibration():
    from bh_routing import Calibration
    from bh_routing.models.loading import default_calibration

    return Calibration.load(default_calibration("olmoe-nano"))


def greedy(model, ids, num):
    return model.generate(ids, max_new_tokens=num, do_sample=False, pad_token_id=0)


def test_a_prompt_is_read_with_all_experts_and_answered_with_few(nano_model, calibration, token_ids):
    whole = nano_model(input_ids=token_ids).logits
    with BHRoutingIntegration(nano_model, calibration=calibration, phases=PHASES) as routed:
        assert torch.equal(nano_model(input_ids=token_ids, use_cache=True).logits, whole)
        greedy(nano_model, token_ids, 9)
        figures = routed.telemetry.to_dict()["phases"]
        assert figures["prefill"]["mean_experts"] == 8.0
        assert figures["prefill"]["tokens"] == 2 * token_ids.numel()
        assert figures["decode"]["tokens"] == 2 * 8  # the first new word comes out of the prompt
        assert 2.0 < figures["decode"]["mean_experts"] < 4.5
        total = routed.telemetry.to_dict()["total"]
        assert total["tokens"] == figures["prefill"]["tokens"] + figures["decode"]["tokens"]
        assert routed.telemetry.silent_layers() == []
    assert torch.equal(nano_model(input_ids=token_ids).logits, whole)


@torch.no_grad()
def test_decoding_is_what_the_decoding_level_alone_decides(nano_model, calibration, token_ids):
    cache = nano_model(input_ids=token_ids, use_cache=True).past_key_values
    last = token_ids[:, :1]
    with BHRoutingIntegration(nano_model, calibration=calibration, experts_per_token=3):
        expected = nano_model(input_ids=last, **after(nano_model, copy.deepcopy(cache))).logits
    with BHRoutingIntegration(nano_model, calibration=calibration, phases=PHASES) as routed:
        assert torch.equal(
            nano_model(input_ids=last, **after(nano_model, copy.deepcopy(cache))).logits, expected
        )
        routed.set_level(phases=PHASES | {"decode": {"alpha": 0.5}})
        other = nano_model(input_ids=last, **after(nano_model, copy.deepcopy(cache))).logits
        assert not torch.equal(other, expected)
        with pytest.raises(InvalidParameterError, match="unpatch and patch anew"):
            routed.set_level(experts_per_token=4)


def test_the_phase_of_a_call():
    assert Call(shape=(2, 1), cached=True).phase == "decode"
    assert Call(shape=(2, 1)).phase == "prefill"  # a prompt of one token
    assert Call(shape=(2, 5), cached=True).phase == "prefill"


def test_a_prompt_of_one_token_is_read_as_a_prompt(nano_model, calibration):
    with BHRoutingIntegration(nano_model, calibration=calibration, phases=PHASES) as routed:
        greedy(nano_model, torch.tensor([[5]]), 4)
        figures = routed.telemetry.to_dict()["phases"]
    assert (figures["prefill"]["tokens"], figures["decode"]["tokens"]) == (1, 3)


def test_tokens_of_both_phases_in_one_call():
    context = RoutingContext(path="gate", index=0, num_experts=8, empty=8, top_k=4, route_norm="none")
    policy = PhasePolicy({"prefill": TopKPolicy(), "decode": TopKPolicy(1)})
    policy.bind([context])
    logits = torch.randn(6, 8)
    weights, experts = logits.softmax(-1).topk(4)
    decode = torch.tensor([True, False, True, True, False, False])
    mixed = policy.decide(logits, weights, experts, replace(context, decode_T=decode))
    assert mixed.counts_T.tolist() == [1, 4, 1, 1, 4, 4]
    for phase, chosen in (("prefill", ~decode), ("decode", decode)):
        alone = policy.decide(logits, weights, experts, replace(context, phase=phase))
        for name in ("weights_TK", "experts_TK", "dropped_TK"):
            assert torch.equal(getattr(mixed, name)[chosen], getattr(alone, name)[chosen])
    counted = PhaseTelemetry([context], [4])
    counted.update(replace(context, decode_T=decode), mixed, logits)
    parts = counted.to_dict()
    assert [parts["phases"][p]["tokens"] for p in ("prefill", "decode")] == [3, 3]
    assert [parts["phases"][p]["mean_experts"] for p in ("prefill", "decode")] == [4.0, 1.0]
    assert parts["total"]["mean_experts"] == 2.5
    counted.merge(counted)
    assert counted.to_dict()["total"]["decisions"] == 12
    counted.reset()
    assert counted.to_dict()["phases"]["decode"]["tokens"] == 0


def test_a_patched_model_can_be_pickled(nano_model, calibration, token_ids):
    with BHRoutingIntegration(nano_model, calibration=calibration, phases=PHASES):
        copied = pickle.loads(pickle.dumps(nano_model))
        expected = greedy(nano_model, token_ids, 5)
    assert torch.equal(greedy(copied, token_ids, 5), expected)


def test_settings_of_each_phase(calibration):
    settings = RoutingSettings(phases=PHASES, procedure="by")
    parts = of_phases(settings, calibration)
    assert parts["decode"] == RoutingSettings(experts_per_token=3, procedure="by")
    assert parts["prefill"] == RoutingSettings(min_k=8, procedure="by")  # the model's own number: everything
    assert "phases" in settings.features(calibration)
    assert read_phases("8/3") == PHASES
    assert parse_policy("bh:phases=8/3").parameters["phases"] == PHASES
    assert parse_policy(parse_policy("bh:phases=8/3").text).parameters["phases"] == PHASES


@pytest.mark.parametrize(
    ("phases", "error", "sentence"),
    [
        ({"prefill": {"alpha": 0.1}}, InvalidParameterError, "phases must say both"),
        (3, InvalidParameterError, "phases must say both"),
        ({"prefill": 8, "decode": {"alpha": 0.1}}, InvalidTypeError, "must be a mapping, got int"),
        (PHASES | {"decode": {"max_kl": 0.01}}, InvalidParameterError, "certificates are of one level"),
        (PHASES | {"decode": {"experts": 3}}, InvalidParameterError, "no setting 'experts'; did you mean"),
        (PHASES | {"decode": {"min_k": 1}}, InvalidParameterError, "must name one of alpha and experts"),
    ],
)
def test_what_are_no_phases(phases, error, sentence):
    with pytest.raises(error, match=sentence):
        RoutingSettings(phases=phases)


def test_phases_need_a_calibration_and_stand_alone(nano_model):
    with pytest.raises(InvalidParameterError, match="expected a level or a budget, got both"):
        RoutingSettings(phases=PHASES, alpha=0.1)
    with pytest.raises(InvalidParameterError, match="needs a calibration"):
        BHRoutingIntegration(nano_model, phases=PHASES)
