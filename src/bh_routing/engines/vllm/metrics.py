"""The routing's figures on the server's ``/metrics``, for Prometheus: through the client library that vLLM has.

`Metrics` is middleware of vLLM's server, ``--middleware bh_routing.engines.vllm.metrics.Metrics`` (which `bh-routing serve`
gives): when somebody reads ``/metrics`` it asks the workers what they have counted, and answers with that among vLLM's own
figures. It reads only; whoever may read vLLM's figures may read these.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from .phases import PHASES

logger = logging.getLogger("vllm.bh_routing")

TIMEOUT = 5.0  # seconds; a busy engine answers between two steps. Afterwards the figures are those of before.
_COUNTERS = {
    "decisions": "(token, layer) pairs that were routed",
    "experts": "Experts that they ran; over decisions: experts per token",
    "floor": "Of the decisions, those where min_k kept more experts than were called for",
    "ceiling": "Of the decisions, those where max_k kept fewer experts than were called for",
    "steps": "(forward, layer) pairs with tokens of that phase",
    "loads": "Distinct experts that those tokens ran; over steps: loads per layer and step",
}


class Collector:
    """A collector of `prometheus_client`: the answer that was held last, as metric families.

    ========================================= ============================================================
    bh_routing_<name>_total{phase}            the sums of `phases.PhaseCounts`, phase "prefill" or "decode"
    bh_routing_requests_total{why, level}     requests that began: why "default", "own" or "load"
    bh_routing_level{kind}                    the default's level in use: kind "alpha" and "experts_per_token"
    ========================================= ============================================================
    """

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        answers = [x for x in self.answers if "phases" in x]
        if not answers:
            return
        # Ranks of one tensor-parallel group say the same; stages of a pipeline speak for their own layers.
        stages = list({tuple(answer["layers"]): answer for answer in answers}.values())
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(f"bh_routing_{name}", text, labels=["phase"])
            for phase in PHASES:
                family.add_metric([phase], sum(stage["phases"][phase][name] for stage in stages))
            yield family
        requests = CounterMetricFamily("bh_routing_requests", "Requests that began", labels=["why", "level"])
        for why, counts in stages[0]["requests"].items():
            for level, count in counts.items():
                requests.add_metric([why, level], count)
        yield requests
        level = GaugeMetricFamily("bh_routing_level", "The default's level in use", labels=["kind"])
        for kind in ("alpha", "experts_per_token"):
            if isinstance(value := stages[0][kind], (int, float)):
                level.add_metric([kind], value)
        yield level


class Metrics:
    """ASGI middleware: asks the workers before ``/metrics`` is answered, and leaves every other request alone."""

    def __init__(self, app: Any) -> None:
        from prometheus_client import REGISTRY

        self.app, self.collector = app, Collector()
        REGISTRY.register(self.collector)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            client = scope["app"].state.engine_client
            try:
                asked = client.collective_rpc("bh_routing_metrics")
                self.collector.answers = await asyncio.wait_for(asked, TIMEOUT)
            except Exception as error:  # the engine's own figures are read all the same
                logger.warning("bh-routing: the workers did not say what they counted: %r", error)
        await self.app(scope, receive, send)
