"""Training under adaptive routing: losses, a callback for transformers' Trainer, and a fine-tuning loop.

The names below are loaded when they are first used: the callback needs transformers' Trainer, the losses do not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import AdaptiveRoutingCallback
    from .functional import expected_experts, load_balancing_loss, router_z_loss
    from .loop import FinetuneSettings, finetune
    from .loss import AdaptiveRoutingLoss
    from .refitting import refit

_MODULE_OF = {
    "AdaptiveRoutingCallback": "callback",
    "AdaptiveRoutingLoss": "loss",
    "FinetuneSettings": "loop",
    "expected_experts": "functional",
    "finetune": "loop",
    "load_balancing_loss": "functional",
    "refit": "refitting",
    "router_z_loss": "functional",
}

__all__ = [
    "AdaptiveRoutingCallback",
    "AdaptiveRoutingLoss",
    "FinetuneSettings",
    "expected_experts",
    "finetune",
    "load_balancing_loss",
    "refit",
    "router_z_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
