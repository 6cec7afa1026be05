"""Random logits that several calibration tests share."""

from __future__ import annotations

import torch


def random_logits(seed: int, tokens: int, layers: int = 2, experts: int = 16) -> torch.Tensor:
    """Logits [L, T, E] with experts of different habits and a few strong calls per token."""
    generator = torch.Generator().manual_seed(seed)
    habits = torch.randn(layers, 1, experts, generator=torch.Generator().manual_seed(99)) * 0.3
    noise = torch.randn(layers, tokens, experts, generator=generator)
    strong = (torch.rand(layers, tokens, experts, generator=generator) < 0.15) * 2.0
    return noise + habits + strong
