"""Forward passes and what they say: losses and guesses on text, log-likelihoods of continuations.

Shape legend: N tokens of a text, B windows of a batch, S tokens of one (or those scored), V vocabulary, C scored tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInputError
from ..stats.divergence import kl_divergence
from ..text import Window


def batches(windows: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    """Runs of windows of one length and one number of scored tokens, at most so many tokens each."""
    held: list[Window] = []
    for window in windows:
        size = window.end - window.begin
        if held and (
            size != held[0].end - held[0].begin
            or window.score - window.begin != held[0].score - held[0].begin
            or (len(held) + 1) * size > tokens
        ):
            yield held
            held = []
        held.append(window)
    if held:
        yield held


@dataclass(kw_only=True)
class TextScores:
    """Per scored token, in the order of the text: loss in nats, whether guessed, KL divergence (or None)."""

    losses_C: Tensor
    hits_C: Tensor
    kl_C: Tensor | None
    seconds: float = field(default=0.0)


@torch.no_grad()
def score_text(
    model: Any,
    ids_N: Tensor,
    windows: Sequence[Window],
    *,
    batch_tokens: int = 4096,
    reference: Callable[[Tensor], Tensor] | None = None,
    around: Callable[[int], Any] | None = None,
    step: Callable[[int], None] = lambda tokens: None,
) -> TextScores:
    """Loss and top-1 guess of every scored token.

    Parameters
    ----------
    reference : callable, optional
        ``f(input_ids_BS) -> logits_BSV`` of the full model, for the divergence KL(full || this).
    around : callable, optional
        ``f(number of the batch)`` returns a context manager around the forward.
    step : callable
        Called after every batch with the number of its tokens.
    """
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    divergences: list[Tensor] = []
    seconds = 0.0
    for number, batch in enumerate(batches(windows, batch_tokens)):
        ids_BS = torch.stack([ids_N[w.begin : w.end] for w in batch]).to(model.device)
        first = batch[0].score - batch[0].begin
        reference_BSV = None if reference is None else reference(ids_BS)
        start = time.perf_counter()
        if around is None:
            logits_BSV = _logits(model, ids_BS)
        else:
            with around(number):
                logits_BSV = _logits(model, ids_BS)
        if ids_BS.device.type == "cuda":
            torch.cuda.synchronize(ids_BS.device)
        seconds += time.perf_counter() - start
        # Window by window: a slice of one is a view, of all of them a copy as large as the logits.
        for row, targets_S in enumerate(ids_BS[:, first:]):
            logits_SV = logits_BSV[row, first - 1 : -1].float()
            losses.append(torch.nn.functional.cross_entropy(logits_SV, targets_S, reduction="none").cpu())
            hits.append(_guessed(logits_SV, targets_S).cpu())
            if reference_BSV is not None:
                full_SV = reference_BSV[row, first - 1 : -1].float().log_softmax(-1)
                own_SV = logits_SV.log_softmax(-1)
                divergences.append(kl_divergence(full_SV, own_SV).cpu())
        step(ids_BS.numel())
    return TextScores(
        losses_C=torch.cat(losses),
        hits_C=torch.cat(hits),
        kl_C=torch.cat(divergences) if divergences else None,
        seconds=seconds,
    )


def _guessed(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """bool [S], whether the target is the first largest logit: argmax only where it is a largest one at all."""
    hit_S = logits_SV.gather(-1, targets_S.unsqueeze(-1)).squeeze(-1) >= logits_SV.amax(-1)
    hit_S[hit_S.clone()] = logits_SV[hit_S].argmax(-1) == targets_S[hit_S]
    return hit_S


def _logits(model: Any, ids_BS: Tensor) -> Tensor:
    return model(input_ids=ids_BS, use_cache=False).logits


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation, split as lm-evaluation-harness does it."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    both = tokenizer(context + continuation, add_special_tokens=False).input_ids
    head = tokenizer(context, add_special_tokens=False).input_ids
    if not head or len(both) <= len(head):
        raise InvalidInputError(
            f"expected a context and a continuation of at least one token each, got {context!r} and {continuation!r}."
        )
    return head, both[len(head) :]


@torch.no_grad()
def score_continuations(
    model: Any,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    batch_tokens: int = 4096,
    pad: int = 0,
    step: Callable[[int], None] = lambda items: None,
) -> tuple[list[tuple[float, bool]], float]:
    """Log-likelihood of each continuation and whether greedy decoding gives it; and the seconds of the forwards.

    Contexts too long for the model lose their beginning.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 2048
    rows = [((c + t)[-(longest + 1) :][:-1], t) for c, t in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    seconds = 0.0
    while order:
        size = max(1, batch_tokens // len(rows[order[0]][0]))
        chosen, order = order[:size], order[size:]
        width = len(rows[chosen[0]][0])
        ids_BS = torch.full((len(chosen), width), pad)
        mask_BS = torch.zeros_like(ids_BS)
        for b, i in enumerate(chosen):
            ids = rows[i][0]
            ids_BS[b, : len(ids)] = torch.tensor(ids)
            mask_BS[b, : len(ids)] = 1
        ids_BS, mask_BS = ids_BS.to(model.device), mask_BS.to(model.device)
        start = time.perf_counter()
        full = bool(mask_BS.all())
        logits_BSV = model(
            input_ids=ids_BS, attention_mask=None if full else mask_BS, use_cache=False
        ).logits.float()
        seconds += time.perf_counter() - start
        for b, i in enumerate(chosen):
            ids, target = rows[i]
            target = target[-len(ids) :]
            log_CV = logits_BSV[b, len(ids) - len(target) : len(ids)].log_softmax(-1)
            wanted_C = torch.tensor(target, device=log_CV.device)
            total = float(log_CV.gather(-1, wanted_C.unsqueeze(-1)).sum())
            results[i] = (total, bool((log_CV.argmax(-1) == wanted_C).all()))
        step(len(chosen))
    return results, seconds
