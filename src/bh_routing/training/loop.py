"""`finetune`: a short fine-tune of a language model under routing at a budget, as a plain PyTorch loop.

Shape legend: N windows of a text, B windows of a batch, S tokens of a window, V vocabulary.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..calibration.calibration import Calibration
from ..errors import InvalidInputError
from ..integration import BHRoutingIntegration, RoutingIntegration
from ..policies import TablePolicy, TopKPolicy
from ..stats.divergence import kl_of_logits
from ..text import iter_windows
from .loss import AdaptiveRoutingLoss
from .refitting import RecentChoices, recalibrate, refit
from .settings import FinetuneSettings


@dataclass(kw_only=True)
class Finetuned:
    """What a fine-tune did: the calibration it ended with, one entry per step, and the seconds its steps took."""

    calibration: Calibration
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)


def text_windows(tokenizer: Any, documents: Sequence[str], window: int, limit: int | None = None) -> Tensor:
    """Windows int64 [N, S] of documents, in order; what is left over at a document's end is dropped.

    Parameters
    ----------
    documents : sequence of str
    window : int
        S.
    limit : int, optional
        Stop after so many windows, without tokenising the rest.
    """
    whole = (ids for ids in iter_windows(tokenizer, documents, window) if len(ids) == window)
    rows = list(islice(whole, limit))
    return torch.stack(rows) if rows else torch.zeros(0, window, dtype=torch.int64)


def batches_of(windows_NS: Tensor, settings: FinetuneSettings) -> Iterator[Tensor]:
    """One batch [B, S] per step: every epoch in an order of its own, a function of the seed alone."""
    size = max(1, settings.batch_tokens // windows_NS.shape[1])
    if len(windows_NS) < size:
        raise InvalidInputError(
            f"expected a text of at least {size} windows of {windows_NS.shape[1]} tokens, got {len(windows_NS)}: give more "
            "text, or smaller batches."
        )
    left: list[int] = []
    random_ = random.Random(settings.seed)
    for _ in range(settings.steps):
        if len(left) < size:
            left = list(range(len(windows_NS)))
            random_.shuffle(left)
        chosen, left = left[:size], left[size:]
        yield windows_NS[chosen]


def finetune(
    model: nn.Module,
    windows_NS: Tensor,
    calibration: Calibration,
    settings: FinetuneSettings,
    *,
    make_calibration: Callable[[nn.Module], Calibration] | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> Finetuned:
    """Train all weights that require a gradient; the model comes back unpatched, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        A causal language model with supported routers.
    windows_NS : Tensor
        int64 [N, S], the text (`text_windows`).
    calibration : Calibration
        Of the model as it is.
    settings : FinetuneSettings
    make_calibration : callable, optional
        ``f(model) -> Calibration``: a refit then is a complete calibration. Default: the null follows the training
        tokens, sizes and mean outputs stay (`bh_routing.training.refit`).
    on_step : callable
        Called after every step with its number (from 1) and its figures.

    Returns
    -------
    Finetuned
        Its calibration is the last refitted one: calibrate anew for use.

    Notes
    -----
    Same arguments and seed, same machine, one thread: the same weights.
    """
    torch.manual_seed(settings.seed)
    teacher = (
        copy.deepcopy(model).eval().requires_grad_(False) if settings.routed and settings.distil else None
    )
    if settings.routed:
        integrator: RoutingIntegration = BHRoutingIntegration(
            model, calibration=calibration, experts_per_token=settings.experts_per_token, collect_stats=False
        )
    else:
        integrator = RoutingIntegration(model, TopKPolicy(), collect_stats=False)
    loss = AdaptiveRoutingLoss(
        integrator,
        balance=settings.balance,
        z=settings.z,
        budget=settings.budget if settings.routed else 0.0,
        temperature=settings.temperature,
        scope=settings.scope,
    )
    recent = RecentChoices(settings.refit_tokens)
    if settings.routed:
        integrator.watchers.append(recent)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidInputError(
            "expected a model with weights to train, got one with none that require a gradient."
        )
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    done = Finetuned(calibration=calibration, settings=asdict(settings))
    model.train()
    try:
        with integrator:
            for step, ids_BS in enumerate(batches_of(windows_NS, settings)):
                started = time.perf_counter()
                for group in optimiser.param_groups:
                    group["lr"] = settings.rate_at(step)
                figures = _step(model, teacher, integrator, loss, ids_BS.to(parameters[0].device), settings)
                norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                recent.trim()
                last = step + 1 == settings.steps
                if isinstance(integrator, BHRoutingIntegration) and (
                    last or (step + 1) % settings.refit_every == 0
                ):
                    if make_calibration is None:
                        done.calibration = refit(integrator, recent, seed=settings.seed)
                    elif not last:
                        done.calibration = recalibrate(integrator, make_calibration)
                figures |= {"step": step + 1, "gradient_norm": float(norm), "rate": settings.rate_at(step)}
                done.seconds += time.perf_counter() - started
                done.curve.append({k: float(v) for k, v in figures.items()} | {"seconds": done.seconds})
                on_step(step + 1, done.curve[-1])
    finally:
        loss.close()
        model.eval()
    return done


def _step(
    model: Any,
    teacher: Any,
    integrator: RoutingIntegration,
    loss: AdaptiveRoutingLoss,
    ids_BS: Tensor,
    settings: FinetuneSettings,
) -> dict[str, Any]:
    """Forward and backward of one batch: under the budget, and with the model's own routing if it has a share."""
    share = settings.full_share if settings.routed else 0.0
    figures: dict[str, Any] = {}
    if share:
        with keeping_all(integrator):
            task = next_token_loss(model(input_ids=ids_BS, use_cache=False).logits, ids_BS)
        (share * task).backward()
        loss.forget()  # its graph is gone, and its routing is not the one that is trained
        figures["full_loss"] = task.detach()
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
    task = next_token_loss(logits_BSV, ids_BS)
    auxiliary = loss.auxiliary()
    figures |= {"loss": task.detach(), **loss.parts}
    total = task
    if teacher is not None:
        with torch.no_grad():
            wanted_BSV = teacher(input_ids=ids_BS, use_cache=False).logits
        apart = kl_of_logits(wanted_BSV, logits_BSV).mean()
        figures["divergence"] = apart.detach()
        total = (1.0 - settings.distil) * task + settings.distil * apart
    ((1.0 - share) * total + auxiliary).backward()
    return figures


