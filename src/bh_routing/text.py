"""Text in, windows of tokens out: the readers of text files, and the only cutter of documents into windows.

Shape legend: B windows of a batch, S tokens of one (the longest), T = B * S tokens with padding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ._files import read_lines
from ._hashing import Ids, document_digest, document_key, token_hashes
from .errors import DatasetError, InvalidInputError, InvalidParameterError, InvalidTypeError

Document = str | Sequence[int] | Tensor
Item = TypeVar("Item")
PIECE = 1 << 16  # characters


# -- files -----------------------------------------------------------------------------------------------------


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
        read = self._json_lines if ".jsonl" in self.path.suffixes else self._pieces
        any_text = False
        for source, text in read():
            any_text = any_text or bool(text.strip())
            yield source or own, text
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


# -- windows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens ``begin`` to ``end`` of a text; those from ``score`` on are new, the others are context."""

    begin: int
    end: int
    score: int


def spans(num: int, length: int, stride: int | None = None) -> list[Window]:
    """Where the windows of a text of ``num`` tokens lie.

    Without a stride, or with stride = length, windows do not overlap and the first token of each is context only.
    With a smaller stride every token but the first is scored once, with at least ``length - stride`` tokens of context:
    the sliding window of the transformers documentation. A last window of a single token scores nothing and is left out.

    Raises
    ------
    InvalidInputError
        If the text has fewer than two tokens.
    InvalidParameterError
        Unless length >= 2 and 1 <= stride <= length.

    Examples
    --------
    >>> [(w.begin, w.end, w.score) for w in spans(10, 6, 3)]
    [(0, 6, 1), (3, 9, 6), (6, 10, 9)]
    """
    stride = length if stride is None else stride
    if length < 2 or not 1 <= stride <= length:
        raise InvalidParameterError(
            f"a window needs at least 2 tokens and a stride of 1 to its length, got {length} and {stride}."
        )
    if num < 2:
        raise InvalidInputError(f"expected a text of at least two tokens, got {num}.")
    windows, done = [], 0
    for begin in range(0, num, stride):
        end = min(begin + length, num)
        score = max(done, begin + 1)
        if score < end:
            windows.append(Window(begin=begin, end=end, score=score))
        done = end
        if end == num:
            break
    return windows


