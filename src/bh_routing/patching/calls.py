"""Forwards under way: what a model's forward knows and its routers do not, kept apart for every thread.

That is the batch's shape, the padding mask and the phase (`Call`). The same object knows which forwards have not
ended (`Forwards`), so that a patch is taken off a model between two forwards and never within one.

Shape legend: B sequences, S positions of this call, C positions with the cache, T = B S tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .._threads import Lock, PerThread
from .._words import Phase
from ..decision.price import Step
from ..errors import PatchError
from ..policies import RoutingContext


@dataclass(eq=False)
class Call:
    """One forward.

    Attributes
    ----------
    shape : (B, S) or None
    mask_T : Tensor or None
        bool [B * S], False for padding.
    cached : bool
        Whether a cache holds tokens before these.
    routed : bool
        False for a forward that began after its model was unpatched, while another was still running.
    counted : bool
        Whether `Forwards` waits for its end.
    outer : Call or None
        The forward around it in the same thread.
    step : Step or None
        Which tokens are decoded together: those of one query per sequence with a cache; in `as_steps` the columns of a
        batch.
    """

    routed: bool = True
    counted: bool = False
    outer: Call | None = None
    shape: tuple[int, int] | None = None
    mask_T: Tensor | None = None
    cached: bool = False
    step: Step | None = None

    @property
    def phase(self) -> Phase:
        """What it computes: one token of each sequence after those in its cache, or (part of) a prompt."""
        return "decode" if self.cached and self.shape is not None and self.shape[1] == 1 else "prefill"


class _Columns(PerThread):
    """Whether the running thread is within `as_steps`, and from which column on."""

    def __init__(self) -> None:
        self.first: int | None = None


_columns = _Columns()


@contextmanager
def as_steps(first: int = 0) -> Iterator[None]:
    """Within it, the columns of a batch [B, S] that comes without a cache are decoding steps, from this one on.

    Of every patched model, in this thread: so a teacher-forced batch is routed and counted as if it were decoded.
    """
    before, _columns.first = _columns.first, first
    try:
        yield
    finally:
        _columns.first = before


def step_of(cache: Any, batch: int, length: int, device: torch.device) -> Step | None:
    """The tokens of one query per sequence with a cache that holds something; in `as_steps` those of each column."""
    first = _columns.first
    if first is not None and cache is None:
        priced_T = (torch.arange(length, device=device) >= first).repeat(batch) if first else None
        return Step(shape=(batch, length), tokens=batch, priced_T=priced_T)
    if length != 1 or cache is None:
        return None
    past = past_length(cache)
    return None if isinstance(past, int) and not past else Step(shape=(batch, 1), tokens=batch)


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
        self._before: set[int] = set()  # threads in a forward that began before the patch
        # Those without a mask: (the router's, the same completed), which keeps the identity in the key alive.
        self._complete: dict[
            tuple[int, tuple[int, int], Phase, bool], tuple[RoutingContext, RoutingContext]
        ] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle has no forwards under way.
        return self.__dict__ | {"_running": 0, "_afterwards": None, "_before": set(), "_complete": {}}

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
        if self._before:
            self._before.discard(get_ident())
        return call

    def pass_over(self, modules: Iterable[nn.Module]) -> None:
        """Forwards of these modules that are under way now, in any thread, stay the unpatched model's."""
        inside = {id(module) for module in modules}
        for thread, frame in sys._current_frames().items():
            at: FrameType | None = frame
            while at is not None and id(at.f_locals.get("self")) not in inside:
                at = at.f_back
            if at is not None:
                self._before.add(thread)

    @property
    def began_before(self) -> bool:
        """Whether this thread is in a forward that began before the patch."""
        return bool(self._before) and get_ident() in self._before

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
        step = call.step
        if step is not None and step.priced_T is not None:
            step = replace(step, priced_T=step.priced_T.to(logits_TE.device))
        if (
            mask_T is not None
            or torch.compiler.is_compiling()
            or (step is not None and step.priced_T is not None)
        ):
            return replace(context, shape=call.shape, mask_T=mask_T, phase=call.phase, step=step)
        # Making one takes longer than looking it up, at every layer of every decoding step.
        key = (id(context), call.shape, call.phase, step is not None)
        found = self._complete.get(key)
        if found is None:
            if len(self._complete) >= 4096:
                self._complete.clear()
            known = replace(context, shape=call.shape, phase=call.phase, step=step)
            found = self._complete[key] = (context, known)
        return found[1]


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
