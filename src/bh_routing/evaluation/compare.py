"""Several routings of one model on one text: loss, nearness to the first of them, experts and time, paired window by window.

Shape legend: S tokens of one window, V vocabulary.
"""

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
from ..policies import TopKPolicy
from ..stats.divergence import kl_divergence
from .figures import costs
from .paired import Interval, mean_change, perplexity_change
from .perplexity import perplexity

_COUNTED = ("mean_experts", "std_experts", "share_saved", "share_floor", "share_ceiling")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What one routing did on the text.

    Attributes
    ----------
    label : str
    losses : tuple of Tensor
        Nats per token, one tensor per window: paired with those of the other routings.
    divergences, agreements : tuple of Tensor
        KL(first || this) in nats, and whether both say the same next token: per token like the losses, against the
        first of the routings that were compared.
    units : tuple of int or None
        The document of each window, what is drawn for intervals; None: each its own.
    mean_experts, std_experts : float
        Experts per token over all layers.
    layers : tuple of (float, float)
        The same per layer.
    share_saved, share_floor, share_ceiling : float
        Experts not run; tokens at which min_k and max_k bound.
    alpha : float or None
        The level in use, where there is one.
    would_select : float or None
        In mode ``"analyze"``, where the model's own experts run: how many the policy would have kept.
    arithmetic_per_token, bytes_per_token : float or None
        `bh_routing.evaluation.figures.costs`.
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
    divergences: tuple[Tensor, ...] = ()
    agreements: tuple[Tensor, ...] = ()
    units: tuple[int, ...] | None = None
    would_select: float | None = None
    arithmetic_per_token: float | None = None
    bytes_per_token: float | None = None

    @property
    def perplexity(self) -> float:
        return perplexity(self.losses)

    def change_from(self, own: Measured) -> Interval:
        """Relative change of the perplexity against another routing of the same windows, with its 95 % interval."""
        return perplexity_change(self._blocks(self.losses), own._blocks(own.losses))

    def kl(self, other: Measured | None = None) -> Interval:
        """Mean divergence in nats, or how much larger it is than another routing's, with its 95 % interval."""
        return mean_change(
            self._blocks(self.divergences), None if other is None else other._blocks(other.divergences)
        )

    def agreement(self, other: Measured | None = None) -> Interval:
        """Share of tokens after which the first routing says the same, or how much larger it is than another's."""
        return mean_change(
            self._blocks(self.agreements), None if other is None else other._blocks(other.agreements)
        )

    def _blocks(self, values: Sequence[Tensor]) -> list[tuple[float, int]]:
        """Sum and number per document."""
        blocks: dict[int, tuple[float, int]] = {}
        for unit, value in zip(self.units or range(len(values)), values, strict=True):
            total, count = blocks.get(unit, (0.0, 0))
            blocks[unit] = (total + float(value.double().sum()), count + len(value))
        return list(blocks.values())

    @property
    def median_seconds(self) -> float:
        """Median time of a forward of one full window; NaN where there was only the warm-up."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain Python values (without the losses of single tokens)."""
        named = (
            "label",
            "alpha",
            "perplexity",
            *_COUNTED,
            "would_select",
            "arithmetic_per_token",
            "bytes_per_token",
        )
        return {name: getattr(self, name) for name in named} | {
            "kl": self.kl().to_dict(),
            "agreement": self.agreement().to_dict(),
            "layers": [{"mean_experts": mean, "std_experts": std} for mean, std in self.layers],
            "median_seconds": self.median_seconds if self.seconds else None,
        }


@torch.no_grad()
def compare(
    model: Any,
    windows: Sequence[Tensor],
    routings: Mapping[str, RoutingIntegration | None],
    *,
    units: Sequence[int] | None = None,
    step: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Run every window under every routing in turn, so that a busy machine is busy for all of them.

    Parameters
    ----------
    windows : sequence of Tensor
        Token ids [1, S] (`bh_routing.evaluation.cut_windows`).
    routings : mapping
        Label -> integration (not patched; its statistics start at zero), or None for the model as it is. The others are
        compared with the first.
    units : sequence of int, optional
        The document that each window is from (default: each its own): intervals draw documents.
    step : callable
        Called after every forward, for a progress bar.
    """
    full = max(w.shape[1] for w in windows)
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {label: [] for label in routings}
    seconds: dict[str, list[float]] = {label: [] for label in routings}
    for number, window in enumerate(windows):
        window_1S = window.to(model.device)
        first_SV = None
        for label, integration in routings.items():
            with integration or nullcontext():
                start = time.perf_counter()
                logits_SV = model(input_ids=window_1S, use_cache=False).logits[0, :-1].float()
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                if number > 0 and window.shape[1] == full:
                    seconds[label].append(time.perf_counter() - start)
            losses_S = torch.nn.functional.cross_entropy(logits_SV, window_1S[0, 1:], reduction="none")
            logprobs_SV = logits_SV.log_softmax(-1)
            first_SV = logprobs_SV if first_SV is None else first_SV
            agrees_S = logprobs_SV.argmax(-1) == first_SV.argmax(-1)
            found[label].append((losses_S, kl_divergence(first_SV, logprobs_SV), agrees_S))
            step()
    measured = []
    for label, integration in routings.items():
        losses, divergences, agreements = zip(*found[label], strict=True)
        measured.append(
            Measured(
                label=label,
                losses=losses,
                divergences=divergences,
                agreements=agreements,
                units=None if units is None else tuple(units),
                seconds=tuple(seconds[label]),
                **_figures(model, integration),
            )
        )
    return measured


def _figures(model: Any, integration: RoutingIntegration | None) -> dict[str, Any]:
    counted = None if integration is None else integration.telemetry.to_dict()
    found = {"alpha": getattr(integration, "alpha", None), "would_select": None}
    if integration is None or integration.mode == "analyze":
        own = [float(context.top_k) for context in make_plan(model).contexts]
        total = dict.fromkeys(_COUNTED, 0.0) | {
            "mean_experts": statistics.fmean(own),
            "std_experts": statistics.pstdev(own),
        }
        layers = [{"mean_experts": k, "std_experts": 0.0} for k in own]
        if counted is not None:
            found["would_select"] = counted["total"]["mean_experts"]
        integration = RoutingIntegration(model, TopKPolicy(), collect_stats=False)
    else:
        assert counted is not None
        total, layers = counted["total"], counted["layers"]
    spent = costs(model, integration, layers)
    return {name: total[name] for name in _COUNTED} | {
        **found,
        "layers": tuple((layer["mean_experts"], layer["std_experts"]) for layer in layers),
        "arithmetic_per_token": spent["arithmetic_per_token"],
        "bytes_per_token": spent["bytes_per_token"],
    }
