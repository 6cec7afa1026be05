"""Where vLLM is hooked. Importing this imports no vLLM; `register` is the entry point ``vllm.general_plugins``.

Three places, each of which does nothing for an engine that is not configured:

- ``EngineArgs.create_engine_config``, in the process that a person starts: the configuration is checked where its
  error is seen, its digest becomes part of the compile-cache key, and the workers get `worker.WorkerExtension`.
- ``MoERunner.__init__``, in every worker: the only place that knows the layer's name and its router, before weights
  are loaded and anything is compiled. Its router *instance* is wrapped.
- ``Worker.load_model``: the model is complete, so that missing layers and other weights can be refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ...errors import (
    BHRoutingError,
    CalibrationMismatchError,
    MissingDependencyError,
    UnsupportedModelError,
)
from .routing import EngineRouting, LayerFacts, LayerRouting
from .settings import DIGEST_KEY, KEY, Settings, read_settings

logger = logging.getLogger("vllm.bh_routing")  # below vLLM's own, so that its handlers print it

EXTENSION = "bh_routing.integrations.vllm.worker.WorkerExtension"
TESTED = "0.32"
REFUSED = "bh-routing refuses to start: "  # in front of the one sentence that says why
MARK = "__bh_routing__"


def register() -> None:
    """Hook vLLM once in this process; does nothing to an engine that is not configured."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_worker import Worker

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(Worker, "load_model", _load_model)
    try:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    except ImportError:
        return  # said by `prepare`, where somebody configures it
    _wrap(MoERunner, "__init__", _init_runner)


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
    return config


def _init_runner(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    from vllm.config import get_current_vllm_config

    _told(attach, self, get_current_vllm_config())


def _load_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    _told(finish, self.vllm_config, self.get_model(), torch.device(self.device))


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
    _check_version()
    _check_engine(config)
    _check_folder(settings, config.model_config.model)
    EngineRouting(settings)  # loads, solves the budget; made anew in each worker
    _write(config, settings)
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


def _check_version() -> None:
    try:
        import vllm
        from vllm.model_executor.layers.fused_moe.runner import moe_runner  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"bh-routing needs a vLLM with a MoERunner (tested: {TESTED}), got {vllm.__version__}: {error}; "
            "install that version."
        ) from error
    if not vllm.__version__.startswith(f"{TESTED}."):
        logger.warning("bh-routing was tested with vLLM %s, this is %s.", TESTED, vllm.__version__)


def _check_folder(settings: Settings, model: str) -> None:
    """vLLM reads every .safetensors file of a model's folder as weights, unless an index names them."""
    if settings.calibration is None:
        return
    folder = Path(settings.calibration).resolve().parent
    if folder == Path(model).resolve() and not (folder / "model.safetensors.index.json").is_file():
        raise CalibrationMismatchError(
            f"the calibration {settings.calibration} lies in the model's folder, where vLLM would read it as weights: "
            "expected it elsewhere; move it."
        )


def _check_engine(config: Any) -> None:
    if config.parallel_config.enable_eplb:
        raise UnsupportedModelError(
            "expert-parallel load balancing (enable_eplb) has not been tested with BH routing: expected it off, got "
            "it on; start without --enable-eplb."
        )


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
    _check_engine(config)
    from . import ops

    engine = engine_of(config)
    if engine is None:
        engine = EngineRouting(settings)
        if DIGEST_KEY not in (config.additional_config or {}):  # an engine that was made without EngineArgs
            _write(config, settings)
    facts = read_facts(runner)
    if engine.compensates and settings.mode == "patch":
        _check_compensation(runner)
    layer = engine.add(facts)
    if layer is None:
        logger.info("bh-routing: %s stays as it is: the calibration left it out", facts.name)
        return
    setattr(runner, ops.ATTRIBUTE, layer)
    runner.router._compute_routing = ops.RouteCall(runner.router._compute_routing, facts.name)
    if engine.compensates and settings.mode == "patch":
        runner.forward = ops.CompensatedForward(runner.forward, facts.name)


