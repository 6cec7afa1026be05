"""What stands in for dropped experts, weighted by the router's own weights: a vector per expert, or a map per expert.

Shape legend: T tokens, E experts, K slots of the router's own choice, H hidden size, D router logits of a token (= E),
R rank, Q = 1 + R regressors (and some zeros, where a kernel wants a multiple of 8), P dropped pairs.

With w_e the router's own weight of expert e, D the dropped and S the kept experts of its choice, the layer's output
gets, in the **mean** form,

    sum_{e in D} w_e M_e  +  (sum_{e in D} w_e) sum_{e in S} w_e N_e.

M_e alone, the mean output of expert e, is the simple kind. The second term says what the kept experts tell of the
dropped ones; it vanishes where nothing is dropped. M and N are fitted by least squares to what was dropped on the
calibration text (`bh_routing.calibration.data.Moments.compensation`). Either kind is one product with a matrix of
E or 2E rows: about 1/50 or 1/25 of an expert's cost at OLMoE's size.

In the **linear** form (`bh_routing.calibration.linear_fit`) what stands in for an expert follows the token:

    sum_{e in D} w_e (m_e + A_e z~),    z~ = W' (z - mu),

z the raw router logits, each clamped to its calibrated range, one that is not finite (a masked expert) counted as its
mu. A dropped pair costs R / (3 I) of an expert, I its intermediate size. m and A have 16 bits; products of them are
summed in float32.

All of it is multiplied by one scale, which a calibration measures: the squared error of a layer's output is least
at 1, the model's predictions are nearest to its own at less.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._words import CompensationForm, WeightRule
from ..errors import InvalidInputError
from .linear_products import OneToken, grouped, looped, weighted_rows
from .types import RouteNorm, RoutingDecision

C = TypeVar("C", bound="Compensation")


class Cost(NamedTuple):
    """Of one token in one layer: multiplications (each with its addition), and bytes read where it is alone."""

    multiplications: float
    bytes: float


class Compensation(ABC):
    """What one layer adds in place of its dropped experts.

    Class attributes
    ----------------
    form : "mean" or "linear"
    """

    form: ClassVar[CompensationForm]

    @staticmethod
    def mean(dropped_EH: Tensor, kept_EH: Tensor | None = None) -> MeanCompensation:
        """From M, and N where it is there."""
        parts = [dropped_EH] if kept_EH is None else [dropped_EH, kept_EH]
        return MeanCompensation(torch.cat(parts), dropped_EH.shape[0])

    @staticmethod
    def linear(
        *,
        center_D: Tensor,
        low_D: Tensor,
        high_D: Tensor,
        whiten_DR: Tensor,
        mean_EH: Tensor,
        slope_ERH: Tensor,
        scale: float = 1.0,
    ) -> LinearCompensation:
        """From mu, the calibrated range of the logits, W, m and A, of any dtype; rank 0 is m alone."""
        maps_EQH = torch.cat((mean_EH.unsqueeze(1), slope_ERH.to(mean_EH)), 1)
        one_Q = maps_EQH.new_zeros(maps_EQH.shape[1], dtype=torch.float64)
        one_Q[0] = 1.0
        made = LinearCompensation(
            low_D=low_D.double(),
            high_D=high_D.double(),
            center_D=center_D.double(),
            whiten_DQ=pad(whiten_DR.double(), (1, 0)),
            one_Q=one_Q,
            maps_EQH=maps_EQH.to(torch.bfloat16).contiguous(),
        )
        return made if scale == 1.0 else made.scaled(scale)

    @abstractmethod
    def addition(self, decision: RoutingDecision, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """What a decision adds to the output of the layer's experts, [T, H]; None where it is seen that nothing is.

        ``dtype`` is what the experts put out: the addition need not be more exact.
        """

    @abstractmethod
    def cost(self, dropped: float) -> Cost:
        """What it costs where a token drops so many pairs, on average."""

    @abstractmethod
    def scaled(self: C, scale: float) -> C:
        """The same times a scale."""

    @abstractmethod
    def to(self: C, device: torch.device | None = None, dtype: torch.dtype | None = None) -> C:
        """A copy on this device; what follows the experts' dtype, in this one."""

    def fits(self, other: Compensation | None) -> bool:
        """Whether `copy_` can take the other: the same form and sizes."""
        return type(other) is type(self) and [t.shape for t in self._tensors] == [
            t.shape for t in other._tensors
        ]

    def copy_(self, other: Compensation) -> None:
        """Write another one into the same buffers."""
        device, dtype = self._tensors[0].device, self._tensors[0].dtype
        for mine, theirs in zip(self._tensors, other.to(device, dtype)._tensors, strict=True):
            mine.copy_(theirs)

    @property
    def _tensors(self) -> list[Tensor]:
        held = [getattr(self, item.name) for item in fields(self)]  # type: ignore[arg-type]
        return [value for value in held if isinstance(value, Tensor)]


