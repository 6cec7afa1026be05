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
from dataclasses import asdict, fields
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

IN_FLOAT32 = ("mean_LEH", "gram_LJJ", "cross_LJH")  # of the moments, which are float64 in memory
RENAMED = {"compensation_strength": "compensation_scale"}  # of older files
PARTS: dict[str, type[Moments | Reservoir]] = {"moments": Moments, "reservoir": Reservoir}


def _keys(part: str) -> dict[str, str]:
    """Field -> key in the file: ``mean_LEH`` of the moments is ``moments.mean``."""
    return {field.name: f"{part}.{field.name.rpartition('_')[0]}" for field in fields(PARTS[part])}


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
    for part in PARTS:
        for name, key in _keys(part).items():
            if (value := getattr(getattr(data, part), name, None)) is not None:
                tensors[key] = value.float() if name in IN_FLOAT32 else value
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    scalars = {field.name: getattr(data, field.name) for field in fields(data)}
    scalars = {name: value for name, value in scalars.items() if isinstance(value, (str, int, float))}
    layers = [asdict(layer) for layer in data.layers]
    header = json.dumps(
        scalars | {"layers": layers, "starts": starts, "left_out": data.left_out}, sort_keys=True
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
    found: dict[str, Any] = {RENAMED.get(k, k): value for k, value in header.items() if k != "starts"}
    for part, kind_of_part in PARTS.items():
        held = {name: tensors.get(key) for name, key in _keys(part).items()}
        if any(value is not None for value in held.values()):
            wide: dict[str, Any] = {
                n: v.double() if v is not None and n in IN_FLOAT32 else v for n, v in held.items()
            }
            found[part] = kind_of_part(**wide)
    return found | {
        "left_out": tuple(header.get("left_out", ())),
        "layers": tuple(LayerRecord(**_renamed(layer)) for layer in header["layers"]),
        "histograms": histograms,
        "fingerprint_LD": tensors["fingerprint"],
    }
