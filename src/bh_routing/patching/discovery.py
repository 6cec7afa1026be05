"""Find the routers of a model: by what transformers records as router logits, and by structure.

Two rules are united (docs/families.md has the evidence): modules of a class that some submodel of the model
records as ``router_logits``, and children ``gate`` or ``router`` of a parent that also has ``experts``. A
module whose class is called exactly ``OlmoeTopKRouter`` counts without either, so that a bare mock works.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import NoRoutersError, UnsupportedModelError
from .adapters import router_call
from .contract import call_through, hidden_size
from .instance import InstancePatch, execution_device, find_patch

logger = logging.getLogger(__name__)

BARE_ROUTER = "OlmoeTopKRouter"

# Families whose contract cannot be served, by config.model_type, and why.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("llama4", "llama4_text"),
        "its scores multiply the experts' input and all experts run on all tokens, so that nothing can be skipped",
    ),
    "switch_transformers": "it routes every token to one expert with a capacity limit",
    "nllb-moe": "its router returns one-hot masks with a capacity limit",
    "doge": "its experts are product-key memories without a router module",
    "jetmoe": "its router returns a sorted batch layout instead of indices, and attention is routed as well",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterSite:
    """A router in its model: where it is, and the experts beside it (None for a bare mock)."""

    path: str
    router: nn.Module
    experts_path: str | None
    experts: nn.Module | None
    parent: nn.Module | None


def recorded_classes(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[type, ...]]]:
    """(path, submodel, classes) of every submodel that records router logits."""
    for path, submodel in model.named_modules():
        recorded = getattr(submodel, "_can_record_outputs", None)
        entries = recorded.get("router_logits") if isinstance(recorded, dict) else None
        if entries is None:
            continue
        entries = entries if isinstance(entries, list) else [entries]
        classes = tuple(
            target for entry in entries if isinstance(target := getattr(entry, "target_class", entry), type)
        )
        if classes:
            yield path, submodel, classes


def find_sites(model: nn.Module) -> list[RouterSite]:
    """All router sites in module order, each once.

    Raises
    ------
    UnsupportedModelError
        For a family whose contract cannot be served.
    NoRoutersError
        If there is none; the message lists what was looked for and what the model has.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for refused in (model_type, *_inner_types(model)):
        if refused in REFUSED:
            raise UnsupportedModelError(
                f"{refused} models cannot be routed by this library: {REFUSED[refused]}."
            )
    modules = dict(model.named_modules())
    recorded = {
        id(module)
        for _, submodel, classes in recorded_classes(model)
        for module in submodel.modules()
        if isinstance(module, classes)
    }
    sites: list[RouterSite] = []
    seen: set[int] = set()
    for path, module in modules.items():
        parent_path, _, name = path.rpartition(".")
        parent = modules.get(parent_path)
        experts = getattr(parent, "experts", None)
        beside_experts = isinstance(experts, nn.Module) and experts is not module
        bare = type(module).__name__ == BARE_ROUTER
        structural = beside_experts and name in ("gate", "router")
        if id(module) in seen or not (structural or bare or (id(module) in recorded and beside_experts)):
            continue
        if structural and _routes_by_token_id(module):
            continue
        seen.add(id(module))
        prefix = f"{parent_path}." if parent_path else ""
        sites.append(
            RouterSite(
                path=path,
                router=module,
                experts_path=f"{prefix}experts" if beside_experts else None,
                experts=experts if beside_experts else None,
                parent=parent,
            )
        )
    if not sites:
        raise NoRoutersError(_nothing_found(model, model_type))
    return sites


def _inner_types(model: nn.Module) -> Iterator[str | None]:
    """config.model_type of every transformers model inside (the text model of a composite, for example)."""
    for submodel in model.modules():
        if hasattr(submodel, "_can_record_outputs"):
            yield getattr(getattr(submodel, "config", None), "model_type", None)


def check_reachable(sites: list[RouterSite]) -> None:
    """Refuse models whose blocks were replaced so that their router is never called (a hub kernel, for example).

    Blocks whose forward is not their class's own are run once on random tokens; a block that ends without
    calling its router bypasses it. A router whose own forward was replaced is served as it is: the patch goes
    around what is there.

    Raises
    ------
    UnsupportedModelError
        If any router is bypassed.
    """
    bypassed = []
    for site in sites:
        replaced = None if site.parent is None else replaced_forward(site.parent)
        if replaced is None or site.parent is None:
            if (other := replaced_forward(site.router)) is not None:
                logger.info(
                    "router %s: its forward was replaced by %s, which stays and runs.", site.path, other
                )
            continue
        width = hidden_size(site.router)
        parameter = next(site.router.parameters(), None)
        call = router_call(site.router, site.parent)
        if width is None or parameter is None or find_patch(call.module, call.attribute) is not None:
            continue
        x_TH = torch.zeros(2, width, dtype=parameter.dtype, device=execution_device(site.router))
        with torch.no_grad():
            if call_through(site.parent, call.module, call.attribute, x_TH)[1]:
                bypassed.append((site, replaced))
    if bypassed:
        site, replaced = bypassed[0]
        raise UnsupportedModelError(
            f"router {site.path} ({type(site.router).__name__}) is never called: the forward of its block "
            f"{type(site.parent).__name__} was replaced by {replaced}, which routes by itself; {len(bypassed)} of "
            f"{len(sites)} routers are bypassed. Expected a block that calls its router: load the model with "
            "use_kernels=False (no kernel for the whole block)."
        )


def replaced_forward(module: nn.Module) -> str | None:
    """Where a module's forward comes from, if it is neither its class's own, nor ours, nor accelerate's."""
    own = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    function = getattr(own, "__func__", own)
    if own is None or isinstance(own, InstancePatch) or function is type(module).forward:
        function = inspect.unwrap(type(module).forward)
        home = getattr(function, "__module__", None)
        defined = {cls.__module__ for cls in type(module).__mro__}
        return None if home in defined or home is None else f"{home}.{function.__qualname__}"
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', '?')}.{name}"


def _routes_by_token_id(router: nn.Module) -> bool:
    """A hash router: it has nothing learned to test, the token id alone decides."""
    try:
        parameters = inspect.signature(type(router).forward).parameters
    except (TypeError, ValueError):
        return False
    wanted = parameters.get("input_ids")
    return wanted is not None and wanted.default is inspect.Parameter.empty


def _nothing_found(model: nn.Module, model_type: str | None) -> str:
    likely = sorted(
        {
            type(m).__name__
            for _, m in model.named_modules()
            if any(word in type(m).__name__.lower() for word in ("rout", "gate", "moe", "expert"))
        }
    )
    found = f"modules that look related: {', '.join(likely)}" if likely else "no module that looks like one"
    kind = f" of type {model_type!r}" if model_type else ""
    if getattr(model, "_use_kernels", False):
        found += "; its modules may have been replaced by kernels, load it with use_kernels=False"
    return (
        f"No {BARE_ROUTER} modules found, nor any other router: expected a Mixture-of-Experts model whose "
        f"layers have `experts` beside a `gate` or `router`, got {type(model).__name__}{kind} with {found}. "
        "`bh-routing families` lists what is supported."
    )
