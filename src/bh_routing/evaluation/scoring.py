"""Forward passes and what they say: losses and guesses of every token of a text.

Shape legend: N tokens of a text, B windows of a batch, S tokens of one (or those scored), V vocabulary, C scored tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


@dataclass(frozen=True, kw_only=True, eq=False)
class TextScores:
    """Per scored token, in the order of the text: loss in nats, whether guessed, KL divergence (or None).

    ``num_tokens``: tokens of the text, N; ``seconds``: of the forward passes.
    """

    losses_C: Tensor
    hits_C: Tensor
    kl_C: Tensor | None
    num_tokens: int
    seconds: float


@torch.no_grad()
def score_text(
    model: Any,
    ids_N: Tensor,
    windows: Sequence[Window],
    *,
    batch_tokens: int = 4096,
    reference: Callable[[Tensor], Tensor] | None = None,
    step: Callable[[int], None] = lambda tokens: None,
) -> TextScores:
    """Loss and top-1 guess of every scored token.

    Parameters
    ----------
    reference : callable, optional
        ``f(input_ids_BS) -> logits_BSV`` of the full model, for the divergence KL(full || this).
    step : callable
        Called after every batch with the number of its tokens.
    """
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    divergences: list[Tensor] = []
    seconds = 0.0
    for batch in batches(windows, batch_tokens):
        ids_BS = torch.stack([ids_N[w.begin : w.end] for w in batch]).to(model.device)
        first = batch[0].score - batch[0].begin
        reference_BSV = None if reference is None else reference(ids_BS)
        start = time.perf_counter()
        logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
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
        num_tokens=len(ids_N),
        seconds=seconds,
    )


def _guessed(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """bool [S], whether the target is the first largest logit: argmax only where it is a largest one at all."""
    hit_S = logits_SV.gather(-1, targets_S.unsqueeze(-1)).squeeze(-1) >= logits_SV.amax(-1)
    hit_S[hit_S.clone()] = logits_SV[hit_S].argmax(-1) == targets_S[hit_S]
    return hit_S
