"""What a calibration is made of: layers, moments of the experts' outputs, kept tokens, and settings.

Shape legend: L routed layers, E experts, K slots of the router's own choice, H hidden size, N tokens kept,
J = 2E regressors of the compensation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CalibrationError, InvalidParameterError
from ..stats.histogram import Histogram
from ..stats.kde import BANDWIDTHS, KERNELS
from ..stats.nulls import ESTIMATORS, Null
from ..stats.statistic import STATISTICS

if TYPE_CHECKING:
    pass

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

NULL_SETS = ("unselected", "all", "trimmed")
SCOPES = ("layer", "model")
SIZES = ("output", "deviation", "sensitivity")
RIDGE = 0.02  # of the compensation's fit, relative to the mean square of a dropped weight


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One routed layer as it was calibrated: module paths, slots, and how its router makes weights."""

    path: str
    experts_path: str | None
    top_k: int
    score_func: str
    route_norm: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """What the experts' outputs are like, over the tokens routed to each of them.

    Attributes
    ----------
    tokens_LE : Tensor
        int64, how many tokens.
    square_LE : Tensor
        float64, mean of |f(x)|^2.
    mean_square_LE : Tensor
        float64, |mean of f(x)|^2.
    mean_LEH : Tensor or None
        float64 in memory, float32 in the file: mean of f(x), for the compensation.
    sensitivity_tokens_LE, sensitivity_LE : Tensor or None
        int64 and float64: mean of (g . (f(x) - mean))^2, g the gradient of the summed next-token loss with
        respect to the layer's output, and over how many tokens.
    gram_LJJ, cross_LJH : Tensor or None
        For the compensation, of the second pass: sums of z z' and z d' over tokens, with z the 2E regressors
        of `bh_routing.decision.compensation.lost_and_kept` and d what the dropped experts would have added. float64 in
        memory, float32 in the file.
    """

    tokens_LE: Tensor
    square_LE: Tensor
    mean_square_LE: Tensor
    mean_LEH: Tensor | None
    sensitivity_tokens_LE: Tensor | None = None
    sensitivity_LE: Tensor | None = None
    gram_LJJ: Tensor | None = None
    cross_LJH: Tensor | None = None

    def size(self, kind: str) -> Tensor:
        """Typical size c_e per expert, float64 [L, E].

        ``output``: RMS of f(x). ``deviation``: RMS of f(x) - mean. ``sensitivity``: RMS of
        g . (f(x) - mean). An expert that no token was routed to gets the median of its layer.
        """
        if kind == "sensitivity":
            assert self.sensitivity_LE is not None
            assert self.sensitivity_tokens_LE is not None
            square_LE, tokens_LE = self.sensitivity_LE, self.sensitivity_tokens_LE
        else:
            square_LE, tokens_LE = self.square_LE, self.tokens_LE
            if kind == "deviation":
                square_LE = (square_LE - self.mean_square_LE).clamp_min(0.0)
        known_LE = (tokens_LE > 0) & (square_LE > 0)
        size_LE = square_LE.sqrt()
        for size_E, known_E in zip(size_LE, known_LE, strict=True):
            size_E[~known_E] = size_E[known_E].median() if bool(known_E.any()) else 1.0
        return size_LE

    def compensation(self) -> Tensor | None:
        """What stands in for dropped experts (`bh_routing.decision.compensation`), float64; None without means.

        [L, E, H], the mean output of each expert; after a second pass [L, 2, E, H], the least-squares fit of
        what was dropped: argmin sum |d - B'z|^2 + sum_j rho_j |B_j - P_j|^2, with the mean outputs (and 0 for
        the kept experts) as P, and rho_j a small share of the mean square of such regressors.
        """
        if self.mean_LEH is None or self.gram_LJJ is None or self.cross_LJH is None:
            return self.mean_LEH
        fitted = []
        for mean_EH, gram_JJ, cross_JH in zip(self.mean_LEH, self.gram_LJJ, self.cross_LJH, strict=True):
            num = mean_EH.shape[0]
            prior_JH = torch.cat((mean_EH, torch.zeros_like(mean_EH)))
            halves = gram_JJ.diagonal().double().view(2, num).mean(1)
            rho_J = RIDGE * halves.clamp_min(1e-30).repeat_interleave(num)
            solved_JH = torch.linalg.solve(
                gram_JJ.double() + rho_J.diag(), cross_JH.double() + rho_J.unsqueeze(1) * prior_JH
            )
            fitted.append(solved_JH.view(2, num, -1))
        return torch.stack(fitted)

    def __add__(self, other: Moments) -> Moments:
        if (self.mean_LEH is None) != (other.mean_LEH is None) or (self.sensitivity_LE is None) != (
            other.sensitivity_LE is None
        ):
            raise CalibrationError(
                "only calibrations that hold the same parts can be merged: expected mean outputs and "
                "sensitivities in both or in neither."
            )
        if self.mean_LEH is None:
            raise CalibrationError(
                "calibrations whose mean outputs were dropped cannot be merged, because the deviation from "
                "the common mean is unknown; merge first, then drop the means."
            )
        tokens_LE = self.tokens_LE + other.tokens_LE
        assert other.mean_LEH is not None
        mean_LEH = _weighted(self.mean_LEH, other.mean_LEH, self.tokens_LE, other.tokens_LE)
        more: dict[str, Any] = {}
        if self.sensitivity_LE is not None:
            assert self.sensitivity_tokens_LE is not None
            assert other.sensitivity_LE is not None
            assert other.sensitivity_tokens_LE is not None
            ours_LE, theirs_LE = self.sensitivity_tokens_LE, other.sensitivity_tokens_LE
            more = {
                "sensitivity_tokens_LE": ours_LE + theirs_LE,
                "sensitivity_LE": _weighted(self.sensitivity_LE, other.sensitivity_LE, ours_LE, theirs_LE),
            }
            if self.gram_LJJ is not None and other.gram_LJJ is not None:
                assert self.cross_LJH is not None
                assert other.cross_LJH is not None
                more["gram_LJJ"] = self.gram_LJJ + other.gram_LJJ
                more["cross_LJH"] = self.cross_LJH + other.cross_LJH
        return Moments(
            tokens_LE=tokens_LE,
            square_LE=_weighted(self.square_LE, other.square_LE, self.tokens_LE, other.tokens_LE),
            mean_square_LE=mean_LEH.square().sum(-1),
            mean_LEH=mean_LEH,
            **more,
        )


