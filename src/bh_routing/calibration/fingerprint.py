"""Which model a calibration was made for: projections of its routers' weights, compared within a stated distance.

Shape legend: L routed layers, D projections.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._hashing import mix64
from ..errors import CalibrationMismatchError, CalibrationWarning
from ..patching import PatchPlan
from .data import CalibrationData

PROJECTIONS = 16  # D
TOLERANCE = 2e-2  # relative: bfloat16 rounding moves a projection by about 2e-3


def fingerprint(router: nn.Module) -> Tensor:
    """Sixteen projections of a router's floating-point parameters onto fixed random signs, float64 [D].

    The sign of weight i in projection d is bit d of a hash of i, so that it depends on nothing but the order
    of the weights: copies of a model in float32 and bfloat16 agree within rounding. Weights that are sharded over
    processes are gathered (every process must ask for them), offloaded ones brought back.

    Raises
    ------
    CalibrationMismatchError
        If the weights cannot be read: they are quantised, or nowhere.
    """
    total = np.zeros(PROJECTIONS)
    first = 0
    for tensor in whole_weights(router):
        weights = tensor.to("cpu", torch.float64).flatten().numpy()
        for begin in range(0, len(weights), 1 << 16):
            part = weights[begin : begin + (1 << 16)]
            index = np.arange(first + begin, first + begin + len(part), dtype=np.uint64)
            bits = (mix64(index)[:, None] >> np.arange(PROJECTIONS, dtype=np.uint64)) & np.uint64(1)
            total += part @ (2.0 * bits - 1.0)
        first += len(weights)
    return torch.from_numpy(total)


def whole_weights(module: nn.Module) -> Iterator[Tensor]:
    """A module's parameters in the order of their names: whole, and where there are numbers to read.

    Raises
    ------
    CalibrationMismatchError
        For weights that cannot be read as numbers.
    """
    with ExitStack() as back:
        for part in module.modules():
            hook = getattr(part, "_hf_hook", None)
            if hook is not None and any(
                p.is_meta for p in part.parameters(recurse=False)
            ):  # offloaded by accelerate
                hook.pre_forward(part)
                back.callback(hook.post_forward, part, None)
        for name, parameter in sorted(module.named_parameters()):
            held = parameter.detach()
            held = held.full_tensor() if hasattr(held, "full_tensor") else held  # of a DTensor
            if held.is_meta or not held.is_floating_point():
                raise CalibrationMismatchError(
                    f"the weights {name} of {type(module).__name__} cannot be compared with a calibration's: expected "
                    f"floating-point numbers, got {'none in memory' if held.is_meta else held.dtype}; pass strict=False, or "
                    "load the routers unquantised."
                )
            yield held


def compare(found_D: Tensor, expected_D: Tensor) -> float:
    """How far apart two fingerprints are, relative to the expected one; alike up to `TOLERANCE`.

    Of several, [..., D], the largest distance; infinite for another number of them.
    """
    if found_D.shape != expected_D.shape:
        return math.inf
    return float(((found_D - expected_D).norm(dim=-1) / expected_D.norm(dim=-1).clamp_min(1e-30)).max())


def weights_differ(
    data: CalibrationData, index: int, found_D: Tensor, layer: str, otherwise: str
) -> str | None:
    """What is wrong with a router's weights, in one sentence that ends in ``otherwise``; None if nothing is."""
    distance = compare(found_D, data.fingerprint_LD[index])
    if distance <= TOLERANCE:
        return None
    return (
        f"the router weights of layer {layer} differ from those that were calibrated (fingerprints "
        f"{distance:.2g} apart, at most {TOLERANCE:g} expected): this is another model or training state than "
        f"{data.model_id}; calibrate it, or {otherwise} to use the calibration all the same."
    )


def check_layer(data: CalibrationData, index: int, layer: str, found: Mapping[str, Any]) -> None:
    """Check what a model says of a layer, by name of the field: of `LayerRecord`, or ``num_experts``.

    Raises
    ------
    CalibrationMismatchError
        Naming the layer and the field that does not fit.
    """
    for name, value in found.items():
        calibrated = getattr(data if name == "num_experts" else data.layers[index], name)
        if calibrated != value:
            raise CalibrationMismatchError(
                f"the calibration does not fit layer {layer}: {name} was {calibrated!r} when it was made, the model "
                f"has {value!r}; calibrate this model."
            )


def check_complete(data: CalibrationData, paths: Iterable[str]) -> None:
    """Raise `CalibrationMismatchError` unless every calibrated layer is one of these."""
    if absent := sorted(set(data.paths) - set(paths)):
        raise CalibrationMismatchError(
            f"the calibration is of another model ({data.model_id}): it has a layer {absent[0]!r} that this model "
            "has not; calibrate this model."
        )


def check_model(data: CalibrationData, plan: PatchPlan, *, strict: bool = True) -> None:
    """Check a calibration against a plan, as `bh_routing.Calibration.check` documents it."""
    if data.given is not None and data.given.in_order:
        return _check_shape(data, data.given.source, plan)
    theirs = {layer.path for layer in plan.layers} - set(data.left_out)
    if missing := sorted(theirs - set(data.paths)):
        raise CalibrationMismatchError(
            f"the calibration is of another model ({data.model_id}): it has no layer {missing[0]!r}, "
            f"but {', '.join(data.paths[:2])}, ...; calibrate this model."
        )
    check_complete(data, theirs)
    for site in plan.layers:
        if site.path not in theirs:
            continue
        index = data.paths.index(site.path)
        found = {
            name: getattr(site.context, name) for name in ("num_experts", "top_k", "score_func", "route_norm")
        }
        check_layer(data, index, site.path, found | {"experts_path": site.experts_path})
        try:
            found_D = fingerprint(site.router)
        except CalibrationMismatchError as error:
            wrong: str | None = str(error)
        else:
            wrong = weights_differ(data, index, found_D, site.path, "pass strict=False")
        if wrong is not None and strict:
            raise CalibrationMismatchError(wrong)
        if wrong is not None:
            warnings.warn(wrong, CalibrationWarning, stacklevel=3)


def _check_shape(data: CalibrationData, source: str, plan: PatchPlan) -> None:
    """All that can be checked where layers have no paths: how many layers and experts there are."""
    widths = {layer.context.num_experts for layer in plan.layers}
    if len(plan.layers) != data.num_layers or widths != {data.num_experts}:
        raise CalibrationMismatchError(
            f"{source} are of {data.num_layers} layers with {data.num_experts} experts, the model has "
            f"{len(plan.layers)} with {', '.join(map(str, sorted(widths)))}; take the files of this model, or give "
            "num_experts."
        )
