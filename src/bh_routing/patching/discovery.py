"""Find the routers of a model: by what transformers records as router logits, and by structure.

Two rules are united (docs/families.md has the evidence): modules of a class that some submodel of the model
records as ``router_logits``, and children ``gate`` or ``router`` of a parent that also has ``experts``. A
module whose class is called exactly ``OlmoeTopKRouter`` counts without either, so that a bare mock works.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..errors import NoRoutersError, UnsupportedModelError

BARE_ROUTER = "OlmoeTopKRouter"

# Families whose contract cannot be served, by config.model_type, and why.
REFUSED: dict[str, str] = {
    "llama4": "its scores multiply the experts' input and all experts run on all tokens, so that nothing "
    "can be skipped",
    "llama4_text": "its scores multiply the experts' input and all experts run on all tokens, so that nothing "
    "can be skipped",
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
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"{model_type} models cannot be routed by this library: {REFUSED[model_type]}."
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
    return (
        f"No {BARE_ROUTER} modules found, nor any other router: expected a Mixture-of-Experts model whose "
        f"layers have `experts` beside a `gate` or `router`, got {type(model).__name__}{kind} with {found}. "
        "`bh-routing families` lists what is supported."
    )