def finish(config: Any, model: torch.nn.Module, device: torch.device) -> None:
    """Bind the routing to a loaded model, or refuse it.

    Raises
    ------
    UnsupportedModelError, CalibrationMismatchError
        If a layer is not routed, or the calibration is of another model.
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
        _check_monolithic(runner)
        if layer_of(runner) is None and name not in engine.left_out:
            raise UnsupportedModelError(
                f"layer {name} of {type(model).__name__} is not routed; please report it."
            )
    if not partial:
        engine.check_complete()
    engine.bind(device)
    for layer in engine.layers:
        _check_weights(engine, layer, model, device)
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
    return getattr(runner, "bh_routing", None)


def engine_of(config: Any) -> EngineRouting | None:
    """The routing of an engine in this process; None before its first layer."""
    found = (layer_of(runner) for runner in runners_of(config).values())
    return next((layer.engine for layer in found if layer is not None), None)


def read_facts(runner: Any) -> LayerFacts:
    """What a runner says about its router.

    Raises
    ------
    UnsupportedModelError
        For routers whose choice does not follow from the logits alone, and for kernels that route by themselves.
    """
    router, name = runner.router, runner.layer_name
    _check_monolithic(runner)
    kind = type(router).__name__
    custom = getattr(router, "custom_routing_function", None)
    if not hasattr(router, "_compute_routing") or kind in ("RoutingSimulatorRouter", "ZeroExpertRouter"):
        raise UnsupportedModelError(f"layer {name}: routers of the class {kind} are not supported.")
    if custom is not None:
        raise UnsupportedModelError(
            f"layer {name}: its router calls a function of the model ({getattr(custom, '__name__', custom)}), whose "
            "scores are not known; models with a custom routing function are not supported."
        )
    if getattr(router, "_hash_indices_table", None) is not None:
        raise UnsupportedModelError(f"layer {name} routes by token id, not by logits; it is not supported.")
    return LayerFacts(
        name=name,
        router=kind,
        num_experts=runner.moe_config.num_logical_experts,
        top_k=router.top_k,
        score=getattr(router, "scoring_func", None),
        renormalize=bool(getattr(router, "renormalize", False)),
        hidden_size=runner.moe_config.hidden_dim_unpadded or runner.moe_config.hidden_dim,
        dtype=runner.moe_config.in_dtype,
    )


def _check_monolithic(runner: Any) -> None:
    if runner.is_monolithic:
        raise UnsupportedModelError(
            f"layer {runner.layer_name}: its kernel ({type(runner._quant_method).__name__}) routes by itself, so that "
            "nothing can be decided in between; choose another MoE backend."
        )


def _check_compensation(runner: Any) -> None:
    """Refuse what comes between the experts' output and the runner's."""
    moe = runner.moe_config
    obstacles = {
        "scales the experts' output": runner.routed_scaling_factor != 1.0,
        "transforms the experts' input or output": runner.routed_input_transform is not None
        or runner.routed_output_transform is not None,
        "leaves its output to be reduced later": moe.skip_final_all_reduce or moe.is_sequence_parallel,
        "gathers the tokens of several ranks": moe.dp_size > 1 or moe.pcp_size > 1,
        "runs two batches at a time": bool(runner.enable_dbo),
    }
    for what, there in obstacles.items():
        if there:
            raise UnsupportedModelError(
                f"layer {runner.layer_name} {what}, where the compensation of dropped experts cannot be added: "
                'configure "compensation": false.'
            )


def _check_weights(
    engine: EngineRouting, layer: LayerRouting, model: torch.nn.Module, device: torch.device
) -> None:
    """Compare the fingerprint of a router's weights with the calibration's."""
    calibration = engine.calibration
    if calibration is None:
        return
    from ...calibration_file import TOLERANCE, fingerprint

    gate = _gate(model, layer, device)
    if gate is None:
        logger.warning(
            "bh-routing: the weights of the router of %s were not found; whether they are those that were "
            "calibrated is not known.",
            layer.facts.name,
        )
        return
    expected_D = calibration.fingerprint_LD[layer.context.index]
    distance = float((fingerprint(gate) - expected_D).norm() / expected_D.norm().clamp_min(1e-30))
    if distance <= TOLERANCE:
        return
    text = (
        f"the router weights of layer {layer.facts.name} differ from those that were calibrated (fingerprints "
        f"{distance:.2g} apart, at most {TOLERANCE:g} expected): this is another model or training state than "
        f'{calibration.model_id}; calibrate it, or configure "strict": false to use the calibration all the same.'
    )
    if engine.settings.strict:
        raise CalibrationMismatchError(text)
    logger.warning("bh-routing: %s", text)


def _gate(model: torch.nn.Module, layer: LayerRouting, device: torch.device) -> torch.nn.Module | None:
    """A router's weights [E, H] as a module; None where they cannot be had.

    The router is the module of its calibrated name beside the experts. Backends repack its weights, so that they are
    read off what it makes of unit vectors.
    """
    own = layer.context.path.rpartition(".")[2]
    parent = dict(model.named_modules()).get(layer.facts.name.rpartition(".")[0])
    gate = getattr(parent, own, None)
    if not isinstance(gate, torch.nn.Module):
        return None
    shape = (layer.facts.num_experts, layer.facts.hidden_size)
    held = torch.nn.Module()
    weight_EH = getattr(gate, "weight", None)
    if not isinstance(weight_EH, torch.Tensor) or weight_EH.shape != shape:
        try:
            logits = gate(torch.eye(layer.facts.hidden_size, dtype=layer.facts.dtype, device=device))
        except Exception:  # whatever it asks for besides hidden states: its weights stay unknown
            return None
        weight_EH = (logits[0] if isinstance(logits, tuple) else logits).T
        if weight_EH.shape != shape:
            return None
    held.weight = torch.nn.Parameter(weight_EH, requires_grad=False)
    return held


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
