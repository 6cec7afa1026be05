"""Documents to windows of tokens: where windows lie, and the only cutter.

Shape legend: S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInputError, InvalidParameterError, InvalidTypeError
from .hashing import Ids

Document = str | Sequence[int] | Tensor
Item = TypeVar("Item")


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
