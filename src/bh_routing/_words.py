"""The words that settings take, the sentences that refuse others, and how settings are read from text.

One list for every layer: the functions, the policies, the settings and the command line. Imports nothing of the library
but its errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args

from .errors import InvalidParameterError

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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What follows an unknown name: ``did you mean 'alpha'?``, or all the known ones.

    >>> did_you_mean("alhpa", ["alpha", "min_k"])
    "did you mean 'alpha'?"
    >>> did_you_mean("x", ["alpha", "min_k"])
    'known are alpha, min_k.'
    """
    listed = list(known)
    near = get_close_matches(name, listed, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(listed) or 'none'}."


class Option(NamedTuple):
    """A field of settings that text can say: one line of help, what reads the text, the field where its name differs."""

    help: str
    read: Callable[[str], Any] = str
    field: str = ""
