"""The original work's per-layer KDE files, read without trusting them.

Those files are pickles: a dict of numpy arrays ``x`` (grid) and ``cdf`` of one layer's router logits. They are read
by `bh_routing.calibration.pickled_arrays`, which unpickles nothing.

Shape legend: L layers, E experts, G grid points.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CalibrationError, CalibrationFileError, CalibrationMismatchError
from ..stats.nulls import GridNull
from .calibration import Calibration
from .data import Fitted, LayerRecord, NullSettings
from .pickled_arrays import read_arrays

if TYPE_CHECKING:
    from ..patching import PatchPlan

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


@dataclass(frozen=True, kw_only=True, eq=False)
class KDECalibration(Calibration):
    """A calibration that consists of given logit distributions, one per layer, and nothing else.

    It has tables and p-values of the statistic ``logit``; it has no tokens to solve a budget on, knows no
    expert outputs, and cannot tell which model it belongs to beyond the number of layers and experts.
    """

    nulls: tuple[GridNull, ...]
    null: str

    @property
    def paths(self) -> tuple[str, ...]:
        """Empty: the files name no modules, layers are taken in order."""
        return ()

    def settings(self, **settings: Any) -> NullSettings:
        """The only settings there are: statistic ``logit``, the null the files were made with, per layer."""
        fixed = {"statistic": "logit", "size": None, "null": self.null, "scope": "layer", "estimator": "kde"}
        for name, value in settings.items():
            if name == "compensated" or value is None:
                continue
            if name not in fixed or value != fixed[name]:
                raise CalibrationMismatchError(
                    f"KDE files hold one distribution per layer ({', '.join(f'{k}={v!r}' for k, v in fixed.items() if v)})"
                    f", got {name}={value!r}; calibrate the model for anything else."
                )
        return NullSettings(
            statistic="logit",
            size=None,
            null=self.null,
            scope="layer",
            estimator="kde",
            kernel="gaussian",
            bandwidth="silverman",
        )

    def fit(self, settings: NullSettings) -> Fitted:
        """The distributions of the files."""
        return Fitted(self.nulls, self.offsets(settings))

    def _index(self, layer: str | int) -> int:
        if isinstance(layer, int) and 0 <= layer < self.num_layers:
            return layer
        match = re.search(r"(\d+)(?!.*\d)", str(layer))
        if isinstance(layer, str) and match and int(match[1]) < self.num_layers:
            return int(match[1])
        raise CalibrationMismatchError(
            f"the KDE files have no layer {layer!r}; they have {self.num_layers} layers, in order."
        )

    def _check_reach(self, *args: Any) -> None:
        """The number of samples behind the files is unknown, so there is nothing to check."""

    def check(self, plan: PatchPlan, *, strict: bool = True) -> None:
        """Check the number of layers and experts, all that the files tell."""
        widths = {layer.context.num_experts for layer in plan.layers}
        if len(plan.layers) != self.num_layers or widths != {self.num_experts}:
            raise CalibrationMismatchError(
                f"the KDE files are of {self.num_layers} layers with {self.num_experts} experts, the model has "
                f"{len(plan.layers)} with {', '.join(map(str, sorted(widths)))}; take the files of this model, or "
                "give num_experts."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Refused: the pickles are the files."""
        raise CalibrationError(
            "a calibration from KDE pickles is not written as a calibration file, because it lacks what one "
            "holds (counts, tokens, module paths); keep the pickles, or calibrate the model."
        )

    def summary(self) -> list[dict[str, Any]]:
        """One plain dictionary per layer."""
        return [
            {
                "layer": i,
                "experts": self.num_experts,
                "null": self.null,
                "grid points": null.grid_G.numel(),
                "median": float(null.grid_G[int((null.survival_G <= 0.5).to(torch.int8).argmax())]),
            }
            for i, null in enumerate(self.nulls)
        ]

    def __repr__(self) -> str:
        median = ", ".join(f"{row['median']:.3g}" for row in self.summary()[:8])
        return (
            f"KDECalibration of {self.model_id}: {self.num_layers} layers x {self.num_experts} experts, "
            f"statistic logit, null {self.null}, medians {median}{', ...' if self.num_layers > 8 else ''}"
        )


def from_kde_pickles(
    folder: str | os.PathLike[str], num_experts: int = 64, variant: str = ""
) -> KDECalibration:
    """Load ``distribution_model_layer_{i}{variant}.pkl`` for i = 0, 1, ... from a folder.

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
    KDECalibration
        Statistic ``logit``; null ``trimmed`` for a trimmed variant, else ``all``.

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
    nulls = tuple(grid_null(files[i]) for i in range(len(files)))
    layers = tuple(
        LayerRecord(
            path=f"layer {i}",
            experts_path=None,
            top_k=num_experts,
            score_func="softmax",
            route_norm="unknown",
        )
        for i in range(len(files))
    )
    return KDECalibration(
        model_id=str(folder),
        layers=layers,
        num_experts=num_experts,
        histograms={},
        fingerprint_LD=torch.zeros(len(files), 0, dtype=torch.float64),
        nulls=nulls,
        null="trimmed" if "trimmed" in suffix else "all",
    )


__all__ = ["KDECalibration", "from_kde_pickles", "grid_null", "read_arrays"]
