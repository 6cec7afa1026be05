"""What documents lose at each of several routings, in one reading of them, resumable; and how the model itself reads them.

Shape legend: M levels, U documents (or sources of several), L routed layers, E experts, K slots of the own choice,
B windows of a batch, S tokens of one, V vocabulary, T tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibration.calibration import Calibration
from ..calibration.certificate import Loss
from ..calibration.checkpoint import Checkpoint
from ..calibration.forwards import evaluating, forward, progress_bar
from ..errors import CertificateError
from ..integration import RoutingIntegration
from ..patching import make_plan
from ..policies import RoutingContext, TopKPolicy
from ..stats.divergence import kl_of_logits
from ..stats.statistic import LOG_SCORES
from ..text import Batch, TextStream
from ..text.hashing import document_key
from .figures import costs


@dataclass(eq=False)
class Documents:
    """What counts once: a document, or all that name one source. The same text twice is read once."""

    seed: int
    texts: list[str] = field(default_factory=list)
    unit_of_key: dict[int, int] = field(default_factory=dict)
    digests: list[int] = field(default_factory=list)  # of each unit
    _units: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, documents: Iterable[str | tuple[str, str]], seed: int) -> Documents:
        """From texts, or pairs of a source ("" for none) and a text."""
        found = cls(seed)
        for one in documents:
            source, text = ("", one) if isinstance(one, str) else one
            digest, key = document_key(text.encode(), seed)
            if not text.strip() or key >> 1 in found.unit_of_key:
                continue
            unit = found._units.setdefault(source or f"\0{key}", len(found.digests))
            if unit == len(found.digests):
                found.digests.append(0)
            found.digests[unit] = (found.digests[unit] + digest) % 2**128
            found.unit_of_key[key >> 1] = unit
            found.texts.append(text)
        return found

    def __len__(self) -> int:
        return len(self.digests)


class Sums:
    """What is added up of each document: at each level its losses and costs, and how the full model read it."""

    def __init__(self, levels: int, units: int, layers: int, experts: int) -> None:
        self.scored_U = torch.zeros(units, dtype=torch.float64)
        self.kl_MU = torch.zeros(levels, units, dtype=torch.float64)
        self.changed_MU = torch.zeros(levels, units, dtype=torch.float64)
        self.tokens = torch.zeros((), dtype=torch.float64)
        self.experts_M = torch.zeros(levels, dtype=torch.float64)
        self.bytes_M = torch.zeros(levels, dtype=torch.float64)
        self.pairs_ULE = torch.zeros(units, layers, experts, dtype=torch.float64)
        self.score_UL = torch.zeros(units, layers, dtype=torch.float64)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(vars(self))

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        vars(self).update(state)

    def profile(self) -> tuple[Tensor, Tensor]:
        """Shares [U, L, E] and mean scores [U, L] of the documents that were read."""
        read = self.pairs_ULE.sum((1, 2)) > 0
        pairs_ULE = self.pairs_ULE[read]
        total_UL = pairs_ULE.sum(-1)
        return pairs_ULE / total_UL.unsqueeze(-1), self.score_UL[read] / total_UL


class _Reader:
    """Forwards over documents: the full model once for each batch, watched, and each routing."""

    def __init__(
        self,
        model: Any,
        documents: Documents,
        calibration: Calibration,
        routings: Sequence[RoutingIntegration],
    ) -> None:
        self.model, self.documents, self.routings = model, documents, routings
        plan = make_plan(model).without(calibration.left_out)
        self.full = RoutingIntegration(model, TopKPolicy(), collect_stats=False, plan=plan)
        self.full.watchers.append(self._watch)
        self.layer = {layer.path: i for i, layer in enumerate(calibration.layers)}
        self.sums = Sums(len(routings), len(documents), calibration.num_layers, calibration.num_experts)
        self.unit_T = self.rows_T = torch.empty(0, dtype=torch.int64)

    def _watch(self, router: Any, context: RoutingContext, decision: Any, logits_TE: Tensor) -> None:
        layer = self.layer.get(context.path)
        if layer is None:
            return
        own_TK = decision.own_experts_TK[self.rows_T.to(logits_TE.device)]
        scores_TE = LOG_SCORES[context.score_func](logits_TE.float())[self.rows_T.to(logits_TE.device)]
        scores_T = scores_TE.gather(-1, own_TK).double().sum(-1).cpu()
        cells_TK = self.unit_T.unsqueeze(-1) * self.sums.pairs_ULE.shape[-1] + own_TK.cpu()
        shape = (self.sums.pairs_ULE.shape[0], self.sums.pairs_ULE.shape[-1])
        counted = cells_TK.flatten().bincount(minlength=shape[0] * shape[1]).reshape(shape)
        self.sums.pairs_ULE[:, layer] += counted
        self.sums.score_UL[:, layer].index_add_(0, self.unit_T, scores_T)

    def _logits(self, routing: RoutingIntegration, batch: Batch) -> Tensor:
        with routing:
            logits_BSV = forward(self.model, routing.plan, batch, head=True)
        if logits_BSV is None:
            raise CertificateError(
                "a certificate is of predictions of the next token, which this model does not make: expected a causal "
                "language model."
            )
        return logits_BSV

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Read a batch."""
        sums, lengths = self.sums, batch.mask.sum(1).tolist()
        self.rows_T = batch.mask.flatten().nonzero().flatten()
        self.unit_T = torch.tensor([self.documents.unit_of_key[int(key)] for key in batch.documents])
        firsts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        unit_B = self.unit_T[firsts]
        own_BSV = self._logits(self.full, batch)
        if self.routings:
            sums.scored_U.index_add_(0, unit_B, torch.tensor(lengths, dtype=torch.float64) - 1)
            sums.tokens += batch.num_tokens
        for level, routing in enumerate(self.routings):
            routing.reset_stats()
            routed_BSV = self._logits(routing, batch)
            for unit, length, own_SV, routed_SV in zip(
                unit_B.tolist(), lengths, own_BSV, routed_BSV, strict=True
            ):
                # Window by window, so that memory stays that of one; the last token has none to predict.
                own_SV, routed_SV = own_SV[: length - 1].float(), routed_SV[: length - 1].float()
                kl_S = kl_of_logits(own_SV, routed_SV)
                sums.kl_MU[level, unit] += float(kl_S.double().sum())
                sums.changed_MU[level, unit] += int((own_SV.argmax(-1) != routed_SV.argmax(-1)).sum())
            counted = routing.telemetry.to_dict()
            sums.experts_M[level] += counted["total"]["mean_experts"] * batch.num_tokens
            read = costs(self.model, routing, counted["layers"])["bytes_per_token"]
            sums.bytes_M[level] += math.nan if read is None else read * batch.num_tokens


