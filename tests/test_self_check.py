"""test_integration.py as existing users run it, and the import name that existing notebooks use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import test_integration as self_check

import bh_routing
import olmoe_bh_integration

ROOT = Path(__file__).parent.parent


def test_script():
    run = subprocess.run(
        [sys.executable, "test_integration.py"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 8
    assert all(line.startswith(f"[{i}/7] passed  ") for i, line in enumerate(lines[:7], 1))
    assert lines[-1] == "7/7 tests passed"


def test_a_failing_check_is_counted(monkeypatch, capsys):
    def broken():
        """Breaks."""
        raise AssertionError("on purpose")

    monkeypatch.setattr(self_check, "CHECKS", (self_check.test_router_discovery, broken))
    assert self_check.main() == 1
    out = capsys.readouterr().out.splitlines()
    assert out == ["[1/2] passed  Finds all 16 routers.", "[2/2] FAILED  Breaks.", "1/2 tests passed"]


def test_with_real_model(nano_model, capsys):
    stats = self_check.test_with_real_model(nano_model)
    out = capsys.readouterr().out
    assert "model.layers.0.mlp.gate  OlmoeTopKRouter" in out
    assert out.splitlines()[-1] == "real model: all checks passed"
    assert 1.0 <= stats["mean_experts_per_token"] < 8.0


def test_real_model_check_notices_a_patch_that_does_nothing(nano_model, monkeypatch):
    class Nothing(self_check.BHRoutingIntegration):
        def __init__(self, model, **settings):
            super().__init__(model, **settings | {"mode": "analyze"})

    monkeypatch.setattr(self_check, "BHRoutingIntegration", Nothing)
    with pytest.raises(AssertionError) as caught:
        self_check.test_with_real_model(nano_model)
    assert str(caught.value).splitlines()[0] == "patching did not change the output"


@pytest.mark.parametrize("name", olmoe_bh_integration.__all__)
def test_import_name_only_re_exports(name):
    assert getattr(olmoe_bh_integration, name) is getattr(bh_routing, name)


def test_import_name_without_the_package(tmp_path):
    (tmp_path / "olmoe_bh_integration.py").write_text((ROOT / "src" / "olmoe_bh_integration.py").read_text())
    code = "import sys; sys.modules['bh_routing'] = None; import olmoe_bh_integration"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "ImportError: Cannot import bh_routing: expected the package bh-routing beside olmoe_bh_integration.py in this "
        "Python, got none; install it there, `python -m pip install PATH_OR_WHEEL`."
    )
