"""Which model a calibration was made for: projections of its routers' weights, compared within a stated distance.

Shape legend: L routed layers, D projections.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CalibrationMismatchError, CalibrationWarning
from ..text import mix64
from .calibration import Calibration

if TYPE_CHECKING:
    from ..patching import PatchPlan


PROJECTIONS = 16  # D


TOLERANCE = 2e-2  # relative: bfloat16 rounding moves a projection by about 2e-3


# ---------------------------------------------------------------------------------------------------------
# Against a model
# ---------------------------------------------------------------------------------------------------------


def fingerprint(router: nn.Module) -> Tensor:
    """Sixteen projections of a router's floating-point parameters onto fixed random signs, float64 [D].

    The sign of weight i in projection d is bit d of a hash of i, so that it depends on nothing but the order
    of the weights: copies of a model in float32 and bfloat16 agree within rounding.
    """
    total = np.zeros(PROJECTIONS)
    first = 0
    for _, parameter in sorted(router.named_parameters()):
        if not parameter.is_floating_point():
            continue
        weights = parameter.detach().to("cpu", torch.float64).flatten().numpy()
        for begin in range(0, len(weights), 1 << 16):
            part = weights[begin : begin + (1 << 16)]
            index = np.arange(first + begin, first + begin + len(part), dtype=np.uint64)
            bits = (mix64(index)[:, None] >> np.arange(PROJECTIONS, dtype=np.uint64)) & np.uint64(1)
            total += part @ (2.0 * bits - 1.0)
        first += len(weights)
    return torch.from_numpy(total)


def check_model(calibration: Calibration, plan: PatchPlan, *, strict: bool = True) -> None:
    """Check a calibration against a plan (`Calibration.check`)."""
    ours, theirs = set(calibration.paths), {layer.path for layer in plan.layers} - set(calibration.left_out)
    if missing := sorted(theirs - ours):
        raise CalibrationMismatchError(
            f"the calibration is of another model ({calibration.model_id}): it has no layer {missing[0]!r}, "
            f"but {', '.join(calibration.paths[:2])}, ...; calibrate this model."
        )
    if absent := sorted(ours - theirs):
        raise CalibrationMismatchError(
            f"the calibration is of another model ({calibration.model_id}): it has a layer {absent[0]!r} "
            "that this model has not; calibrate this model."
        )
    by_path = {layer.path: (i, layer) for i, layer in enumerate(calibration.layers)}
    for site in plan.layers:
        if site.path not in by_path:
            continue  # left out
        index, layer = by_path[site.path]
        fields = {
            "num_experts": (calibration.num_experts, site.context.num_experts),
            "top_k": (layer.top_k, site.context.top_k),
            "score_func": (layer.score_func, site.context.score_func),
            "experts_path": (layer.experts_path, site.experts_path),
            "route_norm": (layer.route_norm, site.context.route_norm),
        }
        for name, (calibrated, found) in fields.items():
            if calibrated != found:
                raise CalibrationMismatchError(
                    f"the calibration does not fit layer {site.path}: {name} was {calibrated!r} when it was "
                    f"made, the model has {found!r}; calibrate this model."
                )
        _check_fingerprint(calibration, index, site.path, fingerprint(site.router), strict)


def _check_fingerprint(
    calibration: Calibration, index: int, path: str, found_D: Tensor, strict: bool
) -> None:
    expected_D = calibration.fingerprint_LD[index]
    distance = float((found_D - expected_D).norm() / expected_D.norm().clamp_min(1e-30))
    if distance <= TOLERANCE:
        return
    text = (
        f"the router weights of layer {path} differ from those that were calibrated (fingerprints "
        f"{distance:.2g} apart, at most {TOLERANCE:g} expected): this is another model or training state than "
        f"{calibration.model_id}; calibrate it, or pass strict=False to use the calibration all the same."
    )
    if strict:
        raise CalibrationMismatchError(text)
    warnings.warn(text, CalibrationWarning, stacklevel=4)
