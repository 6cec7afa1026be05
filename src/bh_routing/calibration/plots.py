"""Pictures of a calibration: densities, decision tables, and whether held-out nulls are uniform.

Shape legend: T tokens, E experts, B bins. Needs matplotlib (the extra ``plot``), imported when a picture is drawn.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._files import write_atomically
from .._lazy import needed
from ..errors import CalibrationError, CalibrationWarning, InvalidParameterError
from ..stats.histogram import Histogram, pool_counts
from ..stats.procedures import get_procedure
from . import fit
from .accumulate import recount
from .data import CalibrationData, Data
from .null_settings import NullSettings, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, np.dtype[np.float64]]

FORMATS = (".png", ".svg", ".pdf")
NULL, SELECTED, POOLED, GUIDE = "#4c78a8", "#e07b39", "#777777", "#bbbbbb"
LEVELS = {0.01: "#08519c", 0.05: "#3182bd", 0.2: "#9ecae1"}


def plot_calibration(calibration: CalibrationData, path: str | os.PathLike[str], **settings: Any) -> None:
    """Draw a calibration (`calibration_figure`) to a file that ends in ``.png``, ``.svg`` or ``.pdf``.

    Raises
    ------
    InvalidParameterError
        For another suffix.
    MissingDependencyError
        Without matplotlib.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InvalidParameterError(
            f"a picture must be written to a file that ends in {', '.join(FORMATS)}, got {str(path)!r}."
        )
    figure = calibration_figure(calibration, **settings)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:])
    write_atomically(path, buffer.getvalue())


def calibration_figure(calibration: CalibrationData, **settings: Any) -> Figure:
    """Draw a calibration, one row of panels per layer.

    Panels: density of the null and of the experts that the model selected; the decision table of BH as
    thresholds over ranks, at three levels; histogram of held-out null p-values; their quantiles against uniform
    ones. Held-out nulls are the passed-over experts of the tokens kept in the file, whose counts are taken out of
    the null first; they are judged by a null per layer (solid) and, where it is another, by the null of the
    settings (dashed). A calibration without tokens (`from_kde_pickles`) shows the first two panels only.

    Parameters
    ----------
    **settings
        As in `Calibration.settings`.

    Raises
    ------
    MissingDependencyError
        Without matplotlib.
    """
    chosen = resolve(calibration, **settings)
    has_tokens = calibration.reservoir is not None and bool(calibration.histograms)
    columns = 4 if has_tokens else 2
    figure: Figure = needed("matplotlib.figure", "drawing a calibration", "plot").Figure(
        figsize=(3.7 * columns, 2.3 * calibration.num_layers + 0.9), dpi=110, layout="constrained"
    )
    axes = figure.subplots(calibration.num_layers, columns, squeeze=False)
    tables = _tables(calibration, chosen)
    p_values = _held_out_p_values(calibration, chosen) if has_tokens else []
    for row, layer in enumerate(calibration.layers):
        _densities(axes[row, 0], calibration, chosen, row)
        _thresholds(axes[row, 1], tables, row, layer.top_k)
        axes[row, 0].set_ylabel(layer.path.replace("model.", "", 1), fontsize=8)
        if has_tokens:
            _histogram(axes[row, 2], p_values[row])
            _quantiles(axes[row, 3], p_values[row])
    titles = (
        "density of the statistic",
        "BH thresholds over ranks",
        "held-out null p-values",
        "their quantiles against uniform",
    )
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=10)
    for axis in axes[0]:
        axis.legend(fontsize=7, frameon=False)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{calibration.model_id}: {chosen.describe()}; {calibration.tokens:,} tokens", fontsize=11
    )
    return figure


def without_kept_tokens(calibration: Data) -> Data:
    """The calibration with its reservoir's tokens taken out of the counts, so that they are held out.

    The tokens are kept in float16: a logit that rounding carries over a bin's edge is taken out of the wrong bin
    (no count falls below zero).
    """
    reservoir = calibration.reservoir
    assert reservoir is not None
    taken = recount(
        calibration, zip(reservoir.logits_NLE.unbind(1), reservoir.experts_NLK.unbind(1), strict=True)
    )
    rest = {
        kind: {name: _subtract(held, taken[kind][name]) for name, held in sets.items()}
        for kind, sets in calibration.histograms.items()
    }
    return replace(calibration, histograms=rest)


