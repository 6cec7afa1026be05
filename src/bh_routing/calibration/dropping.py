"""Forwards in which experts are dropped and compensated, and every pair of the own choice is seen beside its decision.

Shape legend: B windows of a batch, S tokens of a window, T tokens, K slots of the router's own choice, D router logits
of a token, E experts, H hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BudgetError, CalibrationError, CalibrationWarning
from ..patching import LayerPlan, PatchPlan, watch
from ..patching.adapters import ExpertsForward
from ..policies import RoutingPolicy, TopKPolicy
from ..text import Batch
from .calibration import Calibration
from .forwards import forward, pair_outputs, pieces

# (raw logits [T, D], weights [T, K], dropped [T, K], experts [T, K]) -> what is added to the layer's output, float32 [T, H]
Addition = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Some tokens of a batch in one layer, without padding.

    Attributes
    ----------
    logits_TD, weights_TK, experts_TK, dropped_TK : Tensor
        What the router said, and which of its slots were dropped.
    outputs_TKH : Tensor
        f_e(x) of its own experts, unweighted.
    gradients_TH : Tensor or None
        Of the summed next-token loss with respect to the layer's output; None in a forward alone.
    window_T : Tensor
        int64, which of the batch's windows each token belongs to.
    """

    logits_TD: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    dropped_TK: Tensor
    outputs_TKH: Tensor
    gradients_TH: Tensor | None
    window_T: Tensor

    def where(self, keep_T: Tensor) -> Pairs:
        """Some of these tokens."""
        held: dict[str, Any] = {name: None if x is None else x[keep_T] for name, x in vars(self).items()}
        return Pairs(**held)


Taker = Callable[[str, Pairs], None]


