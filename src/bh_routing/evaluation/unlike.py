"""How unlike the text of a certificate another text is, by how the model's own routers read both.

Shape legend: U documents, L routed layers, E experts, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..calibration.calibration import Calibration
from ..calibration.certificate import distances
from ..errors import CertificateError
from .document_losses import Documents, read_documents


def unlike(
    model: Any,
    tokenizer: Any,
    documents: Iterable[str | tuple[str, str]],
    calibration: Calibration,
    *,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> dict[str, dict[str, float]]:
    """How unlike the certificate's text this one is, by how the model's routers read it: for people, no test.

    Returns
    -------
    dict
        ``"usage"`` (share of pairs that go to other experts) and ``"score"`` (mean log routing score, nats): the median
        over these documents of their distances from the certificate's text (``here``), 5 %, median and 95 % of the
        certificate's own documents' distances (``low``, ``median``, ``high``), and the share of these documents beyond the
        last (``beyond``; 0.05 for text of the same kind).

    Raises
    ------
    CertificateError
        Without a certificate.
    """
    held, profile = calibration.certificate, calibration.text_profile
    if held is None or profile is None:
        raise CertificateError(
            "a text is compared with that of a certificate, and this calibration has none; run `bh-routing certify`."
        )
    read = Documents.read(documents, calibration.seed)
    sums = read_documents(
        model,
        tokenizer,
        read,
        calibration,
        [],
        window=held.window,
        document_tokens=held.document_tokens,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    usage_ULE, score_UL = sums.profile()
    found = distances(usage_ULE, score_UL, profile.usage_LE, profile.score_L)
    ranges = {"usage": profile.usage_range_Q, "score": profile.score_range_Q}
    return {
        name: {
            "here": float(each_U.median()),
            **dict(zip(("low", "median", "high"), range_Q.tolist(), strict=False)),
            "beyond": float((each_U > range_Q[2]).double().mean()),
        }
        for (name, range_Q), each_U in zip(ranges.items(), found, strict=True)
    }
