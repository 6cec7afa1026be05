"""The second pass: experts are dropped, and what that costs is measured.

Experts are dropped as the calibration of the first pass drops them at a third of the router's own number, and the mean
outputs are added for them, so that sensitivities and compensations are those of the state in which they are used.

Sensitivities, and the sums of the compensation by fixed vectors, come from the text. The sums of the linear compensation
come from as many tokens, but with ``robust`` only half of them are text: of every four windows one is replaced by its own
tokens shuffled, and one by uniformly random tokens (they need no gradient). Windows that are held out for later are in
none of its sums.

Shape legend: B windows of a batch, L routed layers, T tokens, E experts, K slots of the router's own choice, H hidden
size, J = 2E regressors of the compensation by fixed vectors, D router logits of a token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..decision.compensation import lost_and_kept
from ..patching import PatchPlan, special_ids
from ..stats.histogram import FIRST_BIN
from ..text import Batch
from .accumulate import LayerSensitivity
from .calibration import Calibration
from .data import CalibrationData
from .dropping import Addition, Dropping, Pairs, dropping_policy
from .forwards import gather
from .linear_fit import LinearSums
from .moments import Moments

TEXT, SHUFFLED, RANDOM = (0, 1), 2, 3  # what windows number 4n + ... are to the linear compensation


class SecondPass:
    """How much the loss feels each expert, and what dropped experts would have added, where experts are dropped.

    Parameters
    ----------
    model : nn.Module
        A language model, whose parameters require no gradient.
    plan : PatchPlan
    calibration : Calibration
        Of the first pass, with mean outputs.
    linear : bool
        Also the sums of the linear compensation.
    robust : bool
        Half of these from shuffled and random tokens.
    held_out : collection of int
        Indices of the batches whose first window is kept out of them.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PatchPlan,
        calibration: Calibration,
        *,
        linear: bool = False,
        robust: bool = True,
        held_out: Collection[int] = (),
    ) -> None:
        assert calibration.moments is not None
        self.model, self.moments, self.robust, self.held_out = model, calibration.moments, robust, held_out
        self.seed = calibration.seed
        self.layers = {
            layer.path: LayerSensitivity(mean_EH.float().to(layer.context.device))
            for layer, mean_EH in zip(plan.layers, calibration.means_LEH, strict=True)
        }
        self.linear = linear_sums(plan, calibration) if linear else {}
        self.plain_ids = plain_ids(model) if linear and robust else torch.zeros(0)
        additions = {path: mean_addition(sums.mean_EH) for path, sums in self.layers.items()}
        self.dropping = Dropping(model, plan, dropping_policy(calibration), additions)

    def add(self, batch: Batch) -> None:
        """Run the model forward and backward on a batch, and forward on what stands in for some of its windows."""
        part_B = (torch.arange(len(batch.input_ids)) + batch.index) % 4 if self.robust else None
        text_B = torch.ones(len(batch.input_ids), dtype=torch.bool) if part_B is None else part_B <= max(TEXT)
        if batch.index in self.held_out:
            text_B[0] = False

        def take(path: str, pairs: Pairs) -> None:
            assert pairs.gradients_TH is not None
            self.layers[path].update(
                pairs.outputs_TKH, pairs.gradients_TH, pairs.experts_TK, pairs.weights_TK, pairs.dropped_TK
            )
            if self.linear:
                self.linear[path].take(pairs.where(text_B.to(pairs.window_T.device)[pairs.window_T]))

        self.dropping.backward(batch, take)
        if self.linear and part_B is not None and bool((part_B > max(TEXT)).any()):
            strange = strange_windows(batch, part_B, self.plain_ids, self.seed)
            self.dropping.forward(strange, lambda path, pairs: self.linear[path].take(pairs))

    def state(self) -> dict[str, Any]:
        """What this process has seen, as tensors and numbers."""
        return {
            "layers": {path: sums.parts() for path, sums in self.layers.items()},
            "linear": {path: sums.parts() for path, sums in self.linear.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for path, parts in state["layers"].items():
            self.layers[path].load(parts)
        for path, parts in state["linear"].items():
            self.linear[path].load(parts)

    def result(self) -> Moments:
        """The calibration's moments with the sums of all processes."""
        ours = [torch.stack(part) for part in zip(*(s.parts() for s in self.layers.values()), strict=True)]
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


def mean_addition(mean_EH: Tensor) -> Addition:
    """Mean outputs in place of dropped experts."""

    def add(logits_TD: Tensor, weights_TK: Tensor, dropped_TK: Tensor, experts_TK: Tensor) -> Tensor:
        num = mean_EH.shape[0]
        return lost_and_kept(weights_TK, dropped_TK, experts_TK, num)[:, :num].to(mean_EH.dtype) @ mean_EH

    return add


def linear_sums(plan: PatchPlan, data: CalibrationData) -> dict[str, LinearSums]:
    """Empty sums of every layer, on its device, counted from the text's mean logits."""
    hidden = data.means_LEH.shape[-1]
    return {
        layer.path: LinearSums(data.num_experts, origin_D.to(layer.context.device), hidden)
        for layer, origin_D in zip(plan.layers, mean_logits(data), strict=True)
    }


def mean_logits(data: CalibrationData) -> Tensor:
    """Means of the raw router logits over the calibration text, to a bin's width, float64 [L, D]; masked ones left out."""
    held = data.histograms["logit"]["selected"] + data.histograms["logit"]["unselected"]
    counts_LEB = held.counts_LEB.double()
    if held.start == FIRST_BIN:
        counts_LEB[..., 0] = 0.0  # where -inf is counted
    centres_B = torch.from_numpy((held.edges[1:] + held.edges[:-1]) / 2)
    return data.temperature * (counts_LEB @ centres_B) / counts_LEB.sum(-1).clamp_min(1.0)


def plain_ids(model: nn.Module) -> Tensor:
    """The token ids that stand for text, int64: without those that the configuration gives a meaning of their own."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    special = special_ids(model)
    return torch.tensor([i for i in range(embeddings.weight.shape[0]) if i not in special])


def strange_windows(batch: Batch, part_B: Tensor, plain_N: Tensor, seed: int) -> Batch:
    """The windows of a batch that are no text to the linear compensation: their tokens shuffled, or random ids of these.

    They depend on the seed and the batch's index alone, not on how many processes there are.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + batch.index) % 2**63)
    ids_BS, rows = batch.input_ids.clone(), (part_B > max(TEXT)).nonzero().flatten().tolist()
    for row in rows:
        num = int(batch.mask[row].sum())
        if part_B[row] == SHUFFLED:
            ids_BS[row, :num] = ids_BS[row, torch.randperm(num, generator=generator)]
        else:
            ids_BS[row, :num] = plain_N[torch.randint(len(plain_N), (num,), generator=generator)]
    return batch.windows(rows, ids_BS)
