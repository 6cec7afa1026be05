"""Forwards under way: what a model's forward knows and its routers do not, kept apart for every thread.

That is the batch's shape, the padding mask and the phase (`Call`). The same object knows which forwards have not
ended (`Forwards`), so that a patch is taken off a model between two forwards and never within one.

Shape legend: B sequences, S positions of this call, C positions with the cache, T = B S tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._threads import Lock, PerThread
from ..errors import PatchError
from ..policies import RoutingContext
from .instance import InstancePatch


@dataclass(eq=False)
class Call:
    """One forward.

    Attributes
    ----------
    shape : (B, S) or None
    mask_T : Tensor or None
        bool [B * S], False for padding.
    routed : bool
        False for a forward that began after its model was unpatched, while another was still running.
    counted : bool
        Whether `Forwards` waits for its end.
    outer : Call or None
        The forward around it in the same thread.
    """

    routed: bool = True
    counted: bool = False
    outer: Call | None = None
    shape: tuple[int, int] | None = None
    mask_T: Tensor | None = None

    @property
    def phase(self) -> Literal["prefill", "decode"]:
        """What it computes: one token of each sequence, or more."""
        return "decode" if self.shape is not None and self.shape[1] == 1 else "prefill"


class _Here(PerThread):
    """What the running thread is in."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.ended_B: Tensor | None = None  # sequences that `generate` has ended


