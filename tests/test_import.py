"""What importing the package loads, and that the lazy names are the listed ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bh_routing

OPTIONAL = (
    "triton",
    "transformers",
    "vllm",
    "lm_eval",
    "matplotlib",
    "pandas",
    "scipy",
    "KDEpy",
    "datasets",
    "peft",
)


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_loads_nothing_heavy():
    loaded = modules_after("import bh_routing")
    assert loaded.isdisjoint({"torch", "numpy", "rich", *OPTIONAL})


def test_every_public_name_loads_nothing_optional():
    # torch._dynamo's own optional imports are not ours: what torch brings along is taken off.
    loaded = modules_after("from bh_routing import *") - modules_after("import torch")
    assert "bh_routing" in loaded
    assert loaded.isdisjoint(OPTIONAL)


@pytest.mark.parametrize("name", bh_routing.__all__)
def test_public_name_comes_from_where_it_is_said_to(name):
    assert getattr(bh_routing, name) is getattr(
        sys.modules[f"bh_routing.{bh_routing._MODULE_OF[name]}"], name
    )
    assert name in dir(bh_routing)


def test_the_three_lists_of_names_agree():
    tree = ast.parse(Path(bh_routing.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == bh_routing._MODULE_OF
    assert sorted(imported) == sorted(bh_routing.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"^module 'bh_routing' has no attribute 'nothing'$"):
        _ = bh_routing.nothing
