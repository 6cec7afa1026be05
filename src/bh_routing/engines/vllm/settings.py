"""What a person configures for vLLM: a dictionary (or JSON) -> checked settings -> a policy, and a digest of it all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...decision.compensation import check_strength
from ...errors import InvalidParameterError, InvalidTypeError

if TYPE_CHECKING:
    from ...calibration.calibration import Calibration
    from ...policies import RoutingPolicy

KEY = "bh_routing"  # in vLLM's additional_config
DIGEST_KEY = "bh_routing_digest"
VARIABLE = "BH_ROUTING_CONFIG"

# What belongs to a calibration and is passed on to it.
CALIBRATED = ("statistic", "null", "scope", "estimator", "size", "kernel", "bandwidth")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The routing of one engine. Fields mean what they mean in `bh_routing.BHRoutingIntegration`, and more:

    Attributes
    ----------
    top_k : int, optional
        Instead of a level or a budget: a table that keeps the ``top_k`` largest logits of the model's own choice.
    ragged : bool
        On CPU, call the experts with the kept (token, expert) pairs only; False: unused slots are computed, too,
        with weight 0.
    """

    calibration: str | None = None
    alpha: float | None = None
    experts_per_token: float | dict[str, float] | None = None
    top_k: int | None = None
    temperature: float = 1.0
    min_k: int = 1
    max_k: int | None = None
    mode: str = "patch"
    collect_stats: bool = True
    weights: str = "model"
    procedure: str = "bh"
    pvalues: str = "robust"
    clamp: str = "after"
    statistic: str | None = None
    null: str | None = None
    scope: str | None = None
    estimator: str | None = None
    size: str | None = None
    kernel: str | None = None
    bandwidth: str | float | None = None
    compensation: bool | float | None = None
    ragged: bool = True
    strict: bool = True

    def __post_init__(self) -> None:
        from ...decision.types import check_clamp, check_k, check_temperature

        for name in ("collect_stats", "ragged", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidTypeError(f"{KEY}.{name} must be true or false, got {getattr(self, name)!r}.")
        check_strength(self.compensation)
        if self.mode not in ("patch", "analyze"):
            raise InvalidParameterError(f"mode must be 'patch' or 'analyze', got {self.mode!r}.")
        check_k(self.min_k, self.max_k)
        check_clamp(self.clamp)
        check_temperature(self.temperature)
        given = [n for n in ("alpha", "experts_per_token", "top_k") if getattr(self, n) is not None]
        if len(given) > 1:
            raise InvalidParameterError(
                f"expected one of alpha, experts_per_token and top_k in {KEY}, got {' and '.join(given)}; give one."
            )
        if self.calibration is None:
            needs = ["experts_per_token", *CALIBRATED, *(["compensation"] if self.compensation else [])]
            for name in needs:
                if getattr(self, name) is not None:
                    raise InvalidParameterError(
                        f'{name}={getattr(self, name)!r} needs a calibration: add "calibration": FILE to {KEY}, '
                        "made by `bh-routing calibrate MODEL --text FILE`."
                    )

    @classmethod
    def from_value(cls, value: Any) -> Settings:
        """Settings from what was configured: a mapping, JSON text, or the name of a JSON file.

        Raises
        ------
        InvalidParameterError, InvalidTypeError
            For an unknown key or a value out of range.
        """
        if isinstance(value, Settings):
            return value
        if isinstance(value, str):
            value = _parse(value)
        if not isinstance(value, Mapping):
            raise InvalidTypeError(
                f'{KEY} must be an object such as {{"calibration": "calib.safetensors", '
                f'"experts_per_token": 4}}, got {value!r}.'
            )
        names = [field.name for field in fields(cls)]
        for key in value:
            if key not in names:
                near = get_close_matches(str(key), names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}."
                raise InvalidParameterError(f"{KEY} has no setting {key!r}; {hint}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults: the shortest configuration that means the same."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the settings, of the calibration's own digest, and of the library's version."""
        content = None if self.calibration is None else file_digest(self.calibration)
        text = json.dumps([asdict(self), content, __version__], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def load_calibration(self) -> Calibration | None:
        """The calibration, or None without one; raises `CalibrationError` for a file that is none."""
        if self.calibration is None:
            return None
        from ...calibration.calibration import Calibration

        return Calibration.load(self.calibration)

    def make_policy(self, calibration: Calibration | None, **level: Any) -> RoutingPolicy | None:
        """The policy at the configured level, or at another one given as ``alpha`` or ``experts_per_token``.

        None for ``top_k``, whose table needs the number of layers and experts (`top_k_policy`).
        """
        from ...policies import PValuePolicy

        if not level:
            level = {"alpha": self.alpha, "experts_per_token": self.experts_per_token}
        limits: dict[str, Any] = {
            "min_k": self.min_k,
            "max_k": self.max_k,
            "clamp": self.clamp,
            "weights": self.weights,
        }
        if self.top_k is not None:
            return None
        if calibration is None:
            alpha = level.get("alpha")
            return PValuePolicy(
                self.pvalues,
                procedure=self.procedure,
                alpha=0.05 if alpha is None else alpha,
                temperature=self.temperature,
                **limits,
            )
        chosen = {name: getattr(self, name) for name in CALIBRATED if getattr(self, name) is not None}
        return calibration.policy(
            **level,
            procedure=self.procedure,
            temperature=self.temperature,
            compensated=self.compensates(calibration),
            **chosen,
            **limits,
        )

    def top_k_policy(self, num_layers: int, num_experts: int) -> RoutingPolicy:
        """The policy of ``top_k``: a table that keeps the largest logits."""
        from ...decision.table import DecisionTable
        from ...policies import TablePolicy

        assert self.top_k is not None
        return TablePolicy(
            DecisionTable.top_k(self.top_k, num_layers, num_experts),
            max_k=self.max_k,
            weights=self.weights,  # type: ignore[arg-type]
        )

    def compensates(self, calibration: Calibration | None) -> bool:
        """Whether the dropped experts' stand-ins are added: as configured, by default where they are known."""
        known = calibration is not None and calibration.moments is not None
        known = known and calibration.moments.mean_LEH is not None  # type: ignore[union-attr]
        if self.compensation and not known:
            raise InvalidParameterError(
                f"compensation={json.dumps(self.compensation)} needs the experts' mean outputs, which this "
                "calibration does not hold; "
                'calibrate without --no-means, or configure "compensation": false.'
            )
        return known and check_strength(self.compensation) != 0.0


def _parse(text: str) -> Any:
    """JSON, or the content of the JSON file of that name."""
    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file():
            raise InvalidParameterError(
                f"{VARIABLE} must be a JSON object or the name of a JSON file, got {text!r}, which is neither."
            )
        text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidParameterError(f"the configuration of {KEY} is no JSON: {error}.") from None


def read_settings(additional_config: Any, environ: Mapping[str, str] | None = None) -> Settings | None:
    """The settings of an engine: from its ``additional_config``, else from the environment; None: not configured."""
    if isinstance(additional_config, Mapping) and additional_config.get(KEY) is not None:
        return Settings.from_value(additional_config[KEY])
    value = (os.environ if environ is None else environ).get(VARIABLE)
    return Settings.from_value(value) if value else None


def file_digest(path: str) -> str | None:
    """The digest that a calibration file carries; None for what is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError):
        return None
