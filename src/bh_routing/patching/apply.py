"""Apply a plan and undo it: all or nothing, instances only, restored bit for bit.

Shape legend: T tokens, E experts, K slots per token, H hidden size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._words import Skip, check_word
from ..decision.compensation import Compensation
from ..decision.types import RoutingDecision
from ..errors import PatchError, UnsupportedModelError
from ..policies import RoutingContext, RoutingPolicy, check_decision
from ..telemetry.counters import in_graph
from ..telemetry.figures import Telemetry
from . import experts as skip_aware
from .adapters import flat_experts
from .forward import ForwardInfo, ForwardObserver, find_observers
from .instance import InstancePatch, execution_device, find_patch
from .plan import LayerPlan, PatchPlan

logger = logging.getLogger(__name__)


class Watchers(list[Callable[..., None]]):
    """Functions ``f(router, context, decision, logits_TE)`` that see every decision of a patched model, with its graph.

    A copy or a pickle of the model is not watched: watchers belong to whoever added them.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Watchers:
        return Watchers()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watchers, ()


class _Link:
    """What a router's patch hands to the patch of the experts beside it, within one forward."""

    def __init__(self) -> None:
        self.decision: RoutingDecision | None = None


class RouterPatch(InstancePatch):
    """Runs the router, lets the policy decide, counts, and returns the router's value with that decision."""

    def __init__(
        self,
        layer: LayerPlan,
        context: RoutingContext,
        policy: RoutingPolicy,
        *,
        info: ForwardInfo | None,
        telemetry: Telemetry | None,
        link: _Link | None,
        change: bool,
        keep_indices: bool,
        watchers: Watchers,
    ) -> None:
        super().__init__(layer.call.module, layer.call.attribute)
        self.layer, self.context, self.policy = layer, context, policy
        self.info, self.telemetry, self.link = info, telemetry, link
        self.change, self.keep_indices, self.watchers = change, keep_indices, watchers
        self.checked = False  # the first decision is looked at, later ones are trusted

    def run(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.inner(*args, **kwargs)
        logits_TE, weights_TK, experts_TK = self.layer.read(outputs, args, kwargs)
        if logits_TE.device != self.context.device:
            raise PatchError(
                f"{self.layer.path}: expected router logits on {self.context.device}, where it was patched, got "
                f"{logits_TE.device}; unpatch the model before moving it, and patch it anew."
            )
        context = self.context if self.info is None else self.info.complete(self.context, logits_TE)
        factors_E = self.layer.expert_factors_E
        if factors_E is None:
            decision = self.policy.decide(logits_TE, weights_TK, experts_TK, context)
        else:
            decision = decide_with_factors(self.policy, logits_TE, weights_TK, experts_TK, context, factors_E)
        if not in_graph(logits_TE) and not self.checked:
            check_decision(decision, self.policy, weights_TK, experts_TK, context)
            self.checked = True
        if self.telemetry is not None:
            self.telemetry.update(context, decision, logits_TE)
        for watcher in self.watchers:
            watcher(self.layer.router, context, decision, logits_TE)
        if not self.change:
            return outputs
        if self.link is not None:
            self.link.decision = decision
        chosen_TK = decision.experts_TK
        if self.keep_indices:  # skip="zero": an index the experts know, with weight 0
            spare_TK = experts_TK if chosen_TK.shape == experts_TK.shape else experts_TK[:, :1]
            chosen_TK = torch.where(chosen_TK == context.empty, spare_TK, chosen_TK)
        return self.layer.replace(outputs, args, kwargs, decision.weights_TK, chosen_TK)


def decide_with_factors(
    policy: RoutingPolicy,
    logits_TE: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    context: RoutingContext,
    factors_E: Tensor,
) -> RoutingDecision:
    """Decide on weights before a router's factors per expert, and put the factors back.

    Such a router renormalises first and multiplies afterwards: the rule that renormalises over the kept experts
    must see the weights in between. Rows of which nothing was dropped stay the router's own, bit for bit.
    """
    factors_TK = factors_E.to(weights_TK.dtype)[experts_TK]
    decision = policy.decide(logits_TE, weights_TK / factors_TK, experts_TK, context)
    whole_T1 = ~decision.dropped_TK.any(-1, keepdim=True)
    return replace(
        decision,
        weights_TK=torch.where(whole_T1, weights_TK, decision.weights_TK * factors_TK),
        own_weights_TK=weights_TK,
    )


class ExpertsPatch(InstancePatch):
    """Compacts the pairs in front of experts outside the registry, and adds the compensation."""

    def __init__(
        self, layer: LayerPlan, link: _Link | None, *, compensation: Compensation | None, compact: bool
    ) -> None:
        assert layer.experts is not None
        super().__init__(layer.experts)
        self.ids, self.path = layer.ids, layer.path
        self.link, self.compensation, self.compact = link, compensation, compact

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.compact:
            out_TH = skip_aware.compacted(self.inner, self.ids, hidden_states, top_k_index, top_k_weights)
        else:
            out_TH = self.inner(hidden_states, top_k_index, top_k_weights)
        if self.link is None or self.compensation is None:
            return out_TH
        decision, self.link.decision = self.link.decision, None
        if decision is None:
            return out_TH
        return out_TH + self.compensation.addition(decision).to(out_TH.dtype).reshape(out_TH.shape)


class ImplementationPatch:
    """Gives one experts module a config of its own that names the skip-aware implementation.

    ``set_experts_implementation`` would write the shared config object, and a second model that uses it
    would notice.
    """

    def __init__(self, experts: nn.Module) -> None:
        self.module: Any = experts
        self.config: Any = None

    def install(self) -> None:
        skip_aware.register()
        self.config = self.module.config
        own = copy.copy(self.config)
        own._experts_implementation_internal = skip_aware.IMPLEMENTATION
        setattr(self.module, skip_aware.STOCK, self.config._experts_implementation)
        self.module.config = own

    def remove(self) -> None:
        if self.config is not None:
            self.module.config = self.config
            delattr(self.module, skip_aware.STOCK)
            self.config = None


class RoutingPatch:
    """Handle of an applied plan. `remove` undoes it, in reverse, and may be called twice.

    Parameters
    ----------
    plan : PatchPlan
    policy : RoutingPolicy
        Bound to the plan's routers here.
    telemetry : Telemetry, optional
    change : bool
        False: only watch (the routers return what they would have returned).
    skip : "auto", "compact" or "zero"
        ``compact``: dropped pairs cost nothing. ``zero``: they keep their index and get weight 0, which is
        safe everywhere and saves nothing. ``auto``: ``compact`` wherever the experts allow it.
    compensations : mapping of router path to Compensation, optional
        What stands in for dropped experts; the plan must be one for it (`PatchPlan.compensated`).
    """

    def __init__(
        self,
        plan: PatchPlan,
        policy: RoutingPolicy,
        *,
        telemetry: Telemetry | None = None,
        change: bool = True,
        skip: Skip = "auto",
        compensations: Mapping[str, Compensation] | None = None,
    ) -> None:
        check_word("skip", skip, Skip)
        self.plan, self.policy, self.telemetry = plan, policy, telemetry
        self.change, self.skip, self.compensations = change, skip, dict(compensations or {})
        self.watchers = Watchers()
        self._pieces: list[Any] = []

    def apply(self) -> None:
        """Install every piece, or none.

        Raises
        ------
        PatchError
            If a router or its experts are patched already.
        """
        if self._pieces:
            raise PatchError("this patch is applied already; remove() it first.")
        for layer in self.plan.layers:
            for path, module in ((layer.path, layer.call.module), (layer.experts_path, layer.experts)):
                if module is not None and (found := find_patch(module)) is not None:
                    raise PatchError(
                        f"{path} is already patched ({type(found).__name__}); unpatch the model first "
                        "(bh_routing.unpatch(model)), or use set_level() on the integration that patched it."
                    )
        pieces = self._build()
        try:
            for piece in pieces:
                self._pieces.append(piece)
                piece.install()
        except BaseException:
            self.remove()
            raise

    def _build(self) -> list[Any]:
        pieces: list[Any] = []
        reasons: list[str] = []
        infos: dict[int, ForwardInfo] = {}
        for layer in self.plan.layers:
            owner = layer.owner
            if owner is not None and id(owner) not in infos:
                observer = ForwardObserver(owner, causal=self.policy.causal or not self.change)
                infos[id(owner)] = observer.info
                pieces.append(observer)
        for layer in self.plan.layers:
            compensation = self.compensations.get(layer.path)
            link = _Link() if compensation is not None and self.change else None
            mode, reason = skip_mode(layer, self.skip) if self.change else ("watch", None)
            if reason is not None:
                reasons.append(reason)
            pieces.append(
                RouterPatch(
                    layer,
                    layer.context,
                    self.policy,
                    info=infos.get(id(layer.owner)),
                    telemetry=self.telemetry,
                    link=link,
                    change=self.change,
                    keep_indices=mode == "zero",
                    watchers=self.watchers,
                )
            )
            if mode == "registry":
                pieces.append(ImplementationPatch(layer.experts))  # type: ignore[arg-type]
            if mode == "wrapper" or link is not None:
                if compensation is not None:
                    assert layer.experts is not None
                    dtype = next(layer.experts.parameters()).dtype
                    compensation = compensation.to(execution_device(layer.experts), dtype)
                pieces.append(ExpertsPatch(layer, link, compensation=compensation, compact=mode == "wrapper"))
        if reasons:
            logger.warning(
                "%s: dropped experts keep their index and get weight 0 there (skip='zero'), which saves no time%s.",
                reasons[0],
                f"; the same for {len(reasons) - 1} more layers" if len(reasons) > 1 else "",
            )
        return pieces

    def set_compensations(self, compensations: Mapping[str, Compensation]) -> None:
        """Write others, of the same routers and forms, into the same buffers."""
        self.compensations = dict(compensations)
        for piece in self._pieces:
            if isinstance(piece, ExpertsPatch) and piece.compensation is not None:
                piece.compensation.copy_(self.compensations[piece.path])

    def remove(self) -> None:
        """Undo everything, in reverse; every piece is tried even if one fails."""
        failure: BaseException | None = None
        while self._pieces:
            try:
                self._pieces.pop().remove()
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure

    @property
    def applied(self) -> bool:
        """Whether the plan is in place."""
        return bool(self._pieces)


def skip_mode(layer: LayerPlan, skip: Skip) -> tuple[str, str | None]:
    """How this layer's empty slots are kept out, and why not at a gain where they are not.

    ``"registry"``: by the skip-aware implementation; ``"wrapper"``: in front of the module; ``"zero"``: by weight
    0 alone; ``"index"``: a bare mock has no experts.

    Raises
    ------
    UnsupportedModelError
        If ``skip="compact"`` is asked for where it is not possible.
    """
    experts = layer.experts
    if skip == "zero":
        return "zero", None
    if experts is None:
        return "index", None
    assert layer.experts_path is not None
    reason = skip_aware.why_not_compact(experts, layer.ids, layer.experts_path)
    if reason is not None:
        if skip == "compact":
            raise UnsupportedModelError(
                f"{reason}: expected skip='auto' or 'zero' (weight 0, index kept), got skip='compact'."
            )
        return "zero", reason
    if not skip_aware.uses_registry(experts):
        return "wrapper", None
    if skip_aware.knows_implementation(experts):
        return "registry", None
    if skip == "compact":
        return "wrapper", None
    name = experts.config._experts_implementation  # type: ignore[union-attr]
    return "zero", (
        f"{layer.experts_path} runs the experts implementation {name!r}, which cannot leave pairs out by itself "
        "(skip='compact' takes them out in front of it, which synchronises a GPU)"
    )


def is_patched(model: nn.Module) -> bool:
    """Whether any router of the model carries an active patch of this library."""
    return any(find_patch(module) is not None for module in model.modules())


def unpatch(model: nn.Module) -> int:
    """Remove every patch of this library from a model, also from a deep copy or a loaded pickle of a patched one.

    Returns the number of pieces removed.
    """
    removed = 0
    for module in model.modules():
        while (found := find_patch(module)) is not None:
            found.remove()
            removed += 1
        if hasattr(module, skip_aware.STOCK):
            piece = ImplementationPatch(module)
            piece.config = copy.copy(module.config)
            piece.config._experts_implementation_internal = getattr(module, skip_aware.STOCK)
            piece.remove()
            removed += 1
        for observer in find_observers(module):
            observer.remove()
            removed += 1
    return removed


class _Watch(InstancePatch):
    """Shows a router's own choice to a function, changing nothing."""

    def __init__(self, layer: LayerPlan, info: ForwardInfo | None, on_choice: Callable[..., None]) -> None:
        super().__init__(layer.call.module, layer.call.attribute)
        self.layer, self.info, self.on_choice = layer, info, on_choice

    def run(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.inner(*args, **kwargs)
        logits_TE, weights_TK, experts_TK = self.layer.read(outputs, args, kwargs)
        context = self.layer.context
        if self.info is not None:
            context = self.info.complete(context, logits_TE)
        self.on_choice(self.layer, logits_TE, weights_TK, experts_TK, context.mask_T)
        return outputs


class _Around(InstancePatch):
    """Hands an experts forward to a function that calls it."""

    def __init__(self, layer: LayerPlan, around: Callable[..., Tensor]) -> None:
        assert layer.experts is not None
        super().__init__(layer.experts)
        self.layer, self.around = layer, around

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        inner = flat_experts(self.inner, self.layer.ids)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        out_TH = self.around(self.layer, inner, hidden_TH, top_k_index, top_k_weights)
        return out_TH.reshape(hidden_states.shape)


@contextmanager
def watch(
    plan: PatchPlan,
    on_choice: Callable[[LayerPlan, Tensor, Tensor, Tensor, Tensor | None], None],
    around_experts: Callable[[LayerPlan, skip_aware.ExpertsForward, Tensor, Tensor, Tensor], Tensor]
    | None = None,
) -> Iterator[None]:
    """Watch a model's own routing within a ``with`` block; the model is restored at its end.

    Parameters
    ----------
    on_choice : callable
        ``f(layer, logits_TE, own_weights_TK, own_experts_TK, mask_T)`` after each router call; ``mask_T`` is
        bool [T], False for padding, or None where unknown.
    around_experts : callable, optional
        ``g(layer, inner, hidden_TH, experts_TK, weights_TK) -> out_TH`` in place of each experts forward.
    """
    pieces: list[Any] = []
    infos: dict[int, ForwardInfo] = {}
    try:
        for layer in plan.layers:
            if layer.owner is not None and id(layer.owner) not in infos:
                observer = ForwardObserver(layer.owner, causal=True)
                infos[id(layer.owner)] = observer.info
                pieces.append(observer)
                observer.install()
        for layer in plan.layers:
            patches: list[InstancePatch] = [_Watch(layer, infos.get(id(layer.owner)), on_choice)]
            if around_experts is not None and layer.experts is not None:
                patches.append(_Around(layer, around_experts))
            for patch in patches:
                pieces.append(patch)
                patch.install()
        yield
    finally:
        for piece in reversed(pieces):
            piece.remove()


def special_ids(model: nn.Module) -> set[int]:
    """Token ids that a model's configuration gives a meaning of their own, those of images among them."""
    config: Any = getattr(model, "config", None)
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    return {
        value
        for part in parts
        for name, value in getattr(part, "__dict__", {}).items()
        if "token" in name and isinstance(value, int)
    }


def reached_by_text(model: nn.Module, plan: PatchPlan) -> set[str]:
    """Paths of the routers that a forward of two text tokens calls.

    Routers of a vision tower, or of experts for image tokens only, are not among them; neither are those that a
    kernel for the whole block bypasses.
    """
    special = special_ids(model)
    tokens = [i for i in range(len(special) + 2) if i not in special][:2]
    seen: set[str] = set()
    device = execution_device(model)
    with torch.no_grad(), watch(plan, lambda layer, *_: seen.add(layer.path)):
        model(input_ids=torch.tensor([tokens], device=device), use_cache=False)
    return seen


__all__ = ["RoutingPatch", "is_patched", "reached_by_text", "skip_mode", "special_ids", "unpatch", "watch"]
