"""Which engine and which path can do what: one table, here and in docs/support.md. What is not in it is refused.

A path is where a decision is computed and carried out. The paths of one engine agree: where one of them cannot do
something, the engine takes another that can, which the table says by that path's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from .errors import InvalidParameterError

Path = Literal["PyTorch", "one token", "Triton", "vLLM", "llama.cpp"]
Feature = Literal[
    "levels and budgets",
    "p-values per token",
    "widening",
    "mean compensation",
    "linear compensation",
    "token size",
    "min_k = 0",
    "price",
    "phases",
    "levels per request",
]
PATHS: tuple[Path, ...] = get_args(Path)

_YES, _NO, _OTHER = "yes", "no", "PyTorch"
_EVERYWHERE = (_YES,) * len(PATHS)
_NOWHERE = (_NO,) * len(PATHS)

# Feature -> what it is; whether each of `PATHS` has it.
SUPPORT: dict[Feature, tuple[str, tuple[str, ...]]] = {
    "levels and budgets": (
        "`alpha=`, `experts_per_token=`, `max_kl=`, `agreement=`, changed while it runs",
        _EVERYWHERE,
    ),
    "p-values per token": (
        "without a calibration, and procedures that have no table",
        (_YES, _OTHER, _OTHER, _YES, _NO),
    ),
    "widening": ("`max_k` above the model's own top-k", (_YES, _OTHER, _OTHER, _NO, _NO)),
    "mean compensation": ('`compensation="mean"`', _EVERYWHERE),
    "linear compensation": ('`compensation="linear"`', _EVERYWHERE),
    "token size": ('`size="token"`', _EVERYWHERE),
    "min_k = 0": ("tokens without any expert", _EVERYWHERE),
    "price": (
        "`distinct_experts=`, `price_load=`: what the sequences of a decoding step read together",
        (_YES, _OTHER, _OTHER, _YES, _NO),
    ),
    "phases": ("`phases=`: prefill and decoding apart", (_YES, _YES, _YES, _YES, _NO)),
    "levels per request": (
        "a level of its own for each request, or each row of a batch; with a calibration",
        (_YES, _YES, _OTHER, _YES, _NO),
    ),
}


def can(path: Path, feature: Feature) -> bool:
    """Whether a path has a feature, by itself or by the path that it hands over to."""
    return SUPPORT[feature][1][PATHS.index(path)] != _NO


def check(path: Path, features: Iterable[Feature]) -> None:
    """Refuse what a path cannot do.

    Raises
    ------
    InvalidParameterError
        Naming the first such feature, and the paths that have it.

    Examples
    --------
    >>> check("PyTorch", ["token size", "min_k = 0"])
    >>> check("llama.cpp", ["widening"])
    Traceback (most recent call last):
    ...
    bh_routing.errors.InvalidParameterError: llama.cpp does not support widening (`max_k` above the model's own top-k); PyTorch, one token, Triton do.
    """
    for feature in features:
        if can(path, feature):
            continue
        others = ", ".join(other for other in PATHS if can(other, feature))
        raise InvalidParameterError(
            f"{path} does not support {feature} ({SUPPORT[feature][0]}); "
            f"{f'{others} do' if others else 'nothing does yet'}."
        )


def markdown() -> str:
    """The table of docs/support.md."""
    lines = [f"| feature | | {' | '.join(PATHS)} |", "| --- | --- |" + " :---: |" * len(PATHS)]
    lines += [f"| {feature} | {what} | {' | '.join(cells)} |" for feature, (what, cells) in SUPPORT.items()]
    return "\n".join(lines)
