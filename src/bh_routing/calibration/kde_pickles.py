"""The original work's per-layer KDE files, read without trusting them.

Those files are pickles: a dict of numpy arrays ``x`` (grid) and ``cdf`` of one layer's router logits. They are read
by `bh_routing.calibration.pickled_arrays`, which unpickles nothing.

Shape legend: L layers, E experts, G grid points.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CalibrationFileError
from ..stats.nulls import GridNull
from .data import CalibratedLayer, GivenNulls
from .pickled_arrays import read_arrays

_NAME = re.compile(r"distribution_model_layer_(\d+)(.*)\.pkl")


def grid_null(path: str | os.PathLike[str]) -> GridNull:
    """One layer's null from its file: p = 1 - cdf, at least the rounding error of 1 - cdf.

    Raises
    ------
    CalibrationFileError
        If ``x`` or ``cdf`` is missing, of another shape, not finite, or not increasing.
    """
    arrays = read_arrays(path)
    for name in ("x", "cdf"):
        if name not in arrays:
            raise CalibrationFileError(
                f"{path} holds no array {name!r}; it holds {', '.join(arrays) or 'none'}."
            )
        if arrays[name].ndim != 1 or arrays[name].dtype.kind not in "fiu":
            raise CalibrationFileError(
                f"{path}: {name!r} must be a flat array of numbers, got {arrays[name].dtype} "
                f"{arrays[name].shape}."
            )
    x, cdf = arrays["x"].astype(np.float64), arrays["cdf"].astype(np.float64)
    if len(x) != len(cdf) or len(x) < 2 or not np.isfinite(x).all() or not np.isfinite(cdf).all():
        raise CalibrationFileError(
            f"{path}: 'x' and 'cdf' must be finite and of one length of at least 2, got {len(x)} and {len(cdf)}."
        )
    if (
        not (np.diff(x) > 0).all()
        or (np.diff(cdf) < -1e-6).any()
        or cdf.min() < -1e-6
        or cdf.max() > 1 + 1e-6
    ):
        raise CalibrationFileError(
            f"{path}: 'x' must increase strictly and 'cdf' must rise within 0..1; this is no distribution function."
        )
    survival = 1.0 - np.maximum.accumulate(cdf.clip(0.0, 1.0))
    survival = survival.clip(np.finfo(np.float64).eps, 1.0)
    return GridNull(torch.from_numpy(x), torch.from_numpy(survival), 0)


def read_folder(folder: str | os.PathLike[str], num_experts: int = 64, variant: str = "") -> dict[str, Any]:
    """The fields of a calibration from ``distribution_model_layer_{i}{variant}.pkl``, i = 0, 1, ..., in a folder.

    It has tables and p-values of the statistic ``logit``; it has no tokens to solve a budget on, knows no expert
    outputs, and cannot tell which model it belongs to beyond the number of layers and experts.

    Parameters
    ----------
    folder : path
    num_experts : int
        Experts of the model they were made for, which the files do not tell.
    variant : str
        ``""``, ``"gaussian"``, ``"epanechnikov"``, ``"tophat"``, ``"linear"`` or ``"trimmed_N"``; a leading
        underscore may be given.

    Returns
    -------
    dict
        Of `bh_routing.calibration.data.CalibrationData`. Statistic ``logit``; null ``trimmed`` for a trimmed variant, else ``all``.

    Raises
    ------
    CalibrationFileError
        If there are no such files, a layer is missing, or a file is damaged or asks for more than arrays.
    """
    folder, suffix = Path(folder), f"_{variant.removeprefix('_')}" if variant else ""
    if not folder.is_dir():
        raise CalibrationFileError(f"there is no folder {folder} with distribution_model_layer_*.pkl files.")
    found: dict[str, dict[int, Path]] = {}
    for path in folder.iterdir():
        if match := _NAME.fullmatch(path.name):
            found.setdefault(match[2], {})[int(match[1])] = path
    if suffix not in found:
        there = ", ".join(repr(name.removeprefix("_")) for name in sorted(found)) or "none at all"
        raise CalibrationFileError(
            f"{folder} holds no files distribution_model_layer_*{suffix}.pkl; variants that are there: {there}."
        )
    files = found[suffix]
    if missing := sorted(set(range(max(files) + 1)) - set(files)):
        raise CalibrationFileError(
            f"{folder} lacks layer {missing[0]} of the variant {suffix.removeprefix('_')!r}: expected "
            f"distribution_model_layer_{missing[0]}{suffix}.pkl beside those of layers up to {max(files)}."
        )
    layers = tuple(
        CalibratedLayer(
            path=f"layer {i}",
            experts_path=None,
            top_k=num_experts,
            score_func="softmax",
            route_norm="unknown",
        )
        for i in range(len(files))
    )
    given = GivenNulls(
        nulls=tuple(grid_null(files[i]) for i in range(len(files))),
        statistic="logit",
        null="trimmed" if "trimmed" in suffix else "all",
        estimator="kde",
        source="the KDE files",
        in_order=True,
    )
    return {
        "model_id": str(folder),
        "layers": layers,
        "num_experts": num_experts,
        "histograms": {},
        "fingerprint_LD": torch.zeros(len(files), 0, dtype=torch.float64),
        "given": given,
    }
