"""Time a model with its own routing and with fewer experts, side by side in one run, beside the physical bound.

Shape legend: L routed layers, T tokens of one forward, E experts, K slots per token.

Two passes over the same forwards, the variants taking turns: one without instruments gives tokens per second, one
with hooks on routers and experts gives the time of an MoE layer, the share that deciding and counting takes, and the
work that was done: bytes of expert weights that were touched, and floating-point operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..decision.table import DecisionTable
from ..errors import InvalidInputError, InvalidParameterError
from ..integration import RoutingIntegration
from ..patching import PatchPlan, make_plan
from ..patching.calls import as_steps
from ..patching.expert_math import left_out
from ..patching.forward import CACHES
from ..patching.instance import find_patch
from ..policies import TablePolicy
from ..stats.divergence import kl_of_logits
from ..stats.statistic import base_statistic
from .routing_log import log_routing

CONTEXT = 32  # tokens in the cache before decoding is timed


@dataclass
class Result:
    """What was measured of one variant at one number of tokens per forward.

    Attributes
    ----------
    sequences : int or None
        That were decoded together; None for a prompt.
    seconds : list of float
        Of whole forwards, one per round; rounds of all variants are paired.
    layer_seconds, decision_seconds : list of float
        Per MoE layer (router, decision and experts), and the part of it that deciding and counting took.
    experts : float
        Per token and layer.
    distinct : float
        Experts per layer that had a token.
    megabytes, megaflops : float
        Per layer: weights of those experts, and operations of all pairs.
    """

    variant: str
    tokens: int
    sequences: int | None = None
    seconds: list[float] = field(default_factory=list)
    layer_seconds: list[float] = field(default_factory=list)
    decision_seconds: list[float] = field(default_factory=list)
    experts: float = 0.0
    distinct: float = 0.0
    megabytes: float = 0.0
    megaflops: float = 0.0

    def figures(self, stock: Result) -> dict[str, Any]:
        """Medians, and the ratios to the stock model of the same rounds."""
        layer, decision = median(self.layer_seconds), median(self.decision_seconds)
        return {
            "variant": self.variant,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "tokens_per_second": self.tokens / median(self.seconds),
            "forward_ratio": paired_ratio(self.seconds, stock.seconds),
            "layer_ms": layer * 1e3,
            "layer_ratio": paired_ratio(self.layer_seconds, stock.layer_seconds),
            "decision_share": decision / layer,
            "experts_per_token": self.experts,
            "distinct_experts": self.distinct,
            "megabytes": self.megabytes,
            "megaflops": self.megaflops,
            "bytes_ratio": self.megabytes / stock.megabytes,
            "operations_ratio": self.megaflops / stock.megaflops,
        }


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of the ratio of two times of the same round."""
    return median(t / b for t, b in zip(times, base, strict=True))


# -------------------------------------------------------------------------------------------------- variants


def threshold_variants(
    model: nn.Module, input_ids: Tensor, budgets: Sequence[float]
) -> dict[str, RoutingIntegration]:
    """One integration per budget without a calibration, for timing: a threshold on the log score of each layer.

    The thresholds are such that on these tokens each layer runs ``budget`` experts on average.
    """
    log = log_routing(model, [input_ids], max_tokens=input_ids.numel(), dtype=torch.float32)
    scores: list[Tensor] = []
    for context in log.contexts:
        logits_NE, _, own_NK = log.layer(context.index)
        scores.append(base_statistic(logits_NE, "logprob", context.score_func).gather(-1, own_NK))
    variants = {}
    for budget in budgets:
        levels_L1 = torch.tensor([[threshold_for(scores_NK, budget)] for scores_NK in scores])
        thresholds_LE = levels_L1.repeat(1, log.logits_NLE.shape[-1])
        table = DecisionTable(
            thresholds_LE=thresholds_LE,
            offset_LE=torch.zeros_like(thresholds_LE),
            paths=tuple(context.path for context in log.contexts),
            label=f"{budget:g} experts by a threshold",
        )
        variants[f"{budget:g} experts"] = RoutingIntegration(model, TablePolicy(table))
    return variants


