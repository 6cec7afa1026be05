"""What stands in for dropped experts: a fixed vector per expert, weighted by the router's own weights.

Shape legend: T tokens, E experts, K slots of the router's own choice, H hidden size.

With w_e the router's own weight of expert e, D the dropped and S the kept experts of its choice, the layer's output
gets

    sum_{e in D} w_e M_e  +  (sum_{e in D} w_e) sum_{e in S} w_e N_e.

M_e alone, the mean output of expert e, is the simple form. The second term says what the kept experts tell of the
dropped ones; it vanishes where nothing is dropped. M and N are fitted by least squares to what was dropped on the
calibration text (`bh_routing.calibration.data.Moments.compensation`). Either form is one product with a matrix of
E or 2E rows: about 1/50 or 1/25 of an expert's cost at OLMoE's size.

All of it is multiplied by one scale, which a calibration measures (`bh_routing.calibration.compensation_scale`): the squared error of a
layer's output is least at 1, the model's predictions are nearest to its own at less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._words import WeightRule
from ..errors import InvalidParameterError, InvalidTypeError
from .types import RouteNorm, RoutingDecision


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
class Compensation:
    """What one layer adds in place of its dropped experts.

    Two forms are there: the mean (M alone), and the mean of dropped and kept experts (M and N).

    Attributes
    ----------
    vectors_JH : Tensor
        M_e of all experts, then N_e of all experts where the form has them: J = E or 2E.
    num_experts : int
        E.
    """

    vectors_JH: Tensor
    num_experts: int

    @classmethod
    def mean(cls, dropped_EH: Tensor, kept_EH: Tensor | None = None) -> Compensation:
        """From M, and N where it is there."""
        parts = [dropped_EH] if kept_EH is None else [dropped_EH, kept_EH]
        return cls(torch.cat(parts), dropped_EH.shape[0])

    @property
    def dropped_EH(self) -> Tensor:
        """M."""
        return self.vectors_JH[: self.num_experts]

    @property
    def kept_EH(self) -> Tensor | None:
        """N, None for the mean alone."""
        return self.vectors_JH[self.num_experts :] if len(self.vectors_JH) > self.num_experts else None

    def addition(self, decision: RoutingDecision) -> Tensor:
        """What a decision adds to the output of the layer's experts, [T, H] in the dtype of the vectors."""
        features_TJ = lost_and_kept(
            decision.own_weights_TK, decision.dropped_TK, decision.own_experts_TK, self.num_experts
        )
        return features_TJ[:, : len(self.vectors_JH)].to(self.vectors_JH.dtype) @ self.vectors_JH

    def scaled(self, scale: float) -> Compensation:
        """The same times a scale."""
        return replace(self, vectors_JH=scale * self.vectors_JH)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Compensation:
        """A copy on this device, in this dtype."""
        return replace(self, vectors_JH=self.vectors_JH.to(device, dtype, copy=True))

    def fits(self, other: Compensation | None) -> bool:
        """Whether `copy_` can take the other: the same form and sizes."""
        return other is not None and self.vectors_JH.shape == other.vectors_JH.shape

    def copy_(self, other: Compensation) -> None:
        """Write another one into the same buffers."""
        self.vectors_JH.copy_(other.vectors_JH)


def compensated_norm(route_norm: RouteNorm, weights: WeightRule) -> RouteNorm:
    """A model's ``route_norm`` where there is a compensation: with ``weights="model"`` kept experts keep their weights.

    The weight of what is dropped is still used then, by what stands in for it.
    """
    return "none" if weights == "model" else route_norm


def check_scale(compensation: bool | float | None) -> float | None:
    """What a user says of the compensation, as a scale: None is the calibration's own, 0 none at all.

    Raises
    ------
    InvalidParameterError, InvalidTypeError
        Unless it is True, False, None or a number from 0 to 1.
    """
    if compensation is None or compensation is True:
        return None
    if compensation is False:
        return 0.0
    if not isinstance(compensation, (int, float)):
        raise InvalidTypeError(
            f"compensation must be true, false or a scale from 0 to 1, got {compensation!r}."
        )
    if not 0.0 <= compensation <= 1.0:
        raise InvalidParameterError(
            f"compensation must be true, false or a scale from 0 to 1, got {compensation!r}."
        )
    return float(compensation)
