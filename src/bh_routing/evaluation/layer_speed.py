"""Time one MoE layer of OLMoE-1B-7B's shape, with random weights, under its own top-8 and with fewer experts.

On a model whose experts are tiny, deciding costs what skipping saves. Here experts are as large as people run them: one
is 12.6 MB in bfloat16, no cache holds what a token reads, and the layer takes the time of reading.

Shape legend: T tokens of one forward, H hidden, E experts, K slots per token, G groups of T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from ..decision.price import Step
from ..decision.table import DecisionTable
from ..decision.types import RoutingDecision
from ..integration import RoutingIntegration
from ..policies import FixedPrice, PricePolicy, TablePolicy
from ..policies.base import RoutingContext
from ..stats.statistic import base_statistic
from .bench import paired_ratio, threshold_for

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 1024, 64, 8  # of OLMoE-1B-7B
FEWER_EXPERTS = 16  # where memory is short: as many are read for a token
STOCK = (
    "eager",
    "grouped_mm",
    "batched_mm",
)  # implementations of transformers, of which the fastest is the base
STEPS = 16  # forwards timed together, so that their mean number of experts is near the budget


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """What was measured of one routing of the layer.

    Attributes
    ----------
    label : str
    tokens : int
        Per forward.
    experts, loads : float
        Per token, and distinct ones that a forward reads; realised.
    seconds : tuple of float
        Per forward, one a round; rounds of all routings are paired.
    ratio : float
        Median over rounds of the time as a share of the own routing's.
    """

    label: str
    tokens: int
    experts: float
    loads: float
    seconds: tuple[float, ...]
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """The figures, with the median of the times."""
        return {
            "label": self.label,
            "tokens": self.tokens,
            "experts": self.experts,
            "loads": self.loads,
            "milliseconds": median(self.seconds) * 1e3,
            "ratio": self.ratio,
            "rounds": len(self.seconds),
        }


def experts_that_fit(experts: int = EXPERTS) -> int:
    """So many experts, or `FEWER_EXPERTS` where the machine lacks three times their memory."""
    available = available_bytes()
    needed = experts * 3 * HIDDEN * INTERMEDIATE * 2
    return experts if available is None or available > 3 * needed else min(experts, FEWER_EXPERTS)


def available_bytes() -> int | None:
    """Memory that can be taken without swapping, as Linux says it, within the limit of a container; else None."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):
        return found
    return min(found, limit - used)


def make_layer(experts: int = EXPERTS, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """An `OlmoeSparseMoeBlock` with random weights, whose router's logits have a standard deviation of about 1.5.

    All weights lie in memory of their own; to be quick, experts repeat 16 million random numbers.
    """
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=1,
    )
    config._experts_implementation = STOCK[0]
    with torch.device("meta"):
        layer = OlmoeSparseMoeBlock(config).to(dtype)
    layer = layer.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(1 << 24, dtype=dtype).normal_(0.0, 0.02, generator=generator)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("gate."):
                parameter.normal_(0.0, 1.5 * HIDDEN**-0.5, generator=generator)
            else:
                for part in parameter.flatten().split(pool.numel()):
                    part.copy_(pool[: part.numel()])
    return layer


class _PricedStep(PricePolicy):
    """A price on loads where every call is a decoding step, one token of each sequence: a bare layer is told no shape."""

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        tokens = logits_TE.shape[0]
        step = Step(shape=(tokens, 1), tokens=tokens)
        return super().decide(logits_TE, own_weights_TK, own_experts_TK, replace(context, step=step))


@dataclass
class _Routing:
    label: str
    integration: RoutingIntegration | None
    seconds: list[float] = field(default_factory=list)
    experts: list[float] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)


