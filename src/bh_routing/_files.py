"""Files: text that is read through its compression, and writing that leaves a file whole or as it was."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import DatasetError

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


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Call ``write(temporary_path)`` and rename the result, so that ``path`` is whole or unchanged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's own default; some writers make files for the user alone
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