def _subtract(held: Histogram, taken: Histogram) -> Histogram:
    difference = held + Histogram(taken.start, -taken.counts_LEB)
    return Histogram(difference.start, difference.counts_LEB.clamp_min(0))


def _held_out_p_values(calibration: CalibrationData, chosen: NullSettings) -> list[dict[str, Array]]:
    """Per layer: null p-values of the kept tokens under a null per layer, and under that of the settings."""
    rest = without_kept_tokens(calibration)
    scopes = {"null per layer": "layer"} | ({"null of the model": "model"} if chosen.scope == "model" else {})
    reservoir = calibration.reservoir
    assert reservoir is not None
    result: list[dict[str, Array]] = []
    for index, layer in enumerate(calibration.layers):
        logits_NE, own_NK = reservoir.layer(index, layer.top_k)
        passed_NE = torch.ones_like(logits_NE, dtype=torch.bool).scatter(-1, own_NK, False)
        found: dict[str, Array] = {}
        for label, scope in scopes.items():
            try:
                p_NE = fit.p_values(rest, logits_NE.float(), index, replace(chosen, scope=scope))
            except CalibrationError:  # all tokens were kept: nothing is left to judge them by
                continue
            found[label] = p_NE[passed_NE].numpy()
        result.append(found)
    return result


def _tables(calibration: CalibrationData, chosen: NullSettings) -> dict[float, Any]:
    """Thresholds [L, E] by level; a level that nothing can reach is left out."""
    tables = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        for alpha in LEVELS:
            try:
                table = fit.table(calibration, alpha, get_procedure("bh"), chosen)
            except CalibrationError:
                continue
            tables[alpha] = table.thresholds_LE.numpy()
    return tables


def _densities(axis: Axes, calibration: CalibrationData, chosen: NullSettings, row: int) -> None:
    if not calibration.histograms:
        null: Any = fit.fit(calibration, chosen).nulls[row]
        grid, survival = null.grid_G.numpy(), null.survival_G.numpy()
        density = -np.diff(survival) / np.diff(grid)
        axis.fill_between((grid[1:] + grid[:-1]) / 2, density, color=NULL, alpha=0.6, lw=0, label="null")
        axis.set_yticks([])
        return
    shown = {
        f"null ({chosen.null})": (chosen.null, NULL),
        "selected by the model": ("selected", SELECTED),
    }
    for label, (which, colour) in shown.items():
        pooled = pool_counts(*fit.counted(calibration, chosen, which), row)
        if pooled.num:
            # four bins at a time: of 1/16
            num = len(pooled.counts_G) // 4 * 4
            density = pooled.counts_G[:num].reshape(-1, 4).sum(1) / (pooled.num * 4 * pooled.width)
            centres = pooled.edges_G[:num].reshape(-1, 4)[:, 0] + 2 * pooled.width
            axis.fill_between(centres, density, color=colour, alpha=0.45, lw=0, label=label)
    axis.set_ylim(bottom=0)
    axis.set_yticks([])


def _thresholds(axis: Axes, tables: dict[float, Any], row: int, top_k: int) -> None:
    for alpha, thresholds_LE in tables.items():
        line = np.where(np.isfinite(thresholds_LE[row]), thresholds_LE[row], np.nan)
        axis.plot(np.arange(1, len(line) + 1), line, color=LEVELS[alpha], lw=1.4, label=f"α = {alpha:g}")
    axis.axvline(top_k, color=GUIDE, lw=1, ls=":", label=f"top-{top_k}")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _histogram(axis: Axes, found: dict[str, Array]) -> None:
    styles: tuple[dict[str, Any], ...] = (
        {"histtype": "stepfilled", "color": NULL, "alpha": 0.6},
        {"histtype": "step", "color": POOLED, "ls": "--"},
    )
    for (label, p), style in zip(found.items(), styles, strict=False):
        axis.hist(p, bins=40, range=(0, 1), density=True, label=label, **style)
    axis.axhline(1.0, color=GUIDE, lw=1)
    axis.set_xlim(0, 1)


def _quantiles(axis: Axes, found: dict[str, Array]) -> None:
    shares = np.linspace(0.001, 0.999, 500)
    for (label, p), style in zip(found.items(), (("-", NULL), ("--", POOLED)), strict=False):
        axis.plot(shares, np.quantile(p, shares), style[0], color=style[1], lw=1.5, label=label)
    axis.plot([0, 1], [0, 1], color=GUIDE, lw=1, zorder=0)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)


__all__ = ["plot_calibration", "without_kept_tokens"]
