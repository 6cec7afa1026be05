"""What threads share and what each has for itself, in a form that copies and pickles of a model may hold.

A copy starts anew: an open lock, nothing remembered.
"""

from __future__ import annotations

import threading
from typing import Any


class Lock:
    """A lock for ``with``; the thread that has it may take it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class PerThread(threading.local):
    """Attributes that every thread has for itself; a subclass sets them in `__init__`, which runs in each (torch.compile
    does not see defaults of the class)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
