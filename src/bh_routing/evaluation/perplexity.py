"""Perplexity of a causal language model on a text.

Shape legend: S tokens of one window. A text is cut into windows that do not overlap; the first token of a
window is context only, so that a window of S tokens gives S - 1 losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInputError


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


@torch.no_grad()
def window_losses(model: Any, window_1S: Tensor) -> Tensor:
    """Negative log-likelihood in nats of every token but the first of a window, float32 [S - 1]."""
    window_1S = window_1S.to(model.device)
    logits_SV = model(input_ids=window_1S, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits_SV[:-1].float(), window_1S[0, 1:], reduction="none")


def perplexity(losses: Iterable[Tensor]) -> float:
    """exp of the mean loss per token over all windows; infinite where it overflows."""
    every = torch.cat([loss.double().cpu() for loss in losses])
    mean = float(every.mean())
    return math.exp(mean) if mean < 700 else math.inf
