"""The examples run: the study on a small stand-in of OLMoE's config class, the analysis notebook on olmoe-nano."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from bh_routing.data import sample_text
from bh_routing.evaluation.results import ResultsFolder

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def study() -> Any:
    spec = importlib.util.spec_from_file_location("olmoe_1b_7b", EXAMPLES / "olmoe_1b_7b.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_study_on_a_stand_in(
    study: Any, tiny_olmoe: Any, nano_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_olmoe(vocab_size=len(nano_tokenizer)).save_pretrained(tmp_path / "model")
    nano_tokenizer.save_pretrained(tmp_path / "model")
    text = sample_text()
    (tmp_path / "a.txt").write_text(text[: len(text) // 2])
    (tmp_path / "b.txt").write_text(text[len(text) // 2 :])
    asked = [
        str(tmp_path / "model"),
        "--calibration-text",
        str(tmp_path / "a.txt"),
        "--text",
        str(tmp_path / "b.txt"),
    ]
    asked += [
        "-o",
        str(tmp_path / "r"),
        "--budgets",
        "3",
        "--max-tokens",
        "600",
        "--calibration-tokens",
        "3000",
    ]
    study.main(asked)
    results = ResultsFolder(tmp_path / "r").results()
    assert len(results) == 1 + len(study.AT_BUDGETS) + len(study.ALONE)
    for result in results:
        if result["budget"] is not None:
            assert result["mean_experts_per_token"] == pytest.approx(3.0, rel=0.15), result["policy"]
    assert (tmp_path / "r" / "report.html").stat().st_size > 20_000
    capsys.readouterr()
    study.main(asked)  # all of it is there
    assert "Pareto front" in capsys.readouterr().out
    assert len(ResultsFolder(tmp_path / "r").results_path.read_text().splitlines()) == len(results)


def test_the_study_names_policies_that_exist(study: Any) -> None:
    from bh_routing.evaluation.specs import parse_policy

    texts = study.policies([2.0, 3.0])
    assert len({parse_policy(text).text for text in texts}) == 2 * len(study.AT_BUDGETS) + len(study.ALONE)
    assert "olmoe_1b_7b" not in sys.modules


def test_the_analysis_notebook(tmp_path: Path) -> None:
    import re

    import nbformat
    from nbclient import NotebookClient

    stored = nbformat.read(EXAMPLES / "logs_eda.ipynb", as_version=4)
    fresh = nbformat.from_dict(stored)
    NotebookClient(fresh, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for notebook in (stored, fresh):
        outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
        printed = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")
        assert sum("image/png" in out.get("data", {}) for out in outputs) == 3
        # held-out null p-values: the estimators that follow the data are near to uniform at 0.05
        shares = [
            float(s) for s in re.findall(r"(?:empirical|kde): share .* (0\.\d+)$", printed, re.MULTILINE)
        ]
        assert len(shares) == 8
        assert all(0.03 < share < 0.08 for share in shares)
        means = [float(m) for m in re.findall(r"^alpha .*: (\d\.\d\d) experts", printed, re.MULTILINE)]
        assert means == sorted(means)
        assert 1 <= means[0] < means[-1] <= 8