def _weighted(a: Tensor, b: Tensor, tokens_a_LE: Tensor, tokens_b_LE: Tensor) -> Tensor:
    """Mean of two means by their numbers of tokens; 0 where there are none."""
    share = tokens_b_LE.double() / (tokens_a_LE + tokens_b_LE).clamp_min(1)
    share = share.reshape(share.shape + (1,) * (a.dim() - share.dim()))
    return a + share * (b - a)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reservoir:
    """Tokens kept for the budget: those with the smallest hashes, sorted by hash.

    Attributes
    ----------
    hash_N : Tensor
        int64, a hash of (document, position, seed).
    logits_NLE : Tensor
        float16 router logits.
    experts_NLK : Tensor
        int16, the model's own choice (kept, because a choice made from float16 logits could differ); -1 where
        a layer has fewer slots than the widest.
    """

    hash_N: Tensor
    logits_NLE: Tensor
    experts_NLK: Tensor

    @property
    def num(self) -> int:
        """Tokens, N."""
        return self.hash_N.numel()

    def smallest(self, num: int) -> Reservoir:
        """The tokens with the ``num`` smallest hashes, in their order."""
        order_N = self.hash_N.argsort(stable=True)[:num]
        return Reservoir(
            hash_N=self.hash_N[order_N],
            logits_NLE=self.logits_NLE[order_N],
            experts_NLK=self.experts_NLK[order_N],
        )

    def __add__(self, other: Reservoir) -> Reservoir:
        return Reservoir(
            hash_N=torch.cat((self.hash_N, other.hash_N)),
            logits_NLE=torch.cat((self.logits_NLE, other.logits_NLE)),
            experts_NLK=torch.cat((self.experts_NLK, other.experts_NLK)),
        )


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
    estimator : {"empirical", "kde", "normal"}
    kernel, bandwidth
        Of the KDE (`bh_routing.stats.kde.kde_null`).
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
        for name, allowed in (
            ("statistic", STATISTICS),
            ("size", (*SIZES, None)),
            ("null", NULL_SETS),
            ("scope", SCOPES),
            ("estimator", ESTIMATORS),
            ("kernel", tuple(KERNELS)),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidParameterError(
                    f"unknown {name} {getattr(self, name)!r}; expected one of "
                    f"{', '.join(str(a) for a in allowed if a)}."
                )
        if isinstance(self.bandwidth, str) and self.bandwidth not in BANDWIDTHS:
            raise InvalidParameterError(
                f"unknown bandwidth {self.bandwidth!r}; expected one of {', '.join(BANDWIDTHS)}, or a number."
            )

    def describe(self) -> str:
        """One line for people."""
        size = f" ({self.size})" if self.size else ""
        how = f"{self.kernel} kde" if self.estimator == "kde" else self.estimator
        tail = ", exponential tail" if self.extended else ""
        return f"{self.statistic}{size}, {self.null} null per {self.scope}, {how}{tail}"


def some_of(names: Iterable[str]) -> str:
    """The first three names, and dots if there are more."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


class Fitted(NamedTuple):
    """Nulls per layer (one object, L times, for scope ``model``) and the statistic's offsets [L, E]."""

    nulls: tuple[Null, ...]
    offset_LE: Tensor


def stack_layers(parts: list[Histogram]) -> Histogram:
    """Histograms of one layer each, [1, E, B_l], as one over their common range."""
    start = min(h.start for h in parts)
    stop = max(h.start + h.counts_LEB.shape[-1] for h in parts)
    num_experts = parts[0].counts_LEB.shape[1]
    counts_LEB = torch.zeros(len(parts), num_experts, stop - start, dtype=torch.int64)
    for row, h in enumerate(parts):
        first = h.start - start
        counts_LEB[row, :, first : first + h.counts_LEB.shape[-1]] = h.counts_LEB[0]
    return Histogram(start, counts_LEB)
