"""Watch a model's own routing without changing it.

Shape legend: T tokens, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import ExpertsForward, flat_experts
from .calls import Forwards
from .forward import ForwardPatch
from .instance import InstancePatch, execution_device, installed
from .plan import LayerPlan, PatchPlan


class _Watch(InstancePatch):
    """Shows a router's own choice to a function, changing nothing."""

    def __init__(self, layer: LayerPlan, forwards: Forwards, on_choice: Callable[..., None]) -> None:
        super().__init__(layer.call.module, layer.call.attribute)
        self.layer, self.forwards, self.on_choice = layer, forwards, on_choice

    def run(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.inner(*args, **kwargs)
        logits_TE, weights_TK, experts_TK = self.layer.read(outputs, args, kwargs)
        context = self.forwards.complete(self.layer.context, logits_TE)
        self.on_choice(self.layer, logits_TE, weights_TK, experts_TK, context.mask_T)
        return outputs


class _Around(InstancePatch):
    """Hands an experts forward to a function that calls it."""

    def __init__(self, layer: LayerPlan, around: Callable[..., Tensor]) -> None:
        assert layer.experts is not None
        super().__init__(layer.experts)
        self.layer, self.around = layer, around

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        inner = flat_experts(self.inner, self.layer.ids)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        out_TH = self.around(self.layer, inner, hidden_TH, top_k_index, top_k_weights)
        return out_TH.reshape(hidden_states.shape)


@contextmanager
def watch(
    plan: PatchPlan,
    on_choice: Callable[[LayerPlan, Tensor, Tensor, Tensor, Tensor | None], None],
    around_experts: Callable[[LayerPlan, ExpertsForward, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Watch a model's own routing within a ``with`` block; the model is restored at its end.

    Parameters
    ----------
    on_choice : callable
        ``f(layer, logits_TE, own_weights_TK, own_experts_TK, mask_T)`` after each router call; ``mask_T`` is
        bool [T], False for padding, or None where unknown.
    around_experts : callable, optional
        ``g(layer, inner, hidden_TH, experts_TK, weights_TK) -> out_TH`` in place of each experts forward.
    """
    forwards = Forwards()
    pieces: list[Any] = [ForwardPatch(owner, forwards, causal=True) for owner in plan.owners]
    for layer in plan.layers:
        pieces.append(_Watch(layer, forwards, on_choice))
        if around_experts is not None and layer.experts is not None:
            pieces.append(_Around(layer, around_experts))
    with installed(pieces):
        yield


def special_ids(model: nn.Module) -> set[int]:
    """Token ids that a model's configuration gives a meaning of their own, those of images among them."""
    config: Any = getattr(model, "config", None)
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    return {
        value
        for part in parts
        for name, value in getattr(part, "__dict__", {}).items()
        if "token" in name and isinstance(value, int)
    }


def reached_by_text(model: nn.Module, plan: PatchPlan) -> set[str]:
    """Paths of the routers that a forward of two text tokens calls.

    Routers of a vision tower, or of experts for image tokens only, are not among them; neither are those that a
    kernel for the whole block bypasses.
    """
    special = special_ids(model)
    tokens = [i for i in range(len(special) + 2) if i not in special][:2]
    seen: set[str] = set()
    device = execution_device(model)
    with torch.no_grad(), watch(plan, lambda layer, *_: seen.add(layer.path)):
        model(input_ids=torch.tensor([tokens], device=device), use_cache=False)
    return seen


__all__ = ["reached_by_text", "special_ids", "watch"]
