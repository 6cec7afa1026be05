"""Hashes that are the same on every machine: of documents, of their tokens, of weights' places."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]
Unsigned = np.ndarray[Any, np.dtype[np.uint64]]


def document_key(content: bytes, seed: int) -> tuple[int, int]:
    """A document's share of the text digest (128 bits) and its 64-bit key for the tokens' hashes."""
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")
    keyed = hashlib.blake2b(content, digest_size=8, salt=seed.to_bytes(8, "little", signed=True))
    return digest, int.from_bytes(keyed.digest(), "little")


def document_digest(document: str | bytes) -> int:
    r"""63 bits that tell a document of a text from others, whatever the seed; of a string without regard to white space.

    >>> document_digest("so it\nwas. ") == document_digest("so it was.")
    True
    """
    content = " ".join(document.split()).encode() if isinstance(document, str) else document
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def token_hashes(key: int, first: int, num: int) -> Ids:
    """Hashes of a document's tokens first..first + num - 1, non-negative int64."""
    position = np.arange(first, first + num, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = mix64(mix64(position) + np.uint64(key))
        return (mixed >> np.uint64(1)).astype(np.int64)


def mix64(x: Unsigned) -> Unsigned:
    """A 64-bit hash of each uint64 (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))).astype(np.uint64)


def short_digest(content: Any) -> str:
    """Sixteen hexadecimal digits of bytes, or of a CPU tensor's values."""
    content = content if isinstance(content, bytes) else content.contiguous().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
