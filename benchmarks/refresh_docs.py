"""Make every figure and output in README.md, docs/ and examples/ anew, by the commands that stand beside them.

    python benchmarks/refresh_docs.py [--data DIR] [--plan] [--force] [PART ...]

A part is a command that stands beside a block of a page, `<!-- begin NAME: COMMAND -->`, called by the names of its
blocks; and ``programs`` (what the Python of the pages prints), ``picture`` and ``notebooks``. DIR holds the texts
that commands read (mixed/ and wikitext2-test.txt.xz) and stands for the word DIR in them.

What is fresh is skipped: a part's state is a digest of the package (the model and the calibration in it), of the command,
its script and its texts, and of what the page holds. It is kept in build/docs.json after every part, with the time that
the part took, so that an interrupted run goes on, and the next one can say how long it will take. --plan only says that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pages import PYTHON, arguments, refresh_outputs, write_block

ROOT = Path(__file__).parent.parent
STATE = ROOT / "build" / "docs.json"
NOTEBOOKS = ("colab.ipynb", "logs_eda.ipynb")
PROGRAMS = ("README.md", "docs/quickstart.md", "docs/price.md", "docs/extending.md")
BLOCK = re.compile(r"<!-- begin (\S+): ([^\n]+) -->\n(.*?)<!-- end \1 -->", re.DOTALL)
# What a make target runs, where it is one command: with this Python, whatever environment it is of.
MAKE = {"demo": "python -m bh_routing demo"}
WRITE_THEMSELVES = ("make conformance", "make soak")  # the pages in which they stand


# ------------------------------------------------------------------------------------------------------ commands


def words_of(command: str, data: Path) -> tuple[dict[str, str], list[str]]:
    """(environment, words) of a command, with this Python and with the texts of a folder.

    >>> words_of("COLUMNS=88 make demo", Path("x"))[0]
    {'COLUMNS': '88'}
    """
    environment, words = {}, []
    for word in shlex.split(command):
        name, equals, value = word.partition("=")
        if not words and equals and name.isupper():
            environment[name] = value
        else:
            words.append(word)
    if words[0] == "make" and words[1] in MAKE:
        words = shlex.split(MAKE[words[1]]) + words[2:]
    if words[0] == "python":
        words[0] = sys.executable
    return environment, [
        str(data) if w == "DIR" else str(data / w) if (data / w).is_file() else w for w in words
    ]


def run(command: str, data: Path) -> str:
    """What a command prints.

    Raises
    ------
    RuntimeError
        If it fails, or its program is not there.
    """
    environment, words = words_of(command, data)
    if (
        shutil.which(words[0], path=f"{os.environ['PATH']}{os.pathsep}{ROOT}") is None
        and not (ROOT / words[0]).exists()
    ):
        raise RuntimeError(f"there is no {words[0]}")
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "88", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:] or f"exit status {done.returncode}")
    return done.stdout.rstrip()


# --------------------------------------------------------------------------------------------------------- parts


@dataclass
class Part:
    """Something that is made anew at once.

    Attributes
    ----------
    name : str
        Of its blocks, or its own.
    command : str
        As it stands in the page; "" for what is done here.
    blocks : list of (path, str)
        The blocks that it fills.
    make : callable
        Does it, given the folder of the texts.
    holds : callable
        What the pages hold of it, as text.
    """

    name: str
    command: str = ""
    blocks: list[tuple[Path, str]] = field(default_factory=list)
    make: Callable[[Path], object] = lambda data: None
    holds: Callable[[], Iterable[str]] = lambda: ()

    def digest(self, package: str, data: Path) -> str:
        """Of what it is made from, and of what there is."""
        found = hashlib.sha256(package.encode() + self.command.encode())
        for word in words_of(self.command, data)[1] if self.command else ():
            path = ROOT / word
            if path.is_file() and path.suffix == ".py":
                found.update(path.read_bytes())
            elif Path(word).parent == data and path.is_file():
                found.update(f"{path.name} {path.stat().st_size}".encode())
        for text in self.holds():
            found.update(text.encode())
        return found.hexdigest()


def package_digest() -> str:
    """Of the library, the embedded model and its calibration, and what all benchmarks share."""
    found = hashlib.sha256()
    for path in [*sorted((ROOT / "src").rglob("*")), ROOT / "benchmarks" / "pages.py"]:
        if path.is_file() and "__pycache__" not in path.parts:
            found.update(
                path.relative_to(ROOT).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest()
            )
    return found.hexdigest()


def parts() -> dict[str, Part]:
    """Name -> part, in the order of the pages."""
    found: dict[str, Part] = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for name, command, _ in BLOCK.findall(page.read_text(encoding="utf-8")):
            part = found.setdefault(command, Part(name, command))
            part.name = name if not part.blocks else f"{part.name},{name}"
            part.blocks.append((page, name))
    for part in found.values():
        part.make = lambda data, part=part: fill(part, data)
        part.holds = lambda part=part: [content_of(page, name) for page, name in part.blocks]
    picture = re.search(
        r"`(python benchmarks/picture\.py[^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    drawn = Part("picture", picture[1] if picture else "python benchmarks/picture.py")
    drawn.make = lambda data: run(drawn.command, data)
    drawn.holds = lambda: [hashlib.sha256((ROOT / "docs" / "overview.png").read_bytes()).hexdigest()]
    printed = Part(
        "programs",
        make=programs,
        holds=lambda: [b[0] for p in PROGRAMS for b in PYTHON.finditer((ROOT / p).read_text())],
    )
    run_through = Part(
        "notebooks", make=notebooks, holds=lambda: [(ROOT / "examples" / n).read_text() for n in NOTEBOOKS]
    )
    return {part.name: part for part in (printed, drawn, *found.values(), run_through)}


def content_of(page: Path, name: str) -> str:
    """What the block of a page holds."""
    return next(c for n, _, c in BLOCK.findall(page.read_text(encoding="utf-8")) if n == name)


def fill(part: Part, data: Path) -> None:
    """Run a part's command; where it does not write the page itself, its one block gets what it prints."""
    printed = run(part.command, data)
    if "--write" in part.command or part.command in WRITE_THEMSELVES:
        return
    ((page, name),) = part.blocks
    is_markdown = printed.lstrip().startswith("|")
    write_block(page, name, printed if is_markdown else f"```text\n{printed}\n```")


