"""Time a model with its own routing and with fewer experts, side by side in one run, beside the physical bound.

Shape legend: L routed layers, T tokens of one forward, E experts, K slots per token.

Two passes over the same forwards, the variants taking turns: one without instruments gives tokens per second, one
with hooks on routers and experts gives the time of an MoE layer, the share that deciding and counting takes, and the
work that was done: bytes of expert weights that were touched, and floating-point operations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..decision.table import DecisionTable
from ..errors import InvalidInputError, InvalidParameterError
from ..integration import BHRoutingIntegration, RoutingIntegration
from ..patching import PatchPlan, make_plan, watch
from ..patching.apply import RouterPatch
from ..patching.forward import CACHES
from ..policies import TablePolicy
from ..stats.statistic import base_statistic

CONTEXT = 32  # tokens in the cache before decoding is timed


@dataclass
class Result:
    """What was measured of one variant at one number of tokens per forward.

    Attributes
    ----------
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


def calibrated_variants(
    model: nn.Module, calibration: Any, budgets: Sequence[float]
) -> dict[str, RoutingIntegration]:
    """One integration per budget, as a user of the calibration would have it."""
    return {
        f"{budget:g} experts": BHRoutingIntegration(model, calibration=calibration, experts_per_token=budget)
        for budget in budgets
    }


