"""Make every figure and output in README.md, docs/ and examples/ anew, by the commands that stand beside them.

    python benchmarks/refresh_docs.py [--data DIR] [demo] [programs] [picture] [parameters] [decide] [notebook]

Without names: all of them, in this order. DIR holds books-valid.txt.xz and books-calibration.txt.xz, the texts that
olmoe-nano was judged and calibrated on; picture and parameters need them. Also needs the extras of `make test`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pages import refresh_outputs, write_block

ROOT = Path(__file__).parent.parent
PROGRAMS = ("README.md", "docs/quickstart.md", "docs/price.md", "docs/extending.md")


def printed(*argv: str) -> str:
    """What a command prints."""
    environment = os.environ | {"COLUMNS": "88", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{run.stderr}")
    return run.stdout.rstrip()


def demo(data: Path) -> None:
    write_block(ROOT / "docs" / "demo.md", "demo", f"```text\n{printed('-m', 'bh_routing', 'demo')}\n```")


def programs(data: Path) -> None:
    """What the Python of the pages prints."""
    for name in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # they write files
            refresh_outputs(ROOT / name)
            os.chdir(ROOT)


def picture(data: Path) -> None:
    printed("benchmarks/picture.py", "--text", str(data / "books-valid.txt.xz"))


def parameters(data: Path) -> None:
    texts = (
        f"--text={data / 'books-valid.txt.xz'}",
        f"--calibration-text={data / 'books-calibration.txt.xz'}",
    )
    printed("benchmarks/parameters.py", *texts, "--write", "docs/parameters.md")


def decide(data: Path) -> None:
    printed("benchmarks/decide.py", "--write", "docs/performance.md")


def notebook(data: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    path = ROOT / "examples" / "colab.ipynb"
    content = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(content, timeout=600, resources=resources, coalesce_streams=True).execute()
    for cell in content.cells:
        cell.metadata.pop("execution", None)  # times of day
    nbformat.write(content, path)


PARTS: dict[str, Callable[[Path], None]] = {
    part.__name__: part for part in (demo, programs, picture, parameters, decide, notebook)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="default: data")
    args = parser.parse_args()
    chosen = args.parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"expected parts out of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    for name in chosen:
        print(f"{name} ...", flush=True)
        PARTS[name](args.data.resolve())


if __name__ == "__main__":
    main()
