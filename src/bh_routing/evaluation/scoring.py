"""Forward passes and what they say: losses and guesses of every token of a text.

Shape legend: N tokens of a text, B windows of a batch, S tokens of one (or those scored), V vocabulary, C scored tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInputError
from ..patching.calls import as_steps
from ..stats.divergence import kl_of_logits
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


def whole_streams(tokens: int, window: int, streams: int) -> int:
    """The largest number of tokens that so many streams of whole windows use up.

    Raises
    ------
    InvalidInputError
        If that is none.
    """
    used = tokens - tokens % (window * streams)
    if not used:
        raise InvalidInputError(
            f"{streams} streams of windows of {window} need a text of at least {window * streams} tokens, got {tokens}."
        )
    return used


def in_step(windows: Sequence[Window], streams: int) -> list[list[Window]]:
    """Batches of ``streams`` windows from places spread over the text: of different documents, where it holds so many.

    Raises
    ------
    InvalidInputError
        Unless the windows are of one length and their number is a multiple of ``streams``.
    """
    sizes = {(w.end - w.begin, w.score - w.begin) for w in windows}
    if len(windows) % streams or len(sizes) != 1:
        raise InvalidInputError(
            f"{streams} streams need windows of one length, a multiple of {streams} of them, got {len(windows)} of lengths "
            f"{', '.join(str(size) for size, _ in sorted(sizes))}."
        )
    return [list(windows[i :: len(windows) // streams]) for i in range(len(windows) // streams)]


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
    streams: int | None = None,
    reference: Callable[[Tensor], Tensor] | None = None,
    step: Callable[[int], None] = lambda tokens: None,
) -> TextScores:
    """Loss and top-1 guess of every scored token.

    Parameters
    ----------
    streams : int, optional
        Score so many windows from different places of the text in step, as if they were decoded together (`in_step`).
    reference : callable, optional
        ``f(input_ids_BS) -> logits_BSV`` of the full model, for the divergence KL(full || this).
    step : callable
        Called after every batch with the number of its tokens.
    """
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    divergences: list[Tensor] = []
    seconds = 0.0
    groups = list(batches(windows, batch_tokens)) if streams is None else in_step(windows, streams)
    for batch in groups:
        ids_BS = torch.stack([ids_N[w.begin : w.end] for w in batch]).to(model.device)
        first = batch[0].score - batch[0].begin
        reference_BSV = None if reference is None else reference(ids_BS)
        start = time.perf_counter()
        with nullcontext() if streams is None else as_steps():
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
                divergences.append(kl_of_logits(reference_BSV[row, first - 1 : -1], logits_SV).cpu())
        step(ids_BS.numel())
    # In the order of the text, whatever the order of the batches.
    order = sorted(range(len(losses)), key=[w.begin for group in groups for w in group].__getitem__)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([parts[i] for i in order])

    return TextScores(
        losses_C=joined(losses),
        hits_C=joined(hits),
        kl_C=joined(divergences) if divergences else None,
        num_tokens=len(ids_N),
        seconds=seconds,
    )


def _guessed(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """bool [S], whether the target is the first largest logit: argmax only where it is a largest one at all."""
    hit_S = logits_SV.gather(-1, targets_S.unsqueeze(-1)).squeeze(-1) >= logits_SV.amax(-1)
    hit_S[hit_S.clone()] = logits_SV[hit_S].argmax(-1) == targets_S[hit_S]
    return hit_S