def threshold_variants(
    model: nn.Module, input_ids: Tensor, budgets: Sequence[float]
) -> dict[str, RoutingIntegration]:
    """One integration per budget without a calibration, for timing: a threshold on the log score of each layer.

    The thresholds are such that on these tokens each layer runs ``budget`` experts on average.
    """
    plan = make_plan(model)
    scores: dict[str, list[Tensor]] = {layer.path: [] for layer in plan.layers}

    def collect(
        layer: Any, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, mask_T: Any
    ) -> None:
        base_TE = base_statistic(logits_TE, "logprob", layer.context.score_func)
        scores[layer.path].append(base_TE.gather(-1, own_experts_TK).float().cpu())

    with torch.no_grad(), watch(plan, collect):
        model(input_ids=input_ids, use_cache=False)
    if missing := [path for path, seen in scores.items() if not seen]:
        raise InvalidInputError(
            f"router {missing[0]} saw no token of a text prompt; bench times models all of whose routers text reaches."
        )
    num_experts = max(c.num_experts for c in plan.contexts)
    variants: dict[str, RoutingIntegration] = {}
    for budget in budgets:
        rows = [
            torch.full((num_experts,), threshold_for(torch.cat(scores[layer.path]), budget))
            for layer in plan.layers
        ]
        thresholds_LE = torch.stack(rows)
        table = DecisionTable(
            thresholds_LE=thresholds_LE,
            offset_LE=torch.zeros_like(thresholds_LE),
            paths=tuple(layer.path for layer in plan.layers),
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
    tokens: Sequence[int],
    *,
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
    """
    needed = max(*tokens, CONTEXT)
    if input_ids.shape[1] < needed:
        raise InvalidInputError(f"bench needs a text of at least {needed} tokens, got {input_ids.shape[1]}.")
    plan = make_plan(model)
    results: list[Result] = []
    for count in tokens:
        row = {name: Result(name, count) for name in ("stock", *variants)}
        for instrumented in (False, True):
            for turn in range(rounds + 1):
                names = list(row)
                names = names[turn % len(names) :] + names[: turn % len(names)]
                for name in names:
                    with _applied(variants.get(name)) as integration:
                        instruments = _Instruments(plan, integration) if instrumented else None
                        seconds = _time(model, input_ids, count, steps, turn * steps, instruments)
                    if turn == 0:
                        continue  # warm-up
                    if instruments is None:
                        row[name].seconds += seconds
                    else:
                        instruments.write(row[name], plan, len(seconds) * count)
        results += row.values()
    return results


@contextmanager
def _applied(integration: RoutingIntegration | None) -> Iterator[RoutingIntegration | None]:
    if integration is None:
        yield None
        return
    with integration:
        yield integration


def _time(
    model: Any, input_ids: Tensor, tokens: int, steps: int, first: int, instruments: _Instruments | None
) -> list[float]:
    """Seconds of one forward, or of each of ``steps`` decoding steps over the text's tokens from ``first`` on.

    The greedy choice is computed, but the text goes on as it is: all variants decode the same tokens.
    """
    seconds = []
    if tokens > 1:
        with _installed(instruments):
            start = _now(input_ids)
            model(input_ids=input_ids[:, :tokens], use_cache=False)
            seconds.append(_now(input_ids) - start)
        return seconds
    output = model(input_ids=input_ids[:, :CONTEXT], use_cache=True)
    cache = next(name for name in CACHES if name in output)
    with _installed(instruments):
        for step in range(first, first + steps):
            column = step % input_ids.shape[1]
            token = input_ids[:, column : column + 1]
            start = _now(input_ids)
            output = model(input_ids=token, use_cache=True, **{cache: output[cache]})
            output.logits[:, -1].argmax(-1)
            seconds.append(_now(input_ids) - start)
    return seconds


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


@contextmanager
def _installed(instruments: _Instruments | None) -> Iterator[None]:
    if instruments is None:
        yield
        return
    with instruments:
        yield


class _Instruments:
    """Hooks on routers and experts, and clocks around the decisions."""

    def __init__(self, plan: PatchPlan, integration: RoutingIntegration | None) -> None:
        self.plan = plan
        self.patches = [] if integration is None else router_patches(integration)
        self.seconds = {"layer": 0.0, "own": 0.0, "run": 0.0}
        self.pairs = self.distinct = self.calls = 0
        self.bytes = self.operations = 0.0
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for layer in self.plan.layers:
            for module in (layer.router, layer.experts):
                if module is None:
                    continue
                # The experts' pre-hook looks at the routing before the clock starts.
                before = _Before(self, layer.experts if module is layer.experts else None)
                self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self.handles.append(module.register_forward_hook(_After(self, before)))
        for patch in self.patches:
            for name, kind in (("inner", "own"), ("run", "run")):
                setattr(patch, name, self._clocked(getattr(patch, name), kind))

    def __exit__(self, *exception: object) -> None:
        while self.handles:
            self.handles.pop().remove()
        for patch in self.patches:
            del patch.inner, patch.run  # the class's own again

    def _clocked(self, function: Any, kind: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds[kind] += self.now() - start
            return result

        return call

    def now(self) -> float:
        if any(c.device.type == "cuda" for c in self.plan.contexts):
            torch.cuda.synchronize()
        return time.perf_counter()

    def look(self, experts: Any, index_TK: Tensor) -> None:
        """Count the work that these indices ask of the experts."""
        num_experts = _num_experts(experts)
        kept_P = index_TK[index_TK < num_experts]
        distinct = int(kept_P.unique().numel())
        weights = [p for p in experts.parameters() if p.shape[:1] == (num_experts,)]
        self.pairs += kept_P.numel()
        self.distinct += distinct
        self.bytes += distinct * sum(p.numel() * p.element_size() for p in weights) / num_experts
        self.operations += (
            2.0 * kept_P.numel() * sum(p.numel() for p in weights if p.dim() == 3) / num_experts
        )
        self.calls += 1

    def write(self, result: Result, plan: PatchPlan, tokens: int) -> None:
        """Add what was seen to a result; ``tokens`` went through each layer."""
        layers = len(plan.layers)
        calls = max(1, self.calls)
        result.layer_seconds.append(self.seconds["layer"] / calls)
        result.decision_seconds.append((self.seconds["run"] - self.seconds["own"]) / calls)
        seen = len(result.layer_seconds)

        def update(name: str, value: float) -> None:
            setattr(result, name, getattr(result, name) + (value - getattr(result, name)) / seen)

        update("experts", self.pairs / (tokens * layers))
        update("distinct", self.distinct / calls)
        update("megabytes", self.bytes / calls / 1e6)
        update("megaflops", self.operations / calls / 1e6)


class _Before:
    def __init__(self, instruments: _Instruments, experts: nn.Module | None) -> None:
        self.instruments, self.experts, self.start = instruments, experts, 0.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.experts is not None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            index_TK = next(x for x in tensors if not x.is_floating_point() and x.dtype != torch.bool)
            self.instruments.look(self.experts, index_TK)
        self.start = self.instruments.now()


class _After:
    def __init__(self, instruments: _Instruments, before: _Before) -> None:
        self.instruments, self.before = instruments, before

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.instruments.seconds["layer"] += self.instruments.now() - self.before.start


def _num_experts(experts: Any) -> int:
    stated = getattr(experts, "num_experts", None)
    if isinstance(stated, int):
        return stated
    return next((p.shape[0] for p in experts.parameters() if p.dim() == 3), 0)


def router_patches(integration: RoutingIntegration) -> list[RouterPatch]:
    """The patches of an applied integration's routers."""
    return [piece for piece in integration._patch._pieces if isinstance(piece, RouterPatch)]


__all__ = ["CONTEXT", "Result", "calibrated_variants", "measure", "paired_ratio", "threshold_variants"]