def read_documents(
    model: Any,
    tokenizer: Any,
    documents: Documents,
    calibration: Calibration,
    routings: Sequence[RoutingIntegration],
    *,
    window: int,
    document_tokens: int | None,
    batch_tokens: int,
    checkpoint: Checkpoint | None = None,
    what: str = "reading",
    progress: bool | None = None,
) -> Sums:
    """Read all of the documents with the full model and with each routing, from where it was interrupted.

    Parameters
    ----------
    routings : sequence of RoutingIntegration
        Of this model, not patched, with statistics; without any only the full model reads.
    window, document_tokens, batch_tokens
        As in `bh_routing.calibrate`.
    checkpoint : Checkpoint, optional
    what : str
        For the progress bar.
    """
    reader = _Reader(model, documents, calibration, routings)
    stream = TextStream(
        documents.texts,
        tokenizer,
        window=window,
        batch_tokens=batch_tokens,
        seed=documents.seed,
        document_tokens=document_tokens,
    )
    checkpoint = Checkpoint(None, "", 0, {}) if checkpoint is None else checkpoint
    with evaluating(model), progress_bar(what, progress) as advance:
        checkpoint.run(stream, {"sums": reader.sums}, reader.add, advance)
    return reader.sums


def order_of(read: Documents, sums: Sums) -> list[int]:
    """The documents that were scored, by their digests: an order that has nothing to do with what they lose."""
    by_digest = np.argsort(np.array([f"{digest:032x}" for digest in read.digests]))
    order = [int(unit) for unit in by_digest if sums.scored_U[unit] > 0]
    if not order:
        raise CertificateError("expected documents of two tokens at least, got none.")
    return order


def losses_of(groups: Sequence[Sums], read: Documents, clip: float) -> dict[Loss, Any]:
    """What each document loses at each level, [M, U] in [0, 1], in the order of `order_of`."""
    order, scored_U = order_of(read, groups[0]), groups[0].scored_U
    kl_MU = torch.cat([g.kl_MU for g in groups])[:, order] / scored_U[order]
    changed_MU = torch.cat([g.changed_MU for g in groups])[:, order] / scored_U[order]
    return {"kl": (kl_MU.clamp(0.0, clip) / clip).numpy(), "agreement": changed_MU.clamp(0.0, 1.0).numpy()}