def next_token_loss(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Mean cross entropy of every token but the first of a window."""
    return cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten())


@contextmanager
def keeping_all(integrator: RoutingIntegration) -> Iterator[None]:
    """The model's own routing within a ``with`` block, without unpatching: no expert is dropped."""
    policy = integrator.policy
    if not isinstance(policy, TablePolicy):
        yield
        return
    table = policy.table
    policy.set_table(table.with_thresholds(torch.full_like(table.thresholds_LE, float("-inf"))))
    try:
        yield
    finally:
        policy.set_table(table)


def split_text(
    pieces: Iterable[str], seed: int, shares: tuple[float, float] = (0.1, 0.1)
) -> tuple[list[str], list[str], list[str]]:
    """Pieces of a text, shuffled: those to train on, and two shares set aside, to calibrate on and to judge by.

    Raises
    ------
    InvalidInputError
        If there are fewer than three pieces.
    """
    every = [piece for piece in pieces if piece.strip()]
    if len(every) < 3:
        raise InvalidInputError(
            f"expected a text of at least three pieces (train, calibrate, judge), got {len(every)}; give more text."
        )
    random.Random(seed).shuffle(every)
    first, more = (max(1, round(share * len(every))) if share else 0 for share in shares)
    second = first + more
    return every[second:], every[:first], every[first:second]


__all__ = [
    "FinetuneSettings",
    "Finetuned",
    "batches_of",
    "finetune",
    "keeping_all",
    "next_token_loss",
    "split_text",
    "text_windows",
]
