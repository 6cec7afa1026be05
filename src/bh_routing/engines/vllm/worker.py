"""What `collective_rpc` calls on every worker of an engine. vLLM mixes the class into its own worker."""

from __future__ import annotations

from typing import Any

from ...errors import BHRoutingError
from .plugin import engine_of, runners_of


class WorkerExtension:
    """Statistics and level of a running engine, one answer per worker.

    Tensor-parallel workers all see all tokens and answer the same; pipeline-parallel ones answer for their layers. An
    answer is a dictionary of values that JSON knows; ``rank`` is the worker's. What cannot be done is said under
    ``error`` and changes nothing: an exception would end the engine's other requests.
    """

    vllm_config: Any
    rank: int

    def bh_routing_stats(self) -> dict[str, Any]:
        """What was routed: `bh_routing.engines.vllm.routing.EngineRouting.stats`, ``rank``, ``moe_layers``."""
        engine = engine_of(self.vllm_config)
        if engine is None:
            return _not_configured(self.rank)
        return {"rank": self.rank, "moe_layers": len(runners_of(self.vllm_config))} | engine.stats()

    def bh_routing_metrics(self) -> dict[str, Any]:
        """What `metrics.Collector` tells: the sums by phase, requests by level, and the level in use."""
        engine = engine_of(self.vllm_config)
        return {} if engine is None else engine.metrics()

    def bh_routing_reset(self) -> dict[str, Any]:
        """Set all statistics to zero."""
        engine = engine_of(self.vllm_config)
        if engine is None:
            return _not_configured(self.rank)
        engine.reset()
        return {"rank": self.rank, "reset": True}

    def bh_routing_set(self, **level: Any) -> dict[str, Any]:
        """Another ``alpha``, ``experts_per_token``, ``max_kl``, ``agreement``, ``distinct_experts`` or ``price_load`` from the next step on; answers with what is in use then."""
        engine = engine_of(self.vllm_config)
        if engine is None:
            return _not_configured(self.rank)
        try:
            engine.set_level(**level)
        except BHRoutingError as error:
            return {"rank": self.rank, "error": str(error), "alpha": engine.alpha}
        return {"rank": self.rank, "alpha": engine.alpha, "experts_per_token": engine.budget}


def _not_configured(rank: int) -> dict[str, Any]:
    return {"rank": rank, "error": "BH routing is not configured in this engine.", "layers": []}
