"""What cannot be served is refused at start-up, in one sentence. No vLLM is imported before `check_version`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ...calibration.fingerprint import by_weights, logits_differ, matrix_differs
from ...calibration.responses import inputs
from ...errors import CalibrationMismatchError, MissingDependencyError, UnsupportedModelError
from .routing import EngineRouting, LayerFacts, LayerRouting
from .settings import Settings

logger = logging.getLogger("vllm.bh_routing")  # below vLLM's own, so that its handlers print it

TESTED = "0.32"


def check_version() -> None:
    """A vLLM without the place to hook is refused, one that was not tested is warned about."""
    try:
        import vllm
        from vllm.model_executor.layers.fused_moe.runner import moe_runner  # noqa: F401
        from vllm.v1.worker import gpu_worker  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"bh-routing needs a vLLM with a MoERunner (tested: {TESTED}), got {vllm.__version__}: {error}; "
            "install that version."
        ) from error
    if not vllm.__version__.startswith(f"{TESTED}."):
        logger.warning("bh-routing was tested with vLLM %s, this is %s.", TESTED, vllm.__version__)


def check_folder(settings: Settings, model: str) -> None:
    """vLLM reads every .safetensors file of a model's folder as weights, unless an index names them."""
    if settings.calibration is None:
        return
    folder = Path(settings.calibration).resolve().parent
    if folder == Path(model).resolve() and not (folder / "model.safetensors.index.json").is_file():
        raise CalibrationMismatchError(
            f"the calibration {settings.calibration} lies in the model's folder, where vLLM would read it as weights: "
            "expected it elsewhere; move it."
        )


def check_engine(config: Any) -> None:
    """Refuse what changes the meaning of an expert's index."""
    if config.parallel_config.enable_eplb:
        raise UnsupportedModelError(
            "expert-parallel load balancing (enable_eplb) has not been tested with BH routing: expected it off, got "
            "it on; start without --enable-eplb."
        )


def step_obstacle(config: Any) -> str | None:
    """Why a layer does not see the tokens of a step (`step`), in their order; None where it does."""
    parallel = config.parallel_config
    obstacles = {
        "the tokens of several ranks are gathered (data parallelism)": parallel.data_parallel_size > 1,
        "a prompt is split over ranks (context parallelism)": parallel.prefill_context_parallel_size > 1,
        "ranks share the tokens of a step (sequence parallelism)": parallel.use_sequence_parallel_moe,
        "two batches run at a time (dual batch overlap)": parallel.use_ubatching,
    }
    return next((obstacle for obstacle, there in obstacles.items() if there), None)


def check_step(config: Any, what: str) -> None:
    """Refuse what needs each token's request where `step_obstacle` says why it cannot be had.

    Parameters
    ----------
    config : vllm.config.VllmConfig
    what : str
        Who asks, the subject of the sentence.
    """
    obstacle = step_obstacle(config)
    if obstacle is not None:
        raise UnsupportedModelError(
            f"{what} needs to know each token's request, but here {obstacle}; start without."
        )


def check_price(config: Any) -> None:
    """Refuse a price on loads where a step is not known, may not matter, or is recorded once for all.

    Raises
    ------
    UnsupportedModelError
    """
    from vllm import envs

    check_step(config, "a price on loads")
    if envs.VLLM_BATCH_INVARIANT:
        raise UnsupportedModelError(
            "a price on loads makes a token's output depend on the other sequences of its step, which vLLM's batch-invariant mode "
            "(VLLM_BATCH_INVARIANT) excludes; leave one of the two out."
        )
    device = config.device_config.device_type
    if device != "cpu" and not config.model_config.enforce_eager:
        raise UnsupportedModelError(
            f"a price on loads is solved for the number of sequences in a step, which a graph that was captured on {device} does not "
            "know; start with --enforce-eager."
        )


def read_facts(runner: Any) -> LayerFacts:
    """What a runner says about its router.

    Raises
    ------
    UnsupportedModelError
        For routers whose choice does not follow from the logits alone, and for kernels that route by themselves.
    """
    router, name = runner.router, runner.layer_name
    check_monolithic(runner)
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
        score_func=getattr(router, "scoring_func", None),
        renormalize=bool(getattr(router, "renormalize", False)),
        hidden_size=runner.moe_config.hidden_dim_unpadded or runner.moe_config.hidden_dim,
        dtype=runner.moe_config.in_dtype,
    )


def check_monolithic(runner: Any) -> None:
    """Refuse kernels that route by themselves."""
    if runner.is_monolithic:
        raise UnsupportedModelError(
            f"layer {runner.layer_name}: its kernel ({type(runner._quant_method).__name__}) routes by itself, so that "
            "nothing can be decided in between; choose another MoE backend."
        )


def check_compensation(runner: Any) -> None:
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


def check_weights(
    engine: EngineRouting, layer: LayerRouting, model: torch.nn.Module, device: torch.device
) -> None:
    """Compare a router with the calibration's fingerprint: what its gate answers to fixed inputs."""
    calibration = engine.calibration
    if calibration is None:
        return
    name, index, otherwise = layer.facts.name, layer.context.index, 'configure "strict": false'
    if by_weights(calibration):
        weight_EH = _ask(model, layer, torch.eye(layer.facts.hidden_size), device)
        wrong = (
            None if weight_EH is None else matrix_differs(calibration, index, weight_EH.T, name, otherwise)
        )
        known = weight_EH is not None
    else:
        logits_RE = _ask(model, layer, inputs(layer.facts.hidden_size), device)
        wrong = None if logits_RE is None else logits_differ(calibration, index, logits_RE, name, otherwise)
        known = logits_RE is not None
    if not known:
        logger.warning(
            "bh-routing: the router of %s was not found, or cannot be run by itself; whether it is the one that was "
            "calibrated is not known.",
            name,
        )
    if wrong is not None and engine.settings.strict:
        raise CalibrationMismatchError(wrong)
    if wrong is not None:
        logger.warning("bh-routing: %s", wrong)


def _ask(
    model: torch.nn.Module, layer: LayerRouting, x_NH: torch.Tensor, device: torch.device
) -> torch.Tensor | None:
    """What a router makes of some inputs, [N, E] float32 on the CPU; None where it cannot be had.

    The router is the module of its calibrated name beside the experts. Backends repack its weights, so that it is asked
    and not read; of unit vectors it makes its weights.
    """
    own = layer.context.path.rpartition(".")[2]
    parent = dict(model.named_modules()).get(layer.facts.name.rpartition(".")[0])
    gate = getattr(parent, own, None)
    if not isinstance(gate, torch.nn.Module):
        return None
    for dtype in dict.fromkeys((layer.facts.dtype, torch.float32)):
        try:
            with torch.no_grad():
                answer = gate(x_NH.to(device, dtype))
        except Exception:  # whatever it asks for besides hidden states
            continue
        logits_NE: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
        if logits_NE.shape == (len(x_NH), layer.facts.num_experts):
            return logits_NE.float().cpu()
    return None