class Forwards:
    """The forwards of one patched model that are under way, in all threads.

    A forward stays what it was when it began: one that runs while the patch is taken off goes on as patched, and
    the patch is taken off when the last of them has ended.
    """

    def __init__(self) -> None:
        self.here = _Here()
        self._lock = Lock()
        self._open = True
        self._running = 0
        self._afterwards: Callable[[], None] | None = None
        # Those without a mask: (the router's, the same completed), which keeps the identity in the key alive.
        self._complete: dict[tuple[int, tuple[int, int]], tuple[RoutingContext, RoutingContext]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle has no forwards under way.
        return self.__dict__ | {"_running": 0, "_afterwards": None, "_complete": {}}

    def begin(self) -> Call:
        """A forward of this thread begins."""
        here = self.here
        outer = here.call
        if torch.compiler.is_compiling():  # a graph holds all it needs
            call = Call(routed=self._open if outer is None else outer.routed, outer=outer)
        else:
            with self._lock:
                routed = self._open if outer is None else outer.routed
                call = Call(routed=routed, counted=routed, outer=outer)
                self._running += routed
        here.call = call
        return call

    def end(self, call: Call) -> None:
        """It has ended, well or not."""
        self.here.call = call.outer
        if not call.counted:
            return
        with self._lock:
            self._running -= 1
            afterwards = None if self._running else self._afterwards
            if afterwards is not None:
                self._afterwards = None
        if afterwards is not None:
            afterwards()

    def close(self, afterwards: Callable[[], None]) -> None:
        """New forwards are the unpatched model's; call ``afterwards`` once those under way have ended, now if there are none.

        Raises
        ------
        PatchError
            If the calling thread itself is within one.
        """
        call = self.here.call
        if call is not None and call.counted:
            raise PatchError(
                "the model cannot be unpatched from within its own forward (by a watcher, a hook or a policy): expected "
                "a call after the forward has returned; unpatch it then, or from another thread."
            )
        with self._lock:
            self._open = False
            if self._running:
                self._afterwards = afterwards
                return
        afterwards()

    def reopen(self) -> bool:
        """Take back a `close` whose forwards have not all ended; False if there is none."""
        with self._lock:
            if self._afterwards is None:
                return False
            self._afterwards, self._open = None, True
            return True

    @property
    def in_place(self) -> bool:
        """Whether the patch is on the model, for new forwards or for those under way."""
        return self._open or self._running > 0

    @property
    def is_open(self) -> bool:
        """Whether a forward that begins now is routed."""
        return self._open

    def complete(self, context: RoutingContext, logits_TE: Tensor) -> RoutingContext:
        """A router's context with what is known of this thread's call (nothing, if the token counts disagree)."""
        call = self.here.call
        if call is None or call.shape is None or call.shape[0] * call.shape[1] != logits_TE.shape[0]:
            return context
        mask_T = call.mask_T
        if mask_T is not None and mask_T.device != logits_TE.device:
            mask_T = mask_T.to(logits_TE.device, non_blocking=True)
        if mask_T is not None or torch.compiler.is_compiling():
            return replace(context, shape=call.shape, mask_T=mask_T, phase=call.phase)
        # Making one takes longer than looking it up, at every layer of every decoding step.
        key = (id(context), call.shape)
        found = self._complete.get(key)
        if found is None:
            if len(self._complete) >= 4096:
                self._complete.clear()
            found = self._complete[key] = (context, replace(context, shape=call.shape, phase=call.phase))
        return found[1]


CACHES = ("cache", "past_key_values")  # a forward's cache since transformers 5.24, and before


class ForwardPatch(InstancePatch):
    """Around the forward of a model (or of a lone block): tells `Forwards` when it begins, what it is, and when it ends.

    Parameters
    ----------
    causal : bool
        False for a policy that looks at whole sequences: a forward with a cache is refused.
    edges : sequence of (parent, name, child)
        The way to each router and its experts, as planned (`way_to`).
    """

    def __init__(
        self,
        module: nn.Module,
        forwards: Forwards,
        *,
        causal: bool,
        edges: Sequence[tuple[nn.Module, str, nn.Module]] = (),
    ) -> None:
        super().__init__(module)
        self.forwards, self.causal = forwards, causal
        self.edges = list(edges)
        self.checkpointed = [m for m in module.modules() if hasattr(m, "gradient_checkpointing")]
        parameters = inspect.signature(type(module).forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = tuple(p.name for p in parameters if p.kind in kinds)[1:]

    def install(self) -> None:
        super().install()
        self.module.register_forward_pre_hook(refuse_replica)

    def remove(self) -> None:
        hooks = self.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is refuse_replica]:
            del hooks[key]
        for module in self.checkpointed:
            forget_carried(module)
        super().remove()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        call = self.forwards.begin()
        try:
            if call.routed:
                self._look(call, args, kwargs)
            return self.inner(*args, **kwargs)
        finally:
            self.forwards.end(call)

    def _look(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the call, and that the modules are still those that were patched."""
        if not torch.compiler.is_compiling():
            for index, (parent, name, child) in enumerate(self.edges):
                now = parent._modules.get(name)
                if now is not child:
                    self.edges[index] = (parent, name, still_runs(now, child, name))
            if self.module.training and torch.is_grad_enabled():
                for module in self.checkpointed:
                    carry(module, self.forwards)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if not self.causal and cache is not None:
            raise PatchError(
                "the routing policy looks at a whole sequence, which generation with a cache does not have: "
                "expected a forward without past_key_values; use a causal policy to generate."
            )
        tokens = given.get("input_ids")
        if not isinstance(tokens, Tensor):
            tokens = given.get("inputs_embeds")
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        batch, length = call.shape = (tokens.shape[0], tokens.shape[1])
        mask = given.get("attention_mask")
        call.mask_T = None if mask is None else token_mask(mask, batch, length, past_length(cache))
        ended_B = self.forwards.here.ended_B
        if ended_B is not None and length == 1 and len(ended_B) == batch:
            real_T = ~ended_B.to(tokens.device)
            call.mask_T = real_T if call.mask_T is None else call.mask_T.to(tokens.device) & real_T


def refuse_replica(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: a replica of DataParallel shares its original's patch, which would run the original's weights.

    Raises
    ------
    PatchError
    """
    if getattr(module, "_is_replica", False):
        raise PatchError(
            f"a patched {type(module).__name__} was replicated by torch.nn.DataParallel, whose replicas would run the "
            "original's routers: expected DistributedDataParallel, or one device; unpatch the model before replicating it."
        )


def still_runs(now: nn.Module | None, child: nn.Module, name: str) -> nn.Module:
    """What stands in a planned module's place, if it still runs that module: a wrapper around it and nothing like it.

    Raises
    ------
    PatchError
        If it is another module, or holds a copy of it that runs in its place.
    """
    inside = [] if now is None else list(now.modules())
    if any(m is child for m in inside) and sum(type(m) is type(child) for m in inside) == 1:
        assert now is not None
        return now
    hint = " (PEFT's modules_to_save makes such copies)" if len(inside) > 1 else ""
    raise PatchError(
        f"{name} ({type(child).__name__}) was replaced by {type(now).__name__}{hint} after the model was patched, so "
        "that its routing would not be seen: unpatch the model, and patch it anew as it is now."
    )


def past_length(cache: Any) -> int | Tensor | None:
    """Positions that a cache holds before this call; None where there is none, or it does not tell."""
    length = getattr(cache, "get_seq_length", None)
    found = length() if callable(length) else None
    return found if isinstance(found, (int, Tensor)) else None


def token_mask(mask: Any, batch: int, length: int, past: int | Tensor | None = None) -> Tensor | None:
    """bool [B * S], False for padding, from whatever attention mask a model was given; None if it tells nothing.

    The mask may cover the cache too, and room in it that is not filled yet: this call's tokens are the S positions
    from ``past`` on, as far as the mask reaches. Where that is unknown: the last S of a two-dimensional mask, the first
    S of a four-dimensional one, which tells by whether a token may look at itself.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[0] not in (1, batch):
        return None
    room = mask.shape[-1] - length
    if room < 0 or (mask.dim() == 4 and (mask.shape[-2] != length or (past is None and length == 1))):
        return None
    if isinstance(past, Tensor):
        first = past.to(mask.device).clamp(max=room)
        mask = mask[..., first + torch.arange(length, device=mask.device)]
    else:
        if past is None:
            past = room if mask.dim() == 2 else 0
        start = min(past, room)
        mask = mask[..., start : start + length]
    seen_BS: Tensor
    if mask.dim() == 4:
        mask = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        seen_BS = mask if mask.dtype == torch.bool else mask == 0
    else:
        seen_BS = mask != 0
    return seen_BS.expand(batch, length).reshape(-1)


class Carried:
    """A layer's checkpointing function that takes the call along, so that the repetition in the backward pass knows it.

    The repetition runs when the forward is over, on GPUs in a thread of autograd's.
    """

    def __init__(self, inner: Callable[..., Any], forwards: Forwards) -> None:
        self.inner, self.forwards = inner, forwards

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.forwards.here.call
        if call is not None and call.routed and not torch.compiler.is_compiling():
            function = _Again(function, self.forwards, call)
        return self.inner(function, *args, **kwargs)


class _Again:
    """What is checkpointed, within the call that it belongs to."""

    def __init__(self, function: Callable[..., Any], forwards: Forwards, call: Call) -> None:
        self.function, self.forwards, self.call = function, forwards, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = self.forwards.here
        before = here.call
        if before is self.call:
            return self.function(*args, **kwargs)
        if not self.forwards.in_place:
            raise PatchError(
                "the model was unpatched between a forward and its backward pass, and gradient checkpointing would "
                "repeat the forward without the routing: run the backward pass before unpatching."
            )
        here.call = replace(self.call, counted=False, outer=None)
        try:
            return self.function(*args, **kwargs)
        finally:
            here.call = before


CHECKPOINTING = "_gradient_checkpointing_func"


def carry(module: nn.Module, forwards: Forwards) -> None:
    """Have a layer's checkpointing, where it has one, take calls along."""
    inner = module.__dict__.get(CHECKPOINTING)
    if inner is not None and not isinstance(inner, Carried):
        setattr(module, CHECKPOINTING, Carried(inner, forwards))


def forget_carried(module: nn.Module) -> None:
    """Undo `carry`."""
    found = module.__dict__.get(CHECKPOINTING)
    if isinstance(found, Carried):
        setattr(module, CHECKPOINTING, found.inner)


class GeneratePatch(InstancePatch):
    """Around ``generate``: what was ended in one is forgotten at its end."""

    def __init__(self, module: nn.Module, forwards: Forwards) -> None:
        super().__init__(module, "generate")
        self.forwards = forwards

    def run(self, *args: Any, **kwargs: Any) -> Any:
        here = self.forwards.here
        here.ended_B = None
        try:
            return self.inner(*args, **kwargs)
        finally:
            here.ended_B = None


class CriteriaPatch(InstancePatch):
    """Reads off ``generate``'s stopping criteria which sequences of a batch have ended: their rows run on as padding."""

    def __init__(self, module: nn.Module, forwards: Forwards) -> None:
        super().__init__(module, "_get_stopping_criteria")
        self.forwards = forwards

    def run(self, *args: Any, **kwargs: Any) -> Any:
        criteria = self.inner(*args, **kwargs)
        config = kwargs.get("generation_config", args[0] if args else None)
        if (getattr(config, "num_beams", None) or 1) > 1:  # rows change places
            return criteria
        kind: Any = type(criteria)
        told = telling(kind)(criteria)
        told.here = self.forwards.here
        return told


@cache
def telling(kind: type) -> Any:
    """A list of stopping criteria that also writes down what it answers."""

    class Telling(kind):
        here: Any = None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            done_B = super().__call__(*args, **kwargs)
            ended_B = self.here.ended_B
            self.here.ended_B = done_B if ended_B is None else ended_B | done_B
            return done_B

    return Telling


def way_to(root: nn.Module, modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of every step from a module down to some of those inside it, each once."""
    above = {
        id(child): (parent, name, child)
        for parent in root.modules()
        for name, child in parent.named_children()
    }
    steps: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
    for module in modules:
        while module is not root and id(module) in above:
            step = above[id(module)]
            steps[id(step[0]), step[1]] = step
            module = step[0]
    return list(steps.values())