def with_addition(out_TH: Tensor, added_TH: Tensor | None) -> Tensor:
    """The experts' output, of any leading shape, and what a compensation adds to it."""
    if added_TH is None:
        return out_TH
    added_TH = added_TH.to(out_TH.dtype)
    return out_TH + (added_TH if out_TH.dim() == 2 else added_TH.reshape(out_TH.shape))


def lost_and_kept(weights_TK: Tensor, dropped_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    """Regressors of what was dropped, [T, 2E] in the weights' dtype.

    The first E: the weight of each dropped expert; the others: the weight of each kept expert times all that
    was dropped. Indices from ``num_experts`` on (empty slots) must carry weight 0.
    """
    index_TK = experts_TK.clamp(max=num_experts - 1)
    lost_TK = weights_TK.masked_fill(~dropped_TK, 0.0)
    kept_TK = weights_TK.masked_fill(dropped_TK, 0.0) * lost_TK.sum(-1, keepdim=True)
    features_TJ = torch.zeros(
        (weights_TK.shape[0], 2 * num_experts), dtype=weights_TK.dtype, device=weights_TK.device
    )
    return features_TJ.scatter_add(1, index_TK, lost_TK).scatter_add(1, index_TK + num_experts, kept_TK)


@dataclass(frozen=True, eq=False)
class MeanCompensation(Compensation):
    """The mean form.

    Attributes
    ----------
    vectors_JH : Tensor
        M_e of all experts, then N_e of all experts where the form has them: J = E or 2E.
    num_experts : int
        E.
    """

    form: ClassVar[CompensationForm] = "mean"

    vectors_JH: Tensor
    num_experts: int

    @property
    def dropped_EH(self) -> Tensor:
        """M."""
        return self.vectors_JH[: self.num_experts]

    @property
    def kept_EH(self) -> Tensor | None:
        """N, None for the mean alone."""
        return self.vectors_JH[self.num_experts :] if len(self.vectors_JH) > self.num_experts else None

    def addition(self, decision: RoutingDecision, dtype: torch.dtype = torch.float32) -> Tensor:
        """In the dtype of the vectors."""
        features_TJ = lost_and_kept(
            decision.own_weights_TK, decision.dropped_TK, decision.own_experts_TK, self.num_experts
        )
        return features_TJ[:, : len(self.vectors_JH)].to(self.vectors_JH.dtype) @ self.vectors_JH

    def cost(self, dropped: float) -> Cost:
        """The whole matrix, whatever is dropped."""
        return Cost(self.vectors_JH.numel(), self.vectors_JH.nbytes)

    def scaled(self, scale: float) -> MeanCompensation:
        return replace(self, vectors_JH=scale * self.vectors_JH)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> MeanCompensation:
        return replace(self, vectors_JH=self.vectors_JH.to(device, dtype, copy=True))


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearCompensation(Compensation):
    """The linear form; `Compensation.linear` makes one.

    Attributes
    ----------
    low_D, high_D, center_D : Tensor
        float64: the calibrated range of the logits, and mu.
    whiten_DQ, one_Q : Tensor
        float64: the regressors are ``one + (z - mu) @ whiten``, the scale in both; the first is the mean's.
    maps_EQH : Tensor
        bfloat16: m_e, then A_e.
    """

    form: ClassVar[CompensationForm] = "linear"

    low_D: Tensor
    high_D: Tensor
    center_D: Tensor
    whiten_DQ: Tensor
    one_Q: Tensor
    maps_EQH: Tensor

    def addition(self, decision: RoutingDecision, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """In float32, or for few tokens on CPU rounded to bfloat16 where that is the ``dtype``.

        On CPU nothing is computed where nothing is dropped, and what is has float32 regressors and sums, of one token
        as of many. Elsewhere, and compiled, products of static shape without a host synchronisation, of 16-bit
        regressors, with float32 sums.

        Raises
        ------
        InvalidInputError
            If the decision does not carry the router's logits.
        """
        logits_TD, weights_TK = decision.logits_TE, decision.own_weights_TK
        if logits_TD is None:
            raise InvalidInputError(
                "a linear compensation follows the router's logits: expected a decision with logits_TE, got None; "
                "use dataclasses.replace(decision, logits_TE=...)."
            )
        if logits_TD.device.type != "cpu":
            return grouped(self.maps_EQH, self.regressors(logits_TD), decision)
        if torch.compiler.is_compiling():
            return weighted_rows(self.maps_EQH, self.regressors(logits_TD), decision)
        differentiated = torch.is_grad_enabled() and (logits_TD.requires_grad or weights_TK.requires_grad)
        if logits_TD.shape[0] == 1 and not differentiated:
            return self._host.product(decision, logits_TD, dtype)
        few = None if differentiated else dtype
        return looped(self.maps_EQH, lambda: self.regressors(logits_TD), decision, few)

    def regressors(self, logits_TD: Tensor) -> Tensor:
        """1 and z~, times the scale, float64 [T, Q]."""
        # In float64, which neither autocast nor TF32 shortens: whitening takes differences of large logits.
        z_TD = logits_TD.double()
        known_TD = torch.clamp(z_TD, self.low_D, self.high_D) - self.center_D
        return torch.addmm(self.one_Q, torch.where(z_TD.isfinite(), known_TD, 0.0), self.whiten_DQ)

    def cost(self, dropped: float) -> Cost:
        """The coordinates once, and a map for each pair that is dropped."""
        each = self.maps_EQH[0]
        once = self.whiten_DQ
        return Cost(once.numel() + dropped * each.numel(), once.nbytes + dropped * each.nbytes)

    def scaled(self, scale: float) -> LinearCompensation:
        return replace(self, whiten_DQ=scale * self.whiten_DQ, one_Q=scale * self.one_Q)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> LinearCompensation:
        """A copy on this device; no dtype changes. Grouped products want rows of a multiple of 16 bytes."""
        moved: dict[str, Tensor] = {
            item.name: getattr(self, item.name).to(device, copy=True) for item in fields(self)
        }
        short = -self.one_Q.numel() % 8
        if short and moved["one_Q"].device.type != "cpu":
            moved["whiten_DQ"], moved["one_Q"] = (pad(moved[n], (0, short)) for n in ("whiten_DQ", "one_Q"))
            moved["maps_EQH"] = pad(moved["maps_EQH"], (0, 0, 0, short))
        made = LinearCompensation(**moved)
        if moved["one_Q"].device.type == "cpu":
            _ = made._host  # now, and not in the first forward
        return made

    def copy_(self, other: Compensation) -> None:
        super().copy_(other)
        self.__dict__.pop("_host", None)

    # -- one token on the host ----------------------------------------------------------------------------

    @cached_property
    def _host(self) -> OneToken:
        num, wide, hidden = self.maps_EQH.shape
        return OneToken(
            low=self.low_D.tolist(),
            high=self.high_D.tolist(),
            center=self.center_D.tolist(),
            base_Q=self.one_Q - self.center_D @ self.whiten_DQ,
            whiten_QD=self.whiten_DQ.t(),
            maps=self.maps_EQH.unbind(0),
            rows=torch.arange(num * wide, device="cpu").view(num, wide).repeat(1, 2).unbind(0),
            table_NH=self.maps_EQH.view(-1, hidden),
            start=torch.zeros(1, dtype=torch.int64, device="cpu"),
        )


def compensated_norm(route_norm: RouteNorm, weights: WeightRule) -> RouteNorm:
    """A model's ``route_norm`` where there is a compensation: with ``weights="model"`` kept experts keep their weights.

    The weight of what is dropped is still used then, by what stands in for it.
    """
    return "none" if weights == "model" else route_norm
