"""The optimisers and the learning rate of olmoe-nano's training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeForCausalLM


def orthogonalise(update: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of a stack ``[n, rows, columns]``: Newton-Schulz in ``dtype``,
    with the coefficients of Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024)."""
    x = update.to(dtype)
    if tall := x.shape[1] > x.shape[2]:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.transpose(1, 2) if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised in ``dtype``, for weight matrices and for stacks of them (one per expert).

    A group's ``parts`` says how many matrices one parameter holds, one below the other.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay, "parts": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(state["momentum"], momentum)
                stack = update.reshape(-1, p.shape[-2] // group["parts"], p.shape[-1])
                scale = max(1.0, stack.shape[1] / stack.shape[2]) ** 0.5
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(orthogonalise(stack, self.dtype).view_as(p), alpha=-lr * scale)


def make_optimisers(
    model: OlmoeForCausalLM, lr: float, muon_lr: float, weight_decay: float, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Muon for attention and experts, AdamW for embedding, router and norms."""
    named = list(model.named_parameters())
    gate_up = [p for name, p in named if name.endswith("gate_up_proj")]
    matrices = [p for name, p in named if "_proj" in name and not name.endswith("gate_up_proj")]
    rest = [p for name, p in named if "_proj" not in name]
    made = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        Muon([{"params": matrices}, {"params": gate_up, "parts": 2}], muon_lr, weight_decay, dtype),
    ]
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return made


def learning_rate(step: int, warmup: int, decay: tuple[int, int] | None) -> float:
    """As a share of its peak, ``step`` steps after the start: linear warm-up, then constant; in the ``(first, number)``
    of ``decay``, linear towards zero."""
    factor = min((step + 1) / max(warmup, 1), 1.0)
    if decay and step >= decay[0]:
        factor *= 1 - (step - decay[0]) / decay[1]
    return factor
