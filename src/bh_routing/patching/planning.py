"""Making a plan: every router is found, run on random tokens and read; nothing is changed."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..decision.types import RouteNorm
from ..errors import BHRoutingError, PatchError, UnsupportedModelError
from ..policies import RoutingContext
from .adapters import RouterCall, expert_ids, router_call, with_logits_again
from .contract import Contract, Reading, hidden_size, probe
from .discovery import RouterSite, check_reachable, find_sites
from .instance import execution_device
from .plan import LayerPlan, PatchPlan


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
            expert_bytes=0
            if experts is None
            else sum(p.nbytes for p in experts.parameters()) // max(1, ids.empty),
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
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk")
    stated = (getattr(router, "top_k", None), *(getattr(config, name, None) for name in names))
    top_k = next((value for value in stated if isinstance(value, int)), None)
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


def refresh(plan: PatchPlan) -> None:
    """Follow modules that were replaced since the plan was made, if they do the same (PEFT replaces such).

    Raises
    ------
    PatchError
        If a router is gone, or another one stands in its place.
    """
    modules = dict(plan.model.named_modules())
    if all(
        modules.get(layer.path) is layer.router
        and (layer.experts_path is None or modules.get(layer.experts_path) is layer.experts)
        for layer in plan.layers
    ):
        return
    try:
        found = {layer.path: layer for layer in make_plan(plan.model).layers}
    except BHRoutingError:
        found = {}
    for layer in plan.layers:
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
    for layer in plan.layers:
        now = found[layer.path]
        for name in ("router", "experts", "owner", "block", "positions", "call", "ids", "reading"):
            setattr(layer, name, getattr(now, name))
