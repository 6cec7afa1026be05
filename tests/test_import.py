"""What importing the package loads, and that the lazy names are the listed ones."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bh_routing

OPTIONAL = (
    "triton",
    "transformers",
    "vllm",
    "llama_cpp",
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
    value = getattr(bh_routing, name)
    module = sys.modules[f"bh_routing.{bh_routing._MODULE_OF.get(name, name)}"]
    assert value is (getattr(module, name) if name in bh_routing._MODULE_OF else module)


def test_dir_shows_what_a_person_may_use_and_nothing_else():
    code = "import bh_routing; before = dir(bh_routing); from bh_routing import *; print(before == dir(bh_routing))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
    shown = {name for name in dir(bh_routing) if not name.startswith("__")}
    assert shown == set(bh_routing.__all__)
    assert {"models", "data", "training", "evaluation", "decision", "RoutingSettings", "Kept"} <= shown
    assert shown.isdisjoint({"lazy_names", "TYPE_CHECKING", "cli", "patching", "integration"})


def test_the_three_lists_of_names_agree():
    tree = ast.parse(Path(bh_routing.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert {name: module for name, module in imported.items() if module} == bh_routing._MODULE_OF
    assert sorted(imported) == sorted(bh_routing.__all__)


def test_the_docstring_lists_the_packages():
    """Every public module and package, once."""
    listed = re.findall(r"`([a-z]+)`", bh_routing.__doc__.split("The names below")[0])
    folder = Path(bh_routing.__file__).parent
    found = {
        path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert sorted(listed) == sorted(name for name in found if not name.startswith("_") and name != "errors")


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"^module 'bh_routing' has no attribute 'nothing'$"):
        _ = bh_routing.nothing
