"""The benchmark scripts that can run without the machine they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(not (BENCHMARKS / "gpu.py").exists(), reason="the benchmarks are not part of a wheel")
def test_the_gpu_script_passes_its_checks_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed; pip install 'bh-routing[triton]'")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--no-times"],
        cwd=BENCHMARKS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    assert [line[:5] for line in run.stdout.splitlines()] == ["- ok:"] * 3
