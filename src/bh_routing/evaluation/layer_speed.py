"""Time one MoE layer of OLMoE-1B-7B's shape, with random weights, under its own top-8 and with fewer experts.

On a model whose experts are tiny, deciding costs what skipping saves. Here experts are as large as people run them: one
is 12.6 MB in bfloat16, no cache holds what a token reads, and the layer takes the time of reading.

Shape legend: T tokens of one forward, H hidden, E experts, K slots per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from ..decision.table import DecisionTable
from ..integration import RoutingIntegration
from ..policies import TablePolicy
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
    experts : float
        Per token, realised.
    seconds : tuple of float
        Per forward, one a round; rounds of all routings are paired.
    ratio : float
        Median over rounds of the time as a share of the own routing's.
    """

    label: str
    tokens: int
    experts: float
    seconds: tuple[float, ...]
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """The figures, with the median of the times."""
        return {
            "label": self.label,
            "tokens": self.tokens,
            "experts": self.experts,
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


@dataclass
class _Routing:
    label: str
    integration: RoutingIntegration | None
    seconds: list[float] = field(default_factory=list)
    experts: list[float] = field(default_factory=list)


@torch.inference_mode()
def measure_layer(
    layer: Any,
    means: Sequence[float] = (4.0, 2.0),
    *,
    seconds: float = 6.0,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> list[LayerTime]:
    """One token at a time: the layer as transformers runs it (in its fastest way), and at mean numbers of experts.

    A threshold on the router's log probability keeps the mean number; every decision is made, and counted, as on a
    model. The routings take turns over the same tokens, which are new in every round.

    Parameters
    ----------
    layer : nn.Module
        `make_layer`. It is left as it was.
    seconds : float
        About how long to measure, after a round of warm-up; at least five rounds.
    step : callable
        Called after every round.
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
    try:
        config._experts_implementation = min(STOCK, key=lambda name: _first_time(layer, name, pool_TH))
        start, turn = time.perf_counter(), 0
        while turn < 6 or time.perf_counter() - start < seconds:
            rows = torch.randint(len(pool_TH), (STEPS,), generator=generator)
            for place in range(len(routings)):
                _take_turn(layer, routings[(turn + place) % len(routings)], pool_TH[rows], warm=turn > 0)
            step()
            turn += 1
    finally:
        config._experts_implementation = before
    own = routings[0]
    return [
        LayerTime(
            label=routing.label,
            tokens=1,
            experts=fmean(routing.experts),
            seconds=tuple(routing.seconds),
            ratio=paired_ratio(routing.seconds, own.seconds),
        )
        for routing in routings
    ]


def _threshold_table(layer: Any, level: float) -> DecisionTable:
    thresholds_LE = torch.full((1, layer.gate.weight.shape[0]), level)
    return DecisionTable(
        thresholds_LE=thresholds_LE, offset_LE=torch.zeros_like(thresholds_LE), label="a threshold"
    )


def _first_time(layer: Any, name: str, pool_TH: Tensor) -> float:
    """Seconds of a few forwards of one token by an implementation, the best of three; infinite if it does not run."""
    layer.experts.config._experts_implementation = name
    times = []
    try:
        for turn in range(4):
            start = time.perf_counter()
            for row in range(4):
                layer(pool_TH[4 * turn + row][None, None])
            times.append(time.perf_counter() - start)
    except (RuntimeError, NotImplementedError):  # not for this dtype on this machine
        return float("inf")
    return min(times[1:])


def _take_turn(layer: Any, routing: _Routing, tokens_TH: Tensor, *, warm: bool) -> None:
    integration = routing.integration
    if integration is not None:
        integration.reset_stats()
        integration.patch_model()
    try:
        start = time.perf_counter()
        for token_H in tokens_TH:
            layer(token_H[None, None])
        elapsed = time.perf_counter() - start
    finally:
        if integration is not None:
            integration.unpatch_model()
    if warm:
        routing.seconds.append(elapsed / len(tokens_TH))
        counted = TOP_K if integration is None else integration.telemetry.mean_experts_per_token
        routing.experts.append(float(counted))
