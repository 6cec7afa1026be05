"""Windows to batches.

Shape legend: B windows of a batch, S tokens of one (the longest), T = B * S tokens with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .hashing import Ids, document_digest, document_key, token_hashes
from .windows import Document, evenly, token_ids


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
