"""What a person configures for vLLM: a dictionary (or JSON) -> checked settings -> a policy, and a digest of it all."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..._version import __version__
from ...calibration.calibration import Calibration
from ...decision.table import DecisionTable
from ...errors import InvalidParameterError, InvalidTypeError
from ...policies import RoutingPolicy, TablePolicy
from ...settings import RoutingSettings
from ...settings.levels import LEVELS

KEY = "bh_routing"  # in vLLM's additional_config
DIGEST_KEY = "bh_routing_digest"
LOAD_KEY = "bh_routing_under_load"  # the solved levels of under_load
VARIABLE = "BH_ROUTING_CONFIG"


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings(RoutingSettings):
    """The routing of one engine: `bh_routing.RoutingSettings`, and what only an engine needs.

    Attributes
    ----------
    calibration : str, optional
        The calibration's file.
    top_k : int, optional
        Instead of a level or a budget: a table that keeps the ``top_k`` largest logits of the model's own choice.
    ragged : bool
        On CPU, call the experts with the kept (token, expert) pairs only; False: unused slots are computed, too,
        with weight 0.
    under_load : float, optional
        Experts per token that requests without a level of their own get when many wait (`levels.Shedding`); below
        ``experts_per_token``, which they get otherwise.
    """

    calibration: str | None = None
    top_k: int | None = None
    ragged: bool = True
    under_load: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in (*LEVELS, "top_k") if getattr(self, n) is not None]
        if len(given) > 1:
            raise InvalidParameterError(
                f"expected one of {', '.join(LEVELS)} and top_k in {KEY}, got {' and '.join(given)}; give one."
            )
        least, most = self.under_load, self.experts_per_token
        if least is not None and not (isinstance(most, (int, float)) and 0 < least < most):
            raise InvalidParameterError(
                f"under_load must be a number of experts above 0 and below experts_per_token, got under_load={least!r} and "
                f"experts_per_token={most!r}."
            )
        if self.priced and self.top_k is not None:
            raise InvalidParameterError(
                f"a price on loads needs a calibration's drop losses, which top_k={self.top_k} does not look at; leave top_k out."
            )
        if self.resident is not None:
            raise InvalidParameterError(
                "resident has no meaning in vLLM, which holds all experts; leave it out."
            )
        if self.skip != "auto":
            raise InvalidParameterError(
                f"skip={self.skip!r} has no meaning in vLLM, which says by ragged what is computed; leave it out."
            )
        self.check_calibrated(self.calibration)

    @classmethod
    def from_value(cls, value: Any) -> Settings:
        """Settings from what was configured: a mapping, JSON text, or the name of a JSON file.

        Raises
        ------
        InvalidParameterError, InvalidTypeError
            For an unknown key or a value out of range.
        """
        if isinstance(value, str):
            value = _parse(value)
        if not isinstance(value, Mapping):
            raise InvalidTypeError(
                f'{KEY} must be an object such as {{"calibration": "calib.safetensors", '
                f'"experts_per_token": 4}}, got {value!r}.'
            )
        return cls.from_dict(value)

    def at_rest(self) -> Settings:
        """The same without ``under_load``, which is about the default alone."""
        return replace(self, under_load=None)

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the settings, of the calibration's own digest, and of the library's version."""
        content = None if self.calibration is None else file_digest(self.calibration)
        text = json.dumps([asdict(self), content, __version__], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def load_calibration(self) -> Calibration | None:
        """The calibration, or None without one; raises `CalibrationError` for a file that is none."""
        return None if self.calibration is None else Calibration.load(self.calibration)

    def top_k_policy(self, num_layers: int, num_experts: int) -> RoutingPolicy:
        """The policy of ``top_k``: a table that keeps the largest logits."""
        assert self.top_k is not None
        table = DecisionTable.top_k(self.top_k, num_layers, num_experts)
        return TablePolicy(table, max_k=self.max_k, weights=self.weights)


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


def number(name: str, value: Any) -> float | None:
    """A number, also where it came as text (over HTTP).

    Raises
    ------
    InvalidParameterError
        For anything else, naming it.
    """
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or math.isnan(found):
        raise InvalidParameterError(f"{name} must be a number, got {value!r}.")
    return found


def file_digest(path: str) -> str | None:
    """The digest that a calibration file carries; None for what is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError):
        return None
