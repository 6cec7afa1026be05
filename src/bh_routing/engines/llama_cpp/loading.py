"""`route`: an ordinary `Llama` whose experts are chosen by this library, or one sentence that says why not.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...calibration.calibration import Calibration
from ...errors import ModelLoadError, UnsupportedModelError
from ...settings import RoutingSettings
from . import shim
from .callback import COST
from .compiled import LlamaCppError
from .ggml import TESTED, check_layout, injected, modules
from .hook import Hook
from .routing import LlamaRouting, check_settings, without_counting
from .structure import Structure, check_architecture, read_structure

logger = logging.getLogger("bh_routing")

NEAR = 0.1  # of the logits' standard deviation: what skipping may change over computing with weight 0, root mean square
PROBE = 8  # tokens


def route(
    cls: Callable[..., Any],
    *,
    model_path: str | os.PathLike[str],
    calibration: Calibration | str | os.PathLike[str],
    **arguments: Any,
) -> Any:
    """An ordinary ``llama_cpp.Llama`` with BH routing.

    Parameters
    ----------
    cls : type
        ``llama_cpp.Llama``, or a class of yours that derives from it.
    model_path : str or path
        A GGUF file of an architecture that was compared with transformers (docs/llama_cpp.md), on the CPU.
    calibration : Calibration, str or path
        Made by ``bh-routing calibrate``, in transformers or in llama.cpp, from any quantisation of this model.
    **arguments
        Fields of `bh_routing.RoutingSettings` (``experts_per_token=4``, ``alpha=``, ``mode=``, ...); all others are the
        class's own. ``skip="zero"`` computes dropped experts with weight 0: slower, to compare.

    Returns
    -------
    Llama
        With ``llm.routing``, a `LlamaRouting`: ``get_routing_stats()``, ``set_level(...)``, ``telemetry``.

    Raises
    ------
    MissingDependencyError
        Without llama-cpp-python.
    ModelLoadError
        If llama.cpp cannot load the file.
    UnsupportedModelError
        For an architecture, a device or a graph that was not compared with transformers.
    CalibrationError, BudgetError, InvalidParameterError
        For settings that cannot be served.

    Notes
    -----
    Checked before it is handed out, with a few tokens: the layout of ggml's structs, the order of the nodes, that all
    buffers are in this process's memory, that keeping every expert changes no bit of the logits, and that skipping
    dropped experts gives what computing them with weight 0 gives.
    """
    settings, own = split(arguments)
    if not isinstance(calibration, Calibration):
        calibration = Calibration.load(calibration)
    check_settings(settings, calibration)
    llm, hook, structure, routers = load(cls, str(model_path), own)
    try:
        routing = LlamaRouting(settings, calibration, structure, routers)
        routing.take_charge(hook)
        if isinstance(routing.router, shim.CRouter):
            _check_routing(llm, hook, routing, routing.router)
        llm._ctx.decode = routing.guard(llm._ctx.decode, hook)
    except BaseException:
        llm.close()
        raise
    llm.routing = routing
    return llm


def split(arguments: dict[str, Any]) -> tuple[RoutingSettings, dict[str, Any]]:
    """Routing settings, and what is the class's own."""
    names = {item.name for item in fields(RoutingSettings)}
    ours = {name: value for name, value in arguments.items() if name in names}
    return RoutingSettings(**ours), {name: v for name, v in arguments.items() if name not in names}


