"""Where vLLM is hooked. Importing this imports no vLLM; `register` is the entry point ``vllm.general_plugins``.

Places, each of which does nothing for an engine that is not configured:

- ``EngineArgs.create_engine_config``, in the process that a person starts: the configuration is checked where its
  error is seen, its digest becomes part of the compile-cache key, and the workers get `worker.WorkerExtension`.
- ``MoERunner.__init__``, in every worker: the only place that knows the layer's name and its router, before weights
  are loaded and anything is compiled. Its router *instance* is wrapped.
- ``Worker.load_model``: the model is complete, so that missing layers and other weights can be refused, and the model
  runner is there, whose description of each step is read (`step`).
- ``InputProcessor.process_inputs`` in the front end and ``EngineCore.preprocess_add_request``: what a request asks for
  (`admission`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from ...errors import BHRoutingError, MissingDependencyError, UnsupportedModelError
from . import admission
from .checks import (
    check_compensation,
    check_engine,
    check_folder,
    check_monolithic,
    check_price,
    check_step,
    check_version,
    check_weights,
    logger,
    read_facts,
    step_obstacle,
)
from .levels import LevelBook, Resolver, Shedding
from .routing import ATTRIBUTE, EngineRouting, LayerRouting
from .settings import DIGEST_KEY, KEY, LOAD_KEY, Settings, read_settings
from .step import watch

EXTENSION = "bh_routing.engines.vllm.worker.WorkerExtension"
REFUSED = "bh-routing refuses to start: "  # in front of the one sentence that says why
MARK = "__bh_routing__"


def register() -> None:
    """Hook vLLM once in this process; does nothing to an engine that is not configured."""
    from vllm.engine.arg_utils import EngineArgs

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    try:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
        from vllm.v1.worker.gpu_worker import Worker
    except ImportError:
        return  # another vLLM: said by `prepare`, and only where somebody configures the routing
    _wrap(Worker, "load_model", _load_model)
    _wrap(MoERunner, "__init__", _init_runner)
    if "vllm.v1.engine.core" in sys.modules:  # the engine's own process
        hook_requests()


def hook_requests(config: Any = None) -> None:
    """Hook what a request passes: the front end that checks it, and the engine that it is added to.

    Raises
    ------
    MissingDependencyError
        If this vLLM has no such place, and the engine of this configuration is to be routed.
    """
    try:
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.engine.input_processor import InputProcessor

        _wrap(InputProcessor, "process_inputs", admission.process_inputs)
        if config is not None:  # a front end
            from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
            from vllm.entrypoints.openai.completion.protocol import CompletionRequest
            from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

            for kind in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
                _wrap(kind, "to_sampling_params", admission.to_sampling_params)
            admission.serve(config)
        _wrap(EngineCore, "preprocess_add_request", admission.preprocess_add_request)
        _wrap(EngineCore, "collective_rpc", admission.collective_rpc)
    except (ImportError, AttributeError) as error:
        if config is not None and read_settings(config.additional_config) is not None:
            raise MissingDependencyError(
                f"this vLLM does not have what a request's level is read from: {error}; install one that bh-routing was "
                "tested with."
            ) from error


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by ``around(original, self, *args, **kwargs)``, once."""
    original = getattr(owner, name)
    if hasattr(original, MARK):
        return

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(method, MARK, True)
    setattr(owner, name, method)