def programs(data: Path) -> None:
    """What the Python of the pages prints."""
    for name in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # they write files
            try:
                refresh_outputs(ROOT / name)
            finally:
                os.chdir(ROOT)


def notebooks(data: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    for name in NOTEBOOKS:
        path = ROOT / "examples" / name
        content = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        NotebookClient(content, timeout=600, resources=resources, coalesce_streams=True).execute()
        for cell in content.cells:
            cell.metadata.pop("execution", None)  # times of day
        nbformat.write(content, path)


# ------------------------------------------------------------------------------------------------------- the run


def read_state() -> dict[str, dict[str, Any]]:
    return json.loads(STATE.read_text(encoding="utf-8")) if STATE.exists() else {}


def keep(name: str, digest: str, seconds: float) -> None:
    """Write down that a part is fresh, and how long it took."""
    state = read_state() | {name: {"digest": digest, "seconds": round(seconds, 1)}}
    STATE.parent.mkdir(exist_ok=True)
    other = STATE.with_suffix(".tmp")
    other.write_text(json.dumps(state, indent=1), encoding="utf-8")
    other.replace(STATE)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def plan(todo: list[Part], fresh: list[Part], state: dict[str, dict[str, Any]]) -> str:
    """One paragraph: what is to do, and how long it took the last time."""
    timed = [state[part.name]["seconds"] for part in todo if part.name in state]
    new = [part.name for part in todo if part.name not in state]
    said = [f"{len(todo)} of {len(todo) + len(fresh)} parts to do, {len(fresh)} fresh."]
    if timed:
        said.append(f"{len(timed)} of them took {minutes(sum(timed))} the last time.")
    if new:
        said.append(f"Not timed on this machine yet: {', '.join(new)}.")
    return " ".join(said)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, threads=False, write=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help="only these (default: all)")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="default: data")
    parser.add_argument("--plan", action="store_true", help="say what is fresh and what is to do; do nothing")
    parser.add_argument("--force", action="store_true", help="also what is fresh")
    args = parser.parse_args(argv)
    data, known, package, state = args.data.resolve(), parts(), package_digest(), read_state()
    if unknown := set(args.parts) - set(known):
        parser.error(f"expected parts out of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    chosen = [known[name] for name in args.parts] or list(known.values())
    fresh = [part for part in chosen if state.get(part.name, {}).get("digest") == part.digest(package, data)]
    fresh = [] if args.force else fresh
    todo = [part for part in chosen if part not in fresh]
    todo.sort(key=lambda part: state.get(part.name, {}).get("seconds", float("inf")))  # the quick ones first
    for part in chosen if args.plan else ():
        last = f", {minutes(state[part.name]['seconds'])} the last time" if part.name in state else ""
        print(f"{'fresh' if part in fresh else 'to do'}: {part.name}{last}")
    print(plan(todo, fresh, state), flush=True)
    failed = []
    start = time.perf_counter()
    for part in () if args.plan else todo:
        print(f"{part.name} ...", end=" ", flush=True)
        began = time.perf_counter()
        try:
            part.make(data)
        except (Exception, SystemExit) as error:
            failed.append(part.name)
            print(f"failed: {error}", flush=True)
            continue
        keep(part.name, part.digest(package, data), time.perf_counter() - began)
        print(minutes(time.perf_counter() - began), flush=True)
    if not args.plan:
        print(f"{len(todo) - len(failed)} parts made in {minutes(time.perf_counter() - start)}.")
    if failed:
        print(f"failed: {', '.join(failed)}; the others are kept, run it again for these.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
