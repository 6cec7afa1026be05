"""Files: text that is read through its compression, and the only places that write.

`write_atomically` leaves a file whole or as it was; `append_line` adds a line whole or not at all. Nothing else in the
library opens a file of a user's for writing.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DatasetError

OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text, plain or compressed (``.xz``, ``.gz``, ``.bz2``).

    Raises
    ------
    DatasetError
        If it is damaged, or no UTF-8 text.
    """
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                if "\0" in line:
                    raise ValueError
                yield line
    except ValueError:  # of which a UnicodeDecodeError is one
        raise DatasetError(f"expected UTF-8 text in {path}, got other bytes; convert the file.") from None
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the machine's, not the decompressor's
            raise
        raise DatasetError(
            f"expected {path.suffix} data in {path}, got damaged or other bytes; compress the text again."
        ) from None


def write_atomically(
    path: str | os.PathLike[str], content: bytes | str | Callable[[BinaryIO], object]
) -> None:
    """Write a file (text as UTF-8, or what a function writes), so that it is whole or as it was, whatever interrupts.

    The content goes to a file of a name of its own beside it, to the disk, and is then renamed. A symbolic link is
    followed; what is no regular file (``/dev/stdout``, a pipe) is written to as it is.

    Raises
    ------
    OSError
        With ``path`` as its file name, where the disk is full or the folder cannot be written to.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".bh-routing-{secrets.token_hex(8)}.tmp")  # no longer than a name may be
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _special(target):
            with target.open("wb") as file:
                _write(file, content)
            return
        try:
            with temporary.open("xb") as file:
                _write(file, content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _write(file: BinaryIO, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def _special(path: Path) -> bool:
    """Whether it exists and is no regular file."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with an empty folder beside ``path``, and give it that name when it is complete.

    Raises
    ------
    OSError
        If ``path`` exists and is no empty folder, or cannot be written.
    """
    temporary = path.with_name(f".bh-routing-{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a text, whole or not at all; a line that was torn before is ended first.

    Several processes may append to one file.

    Raises
    ------
    OSError
        With ``path`` as its file name.
    """
    try:
        with open(path, "a+b", buffering=0) as file, _locked(file.fileno()):
            size = file.seek(0, os.SEEK_END)
            torn = False
            if size:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            data = memoryview(b"\n" * torn + line.encode() + b"\n")
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Alone with a file, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
