"""The statistic: how strongly the router calls for an expert, and the table of thresholds on it.

Shape legend: T tokens, E experts, L routed layers.

The base statistic x is the router logit ("logit") or the log of the routing score ("logprob"), after the
logits were divided by the temperature. The statistic is s = scale * x + offset, one affine map per (layer,
expert); "contribution" is the log score plus the log of the expert's calibrated size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softplus

from .errors import CalibrationMismatchError, InvalidInputError, InvalidParameterError
from .procedures import Rule
from .pvalues import at_least_float32

STATISTICS = ("logit", "logprob", "contribution")

# How a family turns router logits into the score that weighs an expert's output; log-scores, [T, E] -> [T, E].
LOG_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: log_softmax(x, -1),
    "sigmoid": logsigmoid,
    "sqrtsoftplus": lambda x: 0.5 * softplus(x).log(),
    "probability": lambda x: x.clamp_min(torch.finfo(x.dtype).tiny).log(),  # what is recorded is a score
}


def check_statistic(statistic: str) -> None:
    """Raise `InvalidParameterError` for an unknown statistic."""
    if statistic not in STATISTICS:
        raise InvalidParameterError(
            f"unknown statistic {statistic!r}; expected one of {', '.join(STATISTICS)}."
        )


def base_statistic(logits_TE: Tensor, statistic: str, score: str, temperature: float = 1.0) -> Tensor:
    """The statistic before its scale and offset, [T, E], float32 at least.

    ``logit``: logits / temperature. ``logprob`` and ``contribution``: the log of the score (`LOG_SCORES`) of
    logits / temperature.
    """
    x_TE = at_least_float32(logits_TE)
    if temperature != 1.0:
        x_TE = x_TE / temperature
    return x_TE if statistic == "logit" else LOG_SCORES[score](x_TE)


def affine_statistic(base: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """s = scale * x + offset in float32: the one place where it is rounded.

    Thresholds are found for these float32 values, so that comparing with them says what the p-values say.
    """
    return base.float() * scale + offset


@dataclass(frozen=True, kw_only=True, eq=False)
class DecisionTable:
    """Level, null and procedure in one table: E thresholds on the statistic per layer.

    ``thresholds_LE[l, k - 1]`` is the smallest float32 s whose p-value is at most the procedure's k-th critical
    value, +inf if there is none; so p_(k) <= c_k is exactly s_(k) >= t_k.

    Attributes
    ----------
    thresholds_LE : Tensor
        float32 [L, E].
    rule : "step_up" or "step_down"
    statistic : str
        One of `STATISTICS`.
    scale_LE, offset_LE : Tensor
        float32 [L, E]: s = scale * x + offset.
    paths : tuple of str
        The router's module path of each layer; empty for a table that fits any layer in order.
    temperature : float
        What divides the logits before the statistic.
    alpha : float or None
        The level the table was made for (None: no level, as for top-k).
    label : str
        What the table is, for people.
    """

    thresholds_LE: Tensor
    rule: Rule = "step_up"
    statistic: str = "logprob"
    scale_LE: Tensor
    offset_LE: Tensor
    paths: tuple[str, ...] = ()
    temperature: float = 1.0
    alpha: float | None = None
    label: str = "table"

    def __post_init__(self) -> None:
        check_statistic(self.statistic)
        if self.rule not in ("step_up", "step_down"):
            raise InvalidParameterError(f"rule must be 'step_up' or 'step_down', got {self.rule!r}.")
        shape = tuple(self.thresholds_LE.shape)
        for name in ("thresholds_LE", "scale_LE", "offset_LE"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.float32 or tensor.dim() != 2 or tuple(tensor.shape) != shape:
                raise InvalidInputError(
                    f"{name} must be float32 of shape [layers, experts] = {shape}, got {tensor.dtype} "
                    f"{tuple(tensor.shape)}."
                )
        if self.paths and len(self.paths) != shape[0]:
            raise InvalidInputError(f"the table has {shape[0]} layers but {len(self.paths)} module paths.")
        if bool(torch.isnan(self.thresholds_LE).any()):
            raise InvalidInputError("thresholds_LE must not hold NaN; use +inf where no value passes.")

    @property
    def num_layers(self) -> int:
        """Layers, L."""
        return self.thresholds_LE.shape[0]

    @property
    def num_experts(self) -> int:
        """Experts, E."""
        return self.thresholds_LE.shape[1]

    def row(self, path: str, index: int) -> int:
        """The table's row for a router: by module path where the table has paths, else by its order.

        Raises
        ------
        CalibrationMismatchError
            If there is none.
        """
        if self.paths:
            if path not in self.paths:
                raise CalibrationMismatchError(
                    f"the table has no row for router {path!r}; it has {', '.join(self.paths[:4])}"
                    f"{', ...' if len(self.paths) > 4 else ''}. Calibrate this model itself."
                )
            return self.paths.index(path)
        if index >= self.num_layers:
            raise CalibrationMismatchError(
                f"the table has {self.num_layers} layers, the model has a router number {index} ({path})."
            )
        return index

    def with_thresholds(self, thresholds_LE: Tensor, **changes: Any) -> DecisionTable:
        """A copy with other thresholds (and other fields)."""
        return replace(self, thresholds_LE=thresholds_LE, **changes)

    @classmethod
    def top_k(cls, k: int | Sequence[int], num_layers: int, num_experts: int) -> DecisionTable:
        """Top-k as a table: t_i = -inf for i <= k, else +inf; one k, or one per layer."""
        ks = [k] * num_layers if isinstance(k, int) else list(k)
        if len(ks) != num_layers or not all(1 <= one <= num_experts for one in ks):
            raise InvalidParameterError(
                f"k must lie in 1..{num_experts}, one for all or one for each of {num_layers} layers, got {k!r}."
            )
        ranks_E = torch.arange(1, num_experts + 1)
        keep_LE = ranks_E <= torch.tensor(ks).unsqueeze(1)
        infinity = torch.tensor(float("inf"))
        return cls._plain(torch.where(keep_LE, -infinity, infinity), "logit", f"top-k {k}")

    @classmethod
    def threshold(cls, probability: float, num_layers: int, num_experts: int) -> DecisionTable:
        """Keep what has at least this routing score: a constant table on the log score."""
        if not 0.0 < probability < 1.0:
            raise InvalidParameterError(
                f"probability must lie strictly between 0 and 1, got {probability!r}."
            )
        level = torch.tensor(probability, dtype=torch.float64).log().to(torch.float32)
        return cls._plain(
            level.expand(num_layers, num_experts).clone(), "logprob", f"score >= {probability:g}"
        )

    @classmethod
    def _plain(cls, thresholds_LE: Tensor, statistic: str, label: str) -> DecisionTable:
        return cls(
            thresholds_LE=thresholds_LE.to(torch.float32),
            statistic=statistic,
            scale_LE=torch.ones(thresholds_LE.shape, dtype=torch.float32),
            offset_LE=torch.zeros(thresholds_LE.shape, dtype=torch.float32),
            label=label,
        )

    def __repr__(self) -> str:
        level = "" if self.alpha is None else f", alpha={self.alpha:.4g}"
        return (
            f"DecisionTable({self.label}{level}, {self.rule}, statistic={self.statistic}, "
            f"{self.num_layers} layers x {self.num_experts} experts)"
        )
