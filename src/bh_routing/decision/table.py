"""The decision table: level, null and procedure collapsed into one threshold on the statistic per rank.

Shape legend: L routed layers, E experts, D raw router logits of a token (= E).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._words import Statistic, check_word
from ..errors import (
    CalibrationMismatchError,
    InvalidInputError,
    InvalidParameterError,
)
from ..stats.nulls import Null
from ..stats.procedures import Rule


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
        "logit", "logprob" or "contribution".
    offset_LE : Tensor
        float32 [L, E]: the statistic is its base + offset.
    slopes_LDE, center_LD : Tensor or None
        float32 [L, D, E] and [L, D], D = E, both or neither: what is added where a size follows the token
        (`bh_routing.stats.statistic.token_size`).
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
    offset_LE: Tensor
    slopes_LDE: Tensor | None = None
    center_LD: Tensor | None = None
    paths: tuple[str, ...] = ()
    temperature: float = 1.0
    alpha: float | None = None
    label: str = "table"

    def __post_init__(self) -> None:
        check_word("statistic", self.statistic, Statistic)
        check_word("rule", self.rule, Rule)
        shape = tuple(self.thresholds_LE.shape)
        if len(shape) != 2:
            raise InvalidInputError(f"thresholds_LE must be of shape [layers, experts], got {shape}.")
        if (self.slopes_LDE is None) != (self.center_LD is None):
            raise InvalidInputError(
                "slopes_LDE and center_LD belong together, got one of them; give both or neither."
            )
        for name, expected in (
            ("thresholds_LE", shape),
            ("offset_LE", shape),
            ("slopes_LDE", (*shape, shape[1])),
            ("center_LD", shape),
        ):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.dtype != torch.float32 or tuple(tensor.shape) != expected):
                raise InvalidInputError(
                    f"{name} must be float32 of shape {expected}, got {tensor.dtype} {tuple(tensor.shape)}; the "
                    f"table has {shape[0]} layers of {shape[1]} experts."
                )
            if (
                tensor is not None
                and name in ("slopes_LDE", "center_LD")
                and not bool(tensor.isfinite().all())
            ):
                raise InvalidInputError(f"{name} must be finite.")
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

    @property
    def follows_token(self) -> bool:
        """Whether its sizes follow the token."""
        return self.slopes_LDE is not None

    def tensors(self, row: int) -> tuple[Tensor, ...]:
        """A layer's thresholds and offsets, and its slopes and center where sizes follow the token."""
        held = (self.thresholds_LE, self.offset_LE, self.slopes_LDE, self.center_LD)
        return tuple(tensor[row] for tensor in held if tensor is not None)

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
            offset_LE=torch.zeros(thresholds_LE.shape, dtype=torch.float32),
            label=label,
        )

    def __repr__(self) -> str:
        level = "" if self.alpha is None else f", alpha={self.alpha:.4g}"
        return (
            f"DecisionTable({self.label}{level}, {self.rule}, statistic={self.statistic}, "
            f"{self.num_layers} layers x {self.num_experts} experts)"
        )


# ---------------------------------------------------------------------------------------------------------
# From nulls to thresholds
# ---------------------------------------------------------------------------------------------------------

_SIGN = 0x7FFFFFFF


def _from_order(order: Tensor) -> Tensor:
    """float32 from its rank among all float32: the integers in [-2^31, 2^31) in the numbers' own order."""
    bits = torch.where(order >= 0, order, (-order - 1) ^ ~_SIGN)
    return bits.to(torch.int32).view(torch.float32)


def smallest_passing(null: Null, critical_E: Tensor) -> Tensor:
    """For each critical value c the smallest float32 s with p(s) <= c, float32 [E]; +inf if there is none.

    p is evaluated by the null itself, in float64, so that ``s >= t`` says what ``p(s) <= c`` says, for every
    finite float32 s: a bisection over the float32 numbers in their order, not an inversion of p.
    """
    critical_E = critical_E.to(torch.float64)
    largest = torch.finfo(torch.float32).max
    top = int(torch.tensor(largest).view(torch.int32))
    low_E = torch.full(critical_E.shape, -top - 2, dtype=torch.int64)  # one below the smallest finite number
    high_E = torch.full_like(low_E, top)
    none_E = null.p_values(torch.full(critical_E.shape, largest)) > critical_E
    while bool((high_E - low_E > 1).any()):
        middle_E = torch.maximum((low_E + high_E).div(2, rounding_mode="floor"), low_E + 1)
        passes_E = null.p_values(_from_order(middle_E)) <= critical_E
        high_E = torch.where(passes_E, middle_E, high_E)
        low_E = torch.where(passes_E, low_E, middle_E)
    # Zero has two representations; -0.0 >= 0.0 holds, so either stands for both.
    return torch.where(none_E, torch.inf, _from_order(high_E))
