"""A routing log: what the routers of a model said and chose for a sample of tokens.

Shape legend: N tokens, L routed layers, E experts, K slots of the router's own choice (-1 pads a narrower layer).

`RoutingLog` is what ``bh-routing record`` writes, what the analysis notebook reads, and what budgets are solved on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args

import torch
from torch import Tensor, nn

from .._files.checks import Check, listed, number, one_of, record, text, unique, whole
from .._files.tensors import FLOATS, INTEGERS, Expected, expected_of, read_tensors, write_tensors
from ..calibration.data import sound_choice
from ..decision.types import RouteNorm
from ..errors import InvalidInputError, RoutingLogError
from ..patching import make_plan, watch
from ..patching.instance import execution_device
from ..policies import RoutingContext
from ..stats.pvalues import at_least_float32
from ..stats.statistic import LOG_SCORES

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration

FORMAT, FORMAT_VERSION = "bh-routing record", 2  # the name that the command gave to its files
_LAYER: dict[str, Check] = {
    "path": text(4096),
    "index": whole(0, 1 << 12),
    "num_experts": whole(1, 1 << 15),
    "empty": whole(0, 1 << 15),
    "top_k": whole(1, 1 << 15),
    "route_norm": one_of(*get_args(RouteNorm)),
    "score_func": one_of(*LOG_SCORES),
    "route_scale": number(-1e6, 1e6),
}
_HEADER = record({"model_id": text(), "layers": listed(record(_LAYER), 1, 1 << 12)})
_NUMBERS = Expected(INTEGERS, 0.0, 2.0**63)


def _expect(header: Any, keys: Collection[str]) -> tuple[dict[str, Any], dict[str, Expected], dict[str, int]]:
    """The header checked, what every tensor must be, and the sizes that are known."""
    held: dict[str, Any] = _HEADER(header)
    layers = held["layers"]
    unique((layer["path"] for layer in layers), "the paths of the layers")
    for i, layer in enumerate(layers):
        if layer["index"] != i:
            raise ValueError(f"layers[{i}].index must be {i}, got {layer['index']}")
        if layer["top_k"] > layer["num_experts"]:
            raise ValueError(f"{layer['path']} chooses {layer['top_k']} of {layer['num_experts']} experts")
    sizes = {
        letter: max(layer[name] for layer in layers)
        for letter, name in (("E", "num_experts"), ("K", "top_k"))
    }
    expected = {_KEYS[name]: must for name, must in expected_of(RoutingLog).items()}
    lacking = {"tokens", "positions"} - set(keys)  # which a file need not hold
    return held, {k: v for k, v in expected.items() if k not in lacking}, sizes | {"L": len(layers)}


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingLog:
    """Router logits, choices and weights of a sample of tokens.

    Attributes
    ----------
    contexts : tuple of RoutingContext
        The routers, in order.
    logits_NLE : Tensor
        Router logits, float16 or wider; -inf where a layer has fewer experts than the widest.
    experts_NLK : Tensor
        int16 or int64, the model's own choice, -1 where a layer has fewer slots than the widest.
    weights_NLK : Tensor
        The model's own weights, 0 there.
    tokens_N, positions_N : Tensor or None
        Token ids, and positions within their window.
    model_id : str
    document_N : Tensor or None
        int64, which document each is from, where it comes from a calibration that knows; not saved.
    """

    contexts: tuple[RoutingContext, ...]
    logits_NLE: Annotated[Tensor, Expected(FLOATS, float("-inf"))]
    experts_NLK: Annotated[Tensor, Expected(INTEGERS, -1.0)]
    weights_NLK: Annotated[Tensor, Expected(FLOATS)]
    tokens_N: Annotated[Tensor | None, _NUMBERS] = None
    positions_N: Annotated[Tensor | None, _NUMBERS] = None
    model_id: str = ""
    document_N: Tensor | None = None

    @property
    def num(self) -> int:
        """Tokens, N."""
        return self.logits_NLE.shape[0]

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits float32 [N, E], own weights [N, K] and own experts int64 [N, K] of one layer."""
        top = self.contexts[index].top_k
        return (
            self.logits_NLE[:, index, : self.contexts[index].num_experts].float(),
            self.weights_NLK[:, index, :top].float(),
            self.experts_NLK[:, index, :top].long(),
        )

    def score_ratios(self) -> list[Tensor]:
        """Per layer, the routing scores of the own choice over the largest, descending, float32 [N, K]."""
        ratios = []
        for context in self.contexts:
            logits_NE, _, own_NK = self.layer(context.index)
            log_NK = LOG_SCORES[context.score_func](at_least_float32(logits_NE)).gather(-1, own_NK)
            log_NK = log_NK.sort(-1, descending=True).values
            ratios.append((log_NK - log_NK[:, :1]).exp())
        return ratios

    @classmethod
    def from_calibration(cls, calibration: Calibration) -> RoutingLog:
        """The tokens that a calibration kept, with weights made anew from their logits.

        Raises
        ------
        CalibrationError
            If it kept none.
        """
        reservoir = calibration.kept_tokens("a budget is solved on", "calibrate again with a reservoir")
        contexts = tuple(
            RoutingContext(
                path=layer.path,
                index=i,
                num_experts=calibration.num_experts,
                empty=calibration.num_experts,
                top_k=layer.top_k,
                route_norm=layer.route_norm,  # type: ignore[arg-type]
                score_func=layer.score_func,
            )
            for i, layer in enumerate(calibration.layers)
        )
        weights = torch.zeros(reservoir.experts_NLK.shape)
        for context in contexts:
            logits_NE, own_NK = reservoir.layer(context.index, context.top_k)
            own = LOG_SCORES[context.score_func](logits_NE.float()).gather(-1, own_NK).exp()
            if context.route_norm == "renormalised":
                own = own / own.sum(-1, keepdim=True)
            weights[:, context.index, : context.top_k] = own
        return cls(
            contexts=contexts,
            logits_NLE=reservoir.logits_NLE,
            experts_NLK=reservoir.experts_NLK,
            weights_NLK=weights,
            model_id=calibration.model_id,
            document_N=reservoir.document_N,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the log as safetensors; it is whole or as it was."""
        layers = [{name: getattr(c, name) for name in _LAYER} for c in self.contexts]
        held = {key: getattr(self, name) for name, key in _KEYS.items() if getattr(self, name) is not None}
        header = {"model_id": self.model_id, "layers": layers}
        write_tensors(path, FORMAT, FORMAT_VERSION, header, held)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingLog:
        """Read a log.

        Raises
        ------
        RoutingLogError
            If the file is damaged or edited, or no routing log of this version, or if anything in it is no such thing as
            a log holds.
        """
        advice = "make one with `bh-routing record MODEL --text FILE -o FILE.safetensors`"
        _, header, tensors = read_tensors(
            path, FORMAT, (FORMAT_VERSION,), _expect, RoutingLogError, what="routing log", advice=advice
        )
        contexts = tuple(RoutingContext(**layer) for layer in header["layers"])
        for c in contexts:
            if not sound_choice(tensors["experts"][:, c.index], c.top_k, c.num_experts):
                raise RoutingLogError(
                    f"{path} holds no sound routing log: the experts of {c.path} must be {c.top_k} of {c.num_experts}; "
                    f"{advice}."
                )
        held: dict[str, Any] = {name: tensors.get(key) for name, key in _KEYS.items()}
        return cls(contexts=contexts, model_id=header["model_id"], **held)

    def __repr__(self) -> str:
        num_experts = self.logits_NLE.shape[-1]
        return (
            f"RoutingLog({self.model_id or 'a model'}: {self.num:,} tokens, {len(self.contexts)} layers x "
            f"{num_experts} experts)"
        )


_KEYS = {name: name.rpartition("_")[0] for name in expected_of(RoutingLog)}  # field -> tensor of a file


def log_routing(
    model: nn.Module,
    windows: Sequence[Tensor],
    *,
    max_tokens: int = 8192,
    model_id: str = "",
    dtype: torch.dtype = torch.float16,
    step: Callable[[], None] = lambda: None,
) -> RoutingLog:
    """Write down a model's own routing on token windows. The model routes as always.

    Parameters
    ----------
    windows : sequence of Tensor
        Token ids [1, S] (`bh_routing.evaluation.cut_windows`).
    max_tokens : int
        Keep at most so many tokens, evenly spread over all that the windows hold.
    dtype : torch.dtype
        Of the logits and weights kept.
    step : callable
        Called after every window.

    Raises
    ------
    InvalidInputError
        If there is no token, or a router saw none or another number of them.
    """
    plan = make_plan(model)
    total = sum(w.numel() for w in windows)
    if not total:
        raise InvalidInputError("expected at least one token to log, got none.")
    stride = max(1, -(-total // max_tokens))
    slots, width = max(c.top_k for c in plan.contexts), max(c.num_experts for c in plan.contexts)
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    parts: list[tuple[Tensor, ...]] = []

    def on_choice(layer: Any, logits_TE: Tensor, own_weights_TK: Tensor, own_TK: Tensor, _mask: Any) -> None:
        if len(logits_TE) != num:
            raise InvalidInputError(
                f"a router saw {len(logits_TE)} of {num} tokens; this model's routing cannot be logged."
            )
        more, missing = slots - own_TK.shape[-1], width - logits_TE.shape[-1]
        rows = picked.to(logits_TE.device)
        seen[layer.path] = (
            nn.functional.pad(logits_TE[rows].to("cpu", dtype), (0, missing), value=-math.inf),
            nn.functional.pad(own_TK[rows].to("cpu", torch.int16), (0, more), value=-1),
            nn.functional.pad(own_weights_TK[rows].to("cpu", dtype), (0, more)),
        )

    offset = 0
    device = execution_device(model)
    for window in windows:
        num = window.numel()
        picked = torch.arange((-offset) % stride, num, stride)
        offset += num
        if len(picked):
            with torch.no_grad(), watch(plan, on_choice):
                model(input_ids=window.to(device), use_cache=False)
            if missing := [c.path for c in plan.contexts if c.path not in seen]:
                raise InvalidInputError(
                    f"router {missing[0]} saw no token of the text: expected a model all of whose routers text reaches."
                )
            layers = zip(*(seen[c.path] for c in plan.contexts), strict=True)
            parts.append((*(torch.stack(x, 1) for x in layers), window.flatten()[picked].cpu(), picked))
        step()
    logits, experts, weights, tokens, positions = (torch.cat(x) for x in zip(*parts, strict=True))
    return RoutingLog(
        contexts=tuple(plan.contexts),
        logits_NLE=logits,
        experts_NLK=experts,
        weights_NLK=weights,
        tokens_N=tokens,
        positions_N=positions,
        model_id=model_id,
    )
