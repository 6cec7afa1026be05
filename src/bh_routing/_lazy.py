"""Imports that happen when somebody asks: names of a package, so that importing it stays cheap, and optional packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from .errors import MissingDependencyError


def lazy_names(
    namespace: dict[str, Any], module_of: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Parameters
    ----------
    namespace : dict
        The package's ``globals()``. What its ``__all__`` names is all that ``dir`` shows.
    module_of : mapping of str to str
        Public name -> the submodule that defines it. A public name that is not in there is a submodule itself.
    """
    package, public = namespace["__name__"], namespace["__all__"]

    def get(name: str) -> Any:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f".{module_of.get(name, name)}", package)
        namespace[name] = getattr(module, name) if name in module_of else module
        return namespace[name]

    def names() -> list[str]:
        return sorted({*public, *(name for name in namespace if name.startswith("__"))})

    return get, names


def needed(module: str, what: str, extra: str, otherwise: str = "") -> Any:
    """A module of an optional package, which ``what`` needs and this library's ``extra`` brings.

    Raises
    ------
    MissingDependencyError
        Where it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs {module.partition('.')[0]}, which is not installed; pip install 'bh-routing[{extra}]'{otherwise}."
        ) from error
