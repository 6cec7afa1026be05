"""Several routings of one model on one text: loss, experts and time, paired window by window."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integration import RoutingIntegration
from ..patching import make_plan
from .paired import Interval, perplexity_change
from .perplexity import perplexity, window_losses

_COUNTED = ("mean_experts", "std_experts", "share_saved", "share_floor", "share_ceiling")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What one routing did on the text.

    Attributes
    ----------
    label : str
    losses : tuple of Tensor
        Nats per token, one tensor per window: paired with those of the other routings.
    mean_experts, std_experts : float
        Experts per token over all layers.
    layers : tuple of (float, float)
        The same per layer.
    share_saved, share_floor, share_ceiling : float
        Experts not run; tokens at which min_k and max_k bound.
    alpha : float or None
        The level in use, where there is one.
    seconds : tuple of float
        Of each forward of a full window, the first one (warm-up) left out.
    """

    label: str
    losses: tuple[Tensor, ...]
    mean_experts: float
    std_experts: float
    layers: tuple[tuple[float, float], ...]
    share_saved: float
    share_floor: float
    share_ceiling: float
    alpha: float | None
    seconds: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return perplexity(self.losses)

    def change_from(self, own: Measured) -> Interval:
        """Relative change of the perplexity against another routing of the same windows, with its 95 % interval."""
        return perplexity_change(self._blocks(), own._blocks())

    def _blocks(self) -> list[tuple[float, int]]:
        return [(float(loss.double().sum()), len(loss)) for loss in self.losses]

    @property
    def median_seconds(self) -> float:
        """Median time of a forward of one full window; NaN where there was only the warm-up."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain Python values (without the losses of single tokens)."""
        return {name: getattr(self, name) for name in ("label", "alpha", "perplexity", *_COUNTED)} | {
            "layers": [{"mean_experts": mean, "std_experts": std} for mean, std in self.layers],
            "median_seconds": self.median_seconds if self.seconds else None,
        }


def compare(
    model: Any,
    windows: Sequence[Tensor],
    routings: Mapping[str, RoutingIntegration | None],
    *,
    step: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Run every window under every routing in turn, so that a busy machine is busy for all of them.

    Parameters
    ----------
    windows : sequence of Tensor
        Token ids [1, S] (`bh_routing.evaluation.cut_windows`).
    routings : mapping
        Label -> integration (not patched; its statistics start at zero), or None for the model as it is.
    step : callable
        Called after every forward, for a progress bar.
    """
    full = max(w.shape[1] for w in windows)
    losses: dict[str, list[Tensor]] = {label: [] for label in routings}
    seconds: dict[str, list[float]] = {label: [] for label in routings}
    for number, window in enumerate(windows):
        for label, integration in routings.items():
            with integration or nullcontext():
                start = time.perf_counter()
                losses[label].append(window_losses(model, window))
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                if number > 0 and window.shape[1] == full:
                    seconds[label].append(time.perf_counter() - start)
            step()
    return [
        Measured(
            label=label,
            losses=tuple(losses[label]),
            seconds=tuple(seconds[label]),
            **_figures(model, integration),
        )
        for label, integration in routings.items()
    ]


def _figures(model: Any, integration: RoutingIntegration | None) -> dict[str, Any]:
    if integration is None:
        own = [float(context.top_k) for context in make_plan(model).contexts]
        total = dict.fromkeys(_COUNTED, 0.0) | {
            "mean_experts": statistics.fmean(own),
            "std_experts": statistics.pstdev(own),
        }
        return total | {"layers": tuple((k, 0.0) for k in own), "alpha": None}
    counted = integration.telemetry.to_dict()
    return {name: counted["total"][name] for name in _COUNTED} | {
        "layers": tuple((layer["mean_experts"], layer["std_experts"]) for layer in counted["layers"]),
        "alpha": getattr(integration, "alpha", None),
    }
