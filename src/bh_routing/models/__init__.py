"""The models that the package carries: one, ``olmoe-nano``, a small real OLMoE trained for demonstrations and tests.

Its folder holds what ``save_pretrained`` writes, a model card (README.md) and a calibration.
"""

from __future__ import annotations

from pathlib import Path

BUNDLED = ("olmoe-nano",)

__all__ = ["BUNDLED", "bundled_calibration", "bundled_path"]


def bundled_path(name: str = "olmoe-nano") -> Path:
    """The folder of a bundled model, for ``from_pretrained``.

    >>> bundled_path("olmoe-nano").name
    'olmoe-nano'
    """
    if name not in BUNDLED:
        from ..errors import InvalidParameterError

        raise InvalidParameterError(f"expected a bundled model, one of {', '.join(BUNDLED)}, got {name!r}.")
    return Path(__file__).parent / name


def bundled_calibration(name: str = "olmoe-nano") -> Path | None:
    """The calibration file beside a bundled model, or None where there is none."""
    path = bundled_path(name) / "calibration.safetensors"
    return path if path.is_file() else None
