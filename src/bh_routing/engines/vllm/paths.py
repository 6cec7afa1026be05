"""A calibration's module paths -> vLLM's layer names.

vLLM builds its own modules: ``language_model.model.layers.3.mlp.experts`` there is
``model.language_model.layers.3.mlp.experts`` in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import CalibrationMismatchError

if TYPE_CHECKING:
    from ...calibration.data import CalibratedLayer


def match_layer(name: str, layers: Sequence[CalibratedLayer]) -> int:
    """Index of the calibrated layer that a vLLM layer is.

    Among the layers whose numbers agree (``3`` in the paths above) the one whose path of the experts has the longest
    run of common last parts with the name.

    Parameters
    ----------
    name : str
        vLLM's name of the experts' layer.
    layers : sequence of CalibratedLayer
        Of the calibration.

    Raises
    ------
    CalibrationMismatchError
        If no layer fits, or more than one as well as the best.

    Examples
    --------
    >>> from bh_routing.calibration.data import CalibratedLayer
    >>> layers = [CalibratedLayer(path=f"model.layers.{i}.mlp.gate", experts_path=f"model.layers.{i}.mlp.experts",
    ...                       top_k=8, score_func="softmax", route_norm="none") for i in range(12)]
    >>> match_layer("language_model.model.layers.11.mlp.experts", layers)
    11
    """
    parts = name.split(".")
    fitting = [
        (_common_suffix(parts, path.split(".")), index)
        for index, layer in enumerate(layers)
        if _numbers(path := layer.experts_path or layer.path) == _numbers(name)
    ]
    if not fitting:
        known = ", ".join(layer.experts_path or layer.path for layer in layers[:2])
        raise CalibrationMismatchError(
            f"the calibration has no layer for {name!r}: it has {known}{', ...' if len(layers) > 2 else ''}; "
            "calibrate this model."
        )
    longest = max(length for length, _ in fitting)
    best = [index for length, index in fitting if length == longest]
    if len(best) > 1:
        first, second = (layers[i].experts_path or layers[i].path for i in best[:2])
        raise CalibrationMismatchError(
            f"it is ambiguous which calibrated layer {name!r} is: {first!r} and {second!r} fit equally well; "
            "this model cannot be served with this calibration."
        )
    return best[0]


def _common_suffix(one: list[str], other: list[str]) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]
