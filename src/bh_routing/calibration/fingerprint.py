"""Which model a calibration was made for: what its routers and experts answer to fixed inputs, within a stated distance.

A fingerprint is the router's logits on `bh_routing.calibration.responses.inputs` and random projections of what one expert
of the layer, chosen by its number, makes of them. It is a function of the model, not of how its weights are stored: a copy
that is quantised, sharded, offloaded or in half precision has the same one, but for rounding.

Files of format 1, and of models whose routers cannot be run by themselves, hold projections of the routers' weights instead
(`weight_projections`), and are compared by those.

Shape legend: L routed layers, R rows of input, E experts, H hidden size, P projections, D numbers of a fingerprint.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationMismatchError, CalibrationWarning
from ..patching import LayerPlan, PatchPlan
from .data import CalibrationData, some_of
from .responses import PROJECTIONS, ROWS, expert_output, inputs, router_logits, signs, whole

# Distances are relative, |found - expected| / |expected|; docs/calibration.md has those of copies and of other models.
ROUTER_TOLERANCE = 3e-2  # of logits: bfloat16 rounding moves them by 3e-3, 8 bits a weight by 1e-2
EXPERT_TOLERANCE = 0.25  # of an expert's output: 4 bits a weight move it by 0.12 to 0.2
WEIGHT_TOLERANCE = 2e-2  # of projections of weights


def fingerprint(layers: Sequence[LayerPlan]) -> Tensor:
    """What these routers and experts answer, float64 [L, D]: D = R E + R P, or R E where an expert cannot be run.

    Where a router cannot be run by itself, the projections of the routers' weights, [L, P]; where those cannot be read
    either, [L, 0], with a warning. The model may be patched. Every process of a sharded model must ask for it.
    """
    logits = [router_logits(layer) for layer in layers]
    if any(found is None for found in logits):
        try:
            return torch.stack([weight_projections(layer.router) for layer in layers])
        except CalibrationMismatchError as error:
            warnings.warn(
                f"no fingerprint of the model can be made, so that its calibration will fit any: {error}",
                CalibrationWarning,
                stacklevel=3,
            )
            return torch.zeros(len(layers), 0, dtype=torch.float64)
    outputs = [expert_output(layer, index) for index, layer in enumerate(layers)]
    known = all(found is not None for found in outputs)
    rows = [joined(x, y if known else None) for x, y in zip(logits, outputs, strict=True) if x is not None]
    return torch.stack(rows)


def joined(logits_RE: Tensor, output_RH: Tensor | None = None) -> Tensor:
    """One layer's fingerprint, float64 [D], from its answers; an expert that a router masks out (-inf) counts as 0."""
    logits_D = logits_RE.double().nan_to_num(0.0, 0.0, 0.0).flatten()
    return logits_D if output_RH is None else torch.cat([logits_D, projected(output_RH)])


def projected(output_RH: Tensor) -> Tensor:
    """The projections of an expert's output, float64 [R P]."""
    return (output_RH.double() @ signs(output_RH.shape[1], 0, PROJECTIONS).double()).flatten()


def weight_projections(router: nn.Module) -> Tensor:
    """Sixteen projections of a router's floating-point parameters onto fixed random signs, float64 [P].

    The sign of weight i in projection d is bit d of a hash of i, so that it depends on nothing but the order
    of the weights.

    Raises
    ------
    CalibrationMismatchError
        If the weights cannot be read: they are quantised, or nowhere.
    """
    with whole(router):
        weights = []
        for name, parameter in sorted(router.named_parameters()):
            held = parameter.detach()
            if held.is_meta or not held.is_floating_point():
                raise CalibrationMismatchError(
                    f"the weights {name} of {type(router).__name__} cannot be compared with a calibration's: expected "
                    f"floating-point numbers, got {'none in memory' if held.is_meta else held.dtype}; pass strict=False, or "
                    "load the routers unquantised."
                )
            weights.append(held.to("cpu", torch.float64).flatten())
    return project_weights(torch.cat(weights)) if weights else torch.zeros(PROJECTIONS, dtype=torch.float64)


def weights_key(layers: Sequence[LayerPlan]) -> list[list[float]] | None:
    """What tells routers apart to the last bit; None where their weights cannot be read."""
    try:
        return [weight_projections(layer.router).tolist() for layer in layers]
    except CalibrationMismatchError:
        return None


def project_weights(weights_N: Tensor) -> Tensor:
    """Projections of weights in their order, float64 [P]."""
    total_P = torch.zeros(PROJECTIONS, dtype=torch.float64)
    for begin in range(0, weights_N.numel(), 1 << 16):
        part_N = weights_N[begin : begin + (1 << 16)].double()
        total_P += part_N @ signs(part_N.numel(), 0, PROJECTIONS, begin).double()
    return total_P


def distance(found: Tensor, expected: Tensor) -> float:
    """How far apart two tensors are, relative to the second; of several, [..., D], the largest; infinite for other shapes."""
    if found.shape != expected.shape:
        return math.inf
    apart = (found - expected).norm(dim=-1)
    return float(torch.where(apart == 0, apart, apart / expected.norm(dim=-1).clamp_min(1e-30)).max())


