"""Two calibrations of one model on different texts, as one."""

from __future__ import annotations

from dataclasses import replace

from ..errors import CalibrationMismatchError
from .calibration import Calibration

MUST_AGREE = (
    "model_id",
    "layers",
    "num_experts",
    "temperature",
    "trim",
    "seed",
    "window",
    "reservoir_size",
)


def merge(first: Calibration, second: Calibration) -> Calibration:
    """Add up counts and moments, average the compensation's strength by tokens, and keep the tokens with the smallest
    hashes (`Calibration.merge`)."""
    for name in MUST_AGREE:
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise CalibrationMismatchError(
                f"only calibrations of one model and one setting can be merged, but {name} differs: "
                f"{ours!r} and {theirs!r}."
            )
    if (first.moments is None) != (second.moments is None):
        raise CalibrationMismatchError(
            "only calibrations that hold the same parts can be merged: one holds the experts' outputs, the "
            "other does not."
        )
    moments = reservoir = None
    if first.moments is not None and second.moments is not None:
        moments = first.moments + second.moments
    if first.reservoir is not None and second.reservoir is not None:
        reservoir = (first.reservoir + second.reservoir).smallest(first.reservoir_size)
    tokens = first.tokens + second.tokens
    strength = (
        first.tokens * first.compensation_strength + second.tokens * second.compensation_strength
    ) / max(1, tokens)
    digest = (int(first.text_digest, 16) + int(second.text_digest, 16)) % 2**128
    return replace(
        first,
        histograms={
            kind: {name: held + second.histograms[kind][name] for name, held in sets.items()}
            for kind, sets in first.histograms.items()
        },
        moments=moments,
        reservoir=reservoir,
        tokens=tokens,
        documents=first.documents + second.documents,
        text_digest=f"{digest:032x}",
        compensation_strength=strength,
        _cache={},
    )
