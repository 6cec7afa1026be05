"""The benchmark scripts that can run without the machine they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bh_routing.data import sample_documents

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(
    not (BENCHMARKS / "calibration.py").exists(), reason="the benchmarks are not part of a wheel"
)
def test_the_calibration_benchmark_prints_its_tables(tmp_path):
    """On a little text: every table but that of the configurations and that of the times."""
    pieces = [sample_documents()[domain][0] for domain in ("fiction", "encyclopaedia", "dialogue", "simple")]
    text = str(tmp_path / "text.txt")
    Path(text).write_text("\n\n".join("\n".join(5 * [piece]) for piece in pieces))
    run = subprocess.run(
        [
            *(
                sys.executable,
                "benchmarks/calibration.py",
                "--calibrate-on",
                text,
                "--choose-and-report",
                text,
            ),
            *("--choose-tokens", "512", "--report-tokens", "512", "--document-tokens", "1024"),
            *("--parts", "documents", "report", "scale", "budgets", "uniformity"),
            *("--output", str(tmp_path / "result.json")),
        ],
        cwd=BENCHMARKS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["tokens"] for row in result["documents"]["document_tokens"]] == [11177] * 5
    assert len(result["documents"]["books"]) == 4
    assert len(result["comparison"]["second half"]["rows"]) == 3 * 8
    by_scale = [result["scale"][0][s][0] for s in ("0", "0.5", "1")]
    assert max(by_scale[1:]) < by_scale[0]
    assert [row["budget"] for row in result["budgets"]] == [4.0, 3.0, 2.0]
    assert all(0.0 < row["pooled"] < 0.1 for row in result["uniformity"])


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
    assert [line[:5] for line in run.stdout.splitlines()] == ["- ok:"] * 5