class Dropping:
    """Runs a model on batches while a policy drops experts.

    Parameters
    ----------
    model : nn.Module
        Its parameters require no gradient.
    plan : PatchPlan
    policy : RoutingPolicy
    additions : mapping of router path to Addition
        The compensation.
    """

    def __init__(
        self, model: nn.Module, plan: PatchPlan, policy: RoutingPolicy, additions: Mapping[str, Addition]
    ) -> None:
        self.model, self.plan, self.policy, self.additions = model, plan, policy, additions
        self.contexts = {layer.path: layer.context for layer in plan.layers}
        policy.bind(plan.contexts)
        self.choice: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.scale = 1.0  # of the additions

    def logits(self, batch: Batch) -> Tensor | None:
        """What the model predicts so, [B, S, V]; None from one without a head."""
        self.batch = batch
        with torch.no_grad(), watch(self.plan, self._on_choice, self._alone):
            logits_BSV = forward(self.model, self.plan, batch, head=True)
        self.choice.clear()
        return logits_BSV

    def forward(self, batch: Batch, take: Taker) -> None:
        """Run a batch; ``take(path, pairs)`` gets all its tokens, layer by layer."""
        self.batch, self.take = batch, take
        with torch.no_grad(), watch(self.plan, self._on_choice, self._each_pair):
            forward(self.model, self.plan, batch)
        self.choice.clear()

    def backward(self, batch: Batch, take: Taker) -> None:
        """The same with gradients."""
        self.batch, self.take = batch, take
        with torch.enable_grad(), watch(self.plan, self._on_choice, self._with_gradient):
            logits_BSV = forward(self.model, self.plan, batch, head=True)
            if logits_BSV is None:
                raise CalibrationError(
                    f"sensitivity=True needs next-token logits, {type(self.model).__name__} gives none; load the model "
                    "with its language-model head (AutoModelForCausalLM)."
                )
            ids_BS = batch.input_ids.to(logits_BSV.device)
            targets_BS = ids_BS[:, 1:].masked_fill(~batch.mask[:, 1:].to(ids_BS.device), -100)
            loss = nn.functional.cross_entropy(
                logits_BSV[:, :-1].flatten(0, 1).float(), targets_BS.flatten(), reduction="sum"
            )
            loss.backward()
        self.choice.clear()

    def _on_choice(
        self, layer: LayerPlan, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, mask: Any
    ) -> None:
        self.choice[layer.path] = (logits_TE, own_weights_TK.detach(), own_experts_TK)

    def _decide(self, layer: LayerPlan) -> tuple[Tensor, Tensor]:
        """The router's logits, and which of its slots are dropped."""
        logits_TD, weights_TK, experts_TK = self.choice[layer.path]
        with torch.no_grad():
            decision = self.policy.decide(
                logits_TD.detach(), weights_TK, experts_TK, self.contexts[layer.path]
            )
        return logits_TD, decision.dropped_TK

    def _hand_over(self, path: str, piece: slice, pairs: Pairs) -> None:
        real_T = self.batch.mask_on(pairs.outputs_TKH.device)
        self.take(path, pairs if real_T is None else pairs.where(real_T[piece]))

    def _windows(self, device: torch.device) -> Tensor:
        windows, length = self.batch.input_ids.shape
        return torch.arange(windows, device=device).repeat_interleave(length)

    def _alone(
        self, layer: LayerPlan, inner: ExpertsForward, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        """The layer's output with what was dropped compensated; differentiable."""
        self.decided = logits_TD, dropped_TK = self._decide(layer)
        out_TH = inner(hidden_TH, index_TK, weights_TK.masked_fill(dropped_TK, 0.0))
        added_TH = self.additions[layer.path](logits_TD, weights_TK, dropped_TK, index_TK)
        return out_TH + self.scale * added_TH.to(out_TH.dtype)

    def _each_pair(
        self, layer: LayerPlan, inner: ExpertsForward, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        logits_TD, dropped_TK = self._decide(layer)
        window_T, parts = self._windows(hidden_TH.device), []
        for piece in pieces(hidden_TH, index_TK):
            index, weights, dropped = index_TK[piece], weights_TK[piece], dropped_TK[piece]
            outputs_TKH = pair_outputs(inner, hidden_TH[piece], index).view(*index.shape, -1)
            kept_TK1 = weights.masked_fill(dropped, 0.0).float().unsqueeze(-1)
            out_TH = (outputs_TKH.float() * kept_TK1).sum(1)
            out_TH += self.additions[layer.path](logits_TD[piece], weights, dropped, index)
            parts.append(out_TH.to(hidden_TH.dtype))
            pairs = Pairs(
                logits_TD=logits_TD[piece],
                weights_TK=weights,
                experts_TK=index,
                dropped_TK=dropped,
                outputs_TKH=outputs_TKH,
                gradients_TH=None,
                window_T=window_T[piece],
            )
            self._hand_over(layer.path, piece, pairs)
        return torch.cat(parts)

    def _with_gradient(
        self, layer: LayerPlan, inner: ExpertsForward, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        out_TH = self._alone(layer, inner, hidden_TH, index_TK, weights_TK)
        logits_TD, dropped_TK = self.decided
        if not out_TH.requires_grad:
            out_TH = out_TH.detach().requires_grad_()  # the first layer: here the graph begins
        fixed_TH, fixed_TK, fixed_TD = hidden_TH.detach(), weights_TK.detach(), logits_TD.detach()
        window_T = self._windows(hidden_TH.device)

        def on_gradient(gradient_TH: Tensor) -> None:
            with torch.no_grad():
                for piece in pieces(fixed_TH, index_TK):
                    index = index_TK[piece]
                    pairs = Pairs(
                        logits_TD=fixed_TD[piece],
                        weights_TK=fixed_TK[piece],
                        experts_TK=index,
                        dropped_TK=dropped_TK[piece],
                        outputs_TKH=pair_outputs(inner, fixed_TH[piece], index).view(*index.shape, -1),
                        gradients_TH=gradient_TH[piece],
                        window_T=window_T[piece],
                    )
                    self._hand_over(layer.path, piece, pairs)

        out_TH.register_hook(on_gradient)
        return out_TH


def dropping_policy(calibration: Calibration, size: str | None = "deviation") -> RoutingPolicy:
    """The routing that a calibration is made for: BH at a third of the router's own number of experts, or top-k where
    that has no level.

    The sizes are those of the first pass, unless another kind (None: the best that was collected) is asked for.
    """
    tops = [layer.top_k for layer in calibration.layers]
    budget = max(1.0, sum(tops) / len(tops) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        try:
            return calibration.policy(experts_per_token=budget, size=size, scope="model")
        except (BudgetError, CalibrationError):
            return TopKPolicy(max(1, min(tops) // 3))
