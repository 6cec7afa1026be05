"""Text files as documents: plain or JSON lines, compressed or not."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .._files import read_lines
from ..errors import DatasetError

PIECE = 1 << 16  # characters


def in_turn(files: Sequence[Iterable[str]]) -> Iterator[str]:
    """The documents of several texts, each time the next of the one that gave the fewest characters so far: wherever one
    stops, all have given about as much, until the shortest has no more.

    >>> list(in_turn([["aa", "bb"], ["cccc", "dd", "e"]]))
    ['aa', 'cccc', 'bb', 'dd', 'e']
    """
    given = [(0, place, iter(file)) for place, file in enumerate(files)]
    while given:
        characters, place, documents = heapq.heappop(given)
        for document in documents:
            heapq.heappush(given, (characters + len(document), place, documents))
            yield document
            break


class TextFile:
    """A file as documents: text, or JSON lines (``.jsonl``); either may be compressed (``.xz``, ``.gz``, ``.bz2``).

    Text is cut into documents at line ends. A JSON line is one document: ``{"text": "...", "source": "..."}``, of which
    ``source`` may be left out. May be iterated over several times; memory stays that of one document.

    Parameters
    ----------
    path : path
        In UTF-8.
    piece : int or None
        Characters per document of a text, about. None: a document ends at a blank line, as where books are joined by one.

    Raises
    ------
    DatasetError
        If there is no such file; while it is read: if it is damaged, empty, or no UTF-8 text.
    """

    def __init__(self, path: str | os.PathLike[str], piece: int | None = PIECE) -> None:
        self.path, self.piece = Path(path), piece
        if not self.path.is_file():
            raise DatasetError(f"there is no text file {self.path}.")

    def __iter__(self) -> Iterator[str]:
        for _, text in self.with_sources():
            yield text

    def with_sources(self) -> Iterator[tuple[str, str]]:
        """(source, text) of every document; the source of those that name none is the file's name without suffixes."""
        own = self.path.name.partition(".")[0]
        for source, text in self.with_named_sources():
            yield source or own, text

    def with_named_sources(self) -> Iterator[tuple[str, str]]:
        """(source, text) of every document; "" for the source of those that name none."""
        read = self._json_lines if ".jsonl" in self.path.suffixes else self._pieces
        any_text = False
        for source, text in read():
            any_text = any_text or bool(text.strip())
            yield source, text
        if not any_text:
            raise DatasetError(f"expected text in {self.path}, got an empty file.")

    def read(self) -> str:
        """All of it; JSON lines are joined by blank lines."""
        return ("\n\n" if ".jsonl" in self.path.suffixes else "").join(self)

    def _pieces(self) -> Iterator[tuple[str, str]]:
        lines: list[str] = []
        held = 0
        for line in read_lines(self.path):
            lines.append(line)
            held += len(line)
            if not line.strip() if self.piece is None else held >= self.piece:
                yield "", "".join(lines)
                lines, held = [], 0
        if lines:
            yield "", "".join(lines)

    def _json_lines(self) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(read_lines(self.path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise DatasetError(
                    f'expected {{"text": "..."}} in every line of {self.path}, got something else in line {number}.'
                )
            yield str(row.get("source") or ""), row["text"]
