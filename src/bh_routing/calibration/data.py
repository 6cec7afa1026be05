"""What a calibration is made of: the frozen fields of it, and how two are added up. Nothing here computes a level.

Which document a token or a text is of, in files of format 2 (None in format 1):

- ``reservoir.document_N``, int64 [N], non-negative: a hash of the document that each kept token comes from, in the order of
  ``reservoir.hash_N``; equal where the document is the same. It depends on the calibration's seed.
- ``document_digests_C``, int64 [C], non-negative, ascending, distinct: `bh_routing.text.hashing.document_digest` of every document
  that was read (of a string without regard to white space, of token ids of their int64 bytes), whatever the seed.

Shape legend: L routed layers, E experts, K slots of the router's own choice, N tokens kept, D projections, C documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, TypeVar, get_args

import torch
from torch import Tensor

from .._files.checks import listed, number, one_of, optional, text, whole
from .._files.tensors import FLOAT64, HASHES, Expected
from ..decision.types import RouteNorm
from ..errors import CalibrationError, CalibrationMismatchError
from ..stats.histogram import Histogram
from ..stats.nulls import Null
from ..stats.statistic import LOG_SCORES
from .certificate import Certificate, TextProfile
from .linear_maps import LinearMaps
from .moments import Moments
from .token_sizes import TokenSizes

MUST_AGREE = (
    "model_id",
    "layers",
    "num_experts",
    "temperature",
    "trim",
    "seed",
    "window",
    "reservoir_size",
)  # of calibrations that are added up
_NAME, _SHARE, _SIZE = text(4096), number(0.0, 1.0), whole(1, 1 << 15)


@dataclass(frozen=True, kw_only=True)
class CalibratedLayer:
    """One routed layer as it was calibrated: module paths, slots, and how its router makes weights.

    It and what follows are annotated with what a file may hold.
    """

    path: Annotated[str, _NAME]
    experts_path: Annotated[str | None, optional(_NAME)]
    top_k: Annotated[int, _SIZE]
    score_func: Annotated[str, one_of(*LOG_SCORES)]
    route_norm: Annotated[str, one_of(*get_args(RouteNorm))]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reservoir:
    """Tokens kept for the budget: those with the smallest hashes, sorted by hash.

    Attributes
    ----------
    hash_N : Tensor
        int64, a hash of (document, position, seed).
    logits_NLE : Tensor
        float16 router logits.
    experts_NLK : Tensor
        int16, the model's own choice (kept, because a choice made from float16 logits could differ); -1 where
        a layer has fewer slots than the widest.
    document_N : Tensor or None
        int64, a hash of the document that each token comes from; None in files of format 1.
    """

    hash_N: Annotated[Tensor, Expected((torch.int64,), -(2.0**63), 2.0**63)]
    logits_NLE: Annotated[Tensor, Expected((torch.float16,), float("-inf"), 65504.0)]  # -inf: a masked expert
    experts_NLK: Annotated[Tensor, Expected((torch.int16,), -1.0)]
    document_N: Annotated[Tensor | None, HASHES] = None

    @property
    def num(self) -> int:
        """Tokens, N."""
        return self.hash_N.numel()

    def layer(self, index: int, top_k: int) -> tuple[Tensor, Tensor]:
        """Router logits float16 [N, E] and the model's own choice int64 [N, K] of one layer."""
        return self.logits_NLE[:, index], self.experts_NLK[:, index, :top_k].long()

    def smallest(self, num: int) -> Reservoir:
        """The tokens with the ``num`` smallest hashes, in their order."""
        order_N = self.hash_N.argsort(stable=True)[:num]
        held: dict[str, Tensor] = {name: x[order_N] for name, x in vars(self).items() if x is not None}
        return Reservoir(**held)

    def __add__(self, other: Reservoir) -> Reservoir:
        known = self.document_N is not None and other.document_N is not None
        names = ("hash_N", "logits_NLE", "experts_NLK", *(("document_N",) if known else ()))
        return Reservoir(**{name: torch.cat((getattr(self, name), getattr(other, name))) for name in names})


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenNulls:
    """Nulls from outside, which stand in for those that the counts would give.

    Attributes
    ----------
    nulls : tuple of Null
        One per layer; the same object for layers that share one.
    statistic, size, null, estimator : str
        Of what they are the null, as in `bh_routing.calibration.null_settings.NullSettings`; other settings are refused.
    source : str
        What they are, for people.
    in_order : bool
        The layers have no module paths: the first null is that of a model's first router, and so on.
    """

    nulls: tuple[Null, ...]
    statistic: str
    size: str | None = None
    null: str = "unselected"
    estimator: str = "given"
    source: str = "the given nulls"
    in_order: bool = False


