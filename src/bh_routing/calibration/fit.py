"""From a calibration's data to nulls, p-values, thresholds and decision tables: plain functions of `CalibrationData`.

Shape legend: L routed layers, T tokens, E experts.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..decision.table import DecisionTable, smallest_passing
from ..errors import CalibrationError, CalibrationMismatchError, CalibrationWarning
from ..stats.histogram import Histogram, bin_index, pool_counts
from ..stats.nulls import Null, fit_null
from ..stats.procedures import Procedure
from ..stats.statistic import full_statistic
from .accumulate import trimmed_range
from .data import CalibrationData, some_of, stack_layers
from .null_settings import NullSettings


class Fitted(NamedTuple):
    """Nulls per layer (one object, L times, for scope ``model``), what the base statistic is shifted by, [L, E], and with
    ``size="token"`` its slopes [L, D, E] about logits [L, D]."""

    nulls: tuple[Null, ...]
    offset_LE: Tensor
    slopes_LDE: Tensor | None = None
    center_LD: Tensor | None = None

    def sized(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """What `full_statistic` is told beyond the offset; nothing where sizes are constants."""
        if self.slopes_LDE is None or self.center_LD is None:
            return {}
        return {
            "slope_DE": self.slopes_LDE[index].to(device),
            "center_D": self.center_LD[index].to(device),
        }


def offsets(data: CalibrationData, settings: NullSettings) -> Tensor:
    """What is added to the base statistic per (layer, expert), float32 [L, E]: log sizes, or 0."""
    if settings.statistic != "contribution":
        return torch.zeros(data.num_layers, data.num_experts)
    assert settings.size is not None
    if settings.size == "token":
        assert data.token_sizes is not None
        return data.token_sizes.offset_LE
    assert data.moments is not None
    return data.moments.size(settings.size).log().float()


def counted(
    data: CalibrationData, settings: NullSettings, which: str | None = None
) -> tuple[Histogram, Tensor]:
    """Counts of a statistic over a set of experts, and what each expert's are shifted by to be counts of *the* statistic.

    Parameters
    ----------
    which : {"unselected", "all", "trimmed", "selected"}, optional
        Default: the null set of the settings.

    Returns
    -------
    Histogram, Tensor
        Of the base statistic, over the whole text, and its offsets [L, E]. With ``size="token"`` of the statistic itself,
        on the reservoir, and zeros: counts of the base statistic do not tell which size each token had.
    """
    which = which or settings.null
    if settings.size == "token":
        return _reservoir_counts(data, settings, which), torch.zeros(data.num_layers, data.num_experts)
    return _base_counts(data, settings, which), offsets(data, settings)


def null_counts(data: CalibrationData, settings: NullSettings) -> Histogram:
    """Binned counts over the null set: those of `counted`."""
    return counted(data, settings)[0]


def _base_counts(data: CalibrationData, settings: NullSettings, which: str) -> Histogram:
    kind = "logit" if settings.statistic == "logit" else "logprob"
    held = data.histograms.get(kind)
    if held is None:
        raise CalibrationMismatchError(
            f"this calibration holds no counts of {kind!r}, which statistic={settings.statistic!r} needs; "
            f"it holds {', '.join(map(repr, data.histograms)) or 'none'}."
        )
    if which == "all":
        return held["unselected"] + held["selected"]
    return held[which]


def _reservoir_counts(data: CalibrationData, settings: NullSettings, which: str) -> Histogram:
    """Counts of the statistic with the size from the token, on the reservoir's tokens.

    The experts that the router passed over were never run there: their sizes are what the slopes, fitted where they were
    chosen, extrapolate to. With N tokens and E experts of which K are chosen a layer's null has N (E - K) samples (whose
    tokens, not whose pairs, are exchangeable), so that its p-values go down to 1 / (N (E - K) + 1).
    """
    if data.reservoir is None or data.reservoir.num == 0 or data.token_sizes is None:
        raise CalibrationError(
            "size='token' takes its null from the calibration's tokens, and this calibration holds none; calibrate "
            "with a reservoir, or use size='sensitivity'."
        )
    layers = []
    for index, layer in enumerate(data.layers):
        logits_NE = data.reservoir.logits_NLE[:, index]
        statistic_NE = _statistic(data, logits_NE, index, settings, _sized(data, settings, ()))
        inside_NE = torch.ones_like(statistic_NE, dtype=torch.bool)
        if which == "trimmed":
            x_NE = logits_NE.float()
            low_N1, high_N1 = trimmed_range(x_NE, data.trim)
            inside_NE = (x_NE >= low_N1) & (x_NE <= high_N1)
        elif which != "all":
            inside_NE = torch.full_like(inside_NE, which == "unselected")
            own_NK = data.reservoir.experts_NLK[:, index, : layer.top_k].long()
            inside_NE.scatter_(1, own_NK, which == "selected")
        bins_NE = bin_index(statistic_NE)
        start = int(bins_NE.min())
        counts_EB = torch.zeros(data.num_experts, int(bins_NE.max()) - start + 1, dtype=torch.int64)
        flat_EB = counts_EB.view(-1)
        place_NE = (bins_NE - start).long() + torch.arange(data.num_experts) * counts_EB.shape[1]
        flat_EB += place_NE[inside_NE].bincount(minlength=flat_EB.numel())
        layers.append(Histogram(start, counts_EB.unsqueeze(0)))
    return stack_layers(layers)


def _sized(data: CalibrationData, settings: NullSettings, nulls: tuple[Null, ...]) -> Fitted:
    offset_LE = offsets(data, settings)
    if settings.size != "token":
        return Fitted(nulls, offset_LE)
    assert data.token_sizes is not None
    return Fitted(nulls, offset_LE, data.token_sizes.slope_LDE, data.token_sizes.center_LD)


def _statistic(
    data: CalibrationData, logits_TE: Tensor, index: int, settings: NullSettings, fitted: Fitted
) -> Tensor:
    """The statistic of every expert of one layer, float32 [T, E]."""
    offset_E, score_func = fitted.offset_LE[index].to(logits_TE.device), data.layers[index].score_func
    return full_statistic(
        logits_TE,
        offset_E,
        settings.statistic,
        score_func,
        data.temperature,
        **fitted.sized(index, logits_TE.device),
    )


def fit(data: CalibrationData, settings: NullSettings) -> Fitted:
    """Null distributions per layer, float64, and the statistic's offsets; computed once per settings.

    Raises
    ------
    CalibrationError
        If a layer (with scope ``model``: the model) has no null samples.
    """
    if settings not in data.memo:
        with (
            torch.inference_mode(False),
            torch.device("cpu"),
        ):  # whatever the caller's, at a policy's first decision
            if data.given is not None:
                nulls = data.given.nulls
            else:
                counts, offset_LE = counted(data, settings)
                if settings.scope == "model":
                    nulls = (_null(data, counts, offset_LE, None, settings),) * data.num_layers
                else:
                    nulls = tuple(_null(data, counts, offset_LE, i, settings) for i in range(data.num_layers))
            data.memo[settings] = _sized(data, settings, nulls)
    found: Fitted = data.memo[settings]
    return found


def _null(
    data: CalibrationData, counts: Histogram, offset_LE: Tensor, layer: int | None, settings: NullSettings
) -> Null:
    """The null of one layer, or (None) of the model."""
    pooled = pool_counts(counts, offset_LE, layer)
    if pooled.num == 0:
        where = "the model" if layer is None else f"layer {data.paths[layer]}"
        raise CalibrationError(
            f"{where} has no null samples (null={settings.null!r}): expected experts that the router passed "
            "over; calibrate on more text, or use null='all'."
        )
    return fit_null(
        pooled,
        settings.estimator,
        kernel=settings.kernel,
        bandwidth=settings.bandwidth,
        extended=settings.extended,
    )


def p_values(data: CalibrationData, logits_TE: Tensor, index: int, settings: NullSettings) -> Tensor:
    """Calibrated p-values of every expert of the layer with this index, float64 [T, E]."""
    fitted = fit(data, settings)
    return fitted.nulls[index].p_values(_statistic(data, logits_TE, index, settings, fitted))


def layer_index(data: CalibrationData, layer: str | int) -> int:
    """A layer's index from its router path or its index; without paths from the last number in the path."""
    if isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < data.num_layers:
        return layer
    if isinstance(layer, str) and layer in data.paths:
        return data.paths.index(layer)
    if data.given is not None and data.given.in_order:
        numbers = re.findall(r"\d+", layer) if isinstance(layer, str) else []
        if numbers and int(numbers[-1]) < data.num_layers:
            return int(numbers[-1])
        raise CalibrationMismatchError(
            f"{data.given.source} have no layer {layer!r}; they have {data.num_layers} layers, in order."
        )
    raise CalibrationMismatchError(
        f"the calibration has no layer {layer!r}; it has {some_of(data.paths)}, or the indices 0 to "
        f"{data.num_layers - 1}."
    )


