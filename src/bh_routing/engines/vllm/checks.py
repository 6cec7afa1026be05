"""What cannot be served is refused at start-up, in one sentence. No vLLM is imported before `check_version`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ...calibration.fingerprint import fingerprint, weights_differ
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


def check_step(config: Any, what: str) -> None:
    """Refuse what needs each token's request (`step`) where a layer does not see the step's tokens, in their order.

    Parameters
    ----------
    config : vllm.config.VllmConfig
    what : str
        Who asks, the subject of the sentence.
    """
    parallel = config.parallel_config
    obstacles = {
        "the tokens of several ranks are gathered (data parallelism)": parallel.data_parallel_size > 1,
        "a prompt is split over ranks (context parallelism)": parallel.prefill_context_parallel_size > 1,
        "ranks share the tokens of a step (sequence parallelism)": parallel.use_sequence_parallel_moe,
        "two batches run at a time (dual batch overlap)": parallel.use_ubatching,
    }
    for obstacle, there in obstacles.items():
        if there:
            raise UnsupportedModelError(
                f"{what} needs to know each token's request, but here {obstacle}; start without."
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
    """Compare the fingerprint of a router's weights with the calibration's."""
    calibration = engine.calibration
    if calibration is None:
        return
    gate = _gate(model, layer, device)
    if gate is None:
        logger.warning(
            "bh-routing: the weights of the router of %s were not found; whether they are those that were "
            "calibrated is not known.",
            layer.facts.name,
        )
        return
    wrong = weights_differ(
        calibration, layer.context.index, fingerprint(gate), layer.facts.name, 'configure "strict": false'
    )
    if wrong is not None and engine.settings.strict:
        raise CalibrationMismatchError(wrong)
    if wrong is not None:
        logger.warning("bh-routing: %s", wrong)


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
    # detach: where oneDNN cannot pack them, they are still a parameter class of vLLM's, which no parameter is made of
    held.weight = torch.nn.Parameter(weight_EH.detach(), requires_grad=False)
    return held