def same_model(layers: Sequence[LayerPlan], expected: Sequence[Sequence[float]]) -> bool:
    """Whether each layer's fingerprint, taken by itself, is the expected one."""
    if len(layers) != len(expected):
        return False
    for layer, row in zip(layers, expected, strict=True):
        expected_D, num = torch.tensor(row, dtype=torch.float64), ROWS * layer.context.num_experts
        if len(row) == PROJECTIONS:
            if distance(weight_projections(layer.router), expected_D) > WEIGHT_TOLERANCE:
                return False
            continue
        found_D = fingerprint([layer])[0]
        if distance(found_D[:num], expected_D[:num]) > ROUTER_TOLERANCE:
            return False
        if found_D.shape == expected_D.shape and distance(found_D[num:], expected_D[num:]) > EXPERT_TOLERANCE:
            return False
    return True


def by_weights(data: CalibrationData) -> bool:
    """Whether a calibration holds projections of the routers' weights, as format 1 does."""
    return data.fingerprint_LD.shape[1] < ROWS * data.num_experts


def logits_differ(
    data: CalibrationData, index: int, logits_RE: Tensor, layer: str, otherwise: str
) -> str | None:
    """What is wrong with a router's logits on `inputs`, in one sentence that ends in ``otherwise``; None if nothing is."""
    expected = data.fingerprint_LD[index, : ROWS * data.num_experts]
    found = distance(joined(logits_RE.cpu()), expected)
    return _sentence(data, "router weights", found, ROUTER_TOLERANCE, layer, otherwise)


def matrix_differs(
    data: CalibrationData, index: int, weight_EH: Tensor, layer: str, otherwise: str
) -> str | None:
    """The same for a router that is one matrix, float [E, H], whatever the calibration's fingerprint is made of.

    For engines that hold other modules, or none: its logits on `inputs` are a product.
    """
    weight_EH = weight_EH.detach().float().cpu()
    if by_weights(data):
        return projections_differ(data, index, project_weights(weight_EH.flatten()), layer, otherwise)
    return logits_differ(data, index, inputs(weight_EH.shape[1]) @ weight_EH.T, layer, otherwise)


def projections_differ(
    data: CalibrationData, index: int, found_P: Tensor, layer: str, otherwise: str
) -> str | None:
    """The same for projections of a router's weights."""
    found = distance(found_P, data.fingerprint_LD[index])
    return _sentence(data, "router weights", found, WEIGHT_TOLERANCE, layer, otherwise)


def _sentence(
    data: CalibrationData, what: str, found: float, tolerance: float, layer: str, otherwise: str
) -> str | None:
    if found <= tolerance:
        return None
    return (
        f"the {what} of layer {layer} differ from those that were calibrated (fingerprints {found:.2g} apart, at most "
        f"{tolerance:g} expected): this is another model or training state than {data.model_id}; calibrate it, or "
        f"{otherwise} to use the calibration all the same."
    )


def check_layer(data: CalibrationData, index: int, layer: str, found: Mapping[str, Any]) -> None:
    """Check what a model says of a layer, by name of the field: of `CalibratedLayer`, or ``num_experts``.

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
    num, unseen = ROWS * data.num_experts, []
    for site in plan.layers:
        if site.path not in theirs:
            continue
        index = data.paths.index(site.path)
        found = {
            name: getattr(site.context, name) for name in ("num_experts", "top_k", "score_func", "route_norm")
        }
        check_layer(data, index, site.path, found | {"experts_path": site.experts_path})
        if (wrong := _router_wrong(data, index, site)) is None and data.fingerprint_LD.shape[1] > num:
            output_RH = expert_output(site, index)
            if output_RH is None:
                unseen.append(site.path)
            else:
                apart = distance(projected(output_RH), data.fingerprint_LD[index, num:])
                wrong = _sentence(
                    data, "experts' weights", apart, EXPERT_TOLERANCE, site.path, "pass strict=False"
                )
        if wrong is not None and strict:
            raise CalibrationMismatchError(wrong)
        if wrong is not None:
            warnings.warn(wrong, CalibrationWarning, stacklevel=3)
    if unseen:
        warnings.warn(
            f"the experts of {some_of(unseen)} cannot be run by themselves: whether they are those that were calibrated is "
            "not known; their routers are.",
            CalibrationWarning,
            stacklevel=3,
        )


def _router_wrong(data: CalibrationData, index: int, site: LayerPlan) -> str | None:
    """What is wrong with a router, or that it cannot be known."""
    otherwise = "pass strict=False"
    if data.fingerprint_LD.shape[1] == 0:
        return (
            f"the calibration of {data.model_id} holds no fingerprint: whether it was made for this model is not known; "
            f"calibrate the model, or {otherwise}."
        )
    if by_weights(data):
        try:
            return projections_differ(data, index, weight_projections(site.router), site.path, otherwise)
        except CalibrationMismatchError as error:
            return str(error)
    logits_RE = router_logits(site)
    if logits_RE is None:
        return (
            f"router {site.path} cannot be run by itself: whether it is the one that was calibrated is not known; calibrate "
            f"this model, or {otherwise}."
        )
    return logits_differ(data, index, logits_RE, site.path, otherwise)


def _check_shape(data: CalibrationData, source: str, plan: PatchPlan) -> None:
    """All that can be checked where layers have no paths: how many layers and experts there are."""
    widths = {layer.context.num_experts for layer in plan.layers}
    if len(plan.layers) != data.num_layers or widths != {data.num_experts}:
        raise CalibrationMismatchError(
            f"{source} are of {data.num_layers} layers with {data.num_experts} experts, the model has "
            f"{len(plan.layers)} with {', '.join(map(str, sorted(widths)))}; take the files of this model, or give "
            "num_experts."
        )
