"""What `route.c` is told, ctypes twins of its structs, and the callback that it is for one context.

Shape legend: E experts, K slots of the router's own choice, H hidden size, D router logits, Q regressors, J = E or 2E.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...decision.compensation import Compensation, LinearCompensation, MeanCompensation
from ...decision.types import TableSettings
from ...telemetry.counters import LayerCounters
from .compiled import LlamaCppError, compiled

MOST_EXPERTS, MOST_SLOTS = 512, 64  # route.c's
STATISTICS = {"logit": 0, "softmax": 1, "sigmoid": 2}
RULES = {"own": 0, "preserve": 1, "sum": 2}


class GgmlTensor(ctypes.Structure):
    """ggml's struct of a tensor, as in ggml 0.25; `bh_routing.engines.llama_cpp.checks.check_layout` verifies it."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * 10),
    ("view_src", ctypes.POINTER(GgmlTensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class CLayer(ctypes.Structure):
    """One layer; all pointers, into tensors that `CRouter` holds, but for the last two."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("threshold_E", "offset_E", "slope_ED", "center_D", "vectors_JH")
        ),
        *((name, ctypes.c_void_p) for name in ("low_D", "high_D", "mu_D", "whiten_DQ", "one_Q", "maps_EQH")),
        *((name, ctypes.c_void_p) for name in ("counts", "sums", "calls")),
        ("vectors", ctypes.c_int32),
        ("regressors", ctypes.c_int32),
    ]


class CConfig(ctypes.Structure):
    """One model."""

    _fields_ = [
        ("layer", ctypes.POINTER(CLayer)),
        ("temperature", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("layers", "experts", "slots", "hidden", "skip", "change")),
        *((name, ctypes.c_int32) for name in ("statistic", "step_down", "min_k", "max_k", "inside", "rule")),
        ("logits", ctypes.c_char * 32),
        ("weights", ctypes.c_char * 32),
    ]


def library(llama_version: str) -> ctypes.CDLL:
    """`route.c` with its functions typed; raises as `bh_routing.engines.llama_cpp.compiled.compiled` does."""
    lib = compiled(llama_version)
    pointer = ctypes.c_void_p
    lib.bh_new.argtypes, lib.bh_new.restype = [ctypes.POINTER(CConfig)], pointer
    lib.bh_free.argtypes, lib.bh_free.restype = [pointer], None
    lib.bh_end.argtypes, lib.bh_end.restype = [pointer, pointer], None
    lib.bh_pairs.argtypes, lib.bh_pairs.restype = [pointer, ctypes.c_bool], ctypes.c_int64
    lib.bh_decide.argtypes = [ctypes.POINTER(CConfig), ctypes.POINTER(CLayer), *[pointer] * 5]
    lib.bh_layout.argtypes = [pointer]
    lib.bh_hook_new.restype = pointer
    lib.bh_hook_set.argtypes, lib.bh_hook_set.restype = [pointer] * 3, None
    return lib


def layout(lib: ctypes.CDLL) -> list[int]:
    """`bh_layout`: sizes and offsets of the structs as the compiler laid them out."""
    out = (ctypes.c_int64 * 16)()
    return list(out[: lib.bh_layout(out)])


def own_layout() -> list[int]:
    """The same of the ctypes twins."""
    names = ("type", "ne", "nb", "op", "src", "view_src", "data", "name")
    offsets = [getattr(GgmlTensor, name).offset for name in names]
    return [
        ctypes.sizeof(GgmlTensor),
        *offsets,
        ctypes.sizeof(CLayer),
        ctypes.sizeof(CConfig),
        CConfig.logits.offset,
    ]


# ---------------------------------------------------------------------------------------------- the callback

_SENTENCES = {
    1: "layer {layer}: its router's logits were not seen before its weights (of {got} tokens, expected {expected})",
    2: "layer {layer}: a node has another shape than at start-up ({got}, expected {expected})",
    3: "layer {layer}: {got} nodes between weights and their product, at most {expected} expected",
    4: "layer {layer}: no memory for {got} bytes",
}


@dataclass(frozen=True, kw_only=True)
class LayerTables:
    """What decides in one layer; tensors on the CPU, whose memory is read during every decode.

    Attributes
    ----------
    row : tuple of Tensor
        Thresholds and offsets, float32 [E], and slopes [D, E] and center [D] where sizes follow the token.
    how : TableSettings
    compensation : Compensation or None
    counters : LayerCounters or None
        Counted into, in place.
    """

    row: tuple[Tensor, ...]
    how: TableSettings
    compensation: Compensation | None = None
    counters: LayerCounters | None = None


class CRouter:
    """The callback in C for one context. Keep it alive as long as the context.

    Parameters
    ----------
    lib : CDLL
    layers : mapping of block number to LayerTables
    experts, slots, hidden : int
    logits, weights : str
        Names of the nodes that hold the router's logits and its last weights, without the layer's number.
    skip : bool
        False: dropped experts are computed with weight 0, which saves nothing and is the reference.
    change : bool
        False: only count.
    """

    def __init__(
        self,
        lib: ctypes.CDLL,
        layers: dict[int, LayerTables],
        *,
        experts: int,
        slots: int,
        hidden: int,
        logits: str,
        weights: str,
        skip: bool = True,
        change: bool = True,
    ) -> None:
        self.lib = lib
        self.held: dict[int, list[Tensor]] = {}
        self.config = CConfig(layers=max(layers) + 1, experts=experts, slots=slots, hidden=hidden)
        self.layers = (CLayer * (max(layers) + 1))()
        self.config.layer = self.layers
        self.config.logits, self.config.weights = (
            name.removeprefix("ffn_moe_").encode() + b"-" for name in (logits, weights)
        )
        self.set_modes(skip=skip, change=change)
        self.load(layers)
        self.state = lib.bh_new(ctypes.byref(self.config))
        if not self.state:
            raise LlamaCppError("no memory for the routing's state")
        self.function = ctypes.cast(lib.bh_callback, ctypes.c_void_p).value or 0
        self.user = self.state
        self._error = (ctypes.c_int64 * 4)()

    def set_modes(self, *, skip: bool, change: bool) -> None:
        """What is done with dropped slots (the class's parameters), from the next decode on."""
        self.config.skip, self.config.change = int(skip), int(change)

    def load(self, layers: dict[int, LayerTables]) -> None:
        """Thresholds and all else that decides, from the next decode on."""
        held = {}
        for index, tables in layers.items():
            held[index] = _fill(self.layers[index], tables)
            _fill_config(self.config, tables.how)
        self.held = held  # what was held before is no longer pointed to

    def end(self) -> None:
        """After a decode: everything as it was; raises what went wrong in it."""
        self.lib.bh_end(self.state, self._error)
        code, layer, got, expected = self._error
        if code:
            sentence = _SENTENCES[code].format(layer=layer, got=got, expected=expected)
            raise LlamaCppError(f"{sentence}; nothing that this decode returned can be used.")

    def pairs(self, *, reset: bool = False) -> int:
        """(token, expert) pairs that were computed."""
        return int(self.lib.bh_pairs(self.state, reset))

    def decide(self, layer: int, logits_TE: Tensor, own_TK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The decision alone, token by token: counts_T, raw_counts_T, dropped_TK, fallback_T."""
        logits_TE, own_TK = logits_TE.float().contiguous(), own_TK.to(torch.int32).contiguous()
        dropped_TK = torch.zeros(own_TK.shape, dtype=torch.uint8)
        told_T3 = torch.zeros(len(own_TK), 3, dtype=torch.int32)
        config, one = ctypes.byref(self.config), ctypes.byref(self.layers[layer])
        rows = (x.data_ptr() for x in (logits_TE, own_TK, dropped_TK, told_T3))
        strides = (4 * logits_TE.shape[1], 4 * own_TK.shape[1], own_TK.shape[1], 12)
        logits, own, dropped, told = rows
        for token in range(len(own_TK)):
            at = [
                start + token * step
                for start, step in zip((logits, own, dropped, told), strides, strict=True)
            ]
            told_T3[token, 0] = self.lib.bh_decide(config, one, at[0], at[1], at[2], at[3] + 4, at[3] + 8)
        return told_T3[:, 0].long(), told_T3[:, 1].long(), dropped_TK.bool(), told_T3[:, 2].bool()

    def close(self) -> None:
        """Free the state; the context must be gone."""
        if self.state:
            self.lib.bh_free(self.state)
            self.state = None


def _fill_config(config: CConfig, how: TableSettings) -> None:
    config.temperature = how.temperature
    kind = "logit" if how.statistic == "logit" else how.score_func
    config.statistic = STATISTICS[kind]
    config.step_down, config.rule = int(how.rule == "step_down"), RULES[how.weights]
    most = MOST_SLOTS if how.limits.max_k is None else how.limits.max_k
    config.min_k, config.max_k, config.inside = how.limits.min_k, most, int(how.limits.clamp == "inside")


def _fill(layer: CLayer, tables: LayerTables) -> list[Tensor]:
    """Point a layer at its tensors; returns them."""
    held: list[Tensor] = []

    def at(tensor: Tensor | None, dtype: torch.dtype) -> Any:
        if tensor is None:
            return None
        held.append(tensor.detach().to("cpu", dtype).contiguous())
        return held[-1].data_ptr()

    thresholds_E, offset_E, *follows = tables.row
    layer.threshold_E, layer.offset_E = at(thresholds_E, torch.float32), at(offset_E, torch.float32)
    slope_DE, center_D = follows or (None, None)
    layer.slope_ED = at(None if slope_DE is None else slope_DE.T, torch.float64)
    layer.center_D = at(center_D, torch.float64)
    layer.vectors = layer.regressors = 0
    made = tables.compensation
    if isinstance(made, MeanCompensation):
        layer.vectors_JH = at(made.vectors_JH, torch.float32)
        layer.vectors = len(made.vectors_JH) // made.num_experts
    elif isinstance(made, LinearCompensation):
        for name in ("low_D", "high_D", "whiten_DQ", "one_Q"):
            setattr(layer, name, at(getattr(made, name), torch.float64))
        layer.mu_D = at(made.center_D, torch.float64)
        layer.maps_EQH = at(made.maps_EQH, torch.bfloat16)
        layer.regressors = made.one_Q.numel()
    layer.counts = layer.sums = layer.calls = None
    if tables.counters is not None:
        counters = tables.counters
        layer.counts, layer.sums = counters.counts.data_ptr(), counters.sums.data_ptr()
        layer.calls = counters.calls.data_ptr()
        held += [counters.counts, counters.sums, counters.calls]
    return held
