"""The one patching mechanism: an instance attribute ``forward`` that is a module-level callable object.

Instances are touched, never classes. The object holds its module and the forward it replaced, so that a deep
copy of a patched model uses the copy's weights, and a pickled one can be loaded. It knows accelerate's hooks,
which move a module's forward to ``_old_forward``; removed while something else still holds it, it becomes a
tombstone that passes everything through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import PatchError

_SLOTS = ("forward", "_old_forward")  # accelerate keeps the hooked forward in the second


def _slots(attribute: str) -> tuple[str, ...]:
    return _SLOTS if attribute == "forward" else (attribute,)


class InstancePatch:
    """Replaces the forward (or another method) of one module; subclasses say what runs instead, in `run`.

    Attributes
    ----------
    module : nn.Module
        The patched module.
    attribute : str
        The method that is replaced.
    active : bool
        False once removed: the object then only calls what it replaced.
    """

    def __init__(self, module: nn.Module, attribute: str = "forward") -> None:
        self.module, self.attribute = module, attribute
        self.previous: Any = None  # the instance attribute that was there, None if there was none
        self.active = False

    def install(self) -> None:
        """Put the patch in place.

        Raises
        ------
        PatchError
            If the module is already patched by this library.
        """
        if (found := find_patch(self.module, self.attribute)) is not None:
            raise PatchError(
                f"{type(self.module).__name__} is already patched ({type(found).__name__}); "
                "unpatch it first, or use set_level() to change the level of the patch in place."
            )
        slots = _slots(self.attribute)
        slot = slots[-1] if slots[-1] in self.module.__dict__ else slots[0]
        self.previous = self.module.__dict__.get(slot)
        self.active = True
        setattr(self.module, slot, self)

    def remove(self) -> None:
        """Undo `install`; safe to call twice."""
        self.active = False
        attributes = self.module.__dict__
        for slot in _slots(self.attribute):
            if attributes.get(slot) is not self:
                continue
            if self.previous is not None:
                setattr(self.module, slot, self.previous)
            elif slot == self.attribute:
                delattr(self.module, slot)
            else:  # hooked by accelerate after the patch: give it the class's own forward back
                self.module._old_forward = type(self.module).forward.__get__(self.module)

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """What the module would run without this patch."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.module), self.attribute)(self.module, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        # Trainer and generate() look at the signature of a model's methods.
        if self.previous is not None:
            return self.previous
        return getattr(type(self.module), self.attribute).__get__(self.module)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the module's forward."""
        raise NotImplementedError

    @contextmanager
    def clocked(self, now: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, float]]:
        """Measure within a ``with``: seconds in this patch, ``"run"``, and of these in what it replaced, ``"inner"``."""
        seconds = {"run": 0.0, "inner": 0.0}

        def timed(name: str) -> Callable[..., Any]:
            function = getattr(self, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                start = now()
                result = function(*args, **kwargs)
                seconds[name] += now() - start
                return result

            return call

        self.__dict__.update({name: timed(name) for name in seconds})
        try:
            yield seconds
        finally:
            for name in seconds:
                del self.__dict__[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs) if self.active else self.inner(*args, **kwargs)

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"{type(self).__name__}({type(self.module).__name__}, {state})"


@contextmanager
def installed(pieces: Iterable[Any]) -> Iterator[None]:
    """Within it these patches are in place; all that were put there are removed at its end, in reverse."""
    with ExitStack() as stack:
        for piece in pieces:
            piece.install()
            stack.callback(piece.remove)
        yield


def find_patch(module: nn.Module, attribute: str | None = None) -> InstancePatch | None:
    """The active patch of this library on a module (on one of its methods, if named), or None."""
    attributes = module.__dict__
    held = attributes.values() if attribute is None else map(attributes.get, _slots(attribute))
    return next((found for found in held if isinstance(found, InstancePatch) and found.active), None)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: its weights' device, or, for weights that accelerate has offloaded, its hook's."""
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if device.type == "meta":
        for part in module.modules():  # the hook is on whatever holds the weights
            planned = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if planned is not None:
                return torch.device("cuda", planned) if isinstance(planned, int) else torch.device(planned)
    return device
