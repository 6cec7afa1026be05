"""examples/colab.ipynb runs from top to bottom on olmoe-nano, and what is stored in it came from such a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "colab.ipynb"


def printed(cell):
    return "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(stored, tmp_path_factory):
    notebook = nbformat.from_dict(stored)
    for cell in code_cells(notebook):
        cell.outputs = []
    folder = tmp_path_factory.mktemp("notebook")  # not the repository: the package must be found as installed
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def test_default_model_needs_no_download(stored):
    choice = next(cell.source for cell in code_cells(stored) if cell.source.startswith("MODEL = "))
    assert choice == 'MODEL = "olmoe-nano"\n# MODEL = "allenai/OLMoE-1B-7B-0924"'


def test_runs(executed):
    text = "\n".join(printed(cell) for cell in code_cells(executed))
    assert re.search(r"^Mean experts per token: [1-7]\.\d\d$", text, re.MULTILINE)
    assert re.search(r"^Sparsity gain: \d\d\.\d%$", text, re.MULTILINE)
    assert re.search(
        r"^BH would select [1-7]\.\d\d experts \(mean\); the model uses 8 \(fixed\)$", text, re.MULTILINE
    )
    perplexities = {
        label: float(value)
        for label, value in re.findall(r"^(\S.*?) +\d\.\d\d experts +(\S+) perp", text, re.MULTILINE)
    }
    assert list(perplexities) == ["own top-8"] + [
        label for k in (6, 4, 3, 2) for label in (f"BH, {k} experts", f"top-{k}")
    ]
    own = perplexities["own top-8"]
    for k in (4, 3, 2):
        # Text of six kinds, of which the model knows one: fewer experts may lower perplexity; BH stays nearer to the model's own.
        bh, top = (abs(perplexities[label] / own - 1.0) for label in (f"BH, {k} experts", f"top-{k}"))
        assert bh < top


def test_stored_outputs_are_of_these_cells(stored, executed):
    for kept, fresh in zip(code_cells(stored), code_cells(executed), strict=True):
        # The figures depend on the machine in their last digits, the number of lines does not.
        assert {out.output_type for out in kept.outputs} == {out.output_type for out in fresh.outputs}
        assert len(printed(kept).splitlines()) == len(printed(fresh).splitlines())
        assert kept.execution_count == fresh.execution_count
        assert "Traceback" not in str(kept.outputs)
