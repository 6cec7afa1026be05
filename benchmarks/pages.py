"""What the benchmarks share: texts to measure on, Markdown tables, and putting these into the pages of docs/.

A page holds blocks between two comment lines,

    <!-- begin NAME: the command that prints it -->
    <!-- end NAME -->

and a benchmark called with ``--write PAGE`` replaces what is between them. A Python block of a page may be followed by a
text block, which is what it prints (`outputs`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bh_routing.text import TextFile, cut_windows, evenly, in_turn

WINDOW = 512  # tokens; what olmoe-nano was trained on
DOMAINS = ("fiction", "encyclopaedia", "docs", "code", "dialogue", "simple")


# A Python block, and where nothing but blank lines stands between, the text block of what it prints.
PYTHON = re.compile(r"(```python\n)(.*?)(```\n)(\s*```text\n)?(?(4)(.*?)(```\n))", re.DOTALL)


def outputs(page: str) -> list[tuple[str, str | None, str]]:
    """(code, what the page says that it prints, what it prints) of every Python block, run in order as one program."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for block in PYTHON.finditer(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block[2], "<page>", "exec"), scope)
        found.append((block[2], block[5], printed.getvalue()))
    return found


def refresh_outputs(page: Path) -> None:
    """Run a page's Python blocks, and put what they print into the text blocks that follow them."""
    content = page.read_text(encoding="utf-8")
    printed = iter([text for _, _, text in outputs(content)])

    def filled(block: re.Match[str]) -> str:
        text = next(printed)
        return block[0] if block[4] is None else f"{block[1]}{block[2]}{block[3]}{block[4]}{text}{block[6]}"

    page.write_text(PYTHON.sub(filled, content), encoding="utf-8")


def arguments(
    doc: str | None,
    *,
    threads: bool = True,
    write: bool = True,
    data: bool = False,
    model: str | None = None,
) -> argparse.ArgumentParser:
    """A parser with what the benchmarks take: --write, --threads of those that time something, --data, and the model.

    ``model`` is the default of MODEL, which a benchmark that names none measures; "" for one that must be given.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if threads:
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    if model is not None:
        parser.add_argument("model", metavar="MODEL", nargs="?" if model else None, default=model or None)
    if data:
        parser.add_argument(
            "--data",
            type=Path,
            default=Path("data"),
            metavar="DIR",
            help="where the texts are (default: data)",
        )
    if write:
        parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    return parser


def publish(page: Path | None, name: str, text: str) -> None:
    """Print a table, and put it into the block ``name`` of a page, if there is one."""
    print(f"\n{text}", flush=True)
    if page is not None:
        write_block(page, name, text)


def domain_file(data: Path, domain: str, split: str) -> TextFile:
    """The documents of a domain; ``split`` is calibration, valid (for choosing) or test (for reporting)."""
    return TextFile(data / "mixed" / f"{domain}-{split}.jsonl.xz")


def mixed_documents(data: Path, split: str) -> Iterator[str]:
    """The documents of all domains in turn: any first part of them has as much of each."""
    return in_turn([domain_file(data, domain, split) for domain in DOMAINS])


def mixed_text(data: Path, split: str, characters: int | None = None) -> str:
    """Equal parts of all domains, documents in turn, as one text of about so many characters."""
    held, documents = 0, []
    for document in mixed_documents(data, split):
        documents.append(document)
        held += len(document)
        if characters is not None and held >= characters:
            break
    return "\n\n".join(documents)


def named_text(data: Path, name: str) -> str:
    """``mixed-test``: equal parts of all domains' test files; or a text of the folder, such as ``wikitext2-test``."""
    domain, _, split = name.rpartition("-")
    if domain == "mixed":
        return mixed_text(data, split)
    if domain in DOMAINS:
        return domain_file(data, domain, split).read()
    return TextFile(data / f"{name}.txt.xz").read()


@cache
def spread_windows(tokenizer: Any, data: Path, name: str, tokens: int) -> list[Tensor]:
    """So many tokens of a text (`named_text`): whole windows [1, S] from places that are spread evenly over it."""
    whole = [w for w in cut_windows(tokenizer, named_text(data, name), WINDOW) if w.shape[1] == WINDOW]
    return list(evenly(whole, tokens // WINDOW))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(table_row(cells) for cells in (header, rule, *rows))


def table_row(cells: Sequence[str]) -> str:
    """A line of such a table, of one that is printed as it is measured: after `markdown_table` of no rows."""
    return "| " + " | ".join(cells) + " |"


def write_block(page: Path, name: str, text: str) -> None:
    """Replace the content of the block ``name`` of a page; a page without it is an error."""
    pattern = re.compile(
        rf"(<!-- begin {re.escape(name)}:[^\n]*-->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL
    )
    content = page.read_text(encoding="utf-8")
    new, found = pattern.subn(lambda m: f"{m[1]}\n{text.strip()}\n\n{m[2]}", content)
    if found != 1:
        raise SystemExit(f"{page} must have one block {name!r}, got {found}.")
    page.write_text(new, encoding="utf-8")
