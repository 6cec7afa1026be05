"""How a model's forward names its cache: transformers 5.24 renamed it."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def after(model: torch.nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword that hands a cache to the model's forward."""
    names = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}
