"""What happens to a request before it is scheduled: its level is checked, and keeps its keys and values to itself.

Hooks, each of which does nothing to a request that asks for nothing of an engine at rest:

- the front end, ``to_sampling_params`` of the server's requests and ``InputProcessor.process_inputs``: a level that cannot be served is the client's error, status 400 with
  one sentence; one that can be is solved (`levels.Resolver`).
- the engine, ``EngineCore.preprocess_add_request``: the level enters the salt of the prefix cache, because keys and values that
  were computed at one level are not those of another. ``EngineCore.collective_rpc``: after `bh_routing_set` the
  default's salt is another, too. With ``under_load`` it gives requests without a level one that follows the number of those
  that wait, when they come: each request has one level from its first token to its last.
"""

from __future__ import annotations

from typing import Any

from ...errors import BHRoutingError
from .checks import check_step
from .levels import Level, Resolver, Shedding
from .settings import KEY, LOAD_KEY, read_settings

_HELD = "_bh_routing"  # on vLLM's objects: what this module keeps for them


class Front:
    """The front end of one engine: what checks the levels of its requests."""

    def __init__(self, config: Any) -> None:
        weights = str(config.model_config.dtype).removeprefix("torch.")
        self.config, self.resolver = config, Resolver(read_settings(config.additional_config), weights)

    def check(self, params: Any) -> None:
        """Solve the level that a request's parameters ask for, once; what cannot be served is the client's error.

        Raises
        ------
        vllm.exceptions.VLLMValidationError
        """
        asked = getattr(params, "extra_args", None) or {}
        if not any(str(name).startswith(KEY) for name in asked) or Level.of(asked) is not None:
            return
        try:
            if self.resolver.settings is not None:
                check_step(self.config, "a request's own level")
            params.extra_args = self.resolver.admit(asked) or asked
        except BHRoutingError as error:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(" ".join(str(error).split())) from None


_served: list[Front] = []  # of this process's server, which has one engine


def serve(config: Any) -> None:
    """Check the levels of the server's requests for the engine of this configuration."""
    _served[:] = [Front(config)]


def to_sampling_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``to_sampling_params`` of the server's requests: before an answer begins, so that its status can be 400."""
    params = original(self, *args, **kwargs)
    for front in _served:
        front.check(params)
    return params


def process_inputs(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``InputProcessor.process_inputs``: requests that came in another way."""
    request = original(self, *args, **kwargs)
    if not hasattr(self, _HELD):
        setattr(self, _HELD, Front(self.vllm_config))
    getattr(self, _HELD).check(request.sampling_params)
    return request


class Engine:
    """What an engine's process keeps: how often its default level was changed, and what it sheds under load."""

    def __init__(self, core: Any) -> None:
        self.core, self.changes = core, 0
        solved = (core.vllm_config.additional_config or {}).get(LOAD_KEY)
        self.shedding = None if solved is None else Shedding([Level(**level) for level in solved])

    def waiting(self) -> int:
        """Requests that came and were not scheduled yet."""
        queue = getattr(self.core, "input_queue", None)
        waiting: int = self.core.scheduler.get_request_counts()[1]
        return waiting + (0 if queue is None else queue.qsize())

    def admit(self, request: Any) -> None:
        """Give the request a level, where load asks for it, and let only requests of the same level share keys and values."""
        params = request.sampling_params
        if params is None:
            return
        level = Level.of(params.extra_args)
        if level is None and self.shedding is not None:
            level = self.shedding.level(self.waiting())
            if level is not None:
                params.extra_args = (params.extra_args or {}) | {KEY: level.to_value()}
        if level is not None:
            mark = level.key
        elif self.changes:
            mark = f"change {self.changes}"
        else:
            return
        request.cache_salt = f"{request.cache_salt or ''}\n{KEY} {mark}"


def engine_of(core: Any) -> Engine:
    """What is kept for an engine."""
    if not hasattr(core, _HELD):
        setattr(core, _HELD, Engine(core))
    found: Engine = getattr(core, _HELD)
    return found


def preprocess_add_request(original: Any, self: Any, request: Any) -> Any:
    """Around ``EngineCore.preprocess_add_request``."""
    engine_of(self).admit(request)
    return original(self, request)


def collective_rpc(original: Any, self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``EngineCore.collective_rpc``."""
    answers = original(self, method, *args, **kwargs)
    if method == "bh_routing_set" and not any("error" in answer for answer in answers):
        engine_of(self).changes += 1
    return answers