def check_temperature(data: CalibrationData, temperature: float | None) -> None:
    """Raise `CalibrationMismatchError` for a temperature other than the calibration's; None is that one."""
    if temperature is not None and temperature != data.temperature:
        raise CalibrationMismatchError(
            f"the calibration was made at temperature {data.temperature:g}, got temperature="
            f"{temperature:g}; calibrate again with that temperature."
        )


def table(data: CalibrationData, alpha: float, procedure: Procedure, settings: NullSettings) -> DecisionTable:
    """The decision table at one level, as `bh_routing.Calibration.table` documents it."""
    if settings.statistic == "logit" and data.temperature != 1.0:
        warnings.warn(
            f"temperature={data.temperature:g} changes no decision with statistic='logit': the null is "
            "divided by it as well.",
            CalibrationWarning,
            stacklevel=3,
        )
    found = table_at(data, [alpha] * data.num_layers, procedure, settings)
    _check_reach(data, found.thresholds_LE, alpha, procedure, settings)
    return found


def table_at(
    data: CalibrationData, alphas: list[float], procedure: Procedure, settings: NullSettings
) -> DecisionTable:
    """The decision table at one level per layer."""
    fitted = fit(data, settings)
    rows: dict[tuple[int, float], Tensor] = {}
    for null, alpha in zip(fitted.nulls, alphas, strict=True):
        if (id(null), alpha) not in rows:
            critical_E = procedure.critical_values(alpha, data.num_experts)
            rows[id(null), alpha] = smallest_passing(null, critical_E)
    return DecisionTable(
        thresholds_LE=torch.stack([rows[id(n), a] for n, a in zip(fitted.nulls, alphas, strict=True)]),
        rule=procedure.rule or "step_up",
        statistic=settings.statistic,
        offset_LE=fitted.offset_LE,
        **(
            {}
            if fitted.slopes_LDE is None
            else {"slopes_LDE": fitted.slopes_LDE, "center_LD": fitted.center_LD}
        ),
        paths=data.paths,
        temperature=data.temperature,
        alpha=alphas[0] if len(set(alphas)) == 1 else None,
        label=f"{procedure.name}: {settings.describe()}",
    )


