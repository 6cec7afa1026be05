"""The plan: every router that would be patched, with all that is known about it, before anything is touched."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .._words import WeightRule
from ..decision.compensation import compensated_norm
from ..decision.types import RouteNorm
from ..errors import BHRoutingError, PatchError, UnsupportedModelError
from ..policies import RoutingContext
from .adapters import ExpertIds, RouterCall, expert_ids, router_call, with_logits_again
from .contract import Contract, Reading, RouterOutputs, hidden_size, match_outputs, probe
from .discovery import RouterSite, check_reachable, find_sites
from .instance import execution_device


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

    def refresh(self) -> None:
        """Follow modules that were replaced since the plan was made, if they do the same (PEFT replaces such).

        Raises
        ------
        PatchError
            If a router is gone, or another one stands in its place.
        """
        modules = dict(self.model.named_modules())
        if all(
            modules.get(layer.path) is layer.router
            and (layer.experts_path is None or modules.get(layer.experts_path) is layer.experts)
            for layer in self.layers
        ):
            return
        try:
            found = {layer.path: layer for layer in make_plan(self.model).layers}
        except BHRoutingError:
            found = {}
        for layer in self.layers:
            now = found.get(layer.path)
            if now is None or any(
                getattr(now.context, name) != getattr(layer.context, name)
                for name in ("num_experts", "empty", "top_k", "score_func", "device")
            ):
                raise PatchError(
                    f"router {layer.path} is no longer what the integration was made for: expected a "
                    f"{type(layer.router).__name__} with {layer.context.num_experts} experts and top-{layer.context.top_k}, "
                    f"got {type(modules.get(layer.path)).__name__}; make the integration anew."
                )
        for layer in self.layers:
            now = found[layer.path]
            for name in ("router", "experts", "owner", "block", "positions", "call", "ids", "reading"):
                setattr(layer, name, getattr(now, name))

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
        names = list(rows[0])
        cells = [names] + [[str(row[name]) for name in names] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return f"PatchPlan({self.model_class}, {len(rows)} routers)\n" + "\n".join(lines)


def make_plan(model: nn.Module) -> PatchPlan:
    """Find and probe every router of a model. Nothing is changed.

    Raises
    ------
    NoRoutersError, UnsupportedModelError
        See `bh_routing.patching.discovery.find_sites` and `bh_routing.patching.contract.probe`.
    """
    sites = find_sites(model)
    on_meta = [s.path for s in sites if execution_device(s.router).type == "meta"]
    if on_meta:
        raise UnsupportedModelError(
            f"the weights of router {on_meta[0]} are on the meta device: load the model's weights (or dispatch "
            "it with offloading) before patching it."
        )
    check_reachable(sites)
    owners = _owners(model)
    layers = []
    for index, site in enumerate(sites):
        try:
            layers.append(_plan_layer(model, site, index, owners.get(site.path)))
        except UnsupportedModelError as error:
            found = ", ".join(f"{s.path} ({type(s.router).__name__})" for s in sites[:4])
            more = f" and {len(sites) - 4} more" if len(sites) > 4 else ""
            raise UnsupportedModelError(
                f"{error} Routers found in {type(model).__name__}: {found}{more}; each must keep that contract."
            ) from error
    return PatchPlan(model_class=type(model).__name__, layers=tuple(layers), model=model)


def _plan_layer(model: nn.Module, site: RouterSite, index: int, owner: nn.Module | None) -> LayerPlan:
    router, experts = site.router, site.experts
    config = _text_config(owner if owner is not None else model)
    call = router_call(router, site.parent)
    try:
        contract = _probe(site, call, config)
    except UnsupportedModelError as error:
        again = with_logits_again(call)
        contract = _probe_again(site, again, config)
        if again is None or contract is None:
            raise error
        call = again
    if contract is None:
        contract = _contract_from_attributes(router, experts, config, site.path)
    width = hidden_size(router) or getattr(config, "hidden_size", None)
    reading, ids = contract.reading, expert_ids(experts, contract.num_logits)
    return LayerPlan(
        path=site.path,
        router=router,
        experts_path=site.experts_path,
        experts=experts,
        owner=owner,
        block=site.parent if site.experts is not None else None,
        width=width if isinstance(width, int) else None,
        probed=contract.positions is not None,
        positions=contract.positions,
        call=call,
        ids=ids,
        reading=reading,
        context=RoutingContext(
            path=site.path,
            index=index,
            num_experts=contract.num_logits,
            empty=ids.empty,
            top_k=contract.top_k,
            route_norm=_route_norm(router, reading, mock=owner is None),
            score_func="softmax" if reading.score_func == "probability" else reading.score_func,
            route_scale=reading.route_scale if reading.route_norm == "none" else 1.0,
            can_widen=reading.plain and contract.num_logits == ids.empty,
            device=execution_device(router),
        ),
    )


def _probe(site: RouterSite, call: RouterCall, config: Any) -> Contract | None:
    """The contract of a routing call, with the input as wide as the router says, else as the model is."""
    for hidden in (None, getattr(config, "hidden_size", None)):
        contract = probe(
            site.router,
            site.path,
            site.parent,
            hidden,
            canonical=lambda args, outputs: call.canonical(args, {}, outputs),
            target=(call.module, call.attribute),
        )
        if contract is not None or not isinstance(hidden, int | None):
            return contract
    return None


def _probe_again(site: RouterSite, call: RouterCall | None, config: Any) -> Contract | None:
    """The same with logits computed anew; None unless the weights are made of them."""
    if call is None:
        return None
    try:
        contract = _probe(site, call, config)
    except UnsupportedModelError:
        return None
    return None if contract is None or contract.reading.route_norm == "unknown" else contract


def _route_norm(router: nn.Module, reading: Reading, *, mock: bool) -> RouteNorm:
    """What the numbers say; else what the router states; else nothing (mock) or weights left alone (model)."""
    stated = getattr(router, "norm_topk_prob", None)
    if not mock and reading.route_norm != "unknown":
        return reading.route_norm
    if isinstance(stated, bool):
        return "renormalised" if stated else "none"
    return "unknown" if mock else "none"


def _contract_from_attributes(
    router: nn.Module, experts: nn.Module | None, config: Any, path: str
) -> Contract:
    """Sizes as the router or its config states them, for a router that cannot be run at all."""
    top_k = next(
        (
            value
            for holder, name in (
                (router, "top_k"),
                (config, "num_experts_per_tok"),
                (config, "top_k_experts"),
                (config, "moe_topk"),
            )
            if isinstance(value := getattr(holder, name, None), int)
        ),
        None,
    )
    num_experts = getattr(experts, "num_experts", None) or getattr(router, "num_experts", None)
    if top_k is None or not isinstance(num_experts, int):
        raise UnsupportedModelError(
            f"router {path} ({type(router).__name__}) does not tell how many experts it has and selects: "
            "expected attributes num_experts and top_k, or a forward that takes hidden states alone."
        )
    # Positions and widths are checked at the first real call.
    return Contract(positions=None, num_logits=num_experts, top_k=top_k, reading=Reading())


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        return config.get_text_config()
    return config


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> nearest enclosing transformers model (recognised by its recorder, not by import)."""
    owners: dict[str, nn.Module] = {}

    def walk(module: nn.Module, path: str, owner: nn.Module | None) -> None:
        if hasattr(module, "_can_record_outputs") and hasattr(module, "save_pretrained"):
            owner = module
        if owner is not None:
            owners[path] = owner
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name, owner)

    walk(model, "", None)
    return owners