def _create_engine_config(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    config = original(self, *args, **kwargs)
    _told(prepare, config)
    _told(hook_requests, config)
    return config


def _init_runner(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    from vllm.config import get_current_vllm_config

    _told(attach, self, get_current_vllm_config())


def _load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    _told(finish, self.vllm_config, self.get_model(), torch.device(self.device), self.model_runner)


def _told(step: Callable[..., None], *args: Any) -> None:
    """Run a step; what it refuses is logged as one line, because workers bury exceptions in tracebacks."""
    try:
        step(*args)
    except BHRoutingError as error:
        logger.error("%s%s", REFUSED, " ".join(str(error).split()))
        raise


# ------------------------------------------------------------------------------------- the three steps


def prepare(config: Any) -> None:
    """Check an engine's configuration and write digest and worker extension into it.

    Raises
    ------
    BHRoutingError
        For settings or a calibration file that cannot be used, or an engine that is not supported.
    """
    settings = read_settings(config.additional_config)
    if settings is None:
        return
    check_version()
    check_engine(config)
    check_folder(settings, config.model_config.model)
    if settings.priced:
        check_price(config)
    EngineRouting(settings)  # loads, solves the budget; made anew in each worker
    _write(config, settings)
    if settings.phases is not None:
        check_step(config, "phases")
        if config.cache_config.enable_prefix_caching:
            logger.warning(
                "bh-routing: the prefix cache is off: with phases, keys and values of generated tokens are not those "
                "that the same tokens have in a prompt."
            )
            config.cache_config.enable_prefix_caching = False
    if settings.under_load is not None:
        check_step(config, "under_load")
        assert isinstance(settings.experts_per_token, (int, float))
        resolver, budgets = (
            Resolver(settings),
            Shedding.budgets(settings.experts_per_token, settings.under_load),
        )
        solved = [resolver.resolve({"experts_per_token": budget}, "load").to_value() for budget in budgets]
        config.additional_config[LOAD_KEY] = solved
    parallel = config.parallel_config
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = EXTENSION
    elif parallel.worker_extension_cls != EXTENSION:
        logger.warning(
            "bh-routing: the worker extension %s stays; derive it from %s to read statistics.",
            parallel.worker_extension_cls,
            EXTENSION,
        )


def _write(config: Any, settings: Settings) -> None:
    """Put settings and digest into the engine's configuration, whose hash is the compile-cache key."""
    old = dict(config.additional_config or {})
    config.additional_config = old | {KEY: settings.to_dict(), DIGEST_KEY: settings.digest()}


def attach(runner: Any, config: Any) -> None:
    """Wrap the router of one MoE runner, where the engine is configured.

    Raises
    ------
    UnsupportedModelError, CalibrationMismatchError
        If it cannot be routed, naming the layer.
    """
    settings = read_settings(config.additional_config)
    if settings is None:
        return
    check_engine(config)
    if settings.priced:
        check_price(config)
    from . import ops

    engine = engine_of(config)
    if engine is None:
        engine = EngineRouting(settings)
        if DIGEST_KEY not in (config.additional_config or {}):  # an engine that was made without EngineArgs
            _write(config, settings)
    facts = read_facts(runner)
    if engine.compensates and settings.mode == "patch":
        check_compensation(runner)
    layer = engine.add(facts)
    if layer is None:
        logger.info("bh-routing: %s stays as it is: the calibration left it out", facts.name)
        return
    setattr(runner, ATTRIBUTE, layer)
    runner.router._compute_routing = ops.RouteCall(runner.router._compute_routing, facts.name)
    if engine.compensates and settings.mode == "patch":
        runner.forward = ops.CompensatedForward(runner.forward, facts.name)


def finish(config: Any, model: torch.nn.Module, device: torch.device, model_runner: Any = None) -> None:
    """Bind the routing to a loaded model, or refuse it.

    Raises
    ------
    UnsupportedModelError, CalibrationMismatchError, MissingDependencyError
        If a layer is not routed, the calibration is of another model, or the model runner does not describe its steps.
    """
    settings = read_settings(config.additional_config)
    if settings is None:
        return
    engine = engine_of(config)
    partial = config.parallel_config.pipeline_parallel_size > 1
    if engine is None:
        if partial:
            return
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Mixture-of-Experts layer that vLLM runs by a MoERunner: expected at least "
            "one, got none; serve it without BH routing."
        )
    for name, runner in runners_of(config).items():
        check_monolithic(runner)
        if layer_of(runner) is None and name not in engine.left_out:
            raise UnsupportedModelError(
                f"layer {name} of {type(model).__name__} is not routed; please report it."
            )
    if not partial:
        engine.check_complete()
    modules = dict(model.named_modules())
    for layer in engine.layers:
        layer.weigh(modules.get(layer.facts.name))
    engine.bind(device, 0 if step_obstacle(config) else config.scheduler_config.max_num_seqs)
    engine.book = None if engine.levels is None else LevelBook(engine.levels)
    engine.step = watch(model_runner, device, engine.book)
    for layer in engine.layers:
        check_weights(engine, layer, model, device)
    if engine.calibration is not None:
        logger.info(
            "bh-routing: routers were compared with the calibration's; experts, which are packed, were not."
        )
    ragged = [_make_ragged(runner) for runner in runners_of(config).values() if layer_of(runner) is not None]
    for layer in engine.layers:
        logger.info(
            "bh-routing: %s: %s -> BH routing of %s (%d of %d experts before)",
            layer.facts.name,
            layer.facts.router,
            layer.context.path,
            layer.facts.top_k,
            layer.facts.num_experts,
        )
    logger.info(
        "bh-routing: %d of %d MoE layers routed: %s%s",
        len(engine.layers),
        len(runners_of(config)),
        engine.describe(),
        "; unused slots are not computed" if all(ragged) else "; unused slots have weight 0",
    )


# ----------------------------------------------------------------------------------------- what vLLM says


def runners_of(config: Any) -> dict[str, Any]:
    """The MoE runners of an engine in this process, by layer name."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

    layers = config.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(layer, MoERunnerInterface)}


def layer_of(runner: Any) -> LayerRouting | None:
    """What was attached to a runner."""
    return getattr(runner, ATTRIBUTE, None)


def engine_of(config: Any) -> EngineRouting | None:
    """The routing of an engine in this process; None before its first layer."""
    found = (layer_of(runner) for runner in runners_of(config).values())
    return next((layer.engine for layer in found if layer is not None), None)


def _make_ragged(runner: Any) -> bool:
    """Let the CPU's experts compute kept pairs only, where asked for and possible."""
    from . import ops

    layer = layer_of(runner)
    assert layer is not None
    settings = layer.engine.settings
    if not settings.ragged or settings.mode != "patch" or layer.context.device.type != "cpu":
        return False
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = runner._quant_method.moe_kernel
    experts = None if kernel is None else kernel.fused_experts
    if not isinstance(experts, CPUUnquantizedExperts) or experts._use_zentorch:
        logger.warning(
            "bh-routing: %s: %s computes unused slots, too; only CPUUnquantizedExperts can leave them out.",
            layer.facts.name,
            type(experts).__name__,
        )
        return False
    experts.apply = ops.RaggedApply(experts, layer.facts.name)
    return True
