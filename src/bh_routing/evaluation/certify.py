"""`certify`: what levels lose on held-out documents, with a confidence, from one reading of them.

Shape legend: M levels, U documents (or sources of several), L routed layers, E experts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .._words import Bound, check_word
from ..calibration.calibration import Calibration
from ..calibration.certificate import (
    CLIP,
    Certificate,
    CertifiedLevel,
    Loss,
    TextProfile,
    merged_digest,
    weights_of,
)
from ..calibration.certify import documents_needed, fixed_sequence, simultaneous
from ..calibration.checkpoint import Checkpoint, remove
from ..calibration.passes import default_window
from ..errors import BudgetError, CertificateError, InvalidParameterError
from ..integration import BHRoutingIntegration
from ..settings import RoutingSettings
from ..settings.levels import LEVELS
from ..text.hashing import document_digest, short_digest
from .document_losses import Documents, Sums, losses_of, read_documents

logger = logging.getLogger(__name__)

STEPS = 16  # levels are multiples of the model's own number over this
TOGETHER = 4  # levels that share a forward of the full model, where the walk may stop


def certify(
    model: Any,
    tokenizer: Any,
    documents: Iterable[str | tuple[str, str]],
    calibration: Calibration,
    *,
    max_kl: float | None = None,
    agreement: float | None = None,
    confidence: float = 0.95,
    levels: Sequence[float] | None = None,
    settings: RoutingSettings | None = None,
    bound: Bound = "betting",
    clip: float = CLIP,
    window: int | None = None,
    document_tokens: int | None = None,
    batch_tokens: int = 4096,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> Calibration:
    """The calibration with a certificate: what its levels lose against the model itself on text like these documents.

    The full model and each routed model read every document. A document's loss is its mean KL(own || routed) per token,
    counted as ``clip`` where it is more; and the share of its next words that change. With a target (``max_kl`` or
    ``agreement``, named before this is called) levels are tested from most experts down, and the walk stops at the
    first that is not rejected. Without one every level gets a bound, and all the bounds hold together; a loss may be named
    later then.

    Parameters
    ----------
    model : nn.Module
        Unpatched; the one that the calibration is of.
    documents : iterable of str, or of pairs (source, text)
        Held out: none may be of the calibration's own text. They must be like independent draws from the text in use.
        Texts of one source count as one document ("": a source of its own).
    max_kl : float, optional
        Nats per token, above 0 and below ``clip``.
    agreement : float, optional
        Share of next words that stay the same, above 0 and below 1.
    confidence : float
        0.5 or more, below 1.
    levels : sequence of float, optional
        Budgets, experts per token. Default: sixteenths of the model's own number, as far as the calibration can meet
        them.
    settings : RoutingSettings, optional
        Of the routing, without a level. Default: all defaults.
    bound : {"betting", "hoeffding-bentkus"}
    window, document_tokens, batch_tokens
        As in `bh_routing.calibrate`.
    resume : path, optional
        A folder for the sums, from which an interrupted run goes on; removed at the end.
    progress : bool, optional
        A bar on standard error. Default: where that is a terminal.

    Raises
    ------
    CertificateError
        If a document is of the calibration's own text, or nothing can be certified: with the smallest loss that can, and
        how many documents more it would take.
    InvalidParameterError
        For a parameter out of range.
    CalibrationMismatchError
        For another model.
    """
    settings = RoutingSettings() if settings is None else settings
    target = _target(max_kl, agreement, clip)
    check_word("bound", bound, Bound)
    if not 0.5 <= confidence < 1.0:
        raise InvalidParameterError(f"confidence must be at least 0.5 and below 1, got {confidence!r}.")
    if any(getattr(settings, name) is not None for name in LEVELS):
        raise InvalidParameterError(
            "expected settings without a level, got one: certify goes through the levels itself."
        )
    if settings.priced:
        raise InvalidParameterError(
            "a price on loads drops other experts for other neighbours in a batch, which no certificate covers; certify "
            "without it."
        )
    read = Documents.read(documents, calibration.seed)
    _check_held_out(read, calibration)
    budgets = _budgets(calibration, settings, levels)
    loss: Loss = "agreement" if agreement is not None else "kl"
    size = len(budgets) if target is None else TOGETHER
    window = window or default_window(model)
    asked = {
        "model": calibration.model_id,
        "calibration": short_digest(calibration.fingerprint_LD) + calibration.text_digest,
        "settings": repr(settings),
        "budgets": budgets,
        "documents": merged_digest(read.digests),
        "window": window,
        "document_tokens": document_tokens,
        "batch_tokens": batch_tokens,
    }
    groups: list[Sums] = []
    losses_MU: dict[Loss, Any] = {}
    for begin in range(0, len(budgets), size):
        group = budgets[begin : begin + size]
        made = [
            BHRoutingIntegration(
                model, calibration=calibration, **settings.with_level(experts_per_token=b).to_dict()
            )
            for b in group
        ]
        groups.append(
            read_documents(
                model,
                tokenizer,
                read,
                calibration,
                made,
                window=window,
                document_tokens=document_tokens,
                batch_tokens=batch_tokens,
                checkpoint=Checkpoint(resume, f"certify-{begin}", 0, asked),
                what=f"{group[0]:g} to {group[-1]:g} experts",
                progress=progress,
            )
        )
        losses_MU = losses_of(groups, read, clip)
        if target is not None and fixed_sequence(losses_MU[loss], target, 1 - confidence, bound)[-1] > (
            1 - confidence
        ):
            break
    decided, compensation = settings.decided_by(calibration)
    blank = Certificate(
        target=target,
        confidence=confidence,
        bound=bound,
        documents=losses_MU["kl"].shape[1],
        tokens=int(groups[0].tokens),
        text_digest=merged_digest(read.digests),
        window=window,
        document_tokens=document_tokens,
        clip=clip,
        fingerprint=short_digest(calibration.fingerprint_LD),
        weights=weights_of(model),
        settings=decided,
        compensation=compensation,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        library_version=__version__,
    )
    certificate = _certificate(blank, budgets, groups, losses_MU, loss, clip)
    usage_ULE, score_UL = groups[0].profile()
    remove(resume)
    return replace(calibration, certificate=certificate, text_profile=TextProfile.of(usage_ULE, score_UL))


def _target(max_kl: float | None, agreement: float | None, clip: float) -> float | None:
    """The most that may be lost, as a share of what a document can."""
    if max_kl is not None and agreement is not None:
        raise InvalidParameterError("expected max_kl or agreement, got both; certify one, then the other.")
    if max_kl is not None:
        if not 0.0 < max_kl < clip:
            raise InvalidParameterError(
                f"max_kl must be above 0 and below {clip:g} nats, where a document's loss is clipped, got {max_kl!r}."
            )
        return max_kl / clip
    if agreement is not None:
        if not 0.0 < agreement < 1.0:
            raise InvalidParameterError(f"agreement must be above 0 and below 1, got {agreement!r}.")
        return 1.0 - agreement
    return None


def _check_held_out(read: Documents, calibration: Calibration) -> None:
    if not len(read):
        raise CertificateError("expected documents to certify on, got none.")
    if calibration.document_digests_C is None:
        logger.warning(
            "the calibration does not know its documents (a file of format 1), so that it cannot be checked that those of "
            "the certificate are others."
        )
        return
    own = set(calibration.document_digests_C.tolist())
    if shared := sum(document_digest(text) in own for text in read.texts):
        raise CertificateError(
            f"{shared:,} of {len(read.texts):,} documents are of the text that the calibration was made from, where "
            "its levels fit better than elsewhere: certify on documents that it has not seen."
        )


def _budgets(
    calibration: Calibration, settings: RoutingSettings, levels: Sequence[float] | None
) -> list[float]:
    """The levels from most experts to fewest; by default those that the calibration can meet."""
    if levels is not None:
        if not levels:
            raise InvalidParameterError("levels must hold a number of experts per token, got none.")
        return sorted({float(level) for level in levels}, reverse=True)
    own = sum(layer.top_k for layer in calibration.layers) / calibration.num_layers
    found = []
    for step in range(STEPS - 1, 0, -1):
        budget = own * step / STEPS
        try:
            settings.with_level(experts_per_token=budget).policy(calibration)
        except BudgetError:
            continue
        found.append(budget)
    if not found:
        raise BudgetError(
            "no level of this calibration meets a budget below the model's own number of experts."
        )
    return found


def _certificate(
    blank: Certificate,
    budgets: Sequence[float],
    groups: Sequence[Sums],
    losses_MU: Mapping[Loss, Any],
    named: Loss,
    clip: float,
) -> Certificate:
    delta = 1.0 - blank.confidence
    experts_M, bytes_M = (
        torch.cat([getattr(g, n) / g.tokens for g in groups]) for n in ("experts_M", "bytes_M")
    )

    def rows(loss: Loss, bounds: Sequence[float]) -> tuple[CertifiedLevel, ...]:
        unit = clip if loss == "kl" else 1.0
        return tuple(
            CertifiedLevel(
                experts_per_token=budgets[i],
                experts=float(experts_M[i]),
                bytes_per_token=None if bytes_M[i].isnan() else float(bytes_M[i]),
                risk=float(losses_MU[loss][i].mean()) * unit,
                bound=bound * unit,
                clipped=float((losses_MU[loss][i] >= 1.0).mean()),
            )
            for i, bound in enumerate(bounds)
            if bound < 1.0
        )

    if blank.target is None:
        tables = {
            loss: rows(loss, simultaneous(held, delta, blank.bound)) for loss, held in losses_MU.items()
        }
        if not any(tables.values()):
            raise CertificateError(
                f"nothing can be certified: {losses_MU['kl'].shape[1]:,} documents bound no level's loss below the most "
                "that it can be; give more documents."
            )
        return replace(blank, kl=tables["kl"], agreement=tables["agreement"])
    held = losses_MU[named]
    passed = [p for p in fixed_sequence(held, blank.target, delta, blank.bound) if p <= delta]
    unit = clip if named == "kl" else 1.0
    if not passed:
        raise CertificateError(_nothing(held[0], blank, budgets[0], named, unit))
    found: dict[str, Any] = {named: rows(named, [blank.target] * len(passed)), "target": blank.target * unit}
    return replace(blank, **found)


def _nothing(losses_U: Any, blank: Certificate, budget: float, named: Loss, unit: float) -> str:
    """The sentence that says what would do."""
    from ..stats.risk import upper_bound

    assert blank.target is not None
    delta = 1.0 - blank.confidence
    least = upper_bound(losses_U, delta=delta, bound=blank.bound) * unit
    asked = f"max_kl={blank.target * unit:g}" if named == "kl" else f"agreement={1.0 - blank.target:g}"
    can = f"max_kl={least + 5e-5:.4f}" if named == "kl" else f"agreement={1.0 - least - 5e-5:.4f}"
    needed = documents_needed(losses_U, blank.target, delta, blank.bound)
    more = (
        f"{asked} would take about {needed - len(losses_U):,} documents more"
        if needed is not None
        else f"no number of documents would do for {asked}, the mean loss is {losses_U.mean() * unit:.4g}"
    )
    return (
        f"nothing can be certified at {asked}: with {budget:g} experts the smallest loss that {len(losses_U):,} documents "
        f"certify is {can}, and {more}."
    )
