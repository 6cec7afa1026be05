"""From a calibration's data to nulls, p-values, thresholds and decision tables: plain functions of `CalibrationData`.

Shape legend: L routed layers, T tokens, E experts.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .._words import Estimator, NullSet, Scope, Size, Statistic, check_word
from ..decision.table import DecisionTable, smallest_passing
from ..errors import CalibrationError, CalibrationMismatchError, CalibrationWarning, InvalidParameterError
from ..stats.histogram import Histogram, pool_counts
from ..stats.kde import BANDWIDTHS, KERNELS
from ..stats.nulls import Null, fit_null
from ..stats.procedures import Procedure
from ..stats.statistic import full_statistic
from .data import CalibrationData, GivenNulls, some_of


@dataclass(frozen=True, kw_only=True)
class NullSettings:
    """Which statistic, and which null it is judged by. All of it resolved, so that it can be a key.

    Attributes
    ----------
    statistic : {"contribution", "logprob", "logit"}
    size : {"output", "deviation", "sensitivity"} or None
        What ``contribution`` scales the score by.
    null : {"unselected", "all", "trimmed"}
    scope : {"model", "layer"}
    estimator : {"empirical", "kde", "normal", "given"}
    kernel, bandwidth
        Of the KDE (`bh_routing.stats.nulls.kde_null`).
    extended : bool
        Whether the null falls exponentially beyond its samples (`bh_routing.stats.nulls.with_exponential_tail`).
    """

    statistic: str
    size: str | None
    null: str
    scope: str
    estimator: str
    kernel: str
    bandwidth: str | float
    extended: bool = False

    def __post_init__(self) -> None:
        check_word("statistic", self.statistic, Statistic)
        if self.size is not None:
            check_word("size", self.size, Size)
        check_word("null", self.null, NullSet)
        check_word("scope", self.scope, Scope)
        check_word("estimator", self.estimator, (*get_args(Estimator), "given"))
        check_word("kernel", self.kernel, KERNELS)
        if isinstance(self.bandwidth, str):
            check_word("bandwidth", self.bandwidth, BANDWIDTHS)

    def describe(self) -> str:
        """One line for people."""
        size = f" ({self.size})" if self.size else ""
        how = f"{self.kernel} kde" if self.estimator == "kde" else self.estimator
        tail = ", exponential tail" if self.extended else ""
        return f"{self.statistic}{size}, {self.null} null per {self.scope}, {how}{tail}"


class Fitted(NamedTuple):
    """Nulls per layer (one object, L times, for scope ``model``) and what the base statistic is shifted by, [L, E]."""

    nulls: tuple[Null, ...]
    offset_LE: Tensor


def resolve(
    data: CalibrationData,
    *,
    statistic: str | None = None,
    size: str | None = None,
    null: str | None = None,
    scope: str | None = None,
    estimator: str | None = None,
    kernel: str = "gaussian",
    bandwidth: str | float = "silverman",
    extended: bool = False,
    compensated: bool | None = None,
) -> NullSettings:
    """Resolve defaults to the recommended configuration, as far as this calibration supports it.

    Parameters
    ----------
    statistic : str, optional
        Default: ``contribution`` where the experts' outputs were collected, else ``logprob``.
    size : str, optional
        Default: ``sensitivity`` where it was collected; else ``deviation`` with compensation, ``output``
        without.
    null, estimator, kernel, bandwidth, extended
        As in `NullSettings`.
    scope : str, optional
        Default: ``model`` for ``contribution`` and ``logprob``, whose units compare across layers;
        ``layer`` for ``logit``.
    compensated : bool, optional
        Whether dropped experts' mean outputs will be added back; default: where they are known.
    """
    if data.given is not None:
        asked = {"statistic": statistic, "size": size, "null": null, "scope": scope, "estimator": estimator}
        return _given_settings(data.given, asked)
    moments = data.moments
    if statistic is None:
        statistic = "contribution" if moments is not None else "logprob"
    if statistic == "contribution":
        if moments is None:
            raise CalibrationMismatchError(
                "statistic='contribution' needs the experts' outputs, which this calibration was made "
                "without; calibrate with outputs, or use statistic='logprob'."
            )
        if size is None:
            if compensated is None:
                compensated = moments.mean_LEH is not None
            if moments.sensitivity_LE is not None:
                size = "sensitivity"
            else:
                size = "deviation" if compensated else "output"
        if size == "sensitivity" and moments.sensitivity_LE is None:
            raise CalibrationMismatchError(
                "size='sensitivity' needs the loss sensitivities, which this calibration was made "
                "without; calibrate with --sensitivity, or use size='deviation'."
            )
    elif size is not None:
        raise InvalidParameterError(
            f"size={size!r} belongs to statistic='contribution', got statistic={statistic!r}; leave it out."
        )
    return NullSettings(
        statistic=statistic,
        size=size,
        null=null or "unselected",
        scope=scope or ("layer" if statistic == "logit" else "model"),
        estimator=estimator or "empirical",
        kernel=kernel,
        bandwidth=bandwidth,
        extended=extended,
    )


def _given_settings(given: GivenNulls, asked: dict[str, str | None]) -> NullSettings:
    """The only settings there are with nulls from outside."""
    fixed = {name: getattr(given, name) for name in ("statistic", "size", "null", "estimator")}
    fixed["scope"] = "layer"
    for name, value in asked.items():
        if value is not None and value != fixed[name]:
            held = ", ".join(f"{k}={v!r}" for k, v in fixed.items() if v)
            raise CalibrationMismatchError(
                f"{given.source} hold one distribution per layer ({held}), got {name}={value!r}; calibrate the "
                "model for anything else."
            )
    return NullSettings(**fixed, kernel="gaussian", bandwidth="silverman")


def offsets(data: CalibrationData, settings: NullSettings) -> Tensor:
    """What is added to the base statistic per (layer, expert), float32 [L, E]: log sizes, or 0."""
    if settings.statistic != "contribution":
        return torch.zeros(data.num_layers, data.num_experts)
    assert data.moments is not None
    assert settings.size is not None
    return data.moments.size(settings.size).log().float()


def null_counts(data: CalibrationData, settings: NullSettings) -> Histogram:
    """Binned counts of the base statistic over the null set."""
    kind = "logit" if settings.statistic == "logit" else "logprob"
    held = data.histograms.get(kind)
    if held is None:
        raise CalibrationMismatchError(
            f"this calibration holds no counts of {kind!r}, which statistic={settings.statistic!r} needs; "
            f"it holds {', '.join(map(repr, data.histograms)) or 'none'}."
        )
    if settings.null == "all":
        return held["unselected"] + held["selected"]
    return held[settings.null]


def fit(data: CalibrationData, settings: NullSettings) -> Fitted:
    """Null distributions per layer, float64, and the statistic's offsets; computed once per settings.

    Raises
    ------
    CalibrationError
        If a layer (with scope ``model``: the model) has no null samples.
    """
    if settings not in data.memo:
        offset_LE = offsets(data, settings)
        if data.given is not None:
            nulls = data.given.nulls
        else:
            counts = null_counts(data, settings)
            if settings.scope == "model":
                nulls = (_null(data, counts, offset_LE, None, settings),) * data.num_layers
            else:
                nulls = tuple(_null(data, counts, offset_LE, i, settings) for i in range(data.num_layers))
        data.memo[settings] = Fitted(nulls, offset_LE)
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
    offset_E, score_func = fitted.offset_LE[index].to(logits_TE.device), data.layers[index].score_func
    statistic_TE = full_statistic(logits_TE, offset_E, settings.statistic, score_func, data.temperature)
    return fitted.nulls[index].p_values(statistic_TE)


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
    needed = math.ceil(1.0 / critical / samples * max(1, data.tokens))
    text = (
        f"{procedure.name} at alpha={alpha:g} asks for p-values down to {critical:.2g} in layer "
        f"{data.layers[row].path}, but {samples} null samples reach only {1 / (samples + 1):.2g}: calibrate on "
        f"about {needed} tokens or more (this calibration saw {data.tokens}), or raise alpha."
    )
    if dead:
        raise CalibrationError(f"no threshold is finite: {text}")
    warnings.warn(f"some thresholds are out of reach: {text}", CalibrationWarning, stacklevel=4)
