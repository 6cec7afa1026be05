"""What routings are measured on: running text, last words (LAMBADA form), multiple choice (HellaSwag form).

A data set is a name, its kind and its items; the digest of the items tells records of different data apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DatasetError, InvalidInputError, MissingDependencyError

Kind = Literal["text", "last_word", "choice"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Items to measure on.

    Attributes
    ----------
    name : str
    kind : {"text", "last_word", "choice"}
        ``text``: one string. ``last_word``: (context, last word with its space). ``choice``: (context, endings,
        index of the right one).
    items : tuple
    """

    name: str
    kind: Kind
    items: tuple[Any, ...]

    @property
    def digest(self) -> str:
        """Of kind and items, 16 hex digits."""
        return hashlib.sha256(json.dumps([self.kind, self.items]).encode()).hexdigest()[:16]

    @classmethod
    def from_text(cls, name: str, text: str) -> Dataset:
        """Running text, for perplexity."""
        if not text.strip():
            raise InvalidInputError(f"expected text in data set {name}, got none.")
        return cls(name=name, kind="text", items=(text,))

    @classmethod
    def from_passages(cls, name: str, passages: list[str]) -> Dataset:
        """Passages whose last word is to be guessed, as lm-evaluation-harness' lambada_openai splits them."""
        items = []
        for passage in passages:
            context, space, word = passage.strip().rpartition(" ")
            if not space:
                raise InvalidInputError(
                    f"a passage of data set {name} needs at least two words, got {passage!r}."
                )
            items.append((context, " " + word))
        if not items:
            raise InvalidInputError(f"expected passages in data set {name}, got none.")
        return cls(name=name, kind="last_word", items=tuple(items))

    @classmethod
    def from_choices(cls, name: str, rows: list[dict[str, Any]]) -> Dataset:
        """Rows ``{"query" or "ctx", "endings", "label"}``.

        Rows with a query are taken as they are; the others are cleaned as lm-evaluation-harness' hellaswag does it.
        """
        items = []
        for number, row in enumerate(rows, start=1):
            try:
                label, endings = int(row["label"]), [_clean(e) for e in row["endings"]]
                if "query" in row:
                    context, endings = row["query"], list(row["endings"])
                elif "ctx_a" in row:
                    context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
                else:
                    context = _clean(row["ctx"])
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidInputError(
                    f"row {number} of data set {name} needs query (or ctx), endings and label: {error!r}."
                ) from error
            if not 0 <= label < len(endings):
                raise InvalidInputError(f"row {number} of data set {name} has no ending number {label}.")
            items.append((context, tuple(endings), label))
        if not items:
            raise InvalidInputError(f"expected rows in data set {name}, got none.")
        return cls(name=name, kind="choice", items=tuple(items))


def _clean(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# name: (hub id, configuration, split)
HUB = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "lambada": ("EleutherAI/lambada_openai", "default", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
}


def load_dataset(name: str, *, limit: int | None = None) -> Dataset:
    """``wikitext``, ``lambada``, ``hellaswag``, a hub id (column ``text``), or ``NAME=FILE.jsonl`` of one of these.

    Raises
    ------
    DatasetError
        If it cannot be read, or needs a network that is not there.
    MissingDependencyError
        If it is on the hub and the package ``datasets`` is not installed.
    """
    kind, equals, path = name.partition("=")
    rows = _read_lines(Path(path), limit) if equals else _read_hub(kind, limit)
    label = Path(path).stem if equals else kind
    if kind == "hellaswag":
        return Dataset.from_choices(label, rows)
    column = "page" if rows and "page" in rows[0] else "text"
    missing = next((i for i, row in enumerate(rows, start=1) if not isinstance(row.get(column), str)), None)
    if missing is not None:
        raise DatasetError(f"row {missing} of data set {name} has no text in column {column!r}.")
    texts = [row[column] for row in rows]
    if kind == "lambada":
        return Dataset.from_passages(label, texts)
    return Dataset.from_text(label, ("" if kind == "wikitext" else "\n\n").join(texts))


def _read_lines(path: Path, limit: int | None) -> list[dict[str, Any]]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DatasetError(f"line {number} of {path} is no JSON object.")
                    rows.append(row)
                if limit is not None and len(rows) >= limit:
                    break
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"line {len(rows) + 1} of {path} cannot be read as JSON: {error}.") from error
    return rows


def _read_hub(name: str, limit: int | None) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"data set {name} is on the hub, which needs the package datasets; pip install "
            "'bh-routing[datasets]', or give a file: --text FILE, or --dataset NAME=FILE.jsonl."
        ) from error
    where, configuration, split = HUB.get(name, (name, None, "test"))
    try:
        found = datasets.load_dataset(where, configuration, split=split)
        return [dict(row) for row in (found if limit is None else found.take(limit))]
    except Exception as error:  # whatever the hub, the network or a loading script raises
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise DatasetError(
            f"expected to open the data set {where} (split {split}), got {type(error).__name__}: {reason}; "
            "check the network, or give a file: --text FILE, or --dataset NAME=FILE.jsonl."
        ) from error
