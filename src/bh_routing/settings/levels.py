"""How a level may be named: itself, a budget, the loss that is accepted, or one for each phase. What each means.

Functions of `bh_routing.RoutingSettings`, which keeps what was said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from .._words import Phase, did_you_mean, wanted
from ..errors import CertificateError, InvalidParameterError, InvalidTypeError

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration
    from .routing import RoutingSettings

S = TypeVar("S", bound="RoutingSettings")

PHASES: tuple[Phase, ...] = get_args(Phase)
LEVELS = ("alpha", "experts_per_token", "max_kl", "agreement", "phases")  # at most one of them is given
OF_A_PHASE = ("alpha", "experts_per_token", "min_k")
# What decides beside the level: what a certificate was made with, and holds for.
DECIDES = (
    "temperature", "min_k", "max_k", "weights", "procedure", "clamp", "statistic", "size", "null", "scope", "estimator",
    "kernel", "bandwidth",
)  # fmt: skip


def check_levels(settings: RoutingSettings) -> None:
    """Raise unless at most one way to say how much is used, and it is in range."""
    for name, what in (
        ("max_kl", "nats per token above 0"),
        ("agreement", "a share of next words above 0 and below 1"),
    ):
        value = getattr(settings, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidTypeError(f"{name} must be a number, got {value!r}.")
        if not 0.0 < value < (1.0 if name == "agreement" else float("inf")):
            raise InvalidParameterError(f"{name} must be {what}, got {value!r}.")
    given = [name for name in LEVELS if getattr(settings, name) is not None]
    if len(given) > 1:
        said = " and ".join(f"{name}={getattr(settings, name)!r}" for name in given)
        raise InvalidParameterError(f"expected a level or a budget, got both {said}; give one of them.")
    if settings.phases is not None:
        _check_phases(settings.phases)
    if settings.priced and given and given[0] in ("max_kl", "agreement", "phases"):
        why = (
            "a price on loads drops other experts for other neighbours in a batch, which no certificate covers"
            if given[0] != "phases"
            else "a price on loads is one of decoding already"
        )
        raise InvalidParameterError(
            f"{given[0]} cannot be had together with a price: {why}; give one of them."
        )


def _check_phases(phases: Any) -> None:
    if not isinstance(phases, Mapping) or set(phases) != set(PHASES):
        got = ", ".join(map(str, phases)) if isinstance(phases, Mapping) else repr(phases)
        raise InvalidParameterError(
            'phases must say both, as in {"prefill": {"experts_per_token": 8}, "decode": {"experts_per_token": 3}}, got '
            f"{got}."
        )
    for phase, level in phases.items():
        if not isinstance(level, Mapping):
            raise InvalidTypeError(f"phases[{phase!r}] must be a mapping, got {type(level).__name__}.")
        if {"max_kl", "agreement"} & set(level):
            raise InvalidParameterError(
                f"phases[{phase!r}] names a certified loss, and certificates are of one level for all tokens; name "
                "experts_per_token or alpha."
            )
        for name in level:
            if name not in OF_A_PHASE:
                raise InvalidParameterError(
                    f"phases[{phase!r}] has no setting {name!r}; {did_you_mean(str(name), OF_A_PHASE)}"
                )
        if (level.get("alpha") is None) == (level.get("experts_per_token") is None):
            raise InvalidParameterError(f"phases[{phase!r}] must name one of alpha and experts_per_token.")


def of_phases(settings: S, calibration: Calibration | None) -> dict[Phase, S]:
    """The settings of each phase by itself. A budget of the model's own number keeps every expert."""
    assert settings.phases is not None
    found = {}
    for phase in PHASES:
        level = dict(settings.phases[phase])
        budget = level.get("experts_per_token")
        if calibration is not None and isinstance(budget, (int, float)):
            own = {layer.top_k for layer in calibration.layers}
            if len(own) == 1 and budget >= (most := own.pop()) and (settings.max_k or most) >= most:
                level = {"alpha": None, "experts_per_token": None, "min_k": most}
        found[phase] = replace(settings, phases=None, **level)
    return found


def certified(settings: RoutingSettings, calibration: Calibration | None) -> float:
    """The budget at which the calibration's certificate covers the loss that was named, experts per token.

    Raises
    ------
    InvalidParameterError
        Without a calibration.
    CertificateError
        If it has no certificate, one of other settings, or one that does not cover the loss.
    """
    asked = (
        f"max_kl={settings.max_kl:g}" if settings.max_kl is not None else f"agreement={settings.agreement:g}"
    )
    certificate = None if calibration is None else calibration.certificate
    if calibration is None or certificate is None:
        raise CertificateError(
            f"{asked} needs a calibration with a certificate; make one with `bh-routing certify MODEL --calibration FILE "
            "--text FILE`, or name a budget instead."
        )
    ours, theirs = decided_by(settings, calibration), (certificate.settings, certificate.compensation)
    if ours != theirs:
        raise CertificateError(
            f"{asked} was certified with {_told(*theirs)}, got {_told(*ours)}; leave those settings as they were, or certify "
            "with others."
        )
    return certificate.level(max_kl=settings.max_kl, agreement=settings.agreement).experts_per_token


def decided_by(
    settings: RoutingSettings, calibration: Calibration
) -> tuple[dict[str, Any], tuple[str, float]]:
    """What decides beside the level: the settings that differ from the defaults, and the compensation's form and scale."""
    from ..stats.procedures import get_procedure

    given = {name: value for name, value in settings.to_dict().items() if name in DECIDES}
    if "procedure" in given:
        given["procedure"] = get_procedure(given["procedure"]).name
        if given["procedure"] == get_procedure(type(settings).procedure).name:
            del given["procedure"]
    form, scale = settings.form(calibration), wanted(settings.compensation).scale
    measured = {"none": 0.0, "mean": calibration.compensation_scale, "linear": calibration.linear_scale}
    return given, (form, measured[form] if scale is None or form == "none" else float(scale))


def _told(settings: Mapping[str, Any], compensation: tuple[str, float]) -> str:
    listed = [f"{name}={value!r}" for name, value in settings.items()]
    return ", ".join([*listed, f"compensation {compensation[0]} at {compensation[1]:g}"])


class Phases(dict[str, dict[str, float]]):
    """Phases that were typed, and are shown as they were."""

    def __str__(self) -> str:
        return "/".join(f"{level['experts_per_token']:g}" for level in self.values())


def read_phases(text: str) -> Phases:
    """``8/3``, as people type it: experts per token while the prompt is read, and while the answer is written.

    >>> read_phases("8/3")["decode"], str(read_phases("8/3"))
    ({'experts_per_token': 3.0}, '8/3')
    """
    prefill, decode = map(float, text.split("/"))
    return Phases(prefill={"experts_per_token": prefill}, decode={"experts_per_token": decode})
