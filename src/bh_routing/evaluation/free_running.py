"""Both models continue the same prompts: what routing costs where the text is the model's own.

Teacher forcing judges a routing on text that somebody wrote. A model that writes reads its own words instead. Here the
full model continues prompts, greedily and by sampling; the routed model is asked, token by token and with a cache, for its
predictions along that path (KL), and writes its own continuation from the same random numbers (how long the texts agree).

Shape legend: B prompts of a batch, P tokens of one, N new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInputError
from ..integration import RoutingIntegration
from ..patching.forward import CACHES
from ..stats.divergence import kl_divergence

PROMPTS, PROMPT_TOKENS = 32, 64
BATCH = 8  # prompts that are continued together


def prompts_of(
    tokenizer: Any, text: str, num: int, prompt_tokens: int, new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Prompts [num, P] spread evenly over a text, and how it goes on after each, [num, N].

    Raises
    ------
    InvalidInputError
        If the text is too short for so many.
    """
    length = prompt_tokens + new_tokens
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < num * length:
        raise InvalidInputError(
            f"expected a text of at least {num * length:,} tokens for {num} prompts of {prompt_tokens} and {new_tokens} "
            f"tokens after each, got {len(ids):,}; give a longer text."
        )
    starts = [i * (len(ids) - length) // max(1, num - 1) for i in range(num)]
    rows = torch.tensor([ids[start : start + length] for start in starts])
    return rows[:, :prompt_tokens], rows[:, prompt_tokens:]


def steps(
    model: Any, prompt_BP: Tensor, num: int, choose: Callable[[int, Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(log probabilities float32 [B, V], chosen token [B]) of each of ``num`` new tokens, with a cache."""
    cache_name = next(name for name in CACHES if name in inspect.signature(type(model).forward).parameters)
    tokens_B1, cache = prompt_BP.to(model.device), None
    for step in range(num):
        out = model(input_ids=tokens_B1, use_cache=True, **({} if cache is None else {cache_name: cache}))
        cache = getattr(out, cache_name)
        logs_BV = out.logits[:, -1].float().log_softmax(-1)
        chosen_B = choose(step, logs_BV)
        yield logs_BV, chosen_B
        tokens_B1 = chosen_B.unsqueeze(-1)


@torch.no_grad()
def free_running(
    model: Any,
    routings: Sequence[RoutingIntegration],
    prompts: Tensor,
    onward: Tensor,
    *,
    seeds: Sequence[int] = (0, 1),
    temperature: float = 1.0,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[dict[str, dict[str, float]]]:
    """For each routing: what it costs along the full model's own text, greedy and sampled.

    Parameters
    ----------
    routings : sequence of RoutingIntegration
        Of this model, not patched.
    prompts, onward : Tensor
        int64 [B, P] and [B, N]: prompts, and the text that follows them (`prompts_of`).
    seeds : sequence of int
        Of the sampling; the routed model draws with the same numbers (Gumbel-max), so that the texts part only where its
        predictions make them.
    temperature : float
        Of the sampling.
    advance : callable
        Called with the number of new tokens after each batch.

    Returns
    -------
    list of dict
        Per routing, ``"greedy"`` and ``"sampled"`` (where there are seeds), each with ``kl`` (nats per token along the full
        model's path, decoded with a cache), ``kl_error`` (its standard error over continuations), ``teacher_forced`` (the
        same along ``onward``), ``ratio`` of the two, ``agreed`` (median number of tokens until the texts part; N where they
        do not), and ``same`` (the share of texts that do not part).
    """
    num = onward.shape[1]
    found: list[dict[str, list[tuple[float, int]]]] = [{} for _ in routings]
    forced: list[list[float]] = [[] for _ in routings]
    for rows in torch.arange(len(prompts)).split(BATCH):
        prompt_BP, onward_BN = prompts[rows], onward[rows].to(model.device)
        reference = [log for log, _ in steps(model, prompt_BP, num, lambda i, _: onward_BN[:, i])]  # noqa: B023
        for index, routing in enumerate(routings):
            forced[index] += _divergences(model, routing, prompt_BP, onward_BN, reference)
        advance(len(rows) * num)
        for seed in (None, *seeds):
            pick = _picker(seed, int(rows[0]), temperature)
            path = list(steps(model, prompt_BP, num, pick))
            own_BN = torch.stack([chosen for _, chosen in path], dim=1)
            reference = [log for log, _ in path]
            for index, routing in enumerate(routings):
                kl_B = _divergences(model, routing, prompt_BP, own_BN, reference)
                with routing:
                    written = [chosen for _, chosen in steps(model, prompt_BP, num, pick)]
                agreed_B = (torch.stack(written, dim=1) == own_BN).long().cumprod(-1).sum(-1)
                kind = "greedy" if seed is None else "sampled"
                found[index].setdefault(kind, []).extend(zip(kl_B, agreed_B.tolist(), strict=True))
            advance(len(rows) * num)
    return [
        {kind: _summary(pairs, forced[index], num) for kind, pairs in kinds.items()}
        for index, kinds in enumerate(found)
    ]


def _picker(seed: int | None, batch: int, temperature: float) -> Callable[[int, Tensor], Tensor]:
    """The next token of log probabilities: the largest, or one drawn by numbers that depend on seed, batch and step only."""

    def pick(step: int, logs_BV: Tensor) -> Tensor:
        if seed is None:
            return logs_BV.argmax(-1)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + batch) * 100_003 + step)
        uniform_BV = torch.rand(logs_BV.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
        noise_BV = -(-uniform_BV.log()).log()
        return (logs_BV.double().cpu() / temperature + noise_BV).argmax(-1).to(logs_BV.device)

    return pick


def _divergences(
    model: Any,
    routing: RoutingIntegration | None,
    prompt_BP: Tensor,
    path_BN: Tensor,
    reference: list[Tensor],
) -> list[float]:
    """Mean KL(full || routed) of each row along a path."""
    with routing or nullcontext():
        routed = steps(model, prompt_BP, path_BN.shape[1], lambda i, _: path_BN[:, i])
        each = [
            kl_divergence(own_BV, routed_BV) for own_BV, (routed_BV, _) in zip(reference, routed, strict=True)
        ]
    means: list[float] = torch.stack(each).double().mean(0).clamp_min(0.0).tolist()
    return means


def _summary(pairs: list[tuple[float, int]], forced: list[float], num: int) -> dict[str, float]:
    kl, agreed = (np.asarray(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    teacher = float(np.mean(forced))
    return {
        "kl": float(kl.mean()),
        "kl_error": float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else float("nan"),
        "teacher_forced": teacher,
        "ratio": float(kl.mean()) / teacher if teacher > 0 else float("nan"),
        "agreed": float(np.median(agreed)),
        "same": float((agreed == num).mean()),
    }