@torch.inference_mode()
def measure_layer(
    layer: Any,
    means: Sequence[float] = (4.0, 2.0),
    *,
    tokens: int = 1,
    share_loaded: float | None = None,
    seconds: float = 6.0,
    seed: int = 0,
) -> list[LayerTime]:
    """The layer as transformers runs it (in its fastest way), and at mean numbers of experts.

    A threshold on the router's log probability keeps the mean number; every decision is made, and counted, as on a
    model. The routings take turns over the same tokens, which are new in every round.

    Parameters
    ----------
    layer : nn.Module
        `make_layer`. It is left as it was.
    tokens : int
        Of one forward, each of a sequence of its own.
    share_loaded : float, optional
        Also a price on loads, without a threshold: at which a forward reads this share of the experts that it reads by
        the own choice.
    seconds : float
        About how long to measure, after a round of warm-up; at least five rounds.
    """
    config = layer.experts.config
    before = config._experts_implementation
    generator = torch.Generator().manual_seed(seed)
    pool_TH = torch.randn(2048, HIDDEN, generator=generator).to(layer.gate.weight.dtype)
    logits_TE, _, experts_TK = layer.gate(pool_TH)
    scores_TK = base_statistic(logits_TE, "logprob", "softmax").gather(-1, experts_TK)
    routings = [_Routing(f"own top-{TOP_K}", None)]
    for mean in means:
        table = _threshold_table(layer, threshold_for(scores_TK, mean))
        routings.append(_Routing(f"mean {mean:g}", RoutingIntegration(layer, TablePolicy(table))))
    if share_loaded is not None:
        price = FixedPrice(_price_for(scores_TK, experts_TK, tokens, share_loaded), 1)
        priced = _PricedStep(_threshold_table(layer, float("-inf")), prices=price)
        routings.append(_Routing("price on loads", RoutingIntegration(layer, priced)))
    stock = STOCK if tokens == 1 else STOCK[:2]  # batched_mm gathers the weights of every pair: seconds
    steps = max(1, STEPS // tokens)
    try:
        config._experts_implementation = min(
            stock, key=lambda name: _first_time(layer, name, pool_TH, tokens)
        )
        start, turn = time.perf_counter(), 0
        while turn < 6 or time.perf_counter() - start < seconds:
            rows = torch.randint(len(pool_TH), (steps, tokens), generator=generator)
            for place in range(len(routings)):
                routing = routings[(turn + place) % len(routings)]
                elapsed = _take_turn(layer, routing, pool_TH[rows])
                if turn:
                    routing.seconds.append(elapsed / steps)
            turn += 1
        for routing in routings:
            _count(layer, routing, pool_TH.view(-1, tokens, 1, HIDDEN)[: max(8, 256 // tokens)])
    finally:
        config._experts_implementation = before
    own = routings[0]
    return [
        LayerTime(
            label=routing.label,
            tokens=tokens,
            experts=fmean(routing.experts),
            loads=fmean(routing.loads),
            seconds=tuple(routing.seconds),
            ratio=paired_ratio(routing.seconds, own.seconds),
        )
        for routing in routings
    ]


def _price_for(scores_TK: Tensor, experts_TK: Tensor, tokens: int, share: float) -> float:
    """The price of a load at which groups of so many tokens read this share of what they read by the own choice, on average.

    A token's best expert is loaded whatever it is worth.
    """
    losses_TK = (2.0 * scores_TK.float()).exp()
    losses_TK[torch.arange(len(losses_TK)), losses_TK.argmax(-1)] = torch.inf
    bids_TE = torch.zeros(len(losses_TK), int(experts_TK.max()) + 1).scatter(1, experts_TK, losses_TK)
    bids_GE = bids_TE.view(-1, tokens, bids_TE.shape[-1]).sum(1)
    bids = bids_GE[bids_GE > 0].sort(descending=True).values
    return float(bids[min(round(share * len(bids)), len(bids) - 1)])


def _threshold_table(layer: Any, level: float) -> DecisionTable:
    thresholds_LE = torch.full((1, layer.gate.weight.shape[0]), level)
    return DecisionTable(
        thresholds_LE=thresholds_LE, offset_LE=torch.zeros_like(thresholds_LE), label="a threshold"
    )


def _first_time(layer: Any, name: str, pool_TH: Tensor, tokens: int) -> float:
    """Seconds of a few forwards by an implementation, the best of three; infinite if it does not run."""
    layer.experts.config._experts_implementation = name
    inputs_NTH = pool_TH[: 4 * tokens].view(4, tokens, HIDDEN)
    try:
        return min([_take_turn(layer, _Routing(name, None), inputs_NTH) for _ in range(4)][1:])
    except (RuntimeError, NotImplementedError):  # not for this dtype on this machine
        return float("inf")


def _take_turn(layer: Any, routing: _Routing, inputs_NTH: Tensor) -> float:
    """Seconds of N forwards."""
    with routing.integration or nullcontext():
        start = time.perf_counter()
        for tokens_TH in inputs_NTH:
            layer(tokens_TH.unsqueeze(1))
        return time.perf_counter() - start


def _count(layer: Any, routing: _Routing, inputs: Tensor) -> None:
    """Experts per token and distinct experts of some forwards, inputs [N, T, 1, H]."""
    held: list[Tensor] = []

    def watch(router: Any, context: Any, decision: Any, logits_TE: Tensor) -> None:
        held.append(decision.own_experts_TK.masked_fill(decision.dropped_TK, -1))

    integration = routing.integration
    if integration is None:
        held += [layer.gate(x.flatten(0, 1))[2] for x in inputs]
    else:
        integration.watchers.append(watch)
        with integration:
            for x in inputs:
                layer(x)
        integration.watchers.remove(watch)
    for experts_TK in held:
        kept = experts_TK[experts_TK >= 0]
        routing.experts.append(kept.numel() / len(experts_TK))
        routing.loads.append(kept.unique().numel())
