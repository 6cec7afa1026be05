"""Text in, windows of tokens out: the readers of text files, and the only cutter of documents into windows."""

from .batches import Batch, TextStream
from .files import PIECE, TextFile, in_turn
from .windows import Document, Window, cut_windows, evenly, iter_windows, spans, token_ids

__all__ = [
    "PIECE",
    "Batch",
    "Document",
    "TextFile",
    "TextStream",
    "Window",
    "cut_windows",
    "evenly",
    "in_turn",
    "iter_windows",
    "spans",
    "token_ids",
]
