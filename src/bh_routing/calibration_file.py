"""Reading and writing calibrations, and checking them against a model.

A calibration file is safetensors with four metadata entries: ``format``, ``format_version``, ``header`` (JSON:
model, layers, settings, text) and ``digest`` (SHA-256 over header and tensors, so that a damaged or edited
file is noticed). Tensors: ``hist.<statistic>.<set>.<layer>`` integer counts [E, B] in the narrowest type that
holds them; ``moments.*``; ``reservoir.*``; ``fingerprint``.

Shape legend: L routed layers, E experts, B bins, D projections.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .accumulate import mix64
from .calibration import Calibration, CalibrationWarning
from .calibration_parts import LayerRecord, Moments, Reservoir
from .errors import CalibrationFileError, CalibrationMismatchError
from .nulls import Histogram

if TYPE_CHECKING:
    from .patching import PatchPlan

FORMAT, FORMAT_VERSION = "bh-routing calibration", 1
PROJECTIONS = 16  # D
TOLERANCE = 2e-2  # relative: bfloat16 rounding moves a projection by about 2e-3
_SCALARS = (
    "model_id",
    "num_experts",
    "temperature",
    "trim",
    "tokens",
    "documents",
    "text_digest",
    "seed",
    "window",
    "reservoir_size",
    "library_version",
)
_MOMENTS = {
    "tokens": "tokens_LE",
    "square": "square_LE",
    "mean_square": "mean_square_LE",
    "mean": "mean_LEH",
    "sensitivity_tokens": "sensitivity_tokens_LE",
    "sensitivity": "sensitivity_LE",
    "gram": "gram_LJJ",
    "cross": "cross_LJH",
}


def save(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write a calibration; nothing half-written stays if it is interrupted.

    Raises
    ------
    OSError
        If the folder cannot be written to.
    """
    tensors: dict[str, Tensor] = {"fingerprint": calibration.fingerprint_LD.double()}
    starts: dict[str, int] = {}
    for kind, sets in calibration.histograms.items():
        for name, held in sets.items():
            for layer in range(calibration.num_layers):
                used = Histogram(held.start, held.counts_LEB[layer : layer + 1]).trimmed_to_use()
                key = f"hist.{kind}.{name}.{layer}"
                tensors[key], starts[key] = _narrow(used.counts_LEB[0]), used.start
    if calibration.moments is not None:
        for key, field in _MOMENTS.items():
            if (value := getattr(calibration.moments, field)) is not None:
                tensors[f"moments.{key}"] = value.float() if key in ("mean", "gram", "cross") else value
    if calibration.reservoir is not None:
        tensors["reservoir.hash"] = calibration.reservoir.hash_N
        tensors["reservoir.logits"] = calibration.reservoir.logits_NLE
        tensors["reservoir.experts"] = calibration.reservoir.experts_NLK
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    header = json.dumps(
        {name: getattr(calibration, name) for name in _SCALARS}
        | {"layers": [asdict(layer) for layer in calibration.layers], "starts": starts}
        | {
            "left_out": list(calibration.left_out),
            "compensation_strength": calibration.compensation_strength,
        },
        sort_keys=True,
    )
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "header": header,
        "digest": _digest(header, tensors),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def write_atomically(path: str | os.PathLike[str], write: Any) -> None:
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


def _narrow(counts: Tensor) -> Tensor:
    """The counts in the narrowest integer type that holds them."""
    largest = int(counts.max()) if counts.numel() else 0
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if largest <= torch.iinfo(dtype).max:
            return counts.to(dtype)
    return counts


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def load(path: str | os.PathLike[str]) -> Calibration:
    """Read a calibration and check that it is whole.

    Raises
    ------
    CalibrationFileError
        If it does not exist, is damaged or edited, is something else, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationFileError(
            f"there is no calibration file {path}; make one with `bh-routing calibrate MODEL --text FILE -o {path}`."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CalibrationFileError(
            f"{path} cannot be read as a calibration file (damaged or truncated?): {error}; calibrate again."
        ) from None
    header_text = metadata.get("header", "")
    if _digest(header_text, tensors) != metadata.get("digest"):
        raise CalibrationFileError(
            f"{path} was changed after it was written: its digest does not match its content; calibrate again."
        )
    return _build(json.loads(header_text), tensors)


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CalibrationFileError(
            f"{path} is not a calibration: expected metadata format={FORMAT!r}, got "
            f"{metadata.get('format')!r}; make one with `bh-routing calibrate`."
        )
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise CalibrationFileError(
            f"{path} has calibration format version {version or 'none'}, this library reads version "
            f"{FORMAT_VERSION}; calibrate again, or use the library version that wrote it."
        )


def _build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    layers = tuple(LayerRecord(**layer) for layer in header["layers"])
    per_layer: dict[tuple[str, str], list[Histogram]] = {}
    for key, start in sorted(header["starts"].items(), key=lambda item: int(item[0].rsplit(".", 1)[1])):
        _, kind, name, _ = key.split(".")
        per_layer.setdefault((kind, name), []).append(Histogram(start, tensors[key].long().unsqueeze(0)))
    histograms: dict[str, dict[str, Histogram]] = {}
    for (kind, name), parts in per_layer.items():
        histograms.setdefault(kind, {})[name] = stack_layers(parts)
    moments = None
    if "moments.tokens" in tensors:
        fields = {f: tensors[f"moments.{k}"] for k, f in _MOMENTS.items() if f"moments.{k}" in tensors}
        fields.setdefault("mean_LEH", None)  # type: ignore[arg-type]
        fields = {
            name: v if v is None or not v.is_floating_point() else v.double() for name, v in fields.items()
        }
        moments = Moments(**fields)
    reservoir = None
    if "reservoir.hash" in tensors:
        reservoir = Reservoir(
            hash_N=tensors["reservoir.hash"],
            logits_NLE=tensors["reservoir.logits"],
            experts_NLK=tensors["reservoir.experts"],
        )
    return Calibration(
        **{name: header[name] for name in _SCALARS},
        compensation_strength=header.get("compensation_strength", 1.0),
        left_out=tuple(header.get("left_out", ())),
        layers=layers,
        histograms=histograms,
        moments=moments,
        reservoir=reservoir,
        fingerprint_LD=tensors["fingerprint"],
    )


def stack_layers(parts: list[Histogram]) -> Histogram:
    """Histograms of one layer each, [1, E, B_l], as one over their common range."""
    start = min(h.start for h in parts)
    stop = max(h.start + h.counts_LEB.shape[-1] for h in parts)
    num_experts = parts[0].counts_LEB.shape[1]
    counts_LEB = torch.zeros(len(parts), num_experts, stop - start, dtype=torch.int64)
    for row, h in enumerate(parts):
        first = h.start - start
        counts_LEB[row, :, first : first + h.counts_LEB.shape[-1]] = h.counts_LEB[0]
    return Histogram(start, counts_LEB)


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
            "score": (layer.score, site.context.score),
            "experts_path": (layer.experts_path, site.experts_path),
            "convention": (layer.convention, site.context.convention),
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
