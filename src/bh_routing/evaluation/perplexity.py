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


@torch.no_grad()
def window_losses(model: Any, window_1S: Tensor) -> Tensor:
    """Negative log-likelihood in nats of every token but the first of a window, float32 [S - 1]."""
    window_1S = window_1S.to(model.device)
    logits_SV = model(input_ids=window_1S, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits_SV[:-1].float(), window_1S[0, 1:], reduction="none")


def perplexity(losses: Iterable[Tensor]) -> float:
    """exp of the mean loss per token over all windows; infinite where it overflows."""
    return perplexity_of(float(torch.cat([loss.double().cpu() for loss in losses]).mean()))


def perplexity_of(loss: float) -> float:
    """exp of a loss; infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
