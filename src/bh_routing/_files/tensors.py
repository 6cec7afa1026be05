"""Files of named tensors under a JSON header: written whole, and read with every name, shape, type and value checked.

A file is safetensors with four metadata entries: ``format``, ``format_version``, ``header`` (JSON) and ``digest``
(SHA-256 over header and tensors, so that a damaged or edited file is noticed). Anybody can compute a digest: what a
file holds is checked all the same, and before any memory is taken that the file does not itself take.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .checks import LONGEST, checks_of, read_json
from .plain import write_atomically

MOST_BYTES = 1 << 34  # of a file: many times what the largest known model needs

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What a tensor of a file must be.

    Attributes
    ----------
    dtypes : tuple of torch.dtype
    least, most : float
        Range of every value; NaN is in none. Infinities count only where they are a bound that is given.
    dims : str
        One letter per dimension. A letter has one size in the whole file: the one that is known, or the first met;
        ``*`` has any.
    """

    dtypes: tuple[torch.dtype, ...] = FLOATS
    least: float = -1e30
    most: float = 1e30
    dims: str = "*"


FLOAT16, FLOAT32, FLOAT64 = Expected((torch.float16,)), Expected((torch.float32,)), Expected((torch.float64,))
COUNTS = Expected((torch.int64,), 0.0, float(LONGEST))
SIZES = Expected((torch.float64,), 0.0)
SHARES = Expected((torch.float64,), most=1.0)  # explained; below 0 where a prediction is worse than none
HASHES = Expected((torch.int64,), 0.0, 2.0**63)


def expected_of(kind: type[Any]) -> dict[str, Expected]:
    """What the tensors of a class must be, by field: as it is annotated, with the dimensions that end its name."""
    found = {name: must for name, must in checks_of(kind).items() if isinstance(must, Expected)}
    return {name: replace(must, dims=name.rpartition("_")[2]) for name, must in found.items()}


def tensors_digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a header and tensors, in hexadecimal digits."""
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    header: dict[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write such a file; it is whole or as it was."""
    held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    metadata = {
        "format": kind,
        "format_version": str(version),
        "header": text,
        "digest": tensors_digest(text, held),
    }
    write_atomically(path, save(held, metadata))


def read_tensors(
    path: str | os.PathLike[str],
    kind: str,
    versions: tuple[int, ...],
    expect: Callable[[Any, Collection[str]], tuple[dict[str, Any], dict[str, Expected], dict[str, int]]],
    raised: type[Exception],
    *,
    what: str,
    advice: str,
) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Read and check such a file.

    Parameters
    ----------
    kind, versions
        Of the format that is read.
    expect : callable
        Of the header as it stands in the file, and of the tensors' keys: the header checked, what every tensor must be
        by its key, and the sizes that are known by letter. Raises ValueError with the end of a sentence.
    raised : type of Exception
        What is raised, with a sentence, whatever is wrong.
    what, advice : str
        "calibration", and what to do where it is none.

    Returns
    -------
    version, header, tensors
    """
    path = Path(path)
    if not path.is_file():
        raise raised(f"there is no {what} file {path}; {advice}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            version = _version(path, metadata, kind, versions, raised, what, advice)
            header, expected, sizes = expect(read_json(metadata.get("header", "")), set(file.keys()))
            _check_sizes(file, expected, sizes, path.stat().st_size)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise raised(
            f"{path} cannot be read as a {what} file (damaged or truncated?): {error}; {advice}."
        ) from None
    except ValueError as error:
        if isinstance(error, raised):
            raise
        raise raised(f"{path} holds no sound {what}: {error}; {advice}.") from None
    if tensors_digest(metadata["header"], tensors) != metadata.get("digest"):
        raise raised(
            f"{path} was changed after it was written: its digest does not match its content; {advice}."
        )
    for key, tensor in tensors.items():
        if sentence := _wrong_values(key, tensor, expected[key]):
            raise raised(f"{path} holds no sound {what}: {sentence}; {advice}.")
    return version, header, tensors


def _version(
    path: Path,
    metadata: Mapping[str, str],
    kind: str,
    versions: tuple[int, ...],
    raised: type[Exception],
    what: str,
    advice: str,
) -> int:
    if metadata.get("format") != kind:
        raise raised(
            f"{path} is not a {what}: expected metadata format={kind!r}, got {metadata.get('format')!r}; {advice}."
        )
    found = metadata.get("format_version", "")
    for version in versions:
        if found == str(version):
            return version
    raise raised(
        f"{path} has {what} format version {found[:20] or 'none'}, this library reads version "
        f"{' and '.join(map(str, versions))}; {advice}, or use the library version that wrote it."
    )


def _check_sizes(file: Any, expected: Mapping[str, Expected], sizes: dict[str, int], num_bytes: int) -> None:
    """Names, types and shapes, by the file's own table: nothing is read yet."""
    if num_bytes > MOST_BYTES:
        raise ValueError(
            f"it takes {num_bytes / 1e9:.0f} GB, and none takes more than {MOST_BYTES / 1e9:.0f}"
        )
    keys = set(file.keys())
    if absent := sorted(set(expected) - keys):
        raise ValueError(f"the tensor {absent[0]!r} is missing")
    if unknown := sorted(keys - set(expected)):
        raise ValueError(f"{unknown[0][:80]!r} is no tensor of it")
    known = dict(sizes)
    for key, must in expected.items():
        held = file.get_slice(key)
        shape, dtype = held.get_shape(), held.get_dtype()
        if dtype not in [_NAMES[d] for d in must.dtypes]:
            raise ValueError(f"{key} must be {' or '.join(_NAMES[d] for d in must.dtypes)}, got {dtype}")
        if len(shape) != len(must.dims) or any(
            letter != "*" and known.setdefault(letter, size) != size
            for letter, size in zip(must.dims, shape, strict=True)
        ):
            wanted = ", ".join(f"{letter}={known.get(letter, 'any')}" for letter in must.dims)
            raise ValueError(f"{key} must have the shape [{wanted}], got {shape}")


def _wrong_values(key: str, tensor: Tensor, must: Expected) -> str | None:
    if not tensor.numel():
        return None
    low, high = (float(x) for x in tensor.aminmax())
    if low >= must.least and high <= must.most:  # false for NaN
        return None
    got = "NaN" if math.isnan(low) or math.isnan(high) else f"{low:g} to {high:g}"
    return f"{key} must hold values from {must.least:g} to {must.most:g}, got {got}"