Data = TypeVar("Data", bound="CalibrationData")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CalibrationData:
    """The fields of `bh_routing.Calibration`. Two of one model on different texts are added up with ``+``.

    Attributes
    ----------
    model_id : str
        Name or path of the model.
    layers : tuple of CalibratedLayer
    num_experts : int
        E, the width of the router logits.
    temperature : float
        What divided the logits.
    trim : int
        The trimmed null leaves out this many of the highest and of the lowest logits of each token.
    histograms : dict
        ``histograms["logit" | "logprob"]["unselected" | "selected" | "trimmed"]``: binned counts of the base
        statistic, int64 [L, E, B].
    moments : Moments or None
        Sizes and means of the experts' outputs; None if they were not collected.
    reservoir : Reservoir or None
    reservoir_size : int
        How many tokens the reservoir holds at most.
    fingerprint_LD : Tensor
        float64, projections of each router's weights (`bh_routing.calibration.fingerprint.fingerprint`).
    tokens, documents : int
        How many were seen.
    text_digest : str
        Of the documents, whatever their order.
    document_digests_C : Tensor or None
        int64, of each document (above); None where they are not known, as in files of format 1.
    seed, window : int
        Seed of the reservoir's hash; the longest run of tokens in one forward.
    compensation_scale : float
        What the compensation is multiplied by, 0 to 1: measured (`bh_routing.calibration.compensation_scale`), 1 where it was not.
    linear : LinearMaps or None
        The linear compensation. Neither it nor the sizes add up: calibrations that are merged lose both.
    linear_scale : float
        What that one is multiplied by.
    token_sizes : TokenSizes or None
        Sizes that follow the token.
    certificate : Certificate or None
        What its levels lose on held-out text, with a confidence. Whatever changes what a level is loses it.
    text_profile : TextProfile or None
        How the model read the certificate's text.
    left_out : tuple of str
        Paths of routers that no token of a text reaches (of a vision tower, for example): they are not
        calibrated, and an integration leaves them as they are.
    given : GivenNulls or None
        Nulls from outside in place of those of the histograms. They are no part of a file.
    """

    model_id: Annotated[str, text()]
    layers: tuple[CalibratedLayer, ...]
    num_experts: Annotated[int, _SIZE]
    histograms: dict[str, dict[str, Histogram]]
    moments: Moments | None = None
    reservoir: Reservoir | None = None
    reservoir_size: Annotated[int, whole()] = 0
    fingerprint_LD: Annotated[Tensor, FLOAT64]
    temperature: Annotated[float, number(most=1e6, above=0.0)] = 1.0
    trim: Annotated[int, whole(0, 1 << 15)] = 8
    tokens: Annotated[int, whole()] = 0
    documents: Annotated[int, whole()] = 0
    text_digest: Annotated[str, text(32)] = "0" * 32
    document_digests_C: Annotated[Tensor | None, HASHES] = None
    seed: Annotated[int, whole(-(2**63), 2**63 - 1)] = 0
    window: Annotated[int, whole()] = 0
    compensation_scale: Annotated[float, _SHARE] = 1.0
    linear: LinearMaps | None = None
    linear_scale: Annotated[float, _SHARE] = 1.0
    token_sizes: TokenSizes | None = None
    certificate: Certificate | None = None
    text_profile: TextProfile | None = None
    left_out: Annotated[tuple[str, ...], listed(_NAME, 0, 1 << 12)] = ()
    library_version: Annotated[str, text()] = ""
    given: GivenNulls | None = None

    @property
    def num_layers(self) -> int:
        """Routed layers, L."""
        return len(self.layers)

    @property
    def paths(self) -> tuple[str, ...]:
        """Router module paths, in order; empty where they are not known and layers are taken in order."""
        if self.given is not None and self.given.in_order:
            return ()
        return tuple(layer.path for layer in self.layers)

    def kept_tokens(self, what: str, otherwise: str) -> Reservoir:
        """The reservoir, or `CalibrationError` where there is nothing in it: what is made of it, and what to do instead."""
        if self.reservoir is None or self.reservoir.num == 0:
            raise CalibrationError(
                f"{what} the calibration's tokens, and this calibration holds none; {otherwise}."
            )
        return self.reservoir

    @property
    def means_LEH(self) -> Tensor:
        """The experts' mean outputs, which it must hold."""
        assert self.moments is not None
        assert self.moments.mean_LEH is not None
        return self.moments.mean_LEH

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What `bh_routing.calibration.fit` found for these fields; no field, so that a changed copy starts anew."""
        return {}

    def __add__(self: Data, other: CalibrationData) -> Data:
        """Counts add up exactly, moments in float64, the compensation's scale is averaged by tokens; the reservoir
        keeps the tokens with the smallest hashes. The linear compensation and the sizes from the token are lost.

        Raises
        ------
        CalibrationMismatchError
            If they differ in model, layers, temperature, trim, seed, window or parts.
        """
        for name in MUST_AGREE:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise CalibrationMismatchError(
                    f"only calibrations of one model and one setting can be merged, but {name} differs: "
                    f"{ours!r} and {theirs!r}."
                )
        if (self.moments is None) != (other.moments is None):
            raise CalibrationMismatchError(
                "only calibrations that hold the same parts can be merged: one holds the experts' outputs, the "
                "other does not."
            )
        moments = reservoir = None
        if self.moments is not None and other.moments is not None:
            moments = self.moments + other.moments
        if self.reservoir is not None and other.reservoir is not None:
            reservoir = (self.reservoir + other.reservoir).smallest(self.reservoir_size)
        documents = None
        if self.document_digests_C is not None and other.document_digests_C is not None:
            documents = torch.cat((self.document_digests_C, other.document_digests_C)).unique()
        tokens = self.tokens + other.tokens
        weighed = self.tokens * self.compensation_scale + other.tokens * other.compensation_scale
        digest = (int(self.text_digest, 16) + int(other.text_digest, 16)) % 2**128
        return replace(
            self,
            histograms={
                kind: {name: held + other.histograms[kind][name] for name, held in sets.items()}
                for kind, sets in self.histograms.items()
            },
            moments=moments,
            reservoir=reservoir,
            tokens=tokens,
            documents=self.documents + other.documents,
            text_digest=f"{digest:032x}",
            document_digests_C=documents,
            compensation_scale=weighed / max(1, tokens),
            linear=None,
            linear_scale=1.0,
            token_sizes=None,
            certificate=None,
            text_profile=None,
        )


def some_of(names: Iterable[str]) -> str:
    """The first three names, and dots if there are more."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def sound_choice(experts_NK: Tensor, top_k: int, num_experts: int) -> bool:
    """Whether these are the choices of a router, ``top_k`` experts a token; -1 in the slots that are left."""
    own_NK, rest = experts_NK[:, :top_k], experts_NK[:, top_k:]
    return bool(((own_NK >= 0) & (own_NK < num_experts)).all()) and bool((rest == -1).all())


def stack_layers(parts: list[Histogram]) -> Histogram:
    """Histograms of one layer each, [1, E, B_l], as one over their common range."""
    start = min(h.start for h in parts)
    stop = max(h.start + h.counts_LEB.shape[-1] for h in parts)
    num_experts = parts[0].counts_LEB.shape[1]
    counts_LEB = torch.zeros(len(parts), num_experts, stop - start, dtype=torch.int64)
    for row, h in enumerate(parts):
        first = h.start - start
        counts_LEB[row, :, first : first + h.counts_LEB.shape[-1]] = h.counts_LEB[0]
    return Histogram(start, counts_LEB)


def join_layers(per_layer: Iterable[dict[str, dict[str, Histogram]]]) -> dict[str, dict[str, Histogram]]:
    """``[statistic][set]`` -> counts of one layer each, as ``[statistic][set]`` -> counts of all layers."""
    parts = list(per_layer)
    return {
        kind: {name: stack_layers([part[kind][name] for part in parts]) for name in sets}
        for kind, sets in parts[0].items()
    }
