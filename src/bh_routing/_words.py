"""The words that settings take, the sentences that refuse others, and how settings are read from text.

One list for every layer: the functions, the policies, the settings and the command line. Imports nothing of the library
but its errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args

from .errors import InvalidParameterError, InvalidTypeError

Mode = Literal["patch", "analyze"]
WeightRule = Literal["model", "preserve", "sum"]
Clamp = Literal["after", "inside"]
Skip = Literal["auto", "compact", "zero"]
Backend = Literal["auto", "torch", "triton"]
Statistic = Literal["contribution", "logprob", "logit"]
Size = Literal["token", "sensitivity", "deviation", "output"]
CompensationForm = Literal["none", "mean", "linear"]
NullSet = Literal["unselected", "all", "trimmed"]
Scope = Literal["model", "layer"]
Estimator = Literal["empirical", "kde", "normal"]
Phase = Literal["prefill", "decode"]
Bound = Literal["betting", "hoeffding-bentkus"]


def check_word(name: str, value: object, words: Any) -> None:
    """Raise `InvalidParameterError` unless the value is one of the words of a ``Literal``, or of a sequence.

    >>> check_word("clamp", "outside", Clamp)
    Traceback (most recent call last):
    ...
    bh_routing.errors.InvalidParameterError: clamp must be 'after' or 'inside', got 'outside'.
    """
    known = get_args(words) or tuple(words)
    if not isinstance(value, str) or value not in known:
        *first, last = map(repr, known)
        listed = f"{', '.join(first)} or {last}" if first else last
        raise InvalidParameterError(f"{name} must be {listed}, got {value!r}.")


def check_whole(**numbers: tuple[int | None, int]) -> None:
    """Raise `InvalidParameterError` unless each is None or an integer of at least its second number.

    >>> check_whole(steps=(0, 1))
    Traceback (most recent call last):
    ...
    bh_routing.errors.InvalidParameterError: steps must be an integer of at least 1, got 0.
    """
    for name, (value, least) in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InvalidParameterError(f"{name} must be an integer of at least {least}, got {value!r}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What follows an unknown name: ``did you mean 'alpha'?``, or all the known ones.

    >>> did_you_mean("alhpa", ["alpha", "min_k"])
    "did you mean 'alpha'?"
    >>> did_you_mean("x", ["alpha", "min_k"])
    'known are alpha, min_k.'
    """
    listed = list(known)
    longer = [
        one for one in listed if len(name) > 3 and one.startswith(name)
    ]  # a name that was cut short comes first
    near = longer or get_close_matches(name, listed, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(listed) or 'none'}."


def aligned(rows: Iterable[Sequence[object]]) -> str:
    """Lines of text in columns, as reprs print them.

    >>> print(aligned([("router", "experts"), ("gate", 64)]))
    router  experts
    gate    64
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


class Option(NamedTuple):
    """A field of settings that text can say: one line of help, what reads the text, the field where its name differs."""

    help: str
    read: Callable[[str], Any] = str
    field: str = ""


class Wanted(NamedTuple):
    """What a person says of the compensation.

    Attributes
    ----------
    form : "none", "mean", "linear" or None
        None: the best that the calibration holds.
    scale : float or None
        0 to 1; None: what the calibration measured for the form.
    insists : bool
        Whether it is an error where the calibration does not hold it.
    """

    form: CompensationForm | None
    scale: float | None
    insists: bool


def wanted(compensation: Any) -> Wanted:
    """Read what a person says of the compensation.

    None: what the calibration holds. True, a form ("none", "mean", "linear"), a scale from 0 to 1, or both: a pair,
    or text with a colon. False, "none" and a scale of 0 are none at all.

    Raises
    ------
    InvalidParameterError, InvalidTypeError
        For anything else.

    Examples
    --------
    >>> wanted("linear:0.9")
    Wanted(form='linear', scale=0.9, insists=True)
    >>> wanted(0).form
    'none'
    """
    form, scale = _parts(compensation)
    if scale is not None and not 0.0 <= scale <= 1.0:
        raise InvalidParameterError(
            f"compensation must be true, false or a scale from 0 to 1, got {compensation!r}."
        )
    if form is not None:
        check_word("compensation", form, CompensationForm)
    if scale == 0.0 or form == "none":
        if form == "none" and scale:
            raise InvalidParameterError(
                f"compensation 'none' has no scale, got {compensation!r}; leave it out."
            )
        return Wanted("none", None, False)
    return Wanted(form, scale, compensation is not None)


def _parts(compensation: Any) -> tuple[Any, float | None]:
    """Form and scale, neither of them checked."""
    if compensation is None or compensation is True:
        return None, None
    if compensation is False:
        return "none", None
    if isinstance(compensation, (int, float)):
        return None, float(compensation)
    if isinstance(compensation, str):
        form, colon, rest = compensation.partition(":")
        if not colon:
            return form, None
        try:
            return form, float(rest)
        except ValueError:
            raise InvalidParameterError(
                f"compensation must have a number after the colon, as in linear:0.9, got {compensation!r}."
            ) from None
    if isinstance(compensation, (tuple, list)) and len(compensation) == 2:
        form, scale = compensation
        if isinstance(scale, (int, float)) and not isinstance(scale, bool):
            return form, float(scale)
    raise InvalidTypeError(
        "compensation must be true, false, a form ('none', 'mean' or 'linear'), a scale from 0 to 1, or both as a "
        f"pair, got {compensation!r}."
    )
