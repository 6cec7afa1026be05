"""What a router returns: three tensors, recognised by dtype and shape, never by position alone.

Shape legend: T tokens, E experts, K slots per token, H hidden size.

A router of the common contract returns router logits [T, E], routing weights [T, K] and expert indices
int64 [T, K], possibly with extras. Most families return them in that order; the original design document (and a
mock written from it) as (weights, indices, logits); some families of older transformers as (indices, weights,
logits). In all, the weights stand right beside the indices.

Score function and normalisation are not looked up by family: the router is run on random tokens, and what it did
is read off the numbers (`read_weighting`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..decision.types import RouteNorm
from ..errors import UnsupportedModelError
from ..stats.statistic import LOG_SCORES
from .instance import InstancePatch, execution_device, find_patch

PROBE_TOKENS = 128


class RouterOutputs(NamedTuple):
    """Positions of the three tensors in a router's return value."""

    logits: int
    weights: int
    experts: int

    def read(self, outputs: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(logits_TE, weights_TK, experts_TK), flattened to two dimensions."""
        tensors = (outputs[self.logits], outputs[self.weights], outputs[self.experts])
        return tuple(t if t.dim() == 2 else t.reshape(-1, t.shape[-1]) for t in tensors)

    def replace(self, outputs: Sequence[Any], weights_TK: Tensor, experts_TK: Tensor) -> Any:
        """The same return value with other weights and indices; everything else untouched."""
        items = list(outputs)
        for position, tensor in ((self.weights, weights_TK), (self.experts, experts_TK)):
            if items[position].dim() == 2:
                items[position] = tensor
            else:
                items[position] = tensor.reshape(*items[position].shape[:-1], tensor.shape[-1])
        if isinstance(outputs, list):
            return items
        return type(outputs)(*items) if hasattr(outputs, "_fields") else tuple(items)


def match_outputs(outputs: Any, where: str) -> RouterOutputs:
    """Find logits, weights and indices in a router's return value.

    Raises
    ------
    UnsupportedModelError
        If they are not there; the message says what came.
    """

    def shape(position: int) -> tuple[int, ...]:
        return tuple(outputs[position].shape)

    if isinstance(outputs, (tuple, list)):
        tensors = [i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.dim() >= 2]
        integers = [i for i in tensors if outputs[i].dtype in (torch.int64, torch.int32)]
        floats = [i for i in tensors if outputs[i].is_floating_point()]
        if len(integers) == 1:
            experts = integers[0]
            beside = [i for i in (experts - 1, experts + 1) if i in floats and shape(i) == shape(experts)]
            weights = beside[0] if beside else -1
            rest = [i for i in floats if i != weights and shape(i)[-1] >= shape(experts)[-1]]
            rows = outputs[experts].numel() // max(1, shape(experts)[-1])
            rest = [i for i in rest if outputs[i].numel() == rows * shape(i)[-1]]
            if beside and rest:
                return RouterOutputs(rest[0], weights, experts)
        came = ", ".join(
            f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in outputs
        )
    else:
        came = (
            f"one tensor {outputs.dtype} {tuple(outputs.shape)}"
            if isinstance(outputs, Tensor)
            else type(outputs).__name__
        )
    raise UnsupportedModelError(
        f"router {where} must return router logits [T, E], weights [T, K] and integer expert indices [T, K], "
        f"got ({came}); this contract is not supported."
    )


class Reading(NamedTuple):
    """How a router makes its weights, as read off its numbers.

    Attributes
    ----------
    score_func : str
        A key of `bh_routing.stats.statistic.LOG_SCORES`: what the weights are made of.
    route_norm : "none", "renormalised" or "unknown"
        ``none``: a weight does not depend on which other experts were selected. ``renormalised``: a token's
        weights are scaled to a constant sum over its selected experts.
    route_scale : float
        ``none``: weight / score. ``renormalised``: the constant sum.
    joint : bool
        Weights are normalised together with something outside the selection (shared experts): ``route_norm`` is
        ``none`` then, because dropping one expert leaves the others' share alone.
    plain : bool
        The selected experts are the K largest of that very score: nothing else takes part in the choice.
    per_expert : str
        Name of the vector [E] of factors that the renormalised weights were multiplied by, "" if none.
    """

    score_func: str = "softmax"
    route_norm: RouteNorm = "unknown"
    route_scale: float = 1.0
    joint: bool = False
    plain: bool = False
    per_expert: str = ""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a probe found out about a router: where its tensors are, sizes, and how it makes weights."""

    positions: RouterOutputs | None
    num_logits: int
    top_k: int
    reading: Reading


def hidden_size(router: nn.Module) -> int | None:
    """The width of a router's input, from its matrices; None where they do not tell."""
    for name in ("hidden_dim", "hidden_size", "dim"):
        value = getattr(router, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    matrices = [p for p in router.parameters() if p.dim() == 2]
    return matrices[0].shape[1] if matrices else None


# A call of the thing to probe with hidden states: what it was given and what it returned, None if it cannot be.
Call = Callable[[Tensor], "tuple[tuple[Any, ...], Any] | None"]


def probe(
    router: nn.Module,
    where: str,
    parent: nn.Module | None = None,
    hidden: int | None = None,
    canonical: Callable[[tuple[Any, ...], Any], Any] | None = None,
    target: tuple[nn.Module, str] | None = None,
) -> Contract | None:
    """Run a router on random tokens and read its contract off the result.

    The router is called by itself with [T, H] and with [1, T, H], and, if it needs more than hidden states, by
    its parent, whose forward is left as soon as the router has answered. The inputs are scaled so that the
    logits spread; the random state of the program is left as it was.

    Parameters
    ----------
    parent : nn.Module, optional
        The block around the router.
    hidden : int, optional
        Width of the input; default: what the router's matrices say.
    canonical : callable, optional
        ``f(args, outputs)`` gives (logits, weights, indices) from a call that has them elsewhere.
    target : (module, attribute), optional
        What is called in place of the router's forward.

    Returns
    -------
    Contract or None
        None where nothing could be run: the contract is then checked at the first real call.

    Raises
    ------
    UnsupportedModelError
        If the router runs and returns something else.
    """
    width = hidden or hidden_size(router)
    parameter = next((p for p in router.parameters() if p.is_floating_point()), None)
    device = execution_device(router)
    if width is None or parameter is None or device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(PROBE_TOKENS, width, generator=generator, device="cpu").to(device, parameter.dtype)
    module, attribute = target or (router, "forward")
    with torch.no_grad(), _random_state_kept(device):
        for call in _calls(module, attribute, parent):
            found = call(x_TH)
            if found is None:
                continue
            outputs = found[1] if canonical is None else canonical(*found)
            positions = match_outputs(outputs, where)
            logits_TE, weights_TK, experts_TK = positions.read(outputs)
            spread = float(logits_TE.float().std(-1).mean())
            if 0.0 < spread < 0.5 or 3.0 < spread < float("inf"):
                again = call(x_TH * (1.5 / spread))
                if again is not None:
                    outputs = again[1] if canonical is None else canonical(*again)
                    logits_TE, weights_TK, experts_TK = positions.read(outputs)
            vectors = {n: p for n, p in router.named_parameters() if p.shape == logits_TE.shape[-1:]}
            return Contract(
                positions=positions,
                num_logits=logits_TE.shape[-1],
                top_k=experts_TK.shape[-1],
                reading=read_weighting(logits_TE, weights_TK, experts_TK, vectors),
            )
    return None


def _random_state_kept(device: torch.device) -> Any:
    devices = [device] if device.type != "cpu" else []
    return torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda")


def _calls(module: nn.Module, attribute: str, parent: nn.Module | None) -> Iterator[Call]:
    """Ways to call a router with hidden states, the most direct first."""
    if attribute == "forward":
        own = find_patch(module)
        forward = own.inner if own is not None else module.forward

        def alone(x_TH: Tensor) -> tuple[tuple[Any, ...], Any] | None:
            try:
                return (x_TH,), forward(x_TH)
            except Exception:  # any failure means the same: this router needs more than hidden states
                return None

        yield alone
        yield lambda x_TH: alone(x_TH.unsqueeze(0))
    if parent is not None and find_patch(module, attribute) is None:
        yield lambda x_TH: call_through(parent, module, attribute, x_TH)[0]


class _Answered(Exception):
    """Leaves the parent's forward once the router has answered."""


class _Capture(InstancePatch):
    """Keeps one call of a module, by the thread that made this object, and leaves."""

    call: tuple[tuple[Any, ...], Any] | None = None

    def __init__(self, module: nn.Module, attribute: str) -> None:
        super().__init__(module, attribute)
        self.thread = threading.get_ident()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.inner(*args, **kwargs)
        self.call = (args, self.inner(*args, **kwargs))
        raise _Answered


def call_through(
    parent: nn.Module, module: nn.Module, attribute: str, x_TH: Tensor
) -> tuple[tuple[tuple[Any, ...], Any] | None, bool]:
    """Call a block with hidden states [1, T, H] and keep its router's call.

    Returns
    -------
    call, bypassed
        The router's (args, outputs), or None; and whether the block ran to its end without calling it.
    """
    capture = _Capture(module, attribute)
    bypassed = False
    capture.install()
    try:
        parent.forward(x_TH.unsqueeze(0))
        bypassed = capture.call is None
    except Exception:  # _Answered, or a block that needs more than hidden states
        pass
    finally:
        capture.remove()
    return capture.call, bypassed


def read_weighting(
    logits_TE: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    vectors: Mapping[str, Tensor] | None = None,
) -> Reading:
    """Which score the weights are made of, and what happens to them after the selection.

    With r = log(weight) - log(score) for each known score: weights are left alone if r is one constant for all tokens
    and slots (the scaling factor), renormalised if r is constant within each token and the weights' sum is the
    same for all tokens (a softmax over the selected logits is that case of a softmax over all), and normalised
    jointly with something else if r is constant within each token and the sum is not. If nothing fits, each of
    `vectors` [E] is tried as a factor per expert on renormalised weights.

    Nothing is claimed (``route_norm="unknown"``) for a router whose logits are all equal, or whose weights fit
    no known score.
    """
    unknown = Reading()
    if logits_TE.shape[0] == 0 or int(experts_TK.max()) >= logits_TE.shape[-1] or int(experts_TK.min()) < 0:
        return unknown
    low = not {logits_TE.dtype, weights_TK.dtype}.isdisjoint((torch.float16, torch.bfloat16))
    x_TE, weights_TK = logits_TE.double(), weights_TK.double()
    tolerance = 0.03 if low else 1e-3
    if not bool(torch.isfinite(x_TE).all()) or float((x_TE.amax(-1) - x_TE.amin(-1)).max()) < 1e-6:
        return unknown
    probabilities = float(x_TE.min()) >= 0 and float((x_TE.sum(-1) - 1).abs().max()) < tolerance
    names = ("probability",) if probabilities else ("softmax", "sigmoid", "sqrtsoftplus")
    usable_TK = weights_TK > 1e-4 * weights_TK.amax()
    if not bool(usable_TK.any()):
        return unknown
    log_scores = {name: LOG_SCORES[name](x_TE) for name in names}
    for factors in ({"": None} | dict(vectors or {})).items():
        fits = [
            fit
            for name, log_TE in log_scores.items()
            if (fit := _fit(name, log_TE, weights_TK, experts_TK, usable_TK, factors, tolerance)) is not None
        ]
        if fits:
            return min(fits, key=lambda fit: fit[0])[1]
    return unknown


def _fit(
    score_func: str,
    log_TE: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    usable_TK: Tensor,
    factors: tuple[str, Tensor | None],
    tolerance: float,
) -> tuple[tuple[int, float], Reading] | None:
    """How well one score explains the weights: (rank, spread) to choose by, and the reading; None if not."""
    name, vector_E = factors
    if vector_E is not None:
        factor_E = vector_E.double().to(weights_TK.device)
        if not bool((factor_E > 0).all()):
            return None
        weights_TK = weights_TK / factor_E[experts_TK]
    ratio_TK = weights_TK.clamp_min(1e-30).log() - log_TE.gather(-1, experts_TK)
    center = ratio_TK[usable_TK].median()
    across = float((ratio_TK[usable_TK] - center).abs().max())
    row_T1 = ratio_TK.masked_fill(~usable_TK, float("nan")).nanmedian(-1, keepdim=True).values
    within = float((ratio_TK - row_T1)[usable_TK].abs().max())
    sum_T = weights_TK.sum(-1)
    total = float(sum_T.median())
    constant = float((sum_T / total - 1).abs().max()) < tolerance if total > 0 else False
    plain = vector_E is None and _largest_chosen(log_TE, experts_TK, tolerance)
    if across < tolerance and vector_E is None:
        return (0, across), Reading(
            score_func, "none", _near_one(float(center.exp()), tolerance), False, plain
        )
    if within < tolerance and constant:
        return (1, within), Reading(
            score_func, "renormalised", _near_one(total, tolerance), False, plain, name
        )
    # One slot is always constant within its token: that explains nothing.
    if within < tolerance and weights_TK.shape[-1] > 1 and vector_E is None:
        return (2, within), Reading(score_func, "none", 1.0, True, False)
    return None


def _near_one(value: float, tolerance: float) -> float:
    return 1.0 if abs(value - 1.0) < tolerance else value


def _largest_chosen(log_TE: Tensor, experts_TK: Tensor, tolerance: float) -> bool:
    """Whether the chosen experts are the K largest scores of every token, ties and rounding aside."""
    chosen_TK = log_TE.gather(-1, experts_TK)
    others_TE = log_TE.scatter(-1, experts_TK, float("-inf"))
    return bool((others_TE.amax(-1) <= chosen_TK.amin(-1) + tolerance).all())