def threshold_for(scores_TK: Tensor, budget: float) -> float:
    """The threshold that keeps this many candidates of a token on average, at least one of each."""
    slots = scores_TK.shape[-1]
    if not 1 <= budget <= slots:
        raise InvalidParameterError(
            f"a budget must lie between 1 and the router's {slots} slots, got {budget:g}."
        )
    if budget == slots:
        return float("-inf")
    # The best of each token is kept whatever the threshold; the others share the rest of the budget.
    rest_P = scores_TK.sort(-1, descending=True).values[:, 1:].flatten().sort(descending=True).values
    keep = round((budget - 1) * scores_TK.shape[0])
    return float(rest_P[keep - 1]) if keep else float("inf")


# -------------------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def measure(
    model: nn.Module,
    variants: dict[str, RoutingIntegration],
    input_ids: Tensor,
    tokens: Sequence[int] = (),
    *,
    sequences: Sequence[int] = (),
    rounds: int = 7,
    steps: int = 8,
) -> list[Result]:
    """Time the model as it is ("stock") and every variant, at each number of tokens per forward.

    Parameters
    ----------
    variants : dict of name to RoutingIntegration
        All of this model, none applied.
    input_ids : Tensor
        int64 [1, S], at least as many as the largest of ``tokens`` and `CONTEXT`.
    tokens : sequence of int
        1 is decoding with a cache, ``steps`` tokens per round; more is one forward without.
    sequences : sequence of int
        Decoding so many sequences at a time, each from a place of its own in the text.
    """
    needed = max((*tokens, CONTEXT))
    if input_ids.shape[1] < needed:
        raise InvalidInputError(f"bench needs a text of at least {needed} tokens, got {input_ids.shape[1]}.")
    plan = make_plan(model)
    results: list[Result] = []
    decoded = [1] * (1 in tokens) + list(sequences)
    for count, together in [(n, n) for n in decoded] + [(n, None) for n in tokens if n > 1]:
        row = {name: Result(name, count, together) for name in ("stock", *variants)}
        prompt = None if together is None else _prompt(model, input_ids, together)
        for instrumented in (False, True):
            for turn in range(rounds + 1):
                names = list(row)
                names = names[turn % len(names) :] + names[: turn % len(names)]
                for name in names:
                    integration = variants.get(name)
                    work = _Work(plan, patched=integration is not None) if instrumented else None
                    with integration or nullcontext():
                        if prompt is None:
                            seconds = _time(model, input_ids[:, :count], work)
                        else:
                            tokens_BS = places(input_ids, count, CONTEXT + turn * steps, steps)
                            seconds = _time_decoding(model, tokens_BS, deepcopy(prompt), work)
                    if turn == 0:
                        continue  # warm-up
                    if work is None:
                        row[name].seconds += seconds
                    else:
                        work.write(row[name], len(seconds) * count)
        results += row.values()
    return results


def _time(model: Any, input_ids: Tensor, work: _Work | None) -> list[float]:
    """Seconds of one forward."""
    with work.watched() if work else nullcontext():
        start = _now(input_ids.device)
        model(input_ids=input_ids, use_cache=False)
        return [_now(input_ids.device) - start]


def places(input_ids: Tensor, sequences: int, first: int, length: int) -> Tensor:
    """So many stretches of a text [1, S], int64 [B, length]: evenly spread, from position ``first`` of each on, round its end."""
    size = input_ids.shape[1]
    starts_B = torch.arange(sequences, device=input_ids.device) * size // sequences + first
    return input_ids[0, (starts_B.unsqueeze(1) + torch.arange(length, device=input_ids.device)) % size]


def _prompt(model: Any, input_ids: Tensor, sequences: int) -> dict[str, Any]:
    """The cache of so many sequences, by the name that the model's forward has for it."""
    output = model(input_ids=places(input_ids, sequences, 0, CONTEXT), use_cache=True)
    cache = next(name for name in CACHES if name in output)
    return {cache: output[cache]}