def _check_reach(
    data: CalibrationData, thresholds_LE: Tensor, alpha: float, procedure: Procedure, settings: NullSettings
) -> None:
    """Refuse thresholds that nothing can reach; warn where only some are out of reach."""
    tops = [layer.top_k for layer in data.layers]
    unreached = [torch.isinf(row_E[:k]) for row_E, k in zip(thresholds_LE, tops, strict=True)]
    dead = [i for i, row in enumerate(unreached) if bool(row.all())]
    short = [i for i, row in enumerate(unreached) if bool(row.any())]
    if not short:
        return
    row = dead[0] if dead else short[0]
    samples = fit(data, settings).nulls[row].num
    if samples == 0:
        return  # how many there are behind a null from outside may not be known
    rank = tops[row] if dead else 1
    critical = float(procedure.critical_values(alpha, data.num_experts)[rank - 1])
    token = settings.size == "token" and data.reservoir is not None
    seen = data.reservoir.num if token and data.reservoir is not None else data.tokens
    needed = math.ceil(1.0 / critical / samples * max(1, seen))
    what = f"with a reservoir of about {needed}" if token else f"on about {needed}"
    has = "holds" if token else "saw"
    text = (
        f"{procedure.name} at alpha={alpha:g} asks for p-values down to {critical:.2g} in layer "
        f"{data.layers[row].path}, but {samples} null samples reach only {1 / (samples + 1):.2g}: calibrate "
        f"{what} tokens or more (this calibration {has} {seen}), or raise alpha."
    )
    if dead:
        raise CalibrationError(f"no threshold is finite: {text}")
    warnings.warn(f"some thresholds are out of reach: {text}", CalibrationWarning, stacklevel=4)
