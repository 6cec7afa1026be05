"""The null follows a router that is being trained: counts of what the routers just did, sizes and means as before.

Shape legend: L layers, T tokens, E experts, K slots of the router's own choice, N tokens that are held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.accumulate import recount
from ..calibration.calibration import Calibration
from ..calibration.data import Reservoir
from ..calibration.fingerprint import fingerprint
from ..calibration.forwards import gather
from ..decision.types import RoutingDecision
from ..errors import CalibrationError
from ..integration import BHRoutingIntegration
from ..policies import RoutingContext
from ..telemetry.counters import recomputing
from ..text.hashing import mix64
from .tape import real_tokens


class Held(NamedTuple):
    """Some tokens of one router: logits float16 [N, E], its own choice int16 [N, K], whether they count, bool [N]."""

    logits_NE: Tensor
    experts_NK: Tensor
    real_N: Tensor


class RecentChoices:
    """A watcher that holds the last tokens of every router, as the router scored and chose them, in training mode.

    Parameters
    ----------
    tokens : int
        How many are held, at least, once so many were seen; `trim` drops the rest.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.held: dict[str, list[Held]] = {}

    def __call__(
        self, router: nn.Module, context: RoutingContext, decision: RoutingDecision, logits_TE: Tensor
    ) -> None:
        if not router.training or recomputing():
            return
        logits_TE = logits_TE.detach()
        held = Held(
            logits_TE.to(torch.float16),
            decision.own_experts_TK.to(torch.int16),
            real_tokens(context, logits_TE),
        )
        self.held.setdefault(context.path, []).append(held)

    def trim(self) -> None:
        """Drop the oldest calls that are not needed."""
        for calls in self.held.values():
            total = sum(len(call.real_N) for call in calls)
            while len(calls) > 1 and total - len(calls[0].real_N) >= self.tokens:
                total -= len(calls.pop(0).real_N)

    def joined(self, path: str) -> Held | None:
        """The tokens of one router that count, on the CPU; None if there are none."""
        calls = self.held.get(path)
        if not calls:
            return None
        logits_NE, experts_NK, real_N = (torch.cat(column) for column in zip(*calls, strict=True))
        rows = real_N.nonzero().squeeze(-1)[-self.tokens :]
        if not len(rows):
            return None
        return Held(logits_NE[rows].cpu(), experts_NK[rows].cpu(), real_N[rows].cpu())


def refit(integrator: BHRoutingIntegration, recent: RecentChoices, *, seed: int = 0) -> Calibration:
    """Fit the null, the table and the budget's level to what the routers just did, in the buffers in use.

    Sizes, sensitivities and mean outputs of the experts stay those of the calibration in use: they change slowly, and
    cost a pass over text (`bh_routing.calibrate`). Under several processes their tokens are put together, so that
    every process gets the same table.

    Parameters
    ----------
    integrator : BHRoutingIntegration
        With a calibration.
    recent : RecentChoices
        What was seen. Routers see hidden states of the routed model here, not of the full one.
    seed : int
        Chooses which tokens the budget is solved on, where more were seen than the calibration's reservoir holds.

    Returns
    -------
    Calibration
        The one now in use, with the fingerprint of the routers as they are.

    Raises
    ------
    CalibrationError
        If a router of the calibration saw no token.
    """
    old = integrator.calibration
    if old is None:
        raise CalibrationError(
            "refit needs an integration with a calibration, got one without; make it with calibration=..."
        )
    mine = {path: recent.joined(path) for path in old.paths}
    parts = gather(mine)
    layers: list[Held] = []
    for path in old.paths:
        found = [part[path] for part in parts if part[path] is not None]
        if not found:
            raise CalibrationError(
                f"router {path} saw no token since training began: expected a forward in training mode before the "
                "null is refitted."
            )
        layers.append(Held(*(torch.cat(column) for column in zip(*found, strict=True))))
    new = recounted(old, layers, seed)
    planned = {layer.path: layer for layer in integrator.plan.layers}
    new = replace(new, fingerprint_LD=fingerprint([planned[path] for path in old.paths]))
    integrator.set_calibration(new)
    return new


def recounted(old: Calibration, layers: list[Held], seed: int) -> Calibration:
    """A calibration with the counts and the reservoir of these tokens, and everything else as it was."""
    tokens = min(len(held.real_N) for held in layers)
    return replace(
        old.uncertified(),
        histograms=recount(old, ((held.logits_NE, held.experts_NK) for held in layers)),
        reservoir=_reservoir(layers, tokens, old.reservoir_size, seed),
        tokens=tokens,
        documents=0,
        text_digest="0" * 32,
        document_digests_C=None,
    )


def _reservoir(layers: list[Held], tokens: int, size: int, seed: int) -> Reservoir | None:
    """At most ``size`` of the last ``tokens`` tokens of each layer, which are the same tokens in each."""
    if not size:
        return None
    position = np.arange(tokens, dtype=np.uint64)
    hashes = torch.from_numpy((mix64(position + np.uint64(seed)) >> np.uint64(1)).astype(np.int64))
    slots = max(held.experts_NK.shape[-1] for held in layers)
    everything = Reservoir(
        hash_N=hashes,
        logits_NLE=torch.stack([held.logits_NE[-tokens:] for held in layers], 1),
        experts_NLK=torch.stack(
            [
                nn.functional.pad(h.experts_NK[-tokens:], (0, slots - h.experts_NK.shape[-1]), value=-1)
                for h in layers
            ],
            1,
        ),
    )
    return everything.smallest(size)


def recalibrate(integrator: BHRoutingIntegration, make: Callable[[nn.Module], Calibration]) -> Calibration:
    """Calibrate the model anew, unpatched meanwhile, and follow that: nulls, sizes, sensitivities and mean outputs.

    Parameters
    ----------
    make : callable
        ``f(model) -> Calibration``, as ``lambda model: calibrate(model, tokenizer, texts, sensitivity=True)``.
    """
    patched = integrator.is_patched
    if patched:
        integrator.unpatch_model()
    try:
        new = make(integrator.model)
        integrator.set_calibration(new)
    finally:
        if patched:
            integrator.patch_model()
    return new


__all__ = ["Held", "RecentChoices", "recalibrate", "refit"]
