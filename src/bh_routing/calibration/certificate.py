"""What a calibration's levels lose, with a confidence: the certificate, what it answers, and the text that it was made on.

`bh_routing.evaluation.certify` makes one from a model and documents; here is what is kept, and what may be read from it.

Shape legend: L routed layers, E experts, Q quantiles, U documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor

from .._files.checks import checks_of, listed, number, one_of, optional, record, text, whole
from .._files.tensors import FLOAT32, Expected
from .._words import Bound, CompensationForm
from ..errors import CertificateError
from ..text.hashing import short_digest

Loss = Literal["kl", "agreement"]
CLIP = 0.1  # nats: the most that a document counts

QUANTILES = (0.05, 0.5, 0.95, 1.0)  # of the documents' distances

_EXPERTS, _SIZE, _SHARE = number(0.0, 1 << 15), number(0.0, 1e30), number(0.0, 1.0)
_IN_FLOAT32 = Expected((torch.float32,), 0.0, 1.0)


def _pair(value: Any) -> Any:
    form, scale = listed(lambda x: x, 2, 2)(value)
    return [one_of(*get_args(CompensationForm))(form), _SHARE(scale)]


@dataclass(frozen=True, kw_only=True)
class CertifiedLevel:
    """One level of a certificate.

    Attributes
    ----------
    experts_per_token : float
        The budget: what `RoutingSettings` is told.
    experts : float
        Kept on the certificate's text, experts per token.
    bytes_per_token : float or None
        Of experts and compensation, read for one token alone; None where the experts are not known.
    risk : float
        The mean loss of its documents: nats per token, or the share of next words that change.
    bound : float
        With the certificate's confidence the loss on such text is at most this.
    clipped : float
        The share of documents that lost more than the clip, and count as if they had lost that.
    """

    experts_per_token: Annotated[float, _EXPERTS]
    experts: Annotated[float, _EXPERTS]
    bytes_per_token: Annotated[float | None, optional(_SIZE)]
    risk: Annotated[float, _SHARE]
    bound: Annotated[float, _SHARE]
    clipped: Annotated[float, _SHARE]


_LEVELS = listed(record(checks_of(CertifiedLevel)), 0, 4096)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Levels with a bound on what they lose, and all that the bounds hold for.

    Attributes
    ----------
    kl, agreement : tuple of CertifiedLevel
        From most experts to fewest: by KL(own || routed), nats per token; by the share of next words that change.
    target : float or None
        The loss that was named before the text was read: each level loses at most this, together. None: every level has
        a bound of its own, and all of them hold together, so that a loss may be named later.
    confidence : float
        Of each of the two tables, by itself.
    bound : str
        Where the bounds come from (`bh_routing.stats.risk`).
    documents, tokens : int
        Read; a document is what counts once.
    text_digest : str
        Of the documents, whatever their order.
    window, document_tokens : int, int or None
        Tokens of one forward; at most so many of each document.
    clip : float
        In nats: the most that a document counts in ``kl``.
    fingerprint : str
        Digest of the calibration's fingerprint of the model.
    weights, engine : str
        What ran: "float32" in "transformers".
    settings : dict
        The routing's settings but for the level, where they differ from the defaults.
    compensation : (str, float)
        Its form and scale.
    date, library_version : str
    """

    kl: Annotated[tuple[CertifiedLevel, ...], _LEVELS] = ()
    agreement: Annotated[tuple[CertifiedLevel, ...], _LEVELS] = ()
    target: Annotated[float | None, optional(_SHARE)] = None
    confidence: Annotated[float, number(most=1.0, above=0.0)]
    bound: Annotated[Bound, one_of(*get_args(Bound))]
    documents: Annotated[int, whole(1)]
    tokens: Annotated[int, whole(1)]
    text_digest: Annotated[str, text(32)]
    window: Annotated[int, whole(1)]
    document_tokens: Annotated[int | None, optional(whole(1))] = None
    clip: Annotated[float, number(most=1e6, above=0.0)] = CLIP
    fingerprint: Annotated[str, text(64)]
    weights: Annotated[str, text(256)]
    engine: Annotated[str, text(64)] = "transformers"
    settings: Annotated[dict[str, Any], record({}, others=True)]
    compensation: Annotated[tuple[str, float], _pair]
    date: Annotated[str, text(64)]
    library_version: Annotated[str, text(64)]

    def level(self, *, max_kl: float | None = None, agreement: float | None = None) -> CertifiedLevel:
        """The fewest experts whose bound is at most this loss.

        Raises
        ------
        CertificateError
            If there is none; it names the smallest loss that there is.
        """
        levels = self.kl if max_kl is not None else self.agreement
        most = max_kl if max_kl is not None else 1.0 - (agreement or 0.0)
        asked = f"max_kl={max_kl:g}" if max_kl is not None else f"agreement={agreement:g}"
        if not levels:
            raise CertificateError(
                f"{asked} needs a certificate of it, and this calibration's is one of "
                f"{'agreement' if self.agreement else 'KL'} only; run `bh-routing certify` without a target."
            )
        # The share that may change is 1 less what was typed: 1 - 0.97 is a rounding above 0.03.
        if not (fit := [level for level in levels if level.bound <= most + 1e-12]):
            best = min(level.bound for level in levels)
            least = f"max_kl={_up(best)}" if max_kl is not None else f"agreement={_down(1.0 - best)}"
            raise CertificateError(
                f"{asked} is not certified: the least that this calibration's certificate covers is {least} "
                f"({self.documents:,} documents, {self.confidence:.0%} confidence); accept that, or certify on more documents."
            )
        return min(fit, key=lambda level: level.experts)

    def elsewhere(self, weights: str, engine: str) -> str | None:
        """The sentence that a level is used where it was not certified; None where it was."""
        if (weights, engine) == (self.weights, self.engine):
            return None
        return (
            f"the level was certified on {self.weights} weights in {self.engine}, this is {weights} in {engine}: it is "
            "used, and the certificate does not speak of it."
        )

    def header(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return asdict(self)

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Certificate:
        """From checked plain values (`HEADER`)."""
        levels = {name: tuple(CertifiedLevel(**one) for one in header[name]) for name in get_args(Loss)}
        return cls(**{**header, **levels, "compensation": tuple(header["compensation"])})


def _up(value: float) -> str:
    """Rounded upwards, to what is still true."""
    return f"{value + 5e-5:.4f}"


def _down(value: float) -> str:
    return f"{value - 5e-5:.4f}"


HEADER = record(checks_of(Certificate))


def check(header: Mapping[str, Any], fingerprint: Tensor) -> Certificate:
    """A certificate from a file's header, of the model whose fingerprint is beside it; ValueError says what is wrong."""
    found = Certificate.from_header(HEADER(header))
    if found.fingerprint != short_digest(fingerprint):
        raise ValueError("the certificate is of another model than the calibration")
    for levels in (found.kl, found.agreement):
        if any(level.risk > level.bound + 1e-9 for level in levels):
            raise ValueError("a certified bound must be at least the measured risk")
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class TextProfile:
    """How a model's routers read the certificate's documents: what a new text can be held against.

    Attributes
    ----------
    usage_LE : Tensor
        float32: each expert's share of a layer's pairs, a mean over documents.
    score_L : Tensor
        float32: mean log routing score of the own choice, likewise.
    usage_range_Q, score_range_Q : Tensor
        float32: `QUANTILES` over the documents of their own distances from these (`distances`).
    """

    usage_LE: Annotated[Tensor, _IN_FLOAT32]
    score_L: Annotated[Tensor, FLOAT32]
    usage_range_Q: Annotated[Tensor, _IN_FLOAT32]
    score_range_Q: Annotated[Tensor, Expected((torch.float32,), 0.0)]

    @classmethod
    def of(cls, usage_ULE: Tensor, score_UL: Tensor) -> TextProfile:
        """From each document's shares and mean scores."""
        usage_LE, score_L = usage_ULE.double().mean(0), score_UL.double().mean(0)
        quantiles = torch.tensor(QUANTILES, dtype=torch.float64)
        ranges = [
            d_U.quantile(quantiles).float() for d_U in distances(usage_ULE, score_UL, usage_LE, score_L)
        ]
        return cls(
            usage_LE=usage_LE.float(),
            score_L=score_L.float(),
            usage_range_Q=ranges[0],
            score_range_Q=ranges[1],
        )


def distances(
    usage_ULE: Tensor, score_UL: Tensor, usage_LE: Tensor, score_L: Tensor
) -> tuple[Tensor, Tensor]:
    """How far each document lies from a profile, float64 [U] each, means over layers.

    Of usage: half the sum of the absolute differences of the shares (total variation: the share of pairs that go to other
    experts than they would in the profile). Of the scores: the absolute difference, in nats. A short document lies farther
    off than a long one of the same kind: compare documents of like length.
    """
    usage_U = (usage_ULE.double() - usage_LE.double()).abs().sum(-1).mean(-1) / 2
    score_U = (score_UL.double() - score_L.double()).abs().mean(-1)
    return usage_U, score_U


def weights_of(model: Any) -> str:
    """What a model's weights are, for a certificate: their dtype, and how they are quantised."""
    config = getattr(model, "config", None)
    quantisation = getattr(config, "quantization_config", None)
    get = quantisation.get if isinstance(quantisation, dict) else partial(getattr, quantisation)
    method = "" if quantisation is None else f" {get('quant_method', 'quantised')}"
    dtype = getattr(model, "dtype", None) or next(model.parameters()).dtype
    return str(dtype).removeprefix("torch.") + method


def merged_digest(digests: Sequence[int]) -> str:
    """Of documents in any order, as a calibration's ``text_digest`` is."""
    return f"{sum(digests) % 2**128:032x}"
