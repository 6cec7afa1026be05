"""`route.c`, compiled once for this machine into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from ...errors import BHRoutingError

SOURCE = Path(__file__).with_name("route.c")


class LlamaCppError(BHRoutingError, RuntimeError):
    """Something inside of a decode; what llama.cpp returned then is not what was asked for."""


def cache_folder() -> Path:
    """Where the compiled file lies: the user's cache, or BH_ROUTING_CACHE."""
    given = os.environ.get("BH_ROUTING_CACHE")
    if given:
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "bh-routing"


def compiled(llama_version: str) -> ctypes.CDLL:
    """`route.c`, compiled on first use.

    Raises
    ------
    LlamaCppError
        If it cannot be compiled, or the cache is not this user's alone; the sentence says why.
    """
    return _compiled(str(cache_folder()), _compiler(), llama_version)


def _compiler() -> str:
    name = os.environ.get("CC") or "cc"
    found = shutil.which(name)
    if found is None:
        raise LlamaCppError(f"no C compiler: expected one called {name!r} (or CC=...), found none")
    return found


@lru_cache
def _compiled(folder: str, compiler: str, llama_version: str) -> ctypes.CDLL:
    version = _run([compiler, "--version"]).stdout.partition("\n")[0]
    key = "\n".join((SOURCE.read_text("utf-8"), compiler, version, llama_version, _processor()))
    path = Path(folder) / f"route-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    _own_folder(Path(folder))
    if not path.exists():
        _compile(compiler, path)
    if os.name == "posix" and (path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022):
        raise LlamaCppError(f"{path} belongs to another user, or others may write to it; remove it")
    return ctypes.CDLL(str(path))


def _own_folder(folder: Path) -> None:
    """A folder of ours that nobody else can write to: what lies there is executed."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LlamaCppError(f"the cache {folder} cannot be made ({error.strerror})") from error
    found = folder.stat()
    if os.name == "posix" and (found.st_uid != os.getuid() or found.st_mode & 0o077):
        raise LlamaCppError(
            f"the cache {folder} must be a folder of this user alone (mode 0700), it is of user {found.st_uid} with mode "
            f"{found.st_mode & 0o777:04o}; give BH_ROUTING_CACHE another one"
        )


def _compile(compiler: str, path: Path) -> None:
    """To a temporary name first, so that nobody ever loads half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        plain = [compiler, "-O3", "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"]
        done = _run([*plain, "-march=native"])
        if done.returncode:  # some compilers know no -march=native
            done = _run(plain)
        if done.returncode:
            reason = " ".join(done.stderr.split())[:300]
            raise LlamaCppError(f"{compiler} cannot compile {SOURCE.name}: {reason}")
        made.chmod(0o700)
        os.replace(made, path)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LlamaCppError(f"{command[0]} cannot be run ({error})") from error


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join(sorted(told)) or platform.machine()
