"""The plan: every router that would be patched, with all that is known about it, before anything is touched."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .._words import WeightRule, aligned
from ..decision.compensation import compensated_norm
from ..errors import PatchError, UnsupportedModelError
from ..policies import RoutingContext
from .adapters import ExpertIds, RouterCall
from .contract import Reading, RouterOutputs, match_outputs


@dataclass(kw_only=True, eq=False)
class LayerPlan:
    """One router of the plan.

    Attributes
    ----------
    path, router : str, nn.Module
        The router and its module path, the key of everything per layer.
    experts_path, experts : str, nn.Module or None
        The experts beside it (None for a bare mock).
    context : RoutingContext
        Sizes, normalisation and device, as a policy sees them.
    owner : nn.Module or None
        The nearest transformers model around the router: its forward tells the mask and the shape.
    block : nn.Module or None
        The module around router and experts.
    width : int or None
        Width of the block's input, where it is known.
    probed : bool
        Whether the router could be run; else its contract is checked at the first real call.
    call : RouterCall
        What is called to route, and patched.
    ids : ExpertIds
        Which indices the experts know.
    reading : Reading
        How the router makes its weights.
    """

    path: str
    router: nn.Module
    experts_path: str | None
    experts: nn.Module | None
    context: RoutingContext
    owner: nn.Module | None
    block: nn.Module | None
    width: int | None
    probed: bool
    positions: RouterOutputs | None = field(default=None)
    call: RouterCall
    ids: ExpertIds
    reading: Reading = field(default_factory=Reading)

    def read(
        self, outputs: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits_TE, weights_TK, experts_TK) from a routing call, checked against the plan.

        Where a router returns probabilities in the logits' place, their logarithms are what a policy sees: the
        logits, but for a constant per token.
        """
        outputs = self.call.canonical(args, kwargs or {}, outputs)
        if self.positions is None:
            positions = match_outputs(outputs, self.path)
            logits, weights, experts = positions.read(outputs)
            expected = (self.context.num_experts, self.context.top_k)
            if (logits.shape[-1], experts.shape[-1]) != expected:
                raise UnsupportedModelError(
                    f"router {self.path} was expected to return logits of {expected[0]} experts and "
                    f"{expected[1]} slots, got {logits.shape[-1]} and {experts.shape[-1]}; the family's "
                    "contract has changed, please report it with the transformers version."
                )
            self.positions = positions
        else:
            logits, weights, experts = self.positions.read(outputs)
            if experts.shape[-1] != self.context.top_k:
                raise PatchError(
                    f"router {self.path} selects {experts.shape[-1]} experts now, {self.context.top_k} when it was planned "
                    "(was its top_k changed?): unpatch the model, and make the integration anew with what was calibrated "
                    "for that number."
                )
        if self.reading.score_func == "probability":
            logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
        return logits, weights, experts

    def replace(
        self,
        outputs: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        weights_TK: torch.Tensor,
        experts_TK: torch.Tensor,
    ) -> Any:
        """The routing call's result with other weights and indices; everything else untouched."""
        assert self.positions is not None
        full = self.call.canonical(args, kwargs, outputs)
        return self.call.original(self.positions.replace(full, weights_TK, experts_TK))

    @property
    def expert_factors_E(self) -> torch.Tensor | None:
        """Factors per expert on the renormalised weights, [E], where the router has them."""
        name = self.reading.per_expert
        if not name or self.context.route_norm != "renormalised":
            return None
        return self.router.get_parameter(name)


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchPlan:
    """What patching would do to a model: the layers, in module order. Printing it shows a table."""

    model_class: str
    layers: tuple[LayerPlan, ...]
    model: nn.Module

    @property
    def owners(self) -> list[nn.Module]:
        """Modules whose forward is one forward of the routers inside: transformers models, else the routers' blocks."""
        found = (layer.block if layer.owner is None else layer.owner for layer in self.layers)
        return list({id(module): module for module in found if module is not None}.values())

    @property
    def generating(self) -> list[nn.Module]:
        """Models with a `generate` of transformers' that an owner belongs to."""
        return [
            module
            for module in self.model.modules()
            if hasattr(type(module), "_get_stopping_criteria")
            and any(inner is owner for owner in self.owners for inner in module.modules())
        ]

    @property
    def contexts(self) -> list[RoutingContext]:
        """The routers as a policy sees them."""
        return [layer.context for layer in self.layers]

    def compensated(self, weights: WeightRule) -> PatchPlan:
        """The same plan for a policy with these weights and a compensation."""
        layers = tuple(
            replace(
                layer,
                context=replace(
                    layer.context, route_norm=compensated_norm(layer.context.route_norm, weights)
                ),
            )
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def without(self, paths: Collection[str]) -> PatchPlan:
        """The same plan without some routers, which stay as they are."""
        if not paths:
            return self
        kept = [layer for layer in self.layers if layer.path not in paths]
        layers = tuple(replace(x, context=replace(x.context, index=i)) for i, x in enumerate(kept))
        return replace(self, layers=layers)

    def rows(self) -> list[dict[str, Any]]:
        """One plain dictionary per router: path, class, experts, top_k, score, weights, widen."""
        return [
            {
                "router": layer.path,
                "class": type(layer.router).__name__,
                "experts": layer.context.num_experts,
                "top_k": layer.context.top_k,
                "score": layer.context.score_func,
                "weights": layer.context.route_norm,
                "widen": "yes" if layer.context.can_widen else "no",
            }
            for layer in self.layers
        ]

    def __repr__(self) -> str:
        rows = self.rows()
        table = aligned([list(rows[0]), *(list(row.values()) for row in rows)])
        return f"PatchPlan({self.model_class}, {len(rows)} routers)\n{table}"
