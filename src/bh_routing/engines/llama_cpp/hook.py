"""The callback of one context, which asks whoever is in charge: nobody, the routing in C, or something in Python.

A callback of ctypes that raises, and one that returns False when it was to look, end nothing: llama_decode returns 0 and
nonsense. So what goes wrong is kept, and raised after the decode.
"""

from __future__ import annotations

import ctypes
from typing import Any

from .ggml import Callback
from .shim import GgmlTensor

_KIND = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class Hook:
    """What cb_eval is set to. Keep it alive as long as the context.

    Parameters
    ----------
    lib : CDLL or None
        `bh_routing.engines.llama_cpp.shim.library`; without it every node is asked about in Python.
    """

    def __init__(self, lib: ctypes.CDLL | None) -> None:
        self.lib = lib
        self.error: BaseException | None = None
        self._python: Callback | None = None
        self._function = _KIND(self._call)
        self._cell: Any = None
        if lib is None:
            self.function, self.user = ctypes.cast(self._function, ctypes.c_void_p).value or 0, None
        else:
            self._cell = lib.bh_hook_new()
            self.function = ctypes.cast(lib.bh_hook, ctypes.c_void_p).value or 0
            self.user = self._cell

    def to_python(self, callback: Callback) -> None:
        """Ask this from now on."""
        self._python = callback
        if self.lib is not None:
            self.lib.bh_hook_set(self._cell, ctypes.cast(self._function, ctypes.c_void_p), None)

    def to_c(self, function: int, state: int) -> None:
        """Ask this function of `route.c` from now on."""
        assert self.lib is not None
        self.lib.bh_hook_set(self._cell, function, state)

    def to_nobody(self) -> None:
        """The model as it is."""
        self._python = None
        if self.lib is not None:
            self.lib.bh_hook_set(self._cell, None, None)

    def _call(self, node: int, ask: bool, _user: Any) -> bool:
        if self._python is None:
            return False
        try:
            return self._python(GgmlTensor.from_address(node), ask)
        except BaseException as error:
            self.error = self.error or error
            return not ask

    def raise_error(self) -> None:
        """After a decode: raise what went wrong in Python."""
        error, self.error = self.error, None
        if error is not None:
            raise error
