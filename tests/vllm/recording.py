"""A worker extension for tests: what the routing operation of the first layer saw of each step."""

from __future__ import annotations

from typing import Any

from bh_routing.engines.vllm.plugin import engine_of
from bh_routing.engines.vllm.worker import WorkerExtension


class Recording(WorkerExtension):
    def record(self) -> None:
        """Record from now on: requests and phases of the tokens, as the operation reads them."""
        engine = engine_of(self.vllm_config)
        layer, step = engine.layers[0], engine.step
        inner = layer.route
        self.recorded: list[dict[str, Any]] = []

        def route(logits_TE: Any, *args: Any, count: bool) -> Any:
            request_T, phase_T, _ = step.at(len(logits_TE))
            if count:
                self.recorded.append(
                    {
                        "requests": [step.requests[i] for i in request_T.tolist()],
                        "phases": phase_T.tolist(),
                        "decoding": step.decoding,
                        "tokens": step.tokens,
                    }
                )
            return inner(logits_TE, *args, count=count)

        layer.route = route

    def recordings(self) -> list[dict[str, Any]]:
        return self.recorded
