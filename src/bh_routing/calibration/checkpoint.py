"""A calibration that was interrupted goes on: the sums of its passes, written to a folder every few minutes.

One file per pass and process: ``first.0.pt`` holds how many batches this process has run, a digest of the documents read
so far, and the pass's state as tensors and numbers (`torch.load` reads nothing else from it). It is written under another
name first, so that it is whole or the one before. The sums of the linear compensation are as large as
E (D + 1) (D + 1 + H) numbers per layer; they are in these files only, never in a calibration.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

import torch
from torch import Tensor

from .._files import write_atomically
from ..errors import CalibrationError
from ..text import Batch, TextStream

EVERY = 180.0  # seconds between two files


class Resumable(Protocol):
    """A pass whose sums can be written and read."""

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings, in dictionaries and lists."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class TensorSums:
    """Sums that are tensors, which are written, sent and read together: `names` in this order."""

    names: ClassVar[tuple[str, ...]]

    def parts(self) -> tuple[Tensor, ...]:
        """All of them, on the CPU."""
        return tuple(getattr(self, name).cpu() for name in self.names)

    def load(self, parts: Sequence[Tensor], device: torch.device | None = None) -> None:
        """Go on from `parts`, on this device, or where the sums are."""
        for name, part in zip(self.names, parts, strict=True):
            setattr(self, name, part.to(getattr(self, name).device if device is None else device, copy=True))


class Checkpoint:
    """The files of one pass and process.

    Parameters
    ----------
    folder : path or None
        None: nothing is written or read.
    name : str
        Of the pass.
    rank : int
        Of the process.
    settings : mapping
        All that must be the same when the calibration goes on; said in full where it is not.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, name: str, rank: int, settings: Mapping[str, Any]
    ) -> None:
        self.path = None if folder is None else Path(folder) / f"{name}.{rank}.pt"
        self.settings = {key: str(value) for key, value in settings.items()}
        self.written = time.monotonic()
        self.done, self.digest, self.complete = 0, 0, False

    def load(self, passes: Mapping[str, Resumable]) -> None:
        """Put the passes where they were; nothing happens where there is no file.

        Raises
        ------
        CalibrationError
            If the file is damaged, or of a calibration with other settings.
        """
        if self.path is None or not self.path.is_file():
            return
        try:
            held = torch.load(self.path, weights_only=True)
            settings, state = held["settings"], held["state"]
            done, digest, complete = int(held["done"]), int(held["digest"], 16), bool(held["complete"])
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
            raise CalibrationError(
                f"{self.path} cannot be read as the sums of a calibration (damaged?): {error}; remove its folder "
                "and calibrate from the beginning."
            ) from None
        for key, value in self.settings.items():
            if settings.get(key) != value:
                raise CalibrationError(
                    f"{self.path.parent} holds the sums of a calibration with {key}={settings.get(key)}, got "
                    f"{key}={value}; go on with the same arguments, or remove the folder and calibrate from the beginning."
                )
        for name, one in passes.items():
            one.load_state(state[name])
        self.done, self.digest, self.complete = done, digest, complete

    def run(
        self,
        stream: TextStream,
        passes: Mapping[str, Resumable],
        add: Callable[[Batch], None],
        advance: Callable[[int], None],
    ) -> None:
        """A pass over a stream from where it was interrupted: batches that the passes hold already are only read.

        Parameters
        ----------
        passes : mapping
            Whose sums are loaded, and written every few minutes and at the end.
        add : callable
            Takes a batch into them.
        advance : callable
            Is told the tokens of every batch.

        Raises
        ------
        CalibrationError
            As `load` and `check_text` do.
        """
        self.load(passes)
        number = 0
        for number, batch in enumerate(stream, start=1):
            if number > self.done:
                add(batch)
                self.after(number, stream.digest, passes)
            elif number == self.done:
                self.check_text(stream.digest)
            advance(batch.num_tokens)
        if number < self.done:
            self.check_text(-1)
        self.after(number, stream.digest, passes, complete=True)

    def check_text(self, digest: int) -> None:
        """Raise `CalibrationError` unless the documents read again up to there are the same."""
        if digest != self.digest:
            raise CalibrationError(
                "the text is not the one that the interrupted calibration read: go on with the same text, or remove "
                f"{self.path.parent if self.path else 'the folder'} and calibrate from the beginning."
            )

    def after(
        self, done: int, digest: int, passes: Mapping[str, Resumable], *, complete: bool = False
    ) -> None:
        """Write the state after so many of this process's batches, if it is time to."""
        if self.path is None or not (complete or time.monotonic() - self.written >= EVERY):
            return
        held = {
            "settings": self.settings,
            "done": done,
            "digest": f"{digest:032x}",
            "complete": complete,
            "state": {name: one.state() for name, one in passes.items()},
        }
        write_atomically(self.path, lambda file: _save(held, file))
        self.written = time.monotonic()


def _save(held: dict[str, Any], file: BinaryIO) -> None:
    """Piece by piece: it may be as large as the memory that is left."""
    try:
        torch.save(held, file)
    except RuntimeError as error:  # how torch tells of a disk that takes no more
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def remove(folder: str | os.PathLike[str] | None) -> None:
    """The folder of a calibration that is whole."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
