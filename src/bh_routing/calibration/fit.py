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


class Sizes(NamedTuple):
    """What the base statistic is shifted by, [L, E], and with sizes that follow the token their slopes [L, D, E] and center [L, D]."""

    offset_LE: Tensor
    slopes_LDE: Tensor | None = None
    center_LD: Tensor | None = None

    def layer(self, index: int, device: torch.device) -> list[Tensor]:
        """One layer's, as `full_statistic` takes them."""
        return [x[index].to(device) for x in self if x is not None]


class Fitted(NamedTuple):
    """Nulls per layer (one object, L times, for scope ``model``), and the sizes in the statistic."""

    nulls: tuple[Null, ...]
    sizes: Sizes


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
    instead = "calibrate with a reservoir, or use size='sensitivity'"
    reservoir = data.kept_tokens("size='token' takes its null from", instead)
    layers, sizes = [], sized(data, settings)
    for index, layer in enumerate(data.layers):
        logits_NE, own_NK = reservoir.layer(index, layer.top_k)
        statistic_NE = _statistic(data, logits_NE, index, settings, sizes)
        inside_NE = torch.ones_like(statistic_NE, dtype=torch.bool)
        if which == "trimmed":
            x_NE = logits_NE.float()
            low_N1, high_N1 = trimmed_range(x_NE, data.trim)
            inside_NE = (x_NE >= low_N1) & (x_NE <= high_N1)
        elif which != "all":
            inside_NE = torch.full_like(inside_NE, which == "unselected")
            inside_NE.scatter_(1, own_NK, which == "selected")
        bins_NE = bin_index(statistic_NE)
        start = int(bins_NE.min())
        counts_EB = torch.zeros(data.num_experts, int(bins_NE.max()) - start + 1, dtype=torch.int64)
        flat_EB = counts_EB.view(-1)
        place_NE = (bins_NE - start).long() + torch.arange(data.num_experts) * counts_EB.shape[1]
        flat_EB += place_NE[inside_NE].bincount(minlength=flat_EB.numel())
        layers.append(Histogram(start, counts_EB.unsqueeze(0)))
    return stack_layers(layers)


def sized(data: CalibrationData, settings: NullSettings) -> Sizes:
    """The sizes in the statistic; none that follow the token where they are constants."""
    token = data.token_sizes if settings.size == "token" else None
    more = () if token is None else (token.slope_LDE, token.center_LD)
    return Sizes(offsets(data, settings), *more)


def _statistic(
    data: CalibrationData, logits_TE: Tensor, index: int, settings: NullSettings, sizes: Sizes
) -> Tensor:
    """The statistic of every expert of one layer, float32 [T, E]."""
    offset_E, *follows = sizes.layer(index, logits_TE.device)
    score_func = data.layers[index].score_func
    return full_statistic(logits_TE, offset_E, settings.statistic, score_func, data.temperature, *follows)


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
            data.memo[settings] = Fitted(nulls, sized(data, settings))
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
    return fitted.nulls[index].p_values(_statistic(data, logits_TE, index, settings, fitted.sizes))


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
        **fitted.sizes._asdict(),
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
    token = data.reservoir if settings.size == "token" else None
    seen = data.tokens if token is None else token.num
    needed = math.ceil(1.0 / critical / samples * max(1, seen))
    what = f"with a reservoir of about {needed}" if token is not None else f"on about {needed}"
    has = "saw" if token is None else "holds"
    text = (
        f"{procedure.name} at alpha={alpha:g} asks for p-values down to {critical:.2g} in layer "
        f"{data.layers[row].path}, but {samples} null samples reach only {1 / (samples + 1):.2g}: calibrate "
        f"{what} tokens or more (this calibration {has} {seen}), or raise alpha."
    )
    if dead:
        raise CalibrationError(f"no threshold is finite: {text}")
    warnings.warn(f"some thresholds are out of reach: {text}", CalibrationWarning, stacklevel=4)