def _time_decoding(model: Any, tokens_BS: Tensor, cache: dict[str, Any], work: _Work | None) -> list[float]:
    """Seconds of each of S decoding steps of B sequences behind a cache.

    The greedy choice is computed, but the text goes on as it is: all variants decode the same tokens.
    """
    seconds = []
    with work.watched() if work else nullcontext():
        for token_B1 in tokens_BS.split(1, dim=-1):
            start = _now(token_B1.device)
            output = model(input_ids=token_B1, use_cache=True, **cache)
            output.logits[:, -1].argmax(-1)
            seconds.append(_now(token_B1.device) - start)
            cache = {name: output[name] for name in cache}
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def divergences(
    model: Any, variants: dict[str, RoutingIntegration], input_ids: Tensor, sequences: int, length: int = 128
) -> dict[str, float]:
    """KL(own || routed) of every variant in nats per token, so many stretches of the text decoded in step."""
    ids_BS = places(input_ids, sequences, 0, min(length, input_ids.shape[1]))
    own_BSV = model(input_ids=ids_BS, use_cache=False).logits
    found = {"stock": 0.0}
    for name, integration in variants.items():
        with integration, as_steps():
            routed_BSV = model(input_ids=ids_BS, use_cache=False).logits
        found[name] = float(kl_of_logits(own_BSV, routed_BSV).mean())
    return found


class _Work:
    """Hooks on routers and experts, clocks around the decisions, and what they saw."""

    def __init__(self, plan: PatchPlan, *, patched: bool) -> None:
        self.plan, self.patched = plan, patched
        self.layer_seconds = self.decision_seconds = self.start = 0.0
        self.pairs = self.distinct = self.calls = 0
        self.bytes = self.operations = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, forwards of the model are seen."""
        clocks = []
        with ExitStack() as stack:
            for layer in self.plan.layers:
                now = partial(_now, layer.context.device)
                for module in filter(None, (layer.router, layer.experts)):
                    self._hook(stack, module, now, module is layer.experts)
                patch = find_patch(layer.call.module, layer.call.attribute) if self.patched else None
                if patch is not None:
                    clocks.append(stack.enter_context(patch.clocked(now)))
            yield
        self.decision_seconds += sum(seconds["run"] - seconds["inner"] for seconds in clocks)

    def _hook(self, stack: ExitStack, module: nn.Module, now: Callable[[], float], experts: bool) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if experts:  # it looks at the routing before the clock starts
                tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
                index = next(x for x in tensors if not x.is_floating_point() and x.dtype != torch.bool)
                weights = next((x for x in tensors if x.is_floating_point() and x.shape == index.shape), None)
                self._look(module, index if weights is None else index[~left_out(weights)])
            self.start = now()

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.layer_seconds += now() - self.start

        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after).remove)

    def _look(self, experts: Any, index_P: Tensor) -> None:
        """Count the work that these indices ask of the experts; those that name none are empty slots."""
        num_experts = getattr(experts, "num_experts", None)
        if not isinstance(num_experts, int):
            num_experts = next((p.shape[0] for p in experts.parameters() if p.dim() == 3), 0)
        kept_P = index_P[index_P < num_experts]
        distinct = int(kept_P.unique().numel())
        weights = [p for p in experts.parameters() if p.shape[:1] == (num_experts,)]
        self.pairs += kept_P.numel()
        self.distinct += distinct
        self.bytes += distinct * sum(p.numel() * p.element_size() for p in weights) / num_experts
        self.operations += (
            2.0 * kept_P.numel() * sum(p.numel() for p in weights if p.dim() == 3) / num_experts
        )
        self.calls += 1

    def write(self, result: Result, tokens: int) -> None:
        """Add what was seen to a result; ``tokens`` went through each layer."""
        calls = max(1, self.calls)
        result.layer_seconds.append(self.layer_seconds / calls)
        result.decision_seconds.append(self.decision_seconds / calls)
        seen = {
            "experts": self.pairs / (tokens * len(self.plan.layers)),
            "distinct": self.distinct / calls,
            "megabytes": self.bytes / calls / 1e6,
            "megaflops": self.operations / calls / 1e6,
        }
        for name, value in seen.items():  # the mean over rounds so far
            held = getattr(result, name)
            setattr(result, name, held + (value - held) / len(result.layer_seconds))


__all__ = [
    "CONTEXT",
    "Result",
    "divergences",
    "measure",
    "paired_ratio",
    "threshold_for",
    "threshold_variants",
]
