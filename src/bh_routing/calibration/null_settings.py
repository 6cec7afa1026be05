"""Which statistic a calibration is asked for, and which null it is judged by: what was chosen, and what follows by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from .._words import Estimator, NullSet, Scope, Size, Statistic, check_word
from ..errors import CalibrationMismatchError, InvalidParameterError
from ..stats.kde import BANDWIDTHS, KERNELS
from .data import CalibrationData, GivenNulls


@dataclass(frozen=True, kw_only=True)
class NullSettings:
    """Which statistic, and which null it is judged by. All of it resolved, so that it can be a key.

    Attributes
    ----------
    statistic : {"contribution", "logprob", "logit"}
    size : {"output", "deviation", "sensitivity", "token"} or None
        What ``contribution`` scales the score by: a constant per expert, or (``token``) what the router logits predict
        for it (`bh_routing.calibration.token_sizes`).
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
    compensated: bool | str | None = None,
) -> NullSettings:
    """Resolve defaults to the recommended configuration, as far as this calibration supports it.

    Parameters
    ----------
    statistic : str, optional
        Default: ``contribution`` where the experts' outputs were collected, else ``logprob``.
    size : str, optional
        Default: ``token`` with a linear compensation, ``sensitivity`` where it was collected; else ``deviation`` with compensation,
        ``output`` without.
    null, estimator, kernel, bandwidth, extended
        As in `NullSettings`.
    scope : str, optional
        Default: ``model`` for ``contribution`` and ``logprob``, whose units compare across layers;
        ``layer`` for ``logit``.
    compensated : bool or str, optional
        What will stand in for dropped experts: a form of compensation, none (False), or the best that is held (True).
        Default: where one is held. Sizes that follow the token are those of what the linear one leaves over; with the
        others sensitivities did better.
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
            if data.token_sizes is not None and compensated in (True, "linear"):
                size = "token"
            elif moments.sensitivity_LE is not None:
                size = "sensitivity"
            else:
                size = "output" if compensated in (False, "none") else "deviation"
        if size == "sensitivity" and moments.sensitivity_LE is None:
            raise CalibrationMismatchError(
                "size='sensitivity' needs the loss sensitivities, which this calibration was made "
                "without; calibrate with --sensitivity, or use size='deviation'."
            )
        if size == "token" and data.token_sizes is None:
            raise CalibrationMismatchError(
                "size='token' needs the sizes that follow the token, which this calibration was made without; calibrate "
                "with --sensitivity on more text, or use size='sensitivity'."
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
