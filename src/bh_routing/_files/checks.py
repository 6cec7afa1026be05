"""What a value that came out of a file must be: small checks, put together, that give the value back or raise ValueError.

>>> check = record({"name": text(), "size": whole(1)}, {"tags": listed(text())})
>>> check({"name": "a", "size": 0})
Traceback (most recent call last):
...
ValueError: size must be a whole number of at least 1, got 0
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, get_origin, get_type_hints

Check = Callable[[Any], Any]

LONGEST = 2**53  # whole numbers beyond it are no counts of anything, and lose digits in other programs


def read_json(content: str | bytes) -> Any:
    """What a JSON text holds; ValueError for whatever is wrong with it: also NaN, and nesting without an end."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(content, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def defined(value: Any) -> Any:
    """The same with None for what JSON does not know (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: defined(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [defined(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    """A value in a sentence, short."""
    if isinstance(value, (list, tuple, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value if not isinstance(value, str) else value[:60])


def _expect(what: str, value: Any, held: bool) -> Any:
    if not held:
        raise ValueError(f"must be {what}, got {shown(value)}")
    return value


def text(longest: int = 1 << 20) -> Check:
    """A string that can be written as UTF-8."""

    def check(value: Any) -> Any:
        _expect("text", value, isinstance(value, str) and len(value) <= longest)
        _expect("text that UTF-8 can hold", value, not any("\ud800" <= c <= "\udfff" for c in value))
        return value

    return check


def one_of(*words: Any) -> Check:
    """One of these, of the same type."""
    what = " or ".join(map(repr, words))
    return lambda value: _expect(
        what, value, any(value == word and type(value) is type(word) for word in words)
    )


def whole(least: int = 0, most: int = LONGEST) -> Check:
    """An integer of this range, and no bool."""
    upper = "" if most == LONGEST else f" and at most {most}"
    what = f"a whole number of at least {least}{upper}"
    return lambda value: _expect(what, value, type(value) is int and least <= value <= most)


def number(least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf) -> Check:
    """A finite number of this range; ``above`` is a bound that is not reached."""
    bounds = [
        f"{word} {b:g}"
        for word, b in (("at least", least), ("above", above), ("at most", most))
        if math.isfinite(b)
    ]
    what = "a finite number" + (f" {' and '.join(bounds)}" if bounds else "")

    def check(value: Any) -> Any:
        # compared, not converted: an integer may be too large for a float
        sound = type(value) in (int, float) and value == value and abs(value) <= 1.7e308
        return _expect(what, value, sound and least <= value <= most and value > above)

    return check


def optional(check: Check) -> Check:
    """That, or None."""
    return lambda value: None if value is None else check(value)


def either(*checks: Check) -> Check:
    """What passes one of these."""

    def check(value: Any) -> Any:
        sentences = []
        for each in checks:
            try:
                return each(value)
            except ValueError as error:
                sentences.append(str(error))
        raise ValueError(sentences[-1])

    return check


def listed(check: Check, least: int = 0, most: int = LONGEST) -> Check:
    """A list of such values; its length within this range."""
    lengths = f"{least} or more" if most == LONGEST else f"{least} to {most}" if least != most else f"{least}"

    def inner(value: Any) -> Any:
        _expect(
            f"a list of {lengths}", value, isinstance(value, (list, tuple)) and least <= len(value) <= most
        )
        return [_within(f"[{i}]", check, item) for i, item in enumerate(value)]

    return inner


def mapping(check: Check, key: Check | None = None) -> Check:
    """A mapping of text to such values."""
    read_key = key or text()

    def inner(value: Any) -> Any:
        _expect("a mapping", value, isinstance(value, dict))
        return {read_key(name): _within(f"[{name!r}]", check, item) for name, item in value.items()}

    return inner


def record(
    required: Mapping[str, Check], more: Mapping[str, Check] | None = None, *, others: bool = False
) -> Check:
    """A mapping with these fields, of which ``more`` may be absent; ``others``: what is not named is let through."""
    known = {**required, **(more or {})}

    def inner(value: Any) -> Any:
        _expect("a mapping", value, isinstance(value, dict))
        if absent := [name for name in required if name not in value]:
            raise ValueError(f"{absent[0]} is missing")
        if not others and (unknown := [name for name in value if name not in known]):
            raise ValueError(f"{shown(unknown[0])} is no field of it")
        return {n: _within(str(n), known[n], v) if n in known else v for n, v in value.items()}

    return inner


def _within(place: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        sentence = str(error)
        joint = "" if sentence.startswith("[") else " " if sentence.startswith("must") else "."
        raise ValueError(f"{place}{joint}{sentence}") from None


def checks_of(kind: type[Any]) -> dict[str, Any]:
    """What the fields of a class are annotated with, by name: a check, or what else a file wants to know of them.

    >>> class Point:
    ...     x: Annotated[float, number(0.0)]
    ...     name: str
    >>> sorted(checks_of(Point))
    ['x']
    """
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}


def unique(values: Iterable[Any], what: str) -> None:
    """Raise unless no two are the same."""
    held = list(values)
    if len(set(held)) != len(held):
        raise ValueError(f"{what} must differ")
