"""The benchmark scripts that can run without the machine they are for."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bh_routing.data import sample_documents, sample_text

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(
    not (BENCHMARKS / "calibration.py").exists(), reason="the benchmarks are not part of a wheel"
)
def test_the_calibration_benchmark_prints_its_tables(tmp_path):
    """On a little text: every table but that of the configurations and that of the times."""
    (tmp_path / "mixed").mkdir()
    for domain, texts in sample_documents().items():
        lines = "\n".join(5 * [json.dumps({"text": text}) for text in texts])
        for split in ("calibration", "valid", "test"):
            with lzma.open(tmp_path / "mixed" / f"{domain}-{split}.jsonl.xz", "wt", encoding="utf-8") as file:
                file.write(lines)
    with lzma.open(tmp_path / "wikitext2-test.txt.xz", "wt", encoding="utf-8") as file:
        file.write(sample_text())
    page = tmp_path / "page.md"
    page.write_text("<!-- begin calibration: x -->\n<!-- end calibration -->\n")
    run = subprocess.run(
        [
            *(sys.executable, "benchmarks/calibration.py", "--data", str(tmp_path), "--tokens", "512"),
            *("--parts", "scales", "budgets", "uniformity", "amounts", "--write", str(page)),
        ],
        cwd=BENCHMARKS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    _, scales, budgets, uniformity, amounts = (
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in part.splitlines()
            if line[:1] == "|"
        ][2:]
        for part in page.read_text().split("###")
    )
    assert [row[:2] for row in scales] == [[t, b] for t in ("mixed-test", "wikitext2-test") for b in "432"]
    assert all(float(half) < float(nothing) for _, _, nothing, _, half, *_ in scales)
    assert len(budgets) == 8
    assert all(0.0 < float(pooled) < 0.2 for *_, pooled in uniformity)
    assert len(uniformity) == 2 * 7
    assert [row[:2] for row in amounts] == [["12,288", "all"], ["12,288", "1,024"], ["3,072", "1,024"]]


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