def load(
    cls: Callable[..., Any], path: str, arguments: dict[str, Any]
) -> tuple[Any, Hook, Structure, dict[int, list[Tensor]]]:
    """A `Llama` whose callback asks nobody yet, and what its graph looks like; raises as `route` does."""
    package, _ = modules()
    if package.__version__ not in TESTED:
        warnings.warn(
            f"bh-routing was tested with llama-cpp-python {', '.join(TESTED)}, this is {package.__version__}.",
            stacklevel=3,
        )
    if arguments.get("n_gpu_layers", 0) != 0:
        raise UnsupportedModelError(
            f"routing in llama.cpp runs on the CPU: expected n_gpu_layers=0, got {arguments['n_gpu_layers']}; leave it out."
        )
    if arguments.get("op_offload"):
        raise UnsupportedModelError(
            "routing in llama.cpp runs on the CPU: expected op_offload=False, got True; leave it out."
        )
    if not os.path.isfile(path):
        raise ModelLoadError(f"expected a GGUF file, got {path!r}, which does not exist; check the path.")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(
                f"expected a GGUF file, got {path!r}, which is none; llama.cpp's convert_hf_to_gguf.py makes one."
            )
    hook = Hook(_library(package.__version__))
    check_layout(hook.lib)
    with injected(hook.function, hook.user):
        try:
            llm = cls(model_path=path, **{"verbose": False, **arguments})
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ModelLoadError(f"llama.cpp cannot load {path}: {error}.") from error
    try:
        llm._bh_hook = hook  # as long as the context
        architecture = llm.metadata.get("general.architecture", "")
        check_architecture(architecture)
        structure, routers = read_structure(llm, hook, architecture)
    except BaseException:
        llm.close()
        raise
    return llm, hook, structure, routers


def _library(version: str) -> Any:
    """`route.c`, or None with a warning that says what that costs."""
    try:
        return shim.library(version)
    except LlamaCppError as error:
        warnings.warn(f"{error}: {COST}.", stacklevel=4)
        return None


# ------------------------------------------------------------------------------------------------ the probe


def _check_routing(llm: Any, hook: Hook, routing: LlamaRouting, router: shim.CRouter) -> None:
    """Compare logits of a few tokens: as the model is, with every expert kept, with half of them skipped, and zeroed."""
    slots = routing.structure.slots
    hook.to_nobody()
    plain = _probe(llm)
    hook.to_c(router.function, router.user)
    with _counting_nothing(routing, router):
        kept = _probe_at(llm, router, slots, skip=True)
        if not all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True)):
            raise UnsupportedModelError(
                "keeping every expert changed the model's logits, which must be the same bit for bit; this build of llama.cpp "
                "is not supported."
            )
        zeroed, skipped = (_probe_at(llm, router, max(1, slots // 2), skip=skip) for skip in (False, True))
    for a, b in zip(zeroed, skipped, strict=True):
        off = float((a - b).square().mean().sqrt() / a.std())
        if not off <= NEAR:
            raise UnsupportedModelError(
                f"skipping experts gives other logits than computing them with weight 0 ({off:.2g} of their standard "
                f"deviation apart, at most {NEAR} expected); this build of llama.cpp is not supported."
            )


@contextmanager
def _counting_nothing(routing: LlamaRouting, router: shim.CRouter) -> Iterator[None]:
    change, skip = routing.mode == "patch", routing.settings.skip != "zero"
    tables = routing.tables()
    router.load(without_counting(tables))
    try:
        yield
    finally:
        router.load(tables)
        router.set_modes(skip=skip, change=change)
        router.pairs(reset=True)


def _probe_at(llm: Any, router: shim.CRouter, count: int, *, skip: bool) -> list[Tensor]:
    router.set_modes(skip=skip, change=True)
    router.config.min_k = router.config.max_k = count
    try:
        return _probe(llm)
    finally:
        router.end()


def _probe(llm: Any) -> list[Tensor]:
    """Logits [V] after a few tokens, and after one more; the memory is empty again."""
    found, size = [], llm.n_vocab()
    tokens = [(7 * i + 1) % size for i in range(PROBE)]
    try:
        for batch, past in ((tokens, 0), ([tokens[0]], len(tokens))):
            llm._batch.set_batch(batch=batch, n_past=past, logits_all=False)
            llm._ctx.decode(llm._batch)
            row = llm._ctx.get_logits_ith(-1)
            found.append(torch.tensor(row[:size]))
    finally:
        llm._ctx.kv_cache_clear()
    return found
