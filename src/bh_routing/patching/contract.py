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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .instance import InstancePatch, execution_device, find_patch, installed
from .weighting import Reading, read_weighting

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

    def told(value: Any) -> str:
        return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

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
        came = ", ".join(map(told, outputs))
    else:
        came = f"{'one tensor ' * isinstance(outputs, Tensor)}{told(outputs)}"
    raise UnsupportedModelError(
        f"router {where} must return router logits [T, E], weights [T, K] and integer expert indices [T, K], "
        f"got ({came}); this contract is not supported."
    )


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
        for call in calls(module, attribute, parent):
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


def calls(module: nn.Module, attribute: str, parent: nn.Module | None) -> Iterator[Call]:
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
    try:
        with installed([capture]):
            parent.forward(x_TH.unsqueeze(0))
    except Exception:  # _Answered, or a block that needs more than hidden states
        return capture.call, False
    return capture.call, capture.call is None
