"""The support matrix: the page says what the table says, and the table what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bh_routing import support
from bh_routing.calibration.calibration import Calibration
from bh_routing.decision.backend import decision_function
from bh_routing.engines.vllm.routing import EngineRouting
from bh_routing.engines.vllm.settings import Settings
from bh_routing.errors import InvalidParameterError
from bh_routing.models import bundled_calibration
from bh_routing.settings import RoutingSettings

PAGE = Path(__file__).parents[1] / "docs" / "support.md"


def test_the_page_holds_the_table():
    assert support.markdown() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", support.PATHS)
def test_each_cell_is_allowed_or_refused_in_one_sentence(path):
    for feature, (_, cells) in support.SUPPORT.items():
        assert len(cells) == len(support.PATHS)
        if support.can(path, feature):
            support.check(path, [feature])
            continue
        with pytest.raises(InvalidParameterError) as caught:
            support.check(path, [feature])
        assert str(caught.value).startswith(f"{path} does not support {feature} (")
        assert str(caught.value).count(". ") == 0


def test_what_settings_ask_for():
    calibration = Calibration.load(bundled_calibration())
    assert RoutingSettings(alpha=0.1).features(None) == ["levels and budgets", "p-values per token"]
    settings = RoutingSettings(alpha=0.1, max_k=12, min_k=0, compensation="mean", procedure="storey")
    assert settings.features(calibration) == [
        "levels and budgets",
        "p-values per token",
        "mean compensation",
        "min_k = 0",
    ]
    assert "token size" in RoutingSettings(alpha=0.1, size="token").features(calibration)


def test_vllm_refuses_what_the_table_does_not_list(monkeypatch):
    settings = Settings(calibration=str(bundled_calibration()), alpha=0.1, compensation="mean")
    assert EngineRouting(settings).compensates
    cells = ("yes", "yes", "yes", "no", "no")
    monkeypatch.setitem(support.SUPPORT, "mean compensation", ("vectors", cells))
    with pytest.raises(
        InvalidParameterError,
        match=r"^vLLM does not support mean compensation \(vectors\); PyTorch, one token, Triton do\.$",
    ):
        EngineRouting(settings)


def test_triton_takes_tables_with_token_sizes():
    pytest.importorskip("triton")
    from bh_routing.decision import select_triton

    known = {"num_experts": 64, "statistic": "contribution", "score_func": "softmax"}
    assert support.can("Triton", "token size")
    assert decision_function("triton", torch.device("cuda"), **known) is select_triton.decide_by_table
