"""What a router returns: three tensors, recognised by dtype and shape, never by position alone.

Shape legend: T tokens, E experts, K slots per token.

A router of the common contract returns router logits [T, E], routing weights [T, K] and expert indices
int64 [T, K], possibly with extras. transformers 5 returns them in that order; the original design document
(and a mock written from it) as (weights, indices, logits). In both, the weights stand right before the indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..routing import Convention
from ..statistic import LOG_SCORES
from .instance import execution_device


class RouterOutputs(NamedTuple):
    """Positions of the three tensors in a router's return value."""

    logits: int
    weights: int
    experts: int

    def read(self, outputs: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(logits_TE, weights_TK, experts_TK), flattened to two dimensions."""
        tensors = (outputs[self.logits], outputs[self.weights], outputs[self.experts])
        return tuple(t.reshape(-1, t.shape[-1]) for t in tensors)

    def replace(self, outputs: Sequence[Any], weights_TK: Tensor, experts_TK: Tensor) -> Any:
        """The same return value with other weights and indices; everything else untouched."""
        items = list(outputs)
        for position, tensor in ((self.weights, weights_TK), (self.experts, experts_TK)):
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
        if len(integers) == 1 and integers[0] - 1 in floats and shape(integers[0]) == shape(integers[0] - 1):
            experts = integers[0]
            weights = experts - 1
            rest = [i for i in floats if i != weights and shape(i)[-1] >= shape(experts)[-1]]
            rows = outputs[experts].numel() // max(1, shape(experts)[-1])
            rest = [i for i in rest if outputs[i].numel() == rows * shape(i)[-1]]
            if rest:
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


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a probe found out about a router: sizes, score, convention."""

    positions: RouterOutputs | None
    num_logits: int
    top_k: int
    score: str
    convention: Convention
    plain: bool  # the router selects by the very score it weighs by, so that widening can compute weights


def hidden_size(router: nn.Module) -> int | None:
    """The width of a router's input, from its matrices; None where they do not tell."""
    for name in ("hidden_dim", "hidden_size", "dim"):
        value = getattr(router, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    matrices = [p for p in router.parameters() if p.dim() == 2]
    return matrices[0].shape[1] if matrices else None


def probe(router: nn.Module, forward: Any, where: str, hidden: int | None = None) -> Contract | None:
    """Run a router on 64 random tokens and read its contract off the result.

    Returns None where the router cannot be run by itself (extra arguments, unknown input width): the contract
    is then checked at the first real call. The random state of the program is left as it was.

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
    x_TH = torch.randn(64, width, generator=generator).to(device, parameter.dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = forward(x_TH)
    except Exception:  # any failure means the same: this router needs more than hidden states
        return None
    positions = match_outputs(outputs, where)
    logits_TE, weights_TK, experts_TK = positions.read(outputs)
    score, convention, plain = read_convention(logits_TE, weights_TK, experts_TK)
    return Contract(
        positions=positions,
        num_logits=logits_TE.shape[-1],
        top_k=experts_TK.shape[-1],
        score=score,
        convention=convention,
        plain=plain,
    )


def read_convention(
    logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor
) -> tuple[str, Convention, bool]:
    """Which score the weights are made of, and whether they are renormalised over the selected.

    For each known score: if weight / score is one constant for all, the weights are raw (times a scaling
    factor); if it is constant within each token, they are renormalised (softmax over the top-k logits is
    that case of softmax over all). A router is plain if the constant is 1 (or the rows sum to 1) and its
    choice is the top-k of that score.
    """
    if logits_TE.shape[0] == 0 or experts_TK.max() >= logits_TE.shape[-1]:
        return "softmax", "unknown", False
    x_TE = logits_TE.double()
    weights_TK = weights_TK.double()
    tolerance = 0.02 if logits_TE.dtype in (torch.float16, torch.bfloat16) else 1e-3
    # An all-equal router (zero weights) says nothing about its convention.
    if float((x_TE.amax(-1) - x_TE.amin(-1)).max()) < 1e-6:
        return "softmax", "unknown", False
    best: tuple[float, str, Convention, bool] | None = None
    for score in ("softmax", "sigmoid", "sqrtsoftplus", "probability"):
        if score == "probability" and float(x_TE.min()) < 0:
            continue
        log_score_TE = LOG_SCORES[score](x_TE)
        ratio_TK = weights_TK.clamp_min(1e-30).log() - log_score_TE.gather(-1, experts_TK)
        usable_TK = weights_TK > 1e-4 * weights_TK.amax()
        across = float((ratio_TK[usable_TK] - ratio_TK[usable_TK].median()).abs().max())
        row_T1 = ratio_TK.masked_fill(~usable_TK, float("nan")).nanmedian(-1, keepdim=True).values
        within = float((ratio_TK - row_T1)[usable_TK].abs().max())
        top_TK = log_score_TE.topk(experts_TK.shape[-1], dim=-1).indices
        chosen_alike = float((top_TK.sort(-1).values == experts_TK.sort(-1).values).all(-1).double().mean())
        selects = chosen_alike > 0.9
        for spread, convention in ((across, "raw"), (within, "renormalised")):
            if spread < tolerance and (best is None or spread < best[0] / 4):
                unit = (
                    float(ratio_TK[usable_TK].median().abs()) < tolerance
                    if convention == "raw"
                    else float((weights_TK.sum(-1) - 1).abs().max()) < tolerance
                )
                best = (spread, score, convention, selects and unit)  # type: ignore[assignment]
        if experts_TK.shape[-1] == 1 and best is not None and best[2] == "raw":
            break
    if best is None:
        return "softmax", "unknown", False
    return best[1], best[2], best[3]