def evenly(items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """At most so many of the items, spread evenly over them, in order."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def token_ids(tokenizer: Any, document: Document, *, special_tokens: bool = False) -> Ids:
    """Token ids of one document, int64; a document of token ids is checked and returned.

    Raises
    ------
    InvalidTypeError
        For a text without a tokenizer, and for what is neither a text nor a flat sequence of ids.
    """
    if isinstance(document, str):
        if tokenizer is None:
            raise InvalidTypeError(
                "texts are strings but no tokenizer was given; pass the model's tokenizer."
            )
        if not document.strip():
            return np.empty(0, dtype=np.int64)
        # verbose=False: a document longer than the context is meant to be, it is cut into windows here
        plain = {} if special_tokens else {"add_special_tokens": False}
        return np.asarray(tokenizer(document, verbose=False, **plain)["input_ids"], dtype=np.int64)
    ids = np.asarray(document.tolist() if isinstance(document, Tensor) else document)
    if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
        raise InvalidTypeError(
            "each document must be a string or a flat sequence of token ids, got "
            f"{type(document).__name__} of shape {ids.shape}."
        )
    return ids.astype(np.int64)


def iter_windows(tokenizer: Any, documents: Iterable[Document], length: int) -> Iterator[Tensor]:
    """Token ids of documents as windows int64 [S], S = ``length`` but for the last of each document.

    Documents are read and tokenised as the windows are taken, without special tokens.
    """
    for document in documents:
        ids = torch.from_numpy(token_ids(tokenizer, document))
        yield from ids.split(length) if len(ids) else ()


def cut_windows(
    tokenizer: Any, documents: Iterable[Document] | str, length: int, limit: int | None = None
) -> list[Tensor]:
    """Windows of a text or of documents, int64 [1, S], that hold something to predict: at least two tokens.

    Parameters
    ----------
    length : int
        Tokens per window.
    limit : int, optional
        At most so many windows, spread evenly over the text.

    Raises
    ------
    InvalidInputError
        If there are fewer than two tokens.
    """
    documents = [documents] if isinstance(documents, str) else documents
    every = list(iter_windows(tokenizer, documents, length))
    windows = [w.unsqueeze(0) for w in every if len(w) >= 2]
    if not windows:
        raise InvalidInputError(f"expected a text of at least two tokens, got {sum(map(len, every))}.")
    return list(evenly(windows, limit))


# -- batches of windows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of tokens, padded on the right.

    Attributes
    ----------
    input_ids, mask : Tensor
        int64 and bool [B, S]; mask is False for padding.
    hashes : ndarray
        int64, one per token that is no padding, in order.
    index : int
        Which of the text's batches this is, over all processes.
    documents : ndarray
        int64, a hash of the document that each token that is no padding comes from.
    """

    input_ids: Tensor
    mask: Tensor
    hashes: Ids
    documents: Ids
    index: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return len(self.hashes)

    def windows(self, rows: Sequence[int], input_ids: Tensor | None = None) -> Batch:
        """Some of its windows, without padding that is left over; with other ids [B, S] in place of its own."""
        mask = self.mask[rows]
        longest = int(mask.sum(1).max())
        ids = self.input_ids if input_ids is None else input_ids
        chosen = np.zeros(len(self.mask), dtype=bool)
        chosen[list(rows)] = True
        tokens = chosen.repeat(self.mask.sum(1).numpy())
        return Batch(
            ids[rows][:, :longest], mask[:, :longest], self.hashes[tokens], self.documents[tokens], self.index
        )

    def mask_on(self, device: torch.device) -> Tensor | None:
        """The mask, bool [T], or None if nothing is padded."""
        return None if self.num_tokens == self.mask.numel() else self.mask.flatten().to(device)

    def rows_on(self, device: torch.device) -> Tensor | None:
        """Indices of the tokens that are no padding, or None if nothing is padded."""
        if self.num_tokens == self.mask.numel():
            return None
        return self.mask.flatten().nonzero().flatten().to(device)


class TextStream:
    """Documents, tokenised, cut into windows and batched.

    `start` sets it to the beginning; iterating yields this process's batches. Every process forms all batches
    and takes every ``world``-th, so that their content does not depend on the number of processes.
    """

    def __init__(
        self,
        texts: Iterable[Document] | Callable[[], Iterable[Document]] | str,
        tokenizer: Any,
        *,
        window: int,
        batch_tokens: int,
        seed: int,
        document_tokens: int | None = None,
    ) -> None:
        self.tokenizer, self.window, self.batch_tokens, self.seed = tokenizer, window, batch_tokens, seed
        self.document_tokens = document_tokens
        if isinstance(texts, str):
            texts = [texts]
        self._texts = texts
        self.start(None, 0, 1)

    @property
    def repeatable(self) -> bool:
        """Whether the texts can be read a second time."""
        return callable(self._texts) or iter(self._texts) is not self._texts

    def start(self, max_tokens: int | None, rank: int, world: int) -> None:
        """Set to the beginning."""
        self.max_tokens, self.rank, self.world = max_tokens, rank, world
        self.documents = self.digest = 0
        self.document_digests: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        for index, windows in enumerate(self._grouped()):
            if index % self.world == self.rank:
                yield self._batch(windows, index)

    def _batch(self, windows: list[tuple[Ids, int, int]], index: int) -> Batch:
        length = max(len(ids) for ids, _, _ in windows)
        input_ids = torch.zeros(len(windows), length, dtype=torch.int64)
        mask = torch.zeros(len(windows), length, dtype=torch.bool)
        for row, (ids, _, _) in enumerate(windows):
            input_ids[row, : len(ids)] = torch.from_numpy(ids)
            mask[row, : len(ids)] = True
        hashes = [token_hashes(key, first, len(ids)) for ids, key, first in windows]
        keys = np.array([key >> 1 for _, key, _ in windows], dtype=np.int64)
        documents = keys.repeat([len(ids) for ids, _, _ in windows])
        return Batch(input_ids, mask, np.concatenate(hashes), documents, index)

    def _grouped(self) -> Iterator[list[tuple[Ids, int, int]]]:
        """Consecutive windows, as many as fit batch_tokens with their padding."""
        group: list[tuple[Ids, int, int]] = []
        longest = 0
        for window in self._windows():
            length = max(longest, len(window[0]))
            if group and (len(group) + 1) * length > self.batch_tokens:
                yield group
                group, length = [], len(window[0])
            group.append(window)
            longest = length
        if group:
            yield group

    def _windows(self) -> Iterator[tuple[Ids, int, int]]:
        """(token ids, document key, position of the first), at most max_tokens in all."""
        left = self.max_tokens
        for document in self._texts() if callable(self._texts) else self._texts:
            if left == 0:
                return
            ids = token_ids(self.tokenizer, document, special_tokens=True)
            if not len(ids):
                continue
            content = document.encode() if isinstance(document, str) else ids.tobytes()
            digest, key = document_key(content, self.seed)
            self.documents += 1
            self.digest = (self.digest + digest) % 2**128
            self.document_digests.add(document_digest(document if isinstance(document, str) else content))
            for first in self._starts(len(ids)):
                part = ids[first : first + self.window][:left]
                if not len(part):
                    return
                yield part, key, first
                if left is not None:
                    left -= len(part)

    def _starts(self, length: int) -> list[int]:
        """Where a document's windows begin: all of them, or as many as document_tokens allows, evenly over it."""
        most = None if self.document_tokens is None else max(1, self.document_tokens // self.window)
        return list(evenly(range(0, length, self.window), most))
