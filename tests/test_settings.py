"""`RoutingSettings`: checked on creation, to and from mappings, and the policy that it means."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from bh_routing import BHRoutingIntegration, PValuePolicy, RoutingSettings, TablePolicy
from bh_routing.calibration.calibration import Calibration
from bh_routing.errors import InvalidParameterError, InvalidTypeError
from bh_routing.models import bundled_calibration
from bh_routing.settings import TEXT_OPTIONS, level_of
from bh_routing.settings.routing import WORDS


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration.load(bundled_calibration())


def test_there_and_back():
    given = {"alpha": 0.1, "min_k": 2, "statistic": "logprob", "compensation": 0.5, "strict": False}
    settings = RoutingSettings.from_dict(given)
    assert settings.to_dict() == given
    assert RoutingSettings.from_dict(settings.to_dict()) == settings
    assert RoutingSettings().to_dict() == {}
    assert repr(settings) == (
        "RoutingSettings(alpha=0.1, min_k=2, statistic='logprob', compensation=0.5, strict=False)"
    )


def test_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        RoutingSettings().alpha = 0.1
    with pytest.raises(TypeError):
        RoutingSettings(0.1)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"alhpa": 0.1}, InvalidParameterError, "there is no setting 'alhpa'; did you mean 'alpha'?"),
        ({"alpha": 1.0}, InvalidParameterError, "alpha must be a number strictly between 0 and 1, got 1.0; "),
        ({"temperature": 0}, InvalidParameterError, "temperature must be a finite number above 0, got 0; "),
        ({"min_k": -1}, InvalidParameterError, "min_k must be at least 0, got -1."),
        ({"min_k": 0, "compensation": "none"}, InvalidParameterError, "min_k must be at least 1, got 0; "),
        ({"min_k": 0, "max_k": 0}, InvalidParameterError, "max_k must be at least 1, got 0."),
        (
            {"compensation": "rank"},
            InvalidParameterError,
            "compensation must be 'none', 'mean' or 'linear', got 'rank'.",
        ),
        (
            {"compensation": "linear:1.5"},
            InvalidParameterError,
            "compensation must be true, false or a scale from 0 to 1",
        ),
        ({"compensation": ("linear", True)}, InvalidTypeError, "compensation must be true, false, a form"),
        (
            {"compensation": "mean:all"},
            InvalidParameterError,
            "compensation must have a number after the colon",
        ),
        ({"compensation": "none:0.5"}, InvalidParameterError, "compensation 'none' has no scale"),
        ({"min_k": 3, "max_k": 2}, InvalidParameterError, "max_k must be at least min_k=3, got 2."),
        ({"mode": "watch"}, InvalidParameterError, "mode must be 'patch' or 'analyze', got 'watch'."),
        ({"mode": None}, InvalidParameterError, "mode must be 'patch' or 'analyze', got None."),
        ({"collect_stats": 1}, InvalidTypeError, "collect_stats must be true or false, got 1."),
        ({"strict": "no"}, InvalidTypeError, "strict must be true or false, got 'no'."),
        (
            {"experts_per_token": {"a": 2.0, "b": "many"}},
            InvalidParameterError,
            "experts_per_token must be a finite number of experts per token above 0, or one for each router, got 'many'.",
        ),
        (
            {"alpha": 0.1, "experts_per_token": 4},
            InvalidParameterError,
            "expected a level or a budget, got both alpha=0.1 and experts_per_token=4; give one of them.",
        ),
        ({"procedure": "bhh"}, InvalidParameterError, "unknown procedure 'bhh'"),
        (
            {"pvalues": "kde"},
            InvalidParameterError,
            "pvalues must be 'robust', 'softmax' or 'batch', got 'kde'.",
        ),
        (
            {"size": "large"},
            InvalidParameterError,
            "size must be 'token', 'sensitivity', 'deviation' or 'output', got",
        ),
        ({"kernel": "round"}, InvalidParameterError, "kernel must be 'gaussian', "),
        ({"bandwidth": "wide"}, InvalidParameterError, "bandwidth must be 'silverman', got 'wide'."),
        (
            {"compensation": 2},
            InvalidParameterError,
            "compensation must be true, false or a scale from 0 to 1",
        ),
        (
            {"backend": "cuda"},
            InvalidParameterError,
            "backend must be 'auto', 'torch' or 'triton', got 'cuda'.",
        ),
    ],
)
def test_one_sentence_for_each_fault(given, error, sentence):
    with pytest.raises(error) as caught:
        RoutingSettings.from_dict(given)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_with_level():
    settings = RoutingSettings(alpha=0.1, min_k=2)
    assert settings.with_level(experts_per_token=4.0) == RoutingSettings(experts_per_token=4.0, min_k=2)
    assert settings.with_level(alpha=0.2) == RoutingSettings(alpha=0.2, min_k=2)
    for level in ({}, {"alpha": 0.1, "experts_per_token": 4.0}):
        with pytest.raises(
            InvalidParameterError, match=r"^expected exactly one of alpha and experts_per_token"
        ):
            settings.with_level(**level)


def test_the_policy_without_a_calibration():
    policy = RoutingSettings(alpha=0.2, procedure="holm", max_k=4, weights="sum", pvalues="softmax").policy()
    assert isinstance(policy, PValuePolicy)
    assert (policy.alpha, policy.procedure.name, policy.max_k, policy.weights) == (0.2, "holm", 4, "sum")
    assert level_of(RoutingSettings().policy()) == 0.05
    for given in ({"experts_per_token": 4}, {"compensation": True}, {"scope": "layer"}):
        with pytest.raises(
            InvalidParameterError, match=r"needs a calibration: .*`bh-routing calibrate MODEL"
        ):
            RoutingSettings(**given).policy()
    RoutingSettings(compensation=False).policy()


def test_the_policy_of_a_calibration(calibration):
    settings = RoutingSettings(experts_per_token=4.0, compensation=False, backend="torch")
    policy = settings.policy(calibration)
    assert isinstance(policy, TablePolicy)
    assert policy.backend == "torch"
    expected = calibration.policy(experts_per_token=4.0, compensated=False)
    assert torch.equal(policy.table.thresholds_LE, expected.table.thresholds_LE)
    assert level_of(policy) == expected.table.alpha


@pytest.mark.parametrize(
    ("given", "calibrated", "note"),
    [
        ({"temperature": 2.0}, False, "temperature=2 has no effect: robust p-values"),
        ({"backend": "torch"}, False, "backend='torch' has no effect: "),
        ({"pvalues": "softmax"}, True, "pvalues='softmax' has no effect: the calibration's are used."),
        ({"temperature": 2.0, "pvalues": "softmax"}, False, None),
        ({"backend": "torch"}, True, None),
    ],
)
def test_what_has_no_effect_is_said(given, calibrated, note, calibration, caplog):
    with caplog.at_level(logging.WARNING, "bh_routing"):
        RoutingSettings(**given).policy(calibration if calibrated else None)
    assert [message[: len(note or "")] for message in caplog.messages] == ([] if note is None else [note])


def test_rewriting_a_policy_in_use_needs_one_of_its_kind(calibration):
    table = RoutingSettings(alpha=0.1).policy(calibration)
    with pytest.raises(
        InvalidParameterError, match=r"^expected settings of a TablePolicy, which is in use, got"
    ):
        RoutingSettings(alpha=0.1).rewrite(table, None)
    before = table.table
    RoutingSettings(alpha=0.3).rewrite(table, calibration)
    assert (before.alpha, table.table.alpha) == (0.1, 0.3)


def test_the_integration_takes_the_original_order_and_every_field():
    names = list(inspect.signature(BHRoutingIntegration).parameters)[1:7]
    assert names == ["alpha", "temperature", "min_k", "max_k", "mode", "collect_stats"]
    assert names == [field.name for field in fields(RoutingSettings)][:6]


def test_text_can_say_every_field_but_switches_of_python():
    said = {option.field or name for name, option in TEXT_OPTIONS.items()}
    assert {field.name for field in fields(RoutingSettings)} - said == {
        "collect_stats",
        "strict",
        "resident",
        "batch_invariant",
    }
    assert set(WORDS) <= said


def test_importing_loads_no_torch():
    code = "import sys, bh_routing.settings, bh_routing.training.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
