"""What calibration accumulates in one pass: counts, moments, kept tokens. Constant memory, any device.

Shape legend: L routed layers, T tokens of a batch, E experts, K slots of the router's own choice, P = T * K
(token, expert) pairs, H hidden size, B bins, N tokens kept.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..decision.compensation import lost_and_kept
from ..errors import CalibrationError
from ..stats.histogram import FIRST_BIN, LAST_BIN, Histogram, bin_index
from ..stats.statistic import base_statistic
from ..text.hashing import Ids
from .checkpoint import TensorSums
from .data import CalibrationData, Reservoir, join_layers
from .moments import Moments

CHUNK = 1024  # tokens counted at once, so that what is in between stays in the cache
GROWTH = 64  # a range of bins grows by whole units of the statistic

# Bits of a logit's class within its token: 1 = inside the trimmed range, 2 = selected by the router.
IN_TRIMMED, SELECTED = 1, 2


class LayerCounts:
    """Binned counts of one layer's base statistics, split by what the router did with the expert."""

    def __init__(self, path: str, num_experts: int, score_func: str, temperature: float, trim: int) -> None:
        self.path, self.num_experts, self.score_func = path, num_experts, score_func
        self.temperature, self.trim = temperature, trim
        self.start = dict.fromkeys(("logit", "logprob"), 0)
        self.counts_ECB: dict[str, Tensor | None] = dict.fromkeys(self.start)

    def update(self, logits_TE: Tensor, own_experts_TK: Tensor) -> None:
        """Count one batch. Padding must have been taken out.

        Raises
        ------
        CalibrationError
            For NaN or +infinite logits.
        """
        for begin in range(0, logits_TE.shape[0], CHUNK):
            self._update(logits_TE[begin : begin + CHUNK], own_experts_TK[begin : begin + CHUNK])

    def _update(self, logits_TE: Tensor, own_experts_TK: Tensor) -> None:
        logit_TE = base_statistic(logits_TE, "logit", self.score_func, self.temperature)
        logprob_TE = base_statistic(logits_TE, "logprob", self.score_func, self.temperature)
        row_TE = torch.zeros_like(logit_TE, dtype=torch.int32).scatter_(-1, own_experts_TK, SELECTED)
        lowest_T1, highest_T1 = trimmed_range(logit_TE, self.trim)
        row_TE += (logit_TE >= lowest_T1) & (logit_TE <= highest_T1)
        row_TE += torch.arange(self.num_experts, device=row_TE.device, dtype=torch.int32) * 4
        ranges = torch.stack((*logit_TE.aminmax(), *logprob_TE.aminmax())).tolist()
        self._count("logit", logit_TE, row_TE, *ranges[:2])
        self._count("logprob", logprob_TE, row_TE, *ranges[2:])

    def _count(self, kind: str, value_TE: Tensor, row_TE: Tensor, low: float, high: float) -> None:
        if low != low or high == float("inf"):
            raise CalibrationError(
                f"router {self.path} gave NaN or infinite logits: expected finite ones; load the model in "
                "another dtype, or find the token that breaks it."
            )
        if low == float("-inf"):  # experts that the router masks out: not passed over, but not there
            there_TE = (value_TE > low) | (row_TE & SELECTED > 0)
            value_TE, row_TE = value_TE[there_TE], row_TE[there_TE]
            if not value_TE.numel():
                return
            low = float(value_TE.min())
        bins_TE = bin_index(value_TE)
        first, last = bin_index(torch.tensor([low, high], dtype=torch.float64)).tolist()
        counts_ECB = self._reserve(kind, first, last, value_TE.device)
        flat = (row_TE * counts_ECB.shape[-1]).add_(bins_TE).sub_(self.start[kind]).flatten()
        one = torch.ones(1, dtype=torch.int64, device=flat.device)
        counts_ECB.view(-1).index_add_(0, flat, one.expand(flat.numel()))

    def _reserve(self, kind: str, first: int, last: int, device: torch.device) -> Tensor:
        """Make room for bins first..last; ranges grow by whole units, so that it happens a few times only."""
        held, start = self.counts_ECB[kind], self.start[kind]
        if held is not None and start <= first and last < start + held.shape[-1]:
            return held
        if held is not None:
            first, last = min(first, start), max(last, start + held.shape[-1] - 1)
        begin = max(FIRST_BIN, first // GROWTH * GROWTH)
        end = min(LAST_BIN + 1, (last // GROWTH + 1) * GROWTH)
        grown = torch.zeros(self.num_experts, 4, end - begin, dtype=torch.int64, device=device)
        if held is not None:
            grown[..., start - begin : start - begin + held.shape[-1]] = held
        self.start[kind], self.counts_ECB[kind] = begin, grown
        return grown

    def state(self) -> dict[str, Any]:
        """What was counted."""
        return {
            "start": dict(self.start),
            "counts": {k: None if x is None else x.cpu() for k, x in self.counts_ECB.items()},
        }

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from `state`."""
        self.start = dict(state["start"])
        self.counts_ECB = {k: None if x is None else x.to(device) for k, x in state["counts"].items()}

    def histograms(self) -> dict[str, dict[str, Histogram]]:
        """``[statistic][set]`` -> counts of this layer, [1, E, B], on the CPU."""
        result: dict[str, dict[str, Histogram]] = {}
        for kind, held in self.counts_ECB.items():
            if held is None:
                held = torch.zeros(self.num_experts, 4, 1, dtype=torch.int64)
            counts = held.cpu()
            by_set = {
                "unselected": counts[:, 0] + counts[:, IN_TRIMMED],
                "selected": counts[:, SELECTED] + counts[:, SELECTED | IN_TRIMMED],
                "trimmed": counts[:, IN_TRIMMED] + counts[:, SELECTED | IN_TRIMMED],
            }
            result[kind] = {name: Histogram(self.start[kind], c.unsqueeze(0)) for name, c in by_set.items()}
        return result


def layer_counts(data: CalibrationData) -> list[LayerCounts]:
    """Empty counts of a calibration's layers."""
    return [
        LayerCounts(layer.path, data.num_experts, layer.score_func, data.temperature, data.trim)
        for layer in data.layers
    ]


def recount(
    data: CalibrationData, layers: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, dict[str, Histogram]]:
    """``[statistic][set]`` -> counts of other tokens of the same routers: (logits [T, E], own choice [T, K]) by layer."""
    every = layer_counts(data)
    for counts, layer, (logits_TE, own_TK) in zip(every, data.layers, layers, strict=True):
        counts.update(logits_TE.float(), own_TK[:, : layer.top_k].long())
    return join_layers(counts.histograms() for counts in every)


def trimmed_range(logits_TE: Tensor, trim: int) -> tuple[Tensor, Tensor]:
    """The (trim + 1)-th smallest and largest logit of each token, [T, 1] each; both are inside the range.

    With 2 trim >= E nothing is inside.
    """
    num = logits_TE.shape[-1]
    if 2 * trim >= num:
        edge_T1 = logits_TE[:, :1]
        return torch.full_like(edge_T1, float("inf")), torch.full_like(edge_T1, float("-inf"))
    if logits_TE.device.type == "cpu":  # numpy's selection is ten times as fast as torch's
        x = logits_TE.numpy()  # two selections: both at once take numpy three times as long
        low = np.partition(x, trim, axis=-1)[:, trim : trim + 1]
        high = np.partition(x, num - 1 - trim, axis=-1)[:, num - 1 - trim : num - trim]
        return torch.from_numpy(low), torch.from_numpy(high)
    return (
        logits_TE.kthvalue(trim + 1, -1, keepdim=True).values,
        logits_TE.kthvalue(num - trim, -1, keepdim=True).values,
    )


class LayerMoments(TensorSums):
    """Sums of the experts' outputs of one layer, in float64; H is 0 until the first output is seen."""

    names = ("tokens_E", "square_E", "sum_EH")

    def __init__(self, num_experts: int) -> None:
        self.tokens_E = torch.zeros(num_experts, dtype=torch.int64)
        self.square_E = torch.zeros(num_experts, dtype=torch.float64)
        self.sum_EH = torch.zeros(num_experts, 0, dtype=torch.float64)

    def update(self, outputs_PH: Tensor, experts_P: Tensor) -> None:
        """Add the outputs of some (token, expert) pairs. Padding must have been taken out."""
        num, hidden = len(self.tokens_E), outputs_PH.shape[-1]
        if not self.sum_EH.shape[1]:
            self.tokens_E, self.square_E = (x.to(outputs_PH.device) for x in (self.tokens_E, self.square_E))
            self.sum_EH = self.square_E.new_zeros(num, hidden)
        values_PH = outputs_PH.float()
        self.tokens_E += torch.bincount(experts_P, minlength=num)
        self.square_E.index_add_(0, experts_P, values_PH.square().sum(-1).double())
        # One batch is summed in float32 (a few hundred terms per expert), batches in float64.
        batch_EH = torch.zeros_like(self.sum_EH, dtype=torch.float32).index_add_(0, experts_P, values_PH)
        self.sum_EH += batch_EH


def join_moments(layers: Sequence[LayerMoments]) -> Moments:
    """Moments over all layers, on the CPU; a layer of which nothing was seen has means of 0."""
    hidden = max(1, *(layer.sum_EH.shape[1] for layer in layers))
    sums = [nn.functional.pad(m.sum_EH.cpu(), (0, hidden - m.sum_EH.shape[1])) for m in layers]
    tokens_LE = torch.stack([layer.tokens_E.cpu() for layer in layers])
    share_LE = tokens_LE.clamp_min(1).double()
    mean_LEH = torch.stack(sums) / share_LE.unsqueeze(-1)
    return Moments(
        tokens_LE=tokens_LE,
        square_LE=torch.stack([layer.square_E.cpu() for layer in layers]) / share_LE,
        mean_square_LE=mean_LEH.square().sum(-1),
        mean_LEH=mean_LEH,
    )


class LayerSensitivity(TensorSums):
    """Sums of one layer's second pass, under the routing that is calibrated for.

    ``square_E``: of (g . (f(x) - mean))^2 over the pairs of the router's own choice. ``gram_JJ`` and
    ``cross_JH``: of z z' and z d', with z the regressors of `bh_routing.decision.compensation.lost_and_kept` and d what
    the dropped experts would have added.
    """

    names = ("tokens_E", "square_E", "gram_JJ", "cross_JH")

    def __init__(self, mean_EH: Tensor) -> None:
        num, hidden = mean_EH.shape
        self.mean_EH = mean_EH
        zeros = torch.zeros(num, dtype=torch.float64, device=mean_EH.device)
        self.tokens_E, self.square_E = zeros.long(), zeros
        self.gram_JJ = zeros.new_zeros(2 * num, 2 * num)
        self.cross_JH = zeros.new_zeros(2 * num, hidden)

    def update(
        self,
        outputs_TKH: Tensor,
        gradients_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        dropped_TK: Tensor,
    ) -> None:
        """Add some tokens. Padding must have been taken out."""
        outputs_TKH, gradients_TH, weights_TK = outputs_TKH.float(), gradients_TH.float(), weights_TK.float()
        experts_P = experts_TK.flatten()
        effect_TK = torch.einsum("tkh,th->tk", outputs_TKH - self.mean_EH[experts_TK], gradients_TH)
        self.tokens_E += torch.bincount(experts_P, minlength=self.tokens_E.numel())
        self.square_E.index_add_(0, experts_P, effect_TK.flatten().double().square())
        features_TJ = lost_and_kept(weights_TK, dropped_TK, experts_TK, self.tokens_E.numel())
        lost_TH = torch.einsum("tkh,tk->th", outputs_TKH, weights_TK.masked_fill(~dropped_TK, 0.0))
        self.gram_JJ += features_TJ.T @ features_TJ
        self.cross_JH += features_TJ.T @ lost_TH


class ReservoirSampler:
    """Keeps the tokens with the smallest hashes: the same tokens in any order and on any number of processes."""

    def __init__(self, size: int, num_layers: int, num_experts: int, num_slots: int) -> None:
        self.size, self.held, self.limit = size, 0, np.iinfo(np.int64).max
        nothing = Reservoir(
            hash_N=torch.zeros(0, dtype=torch.int64),
            logits_NLE=torch.zeros(0, num_layers, num_experts, dtype=torch.float16),
            experts_NLK=torch.zeros(0, num_layers, num_slots, dtype=torch.int16),
            document_N=torch.zeros(0, dtype=torch.int64),
        )
        self.parts = [nothing]

    def admit(self, hash_T: Ids) -> Tensor:
        """Indices of the batch's tokens that may belong to the reservoir, int64."""
        rows = np.flatnonzero(hash_T < self.limit) if self.size else np.empty(0, dtype=np.int64)
        return torch.from_numpy(rows)

    def add(
        self, hash_N: Tensor, logits_NLE: Tensor, experts_NLK: Tensor, document_N: Tensor | None = None
    ) -> None:
        """Add admitted tokens; beyond twice the size the largest hashes are dropped."""
        if self.size == 0:
            return
        part = Reservoir(
            hash_N=hash_N,
            logits_NLE=logits_NLE.to(torch.float16),
            experts_NLK=experts_NLK.to(torch.int16),
            document_N=document_N,
        )
        self.parts.append(part)
        self.held += part.num
        if self.held >= 2 * self.size:
            self._compact()

    def _compact(self) -> None:
        kept = self.result()
        self.parts, self.held = [kept], kept.num
        if kept.num == self.size:
            self.limit = int(kept.hash_N[-1])

    def state(self) -> dict[str, Tensor | None]:
        """What is kept."""
        return vars(self.result())

    def load_state(self, state: dict[str, Tensor | None]) -> None:
        """Go on from `state`."""
        kept = Reservoir(**state)  # type: ignore[arg-type]
        self.parts, self.held = [kept], kept.num
        self.limit = int(kept.hash_N[-1]) if self.size and kept.num == self.size else np.iinfo(np.int64).max

    def result(self) -> Reservoir:
        """What is kept, sorted by hash."""
        return functools.reduce(operator.add, self.parts).smallest(self.size)
