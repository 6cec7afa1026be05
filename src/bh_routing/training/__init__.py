"""Training under adaptive routing: losses, a callback for transformers' Trainer, and a fine-tuning loop.

The names below are loaded when they are first used: the callback needs transformers' Trainer, the losses do not.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .callback import AdaptiveRoutingCallback
    from .functional import expected_experts, load_balancing_loss, router_z_loss
    from .loop import finetune
    from .loss import AdaptiveRoutingLoss
    from .refitting import refit
    from .settings import FinetuneSettings

_MODULE_OF = {
    "AdaptiveRoutingCallback": "callback",
    "AdaptiveRoutingLoss": "loss",
    "FinetuneSettings": "settings",
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

__getattr__, __dir__ = lazy_names(globals(), _MODULE_OF)
