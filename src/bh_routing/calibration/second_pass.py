"""The second pass: experts are dropped, and what that costs is measured.

Experts are dropped as the calibration of the first pass drops them at a third of the router's own number, so that
sensitivities and compensation are those of the state in which they are used.

Shape legend: T tokens, V vocabulary, E experts, K slots of the router's own choice, H hidden size, J = 2E
regressors of the compensation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..decision.compensation import lost_and_kept
from ..errors import BudgetError, CalibrationError, CalibrationWarning
from ..patching import LayerPlan, PatchPlan, watch
from ..policies import RoutingPolicy, TopKPolicy
from ..text import Batch
from .accumulate import LayerSensitivity
from .calibration import Calibration
from .forwards import forward, gather, pair_outputs, pieces
from .moments import Moments


class SecondPass:
    """How much the loss feels each expert, and what dropped experts would have added, where experts are dropped.

    Parameters
    ----------
    model : nn.Module
        A language model, whose parameters require no gradient.
    plan : PatchPlan
    calibration : Calibration
        Of the first pass, with mean outputs.
    """

    def __init__(self, model: nn.Module, plan: PatchPlan, calibration: Calibration) -> None:
        moments = calibration.moments
        assert moments is not None
        assert moments.mean_LEH is not None
        self.model, self.plan, self.moments = model, plan, moments
        self.contexts = {layer.path: layer.context for layer in plan.layers}
        self.policy = dropping_policy(calibration)
        self.policy.bind(plan.contexts)
        self.layers = {
            layer.path: LayerSensitivity(mean_EH.float().to(layer.context.device))
            for layer, mean_EH in zip(plan.layers, moments.mean_LEH, strict=True)
        }
        self.choice: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, batch: Batch) -> None:
        """Run the model forward and backward on a batch."""
        self.batch = batch
        with torch.enable_grad(), watch(self.plan, self._on_choice, self._around):
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
        self.choice[layer.path] = (logits_TE.detach(), own_weights_TK.detach(), own_experts_TK)

    def _around(
        self,
        layer: LayerPlan,
        inner: Callable[[Tensor, Tensor, Tensor], Tensor],
        hidden_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        sums = self.layers[layer.path]
        with torch.no_grad():
            dropped_TK = self.policy.decide(*self.choice[layer.path], self.contexts[layer.path]).dropped_TK
        out_TH = inner(hidden_TH, index_TK, weights_TK.masked_fill(dropped_TK, 0.0))
        num = sums.mean_EH.shape[0]
        lost_TE = lost_and_kept(weights_TK, dropped_TK, index_TK, num)[:, :num]
        out_TH = out_TH + lost_TE.to(out_TH.dtype) @ sums.mean_EH.to(out_TH.dtype)
        if not out_TH.requires_grad:
            out_TH = out_TH.detach().requires_grad_()  # the first layer: here the graph begins
        real_T = self.batch.mask_on(hidden_TH.device)
        fixed_TH, fixed_TK = hidden_TH.detach(), weights_TK.detach()

        def on_gradient(gradient_TH: Tensor) -> None:
            with torch.no_grad():
                for piece in pieces(fixed_TH, index_TK):
                    index = index_TK[piece]
                    outputs_TKH = pair_outputs(inner, fixed_TH[piece], index).view(*index.shape, -1)
                    parts = (outputs_TKH, gradient_TH[piece], index, fixed_TK[piece], dropped_TK[piece])
                    if real_T is not None:
                        parts = tuple(part[real_T[piece]] for part in parts)  # type: ignore[assignment]
                    sums.update(*parts)

        out_TH.register_hook(on_gradient)
        return out_TH

    def result(self) -> Moments:
        """The calibration's moments with the sums of all processes."""
        ours = [torch.stack(part) for part in zip(*(s.sums() for s in self.layers.values()), strict=True)]
        for theirs in gather(ours, others_only=True):
            ours = [a + b for a, b in zip(ours, theirs, strict=True)]
        tokens_LE, square_LE, gram_LJJ, cross_LJH = ours
        return replace(
            self.moments,
            sensitivity_tokens_LE=tokens_LE,
            sensitivity_LE=square_LE / tokens_LE.clamp_min(1),
            gram_LJJ=gram_LJJ,
            cross_LJH=cross_LJH,
        )


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
