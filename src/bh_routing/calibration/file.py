"""Reading and writing calibrations.

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import write_atomically
from ..errors import CalibrationError, CalibrationFileError
from ..stats.histogram import Histogram
from .data import CalibrationData, Data, LayerRecord, Reservoir, stack_layers
from .moments import Moments

FORMAT, FORMAT_VERSION = "bh-routing calibration", 1

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


def save(data: CalibrationData, path: str | os.PathLike[str]) -> None:
    """Write a calibration; nothing half-written stays if it is interrupted.

    Raises
    ------
    CalibrationError
        For one whose nulls come from outside.
    OSError
        If the folder cannot be written to.
    """
    if data.given is not None:
        raise CalibrationError(
            f"nulls from outside ({data.given.source}) are not written to a calibration file, which holds counts, tokens "
            "and module paths; keep the pickles, or calibrate the model."
        )
    tensors: dict[str, Tensor] = {"fingerprint": data.fingerprint_LD.double()}
    starts: dict[str, int] = {}
    for kind, sets in data.histograms.items():
        for name, held in sets.items():
            for layer in range(data.num_layers):
                used = Histogram(held.start, held.counts_LEB[layer : layer + 1]).trimmed_to_use()
                key = f"hist.{kind}.{name}.{layer}"
                tensors[key], starts[key] = _narrow(used.counts_LEB[0]), used.start
    if data.moments is not None:
        for key, field in _MOMENTS.items():
            if (value := getattr(data.moments, field)) is not None:
                tensors[f"moments.{key}"] = value.float() if key in ("mean", "gram", "cross") else value
    if data.reservoir is not None:
        tensors["reservoir.hash"] = data.reservoir.hash_N
        tensors["reservoir.logits"] = data.reservoir.logits_NLE
        tensors["reservoir.experts"] = data.reservoir.experts_NLK
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    header = json.dumps(
        {name: getattr(data, name) for name in _SCALARS}
        | {"layers": [asdict(layer) for layer in data.layers], "starts": starts}
        | {"left_out": list(data.left_out), "compensation_strength": data.compensation_strength},
        sort_keys=True,
    )
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "header": header,
        "digest": _digest(header, tensors),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


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


def load(path: str | os.PathLike[str], kind: type[Data]) -> Data:
    """Read a calibration as an object of this class, and check that it is whole.

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
    return kind(**_fields(json.loads(header_text), tensors))


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


def _renamed(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's header with today's words; older files say ``score`` and ``convention``, and "raw" for "none"."""
    if "convention" not in layer:
        return layer
    norm = {"raw": "none"}.get(layer["convention"], layer["convention"])
    kept = {key: value for key, value in layer.items() if key not in ("score", "convention")}
    return kept | {"score_func": layer["score"], "route_norm": norm}


def _fields(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of `CalibrationData` from a file's header and tensors."""
    per_layer: dict[tuple[str, str], list[Histogram]] = {}
    for key, start in sorted(header["starts"].items(), key=lambda item: int(item[0].rsplit(".", 1)[1])):
        _, kind, name, _ = key.split(".")
        per_layer.setdefault((kind, name), []).append(Histogram(start, tensors[key].long().unsqueeze(0)))
    histograms: dict[str, dict[str, Histogram]] = {}
    for (kind, name), parts in per_layer.items():
        histograms.setdefault(kind, {})[name] = stack_layers(parts)
    moments = reservoir = None
    if "moments.tokens" in tensors:
        held = {field: tensors.get(f"moments.{key}") for key, field in _MOMENTS.items()}
        moments = Moments(
            **{f: v.double() if v is not None and v.is_floating_point() else v for f, v in held.items()}  # type: ignore[arg-type]
        )
    if "reservoir.hash" in tensors:
        reservoir = Reservoir(
            hash_N=tensors["reservoir.hash"],
            logits_NLE=tensors["reservoir.logits"],
            experts_NLK=tensors["reservoir.experts"],
        )
    return {name: header[name] for name in _SCALARS} | {
        "compensation_strength": header.get("compensation_strength", 1.0),
        "left_out": tuple(header.get("left_out", ())),
        "layers": tuple(LayerRecord(**_renamed(layer)) for layer in header["layers"]),
        "histograms": histograms,
        "moments": moments,
        "reservoir": reservoir,
        "fingerprint_LD": tensors["fingerprint"],
    }
