"""The built wheel, in a fresh environment: it holds what it should, installs, and runs the demo."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from bh_routing import __version__

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def call(*argv, cwd):
    run = subprocess.run([str(arg) for arg in argv], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, f"{argv}\n{run.stdout}\n{run.stderr}"
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new virtual environment with nothing but the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    call(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return python


def test_content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"bh_routing-{__version__}.dist-info/METADATA").decode()
    for name in (
        "bh_routing/py.typed",
        "bh_routing/data/sample.jsonl",
        "bh_routing/data/prompts.json",
        "bh_routing/models/families.json",
        "bh_routing/models/olmoe-nano/README.md",
        "bh_routing/models/olmoe-nano/config.json",
        "bh_routing/models/olmoe-nano/model.safetensors",
        "bh_routing/models/olmoe-nano/tokenizer.json",
        "bh_routing/models/olmoe-nano/calibration.safetensors",
        "olmoe_bh_integration.py",
        "olmoe_routing_experiments.py",
        "test_integration.py",
        f"bh_routing-{__version__}.dist-info/licenses/LICENSE",
    ):
        assert name in names
    top = {name.partition("/")[0] for name in names}
    assert top == {
        "bh_routing",
        "olmoe_bh_integration.py",
        "olmoe_routing_experiments.py",
        "test_integration.py",
        f"bh_routing-{__version__}.dist-info",
    }
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch")]
    assert required == ["Requires-Dist: torch>=2.9"]  # a range: installing must not replace a working torch


def test_size(wheel):
    # model 36 MB in bfloat16, calibration 11
    assert wheel.stat().st_size < 60e6


def test_demo(environment, tmp_path):
    command = environment.parent / "bh-routing"
    out = call(command, "demo", "--quick", cwd=tmp_path)
    assert out.startswith("olmoe-nano: OlmoeForCausalLM, ")
    assert "own top-8" in out
    assert "BH, 4 experts" in out


def test_self_check(environment, tmp_path):
    assert call(environment, "-m", "test_integration", cwd=tmp_path).splitlines()[-1] == "7/7 tests passed"
    call(environment, "-c", "from test_integration import test_with_real_model", cwd=tmp_path)
    script = tmp_path / "test_integration.py"
    script.write_text((ROOT / "test_integration.py").read_text())
    assert call(environment, script, cwd=tmp_path).splitlines()[-1] == "7/7 tests passed"


def test_a_self_check_of_ones_own_is_not_shadowed(environment, tmp_path):
    (tmp_path / "test_integration.py").write_text("print('mine')")
    assert call(environment, "-c", "import test_integration", cwd=tmp_path) == "mine\n"


def test_only_what_the_wheel_asks_for_is_needed(environment, tmp_path):
    code = "import importlib.util as u; print([n for n in ('scipy', 'matplotlib', 'pandas', 'pytest') if u.find_spec(n)])"
    assert call(environment, "-c", code, cwd=tmp_path) == "[]\n"


def test_the_names_that_notebooks_import(environment, tmp_path):
    code = (
        "from olmoe_bh_integration import BHRoutingIntegration, topk_routing; "
        "from olmoe_routing_experiments import RoutingExperimentRunner, RoutingStrategy; "
        "from bh_routing.models import bundled_path; print(BHRoutingIntegration.__name__)"
    )
    assert call(environment, "-c", code, cwd=tmp_path) == "BHRoutingIntegration\n"
