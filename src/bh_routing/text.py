"""Text in, batches of token windows out: the same batches whatever the number of processes.

Shape legend: B windows of a batch, S tokens of the longest, T = B * S tokens with padding.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from .errors import CalibrationError, InvalidInputError, InvalidTypeError

Document = str | Sequence[int] | Tensor
PIECE = 1 << 16  # characters


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
    """

    input_ids: Tensor
    mask: Tensor
    hashes: np.ndarray
    index: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return len(self.hashes)

    def mask_on(self, device: torch.device) -> Tensor | None:
        """The mask, bool [T], or None if nothing is padded."""
        return None if self.num_tokens == self.mask.numel() else self.mask.flatten().to(device)

    def rows_on(self, device: torch.device) -> Tensor | None:
        """Indices of the tokens that are no padding, or None if nothing is padded."""
        if self.num_tokens == self.mask.numel():
            return None
        return self.mask.flatten().nonzero().flatten().to(device)


class TextFile:
    """A text file (plain, ``.xz``, ``.gz`` or ``.bz2``) as documents, which end at a line's end.

    May be iterated over several times; memory stays that of one document.

    Parameters
    ----------
    path : path
        UTF-8 text.
    piece : int or None
        Characters per document, about. None: a document ends at a blank line, as where books are joined by one.
    """

    def __init__(self, path: str | os.PathLike[str], piece: int | None = PIECE) -> None:
        self.path, self.piece = Path(path), piece
        if not self.path.is_file():
            raise CalibrationError(f"there is no text file {self.path}.")

    def _open(self) -> TextIO:
        openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
        return openers.get(self.path.suffix, open)(self.path, "rt", encoding="utf-8")

    def __iter__(self) -> Iterator[str]:
        lines: list[str] = []
        held = 0
        try:
            with self._open() as file:
                for line in file:
                    lines.append(line)
                    held += len(line)
                    if not line.strip() if self.piece is None else held >= self.piece:
                        yield "".join(lines)
                        lines, held = [], 0
        except (UnicodeDecodeError, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
            raise CalibrationError(f"{self.path} cannot be read as UTF-8 text: {error}.") from None
        if lines:
            yield "".join(lines)


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

    def __iter__(self) -> Iterator[Batch]:
        for index, windows in enumerate(self._grouped()):
            if index % self.world == self.rank:
                yield self._batch(windows, index)

    def _batch(self, windows: list[tuple[np.ndarray, int, int]], index: int) -> Batch:
        length = max(len(ids) for ids, _, _ in windows)
        input_ids = torch.zeros(len(windows), length, dtype=torch.int64)
        mask = torch.zeros(len(windows), length, dtype=torch.bool)
        for row, (ids, _, _) in enumerate(windows):
            input_ids[row, : len(ids)] = torch.from_numpy(ids)
            mask[row, : len(ids)] = True
        hashes = [token_hashes(key, first, len(ids)) for ids, key, first in windows]
        return Batch(input_ids, mask, np.concatenate(hashes), index)

    def _grouped(self) -> Iterator[list[tuple[np.ndarray, int, int]]]:
        """Consecutive windows, as many as fit batch_tokens with their padding."""
        group: list[tuple[np.ndarray, int, int]] = []
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

    def _windows(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """(token ids, document key, position of the first), at most max_tokens in all."""
        left = self.max_tokens
        for document in self._texts() if callable(self._texts) else self._texts:
            if left == 0:
                return
            ids, content = self._tokenise(document)
            if not len(ids):
                continue
            digest, key = document_key(content, self.seed)
            self.documents += 1
            self.digest = (self.digest + digest) % 2**128
            for first in self._starts(len(ids)):
                part = ids[first : first + self.window][:left]
                if not len(part):
                    return
                yield part, key, first
                if left is not None:
                    left -= len(part)

    def _starts(self, length: int) -> list[int]:
        """Where a document's windows begin: all of them, or as many as document_tokens allows, evenly over it."""
        num = math.ceil(length / self.window)
        chosen = num
        if self.document_tokens is not None:
            chosen = min(num, max(1, self.document_tokens // self.window))
        return [i * num // chosen * self.window for i in range(chosen)]

    def _tokenise(self, document: Document) -> tuple[np.ndarray, bytes]:
        if isinstance(document, str):
            if self.tokenizer is None:
                raise InvalidTypeError(
                    "texts are strings but no tokenizer was given; pass the model's tokenizer."
                )
            if not document.strip():
                return np.empty(0, dtype=np.int64), b""
            # verbose=False: a document longer than the context is meant to be, it is cut into windows here
            ids = np.asarray(self.tokenizer(document, verbose=False)["input_ids"], dtype=np.int64)
            return ids, document.encode()
        if isinstance(document, Tensor):
            document = document.tolist()
        ids = np.asarray(document)
        if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
            raise InvalidTypeError(
                "each document must be a string or a flat sequence of token ids, got "
                f"{type(document).__name__} of shape {ids.shape}."
            )
        ids = ids.astype(np.int64)
        return ids, ids.tobytes()


def document_key(content: bytes, seed: int) -> tuple[int, int]:
    """A document's share of the text digest (128 bits) and its 64-bit key for the tokens' hashes."""
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")
    keyed = hashlib.blake2b(content, digest_size=8, salt=seed.to_bytes(8, "little", signed=True))
    return digest, int.from_bytes(keyed.digest(), "little")


def token_hashes(key: int, first: int, num: int) -> np.ndarray:
    """Hashes of a document's tokens first..first + num - 1, non-negative int64."""
    position = np.arange(first, first + num, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = mix64(mix64(position) + np.uint64(key))
    return (mixed >> np.uint64(1)).astype(np.int64)


def mix64(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each uint64 (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def cut_windows(tokenizer: Any, text: str, length: int, limit: int | None = None) -> list[Tensor]:
    """Token ids of a text as windows int64 [1, S], S = ``length`` but for the last (at least 2).

    Parameters
    ----------
    length : int
        Tokens per window.
    limit : int, optional
        At most so many windows, spread evenly over the text.

    Raises
    ------
    InvalidInputError
        If the text has fewer than two tokens.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
    windows = [w for w in encoded.split(length, dim=1) if w.shape[1] >= 2]
    if not windows:
        raise InvalidInputError(f"expected a text of at least two tokens, got {encoded.shape[1]}.")
    if limit is not None and limit < len(windows):
        windows = [windows[i * len(windows) // limit] for i in range(limit)]
    return windows


__all__ = ["Batch", "Document", "TextFile", "TextStream", "cut_windows"]
