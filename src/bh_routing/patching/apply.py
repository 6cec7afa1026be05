"""Apply a plan and undo it: all or nothing, instances only, restored bit for bit.

Shape legend: T tokens, E experts, K slots per token, H hidden size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .._words import Skip, check_word
from ..decision.compensation import Compensation, with_addition
from ..errors import PatchError, UnsupportedModelError
from ..policies import RoutingPolicy
from ..telemetry.figures import Telemetry
from . import experts as skip_aware
from .calls import Forwards
from .checkpointing import forget_carried
from .discovery import replaced_forward
from .forward import ForwardPatch, way_to
from .generation import BeamsPatch, CriteriaPatch, GeneratePatch
from .implementation import ImplementationPatch
from .instance import InstancePatch, execution_device, find_patch
from .plan import LayerPlan, PatchPlan
from .planning import refresh
from .reach import marks_arrive
from .router import Link, RouterPatch, Watchers

logger = logging.getLogger(__name__)


class ExpertsPatch(InstancePatch):
    """Compacts the pairs in front of experts outside the registry, and adds the compensation."""

    def __init__(
        self, layer: LayerPlan, link: Link | None, *, compensation: Compensation | None, compact: bool
    ) -> None:
        assert layer.experts is not None
        super().__init__(layer.experts)
        self.ids, self.path = layer.ids, layer.path
        self.link, self.compensation, self.compact = link, compensation, compact

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        added_TH = None
        if self.link is not None and self.compensation is not None:
            decision, self.link.decision = self.link.decision, None
            if decision is not None:
                # Before the experts, whose weights empty the caches: behind them it takes a fifth longer.
                added_TH = self.compensation.addition(decision, hidden_states.dtype)
        if self.compact:
            out_TH = skip_aware.compacted(self.inner, self.ids, hidden_states, top_k_index, top_k_weights)
        else:
            out_TH = self.inner(hidden_states, top_k_index, top_k_weights)
        return with_addition(out_TH, added_TH)


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
        self.forwards = Forwards()
        self._pieces: list[Any] = []

    def apply(self) -> None:
        """Install every piece, or none.

        Raises
        ------
        PatchError
            If a router or its experts are patched already, or the model is no longer what was planned.
        UnsupportedModelError
            If dropped experts cannot be handled as asked for.
        """
        if self.applied:
            raise PatchError(
                "the model is patched by this integration already: call unpatch_model() first, or set_level() for another level."
            )
        if self.forwards.reopen():  # taken off, but for a forward in another thread
            return
        refresh(self.plan)
        for layer in self.plan.layers:
            for path, module in ((layer.path, layer.call.module), (layer.experts_path, layer.experts)):
                if module is not None and (found := find_patch(module)) is not None:
                    raise PatchError(
                        f"{path} is already patched ({type(found).__name__}); unpatch the model first "
                        "(bh_routing.unpatch(model)), or use set_level() on the integration that patched it. A forward "
                        "that began before unpatching in another thread keeps the patch until it ends."
                    )
        self.forwards = Forwards()
        pieces = self._build()
        self.forwards.pass_over(self.plan.owners)
        try:
            for piece in pieces:
                piece.install()
                self._pieces.append(piece)
        except BaseException:
            self._take_off()
            raise

    def _build(self) -> list[Any]:
        pieces: list[Any] = []
        reasons: list[str] = []
        forwards = self.forwards
        causal = self.policy.causal or not self.change
        inside = [m for x in self.plan.layers for m in (x.call.module, x.experts) if m is not None]
        for owner in self.plan.owners:
            pieces.append(ForwardPatch(owner, forwards, causal=causal, edges=way_to(owner, inside)))
        for module in self.plan.generating:
            pieces += [GeneratePatch(module, forwards), CriteriaPatch(module, forwards)]
            if hasattr(module, "_check_early_stop_heuristic"):
                pieces.append(BeamsPatch(module, forwards))
        for layer in self.plan.layers:
            compensation = self.compensations.get(layer.path)
            link = Link() if compensation is not None and self.change else None
            mode, reason = skip_mode(layer, self.skip) if self.change else ("watch", None)
            if reason is not None:
                reasons.append(reason)
            if mode == "registry":
                pieces.append(ImplementationPatch(layer.experts))  # type: ignore[arg-type]
            if mode == "wrapper" or link is not None:
                if compensation is not None:
                    assert layer.experts is not None
                    if marks_arrive(layer, dispatched=False) is False:
                        raise UnsupportedModelError(
                            f"{layer.experts_path} ({type(layer.experts).__name__}) is not called by its block with what "
                            "the router decided, so that nothing can stand in for dropped experts there: expected "
                            "compensation=False for this model."
                        )
                    dtype = next(layer.experts.parameters()).dtype
                    compensation = compensation.to(execution_device(layer.experts), dtype)
                pieces.append(ExpertsPatch(layer, link, compensation=compensation, compact=mode == "wrapper"))
            pieces.append(
                RouterPatch(
                    layer,
                    self.policy,
                    forwards=forwards,
                    telemetry=self.telemetry,
                    link=link,
                    change=self.change,
                    watchers=self.watchers,
                )
            )
        if reasons:
            logger.warning(
                "%s: dropped experts keep their index and get weight 0 there (skip='zero'), which saves no time%s.",
                reasons[0],
                f"; the same for {len(reasons) - 1} more layers" if len(reasons) > 1 else "",
            )
        return pieces

    def set_policy(self, policy: RoutingPolicy) -> None:
        """Let another policy decide, bound to the same routers, with as many slots and the same rule of weights."""
        self.policy = policy
        for piece in self._pieces:
            if isinstance(piece, RouterPatch):
                piece.policy, piece.checked = policy, False

    def set_compensations(self, compensations: Mapping[str, Compensation]) -> None:
        """Write others, of the same routers and forms, into the same buffers."""
        self.compensations = dict(compensations)
        for piece in self._pieces:
            if isinstance(piece, ExpertsPatch) and piece.compensation is not None:
                piece.compensation.copy_(self.compensations[piece.path])

    def remove(self) -> None:
        """Undo everything, at the latest when the forwards that run in other threads have ended.

        They go on as patched; those that begin from now on are the unpatched model's.

        Raises
        ------
        PatchError
            If it is called from within a forward of the patched model.
        """
        if self._pieces:
            self.forwards.close(self._take_off)

    def _take_off(self) -> None:
        """Remove every piece, in reverse; each is tried even if one fails. Copies made of patched modules lose theirs."""
        failure: BaseException | None = None
        while self._pieces:
            piece = self._pieces.pop()
            try:
                piece.remove()
                for parent, name, child in getattr(piece, "edges", ()):
                    now = parent._modules.get(name)
                    if now is not None and now is not child:
                        unpatch(now)
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure

    @property
    def applied(self) -> bool:
        """Whether the plan is in place for forwards that begin now."""
        return bool(self._pieces) and self.forwards.is_open


def skip_mode(layer: LayerPlan, skip: Skip) -> tuple[str, str | None]:
    """How this layer's empty slots are kept out, and why not at a gain where they are not.

    ``"registry"``: by the skip-aware implementation; ``"wrapper"``: in front of the module; ``"zero"``: by weight
    0 alone. Either of the first two only where a call of the block has not shown that they would not be reached.

    Raises
    ------
    UnsupportedModelError
        If ``skip="compact"`` is asked for where it is not possible.
    """
    experts = layer.experts
    if skip == "zero":
        return "zero", None
    if experts is None:
        return "zero", None
    assert layer.experts_path is not None
    reason = skip_aware.why_not_compact(experts, layer.ids, layer.experts_path) or _unreached(layer)
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


def _unreached(layer: LayerPlan) -> str | None:
    """Why what would leave pairs out is not reached, as a sentence without its full stop."""
    assert layer.experts is not None
    kind = f"{layer.experts_path} ({type(layer.experts).__name__})"
    registry = skip_aware.uses_registry(layer.experts)
    other = replaced_forward(layer.experts)
    if marks_arrive(layer, dispatched=registry) is False or (other is not None and not registry):
        if other is not None:
            return f"the forward of {kind} was replaced by {other}, which computes every pair it is given"
        return f"{kind} is not called by its block, {type(layer.block).__name__}, which runs the experts by itself"
    return None


def is_patched(model: nn.Module) -> bool:
    """Whether any router of the model carries an active patch of this library."""
    return any(_active(find_patch(module)) for module in model.modules())


def _active(found: InstancePatch | None) -> bool:
    """A patch that is left for the forwards of other threads alone does not count."""
    forwards = getattr(found, "forwards", None)
    return found is not None and (forwards is None or forwards.is_open)


def unpatch(model: nn.Module) -> int:
    """Remove every patch of this library from a model, also from a deep copy or a loaded pickle of a patched one.

    Returns the number of pieces removed.
    """
    modules = list(model.modules())
    patches = [value for m in modules for value in m.__dict__.values() if isinstance(value, InstancePatch)]
    swapped = [m for m in modules if skip_aware.STOCK in m.__dict__]
    removed = sum(patch.active for patch in patches) + len(swapped)

    def take_off() -> None:
        for module in modules:
            while (found := find_patch(module)) is not None:
                found.remove()
            if skip_aware.STOCK in module.__dict__:
                piece = ImplementationPatch(module)
                piece.config = copy.copy(module.config)
                piece.config._experts_implementation_internal = getattr(module, skip_aware.STOCK)
                piece.remove()
            forget_carried(module)

    undo: Callable[[], None] = take_off
    for forwards in {id(f): f for patch in patches if (f := getattr(patch, "forwards", None))}.values():
        undo = partial(forwards.close, undo)
    undo()
    return removed


__all__ = ["RoutingPatch", "is_patched", "skip_mode", "unpatch"]
