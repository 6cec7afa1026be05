"""What the runner notes beside the scores: counts per token, costs, versions, and records as a table."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import MissingDependencyError
from ..integration import RoutingIntegration
from ..policies import RoutingPolicy


@contextmanager
def watch_counts(policy: RoutingPolicy) -> Iterator[dict[str, list[Tensor]]]:
    """Note the number of experts of every token that a policy decides on, by router path, within a ``with``."""
    seen: dict[str, list[Tensor]] = {}
    inner = policy.decide

    def decide(*args: Any) -> Any:
        decision = inner(*args)
        seen.setdefault(args[-1].path, []).append(decision.counts_T.cpu())
        return decision

    policy.decide = decide  # type: ignore[assignment, method-assign]
    try:
        yield seen
    finally:
        del policy.decide


def word_perplexity(loss: float, tokens: int, words: float) -> float:
    """The loss per token, spread over words: exp(loss * tokens / words)."""
    exponent = loss * tokens / max(words, 1.0)
    return math.exp(exponent) if exponent < 700 else math.inf


def costs(model: Any, integration: RoutingIntegration, layers: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Activated parameters and FLOPs per token.

    Parameters of everything but the experts that did not run; two FLOPs for each that multiplies (the input
    embedding does not, unless it is the output layer too). Attention scores and the routing are left out.
    """
    if layers is None or any(layer.experts is None for layer in integration.plan.layers):
        return {"active_parameters": None, "flops_per_token": None}
    total = sum(p.numel() for p in model.parameters())
    active = float(total)
    for layer, counted in zip(integration.plan.layers, layers, strict=True):
        assert layer.experts is not None
        held = sum(p.numel() for p in layer.experts.parameters())
        active -= held * (1.0 - counted["mean_experts"] / layer.context.empty)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return {
        "active_parameters": active,
        "flops_per_token": 2.0 * (active - (0 if tied else embedding.numel())),
    }


def versions() -> dict[str, str]:
    """Of what figures depend on."""
    import transformers

    return {
        "bh_routing": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def to_frame(records: Sequence[dict[str, Any]]) -> Any:
    """Records as a pandas DataFrame, one row each: the values that are single numbers or words.

    Raises
    ------
    MissingDependencyError
        Without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError(
            "a DataFrame needs pandas, which is not installed; pip install 'bh-routing[frame]'."
        ) from error
    rows = [{k: v for k, v in r.items() if not isinstance(v, (list, dict))} for r in records]
    return pandas.DataFrame(rows)
