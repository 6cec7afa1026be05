"""The first pass over a text: counts of the statistics, moments of the experts' outputs, tokens for budgets.

Shape legend: T tokens of a batch, E experts, K slots of the router's own choice, P pairs of a token and one of its
experts, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..patching import LayerPlan, PatchPlan, watch
from ..patching.adapters import ExpertsForward
from ..text import Batch
from .accumulate import LayerMoments, ReservoirSampler, join_moments, layer_counts
from .data import Data, join_layers
from .forwards import forward, pair_outputs, pieces


class FirstPass:
    """What the routers do, batch by batch, while the model routes as always.

    Parameters
    ----------
    model : nn.Module
    plan : PatchPlan
        Of the routers that are calibrated.
    blank : CalibrationData
        The calibration with all that is known before any text.
    outputs : bool
        Also collect the experts' outputs, each formed by itself.
    """

    def __init__(self, model: nn.Module, plan: PatchPlan, blank: Data, outputs: bool) -> None:
        self.model, self.plan, self.tokens = model, plan, 0
        self.slots = max(layer.top_k for layer in blank.layers)
        self.counts = dict(zip(blank.paths, layer_counts(blank), strict=True))
        self.moments = {path: LayerMoments(blank.num_experts) for path in blank.paths if outputs}
        self.sampler = ReservoirSampler(blank.reservoir_size, blank.num_layers, blank.num_experts, self.slots)
        self.seen: dict[
            str, list[tuple[Tensor, Tensor]]
        ] = {}  # of every call: shared layers run several times

    def add(self, batch: Batch) -> None:
        """Run the model on a batch."""
        self.seen.clear()
        self.batch = batch
        around = self._around if self.moments else None
        # Not in inference mode: what a model makes for itself at its first forward must serve other forwards too.
        with torch.no_grad(), watch(self.plan, self._on_choice, around):
            forward(self.model, self.plan, batch)
            self._count(batch)

    def _on_choice(
        self, layer: LayerPlan, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, mask: Any
    ) -> None:
        if logits_TE.shape[0] != self.batch.input_ids.numel():
            raise CalibrationError(
                f"router {layer.path} saw {logits_TE.shape[0]} tokens of {self.batch.input_ids.numel()}: "
                "expected every router to see every token of the batch; this model cannot be calibrated."
            )
        self.seen.setdefault(layer.path, []).append((logits_TE, own_experts_TK))

    def _around(
        self, layer: LayerPlan, inner: ExpertsForward, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        parts = []
        real_T = self.batch.mask_on(hidden_TH.device)
        for piece in pieces(hidden_TH, index_TK):
            index, weights = index_TK[piece], weights_TK[piece]
            outputs_PH = pair_outputs(inner, hidden_TH[piece], index)
            each_TKH = outputs_PH.view(*index.shape, -1)
            parts.append((each_TKH.float() * weights.float().unsqueeze(-1)).sum(1).to(hidden_TH.dtype))
            real_P = None if real_T is None else real_T[piece].repeat_interleave(index.shape[-1])
            experts_P = index.flatten()
            if real_P is not None:
                outputs_PH, experts_P = outputs_PH[real_P], experts_P[real_P]
            self.moments[layer.path].update(outputs_PH, experts_P)
        return torch.cat(parts)

    def _count(self, batch: Batch) -> None:
        admitted = self.sampler.admit(batch.hashes)
        kept_logits, kept_experts = [], []
        for layer in self.plan.layers:
            if layer.path not in self.seen:
                raise CalibrationError(
                    f"router {layer.path} was never called by the model's forward: expected every router to "
                    "see the text; a kernel that replaces the whole block bypasses its router."
                )
            calls = self.seen[layer.path]
            rows = batch.rows_on(calls[0][0].device)
            if rows is not None:
                calls = [(logits.index_select(0, rows), own.index_select(0, rows)) for logits, own in calls]
            for logits_TE, own_TK in calls:
                self.counts[layer.path].update(logits_TE, own_TK)
            if len(admitted):  # of several calls one, by the token's hash
                chosen = admitted.to(calls[0][0].device)
                picked = torch.from_numpy(batch.hashes)[admitted] % len(calls), torch.arange(len(admitted))
                kept_logits.append(
                    torch.stack([x[chosen].to("cpu", torch.float16) for x, _ in calls])[picked]
                )
                own = torch.stack([x[chosen].to("cpu", torch.int16) for _, x in calls])[picked]
                kept_experts.append(nn.functional.pad(own, (0, self.slots - own.shape[-1]), value=-1))
        if len(admitted):
            self.sampler.add(
                torch.from_numpy(batch.hashes)[admitted],
                torch.stack(kept_logits, 1),
                torch.stack(kept_experts, 1),
                torch.from_numpy(batch.documents)[admitted],
            )
        self.tokens += batch.num_tokens
        self.seen.clear()

    def state(self) -> dict[str, Any]:
        """What this process has seen, as tensors and numbers."""
        return {
            "counts": {path: counts.state() for path, counts in self.counts.items()},
            "moments": {path: moments.parts() for path, moments in self.moments.items()},
            "reservoir": self.sampler.state(),
            "tokens": self.tokens,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for layer in self.plan.layers:
            self.counts[layer.path].load_state(state["counts"][layer.path], layer.context.device)
            if self.moments:
                self.moments[layer.path].load(state["moments"][layer.path], layer.context.device)
        self.sampler.load_state(state["reservoir"])
        self.tokens = state["tokens"]

    def result(self, blank: Data) -> Data:
        """The calibration with what was seen."""
        return replace(
            blank,
            histograms=join_layers(counts.histograms() for counts in self.counts.values()),
            moments=join_moments(list(self.moments.values())) if self.moments else None,
            reservoir=self.sampler.result() if self.sampler.size else None,
            tokens=self.tokens,
        )
