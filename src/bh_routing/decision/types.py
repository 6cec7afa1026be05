"""What a decision is made of and returns, and the checks of its limits.

Shape legend: T tokens, E experts, K slots of the router's own choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from .._words import Clamp
from ..errors import InvalidParameterError, InvalidTypeError
from ..stats.procedures import Rule

RouteNorm = Literal["none", "renormalised", "unknown"]


PlainRule = Literal["own", "preserve", "sum"]


PAD = -1  # marks an unused slot in the public functions' results; it never reaches a model


class Limits(NamedTuple):
    """What a count is clamped to.

    Attributes
    ----------
    min_k : int or Tensor
        int64 [T] where each token has its own.
    max_k : int or None
        None: all candidates.
    clamp : "after" or "inside"
        ``after``: the procedure's count, clamped. ``inside``: the largest rank within max_k that passes (the same for
        a step-down rule), then at least min_k.
    """

    min_k: int | Tensor = 1
    max_k: int | None = None
    clamp: Clamp = "after"

    def top(self, num: int) -> int:
        """The most that is kept of ``num`` candidates."""
        return num if self.max_k is None else min(self.max_k, num)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSettings:
    """All that a decision from a table depends on, but for the tensors.

    Attributes
    ----------
    empty : int
        The index that dropped slots get.
    statistic, score_func, temperature
        As in `bh_routing.stats.statistic.base_statistic`.
    rule : "step_up" or "step_down"
    limits : Limits
    weights : "own", "preserve" or "sum"
        As in `bh_routing.decision.weights.apply_weight_rule`.
    """

    empty: int
    statistic: str = "logprob"
    score_func: str = "softmax"
    temperature: float = 1.0
    rule: Rule = "step_up"
    limits: Limits = DEFAULT_LIMITS
    weights: PlainRule = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingDecision:
    """What a policy decided for the T tokens of one layer.

    Attributes
    ----------
    weights_TK : Tensor
        Routing weights, the dtype of the router's own; 0 in empty slots.
    experts_TK : Tensor
        int64 expert indices; an empty slot carries ``num_experts`` of the experts module.
    counts_T : Tensor
        int64, experts kept per token (after the clamp to [min_k, max_k]).
    raw_counts_T : Tensor
        int64, what the procedure itself rejected, before the clamp; without meaning in a ``fallback_T`` row.
    dropped_TK : Tensor
        bool, which of the router's own slots were dropped.
    own_weights_TK, own_experts_TK : Tensor
        The router's own choice, untouched.
    fallback_T : Tensor or None
        bool, tokens with non-finite logits that keep the router's own choice.
    in_place : bool
        Every kept slot is where the router had it, and an empty one has weight -0.0.
    logits_TE : Tensor or None
        The router's raw logits, which a compensation that follows the token reads; the patch sets them.
    shared_TK : Tensor or None
        bool, under a price on loads: pairs that run on loads for which others paid (`bh_routing.decision.price`).
    resident_E : Tensor or None
        bool, experts whose loads were free.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    counts_T: Tensor
    raw_counts_T: Tensor
    dropped_TK: Tensor
    own_weights_TK: Tensor
    own_experts_TK: Tensor
    empty: int
    fallback_T: Tensor | None = None
    in_place: bool = False
    logits_TE: Tensor | None = None
    shared_TK: Tensor | None = None
    resident_E: Tensor | None = None

    @property
    def dropped_weights_TK(self) -> Tensor:
        """The router's own weights of what was dropped, 0 elsewhere."""
        return self.own_weights_TK.masked_fill(~self.dropped_TK, 0.0)


def check_k(min_k: int, max_k: int | None, num_experts: int | None = None, *, least: int = 1) -> None:
    """Raise `InvalidParameterError` unless least <= min_k <= max_k <= num_experts, and max_k is at least 1."""
    for name, value in (("min_k", min_k), ("max_k", max_k)):
        if value is None and name == "max_k":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidTypeError(f"{name} must be an integer, got {value!r}.")
    if min_k < least:
        why = "" if least == 0 else "; every token needs an expert"
        raise InvalidParameterError(f"min_k must be at least {least}, got {min_k}{why}.")
    if max_k is not None and max_k < max(min_k, 1):
        floor = f"min_k={min_k}" if min_k else "1"
        raise InvalidParameterError(f"max_k must be at least {floor}, got {max_k}.")
    if num_experts is not None and (max_k or min_k) > num_experts:
        name, value = ("max_k", max_k) if max_k is not None else ("min_k", min_k)
        raise InvalidParameterError(
            f"{name} must not exceed the number of experts, {num_experts}, got {value}; lower {name}."
        )


def check_temperature(temperature: float, *, coldest: float = 1e-30) -> float:
    """Return the temperature as a float, or raise unless it is a finite number above 0, and at least ``coldest``.

    A logit divided by less than that is no float32 number any more.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise InvalidTypeError(f"temperature must be a number, got {temperature!r}.")
    if not 0.0 < float(temperature) < float("inf"):
        raise InvalidParameterError(
            f"temperature must be a finite number above 0, got {temperature!r}; 1.0 leaves the logits alone."
        )
    if coldest and not coldest <= temperature <= 1 / coldest:
        raise InvalidParameterError(
            f"temperature must be at least {coldest:g} and at most {1 / coldest:g}, got {temperature!r}: logits divided by "
            "it are no numbers any more; 1.0 leaves them alone."
        )
    return float(temperature)
