"""The command line over a YAML file of options over the defaults."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._words import did_you_mean
from ..errors import InvalidParameterError


def with_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None, path: str) -> argparse.Namespace:
    """The command line again, over a YAML file of options, over the defaults.

    Raises
    ------
    InvalidParameterError
        For what is no YAML, an unknown option, or a value that the option cannot take.
    """
    import yaml

    try:
        held = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidParameterError(f"{path} cannot be read as YAML: {error}.") from None
    if not isinstance(held, dict):
        raise InvalidParameterError(f"expected options as key: value in {path}, got {type(held).__name__}.")
    command = parser.parse_args(argv).parser
    actions = {a.dest: a for a in command._actions if a.dest not in ("help", "config")}
    defaults = {name: action.default for name, action in actions.items()}
    values = {}
    for key, value in held.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise InvalidParameterError(f"unknown option {key!r} in {path}; {did_you_mean(name, actions)}")
        values[name] = _read(actions[name], key, value, path)
    for action in actions.values():
        action.default = argparse.SUPPRESS
    given = parser.parse_args(argv)
    for group in command._mutually_exclusive_groups:
        members = [action.dest for action in group._group_actions]
        if any(name in given for name in members):
            values = {name: value for name, value in values.items() if name not in members}
    return argparse.Namespace(**(defaults | values | vars(given)))


def _read(action: argparse.Action, key: str, value: Any, path: str) -> Any:
    """A value of a YAML file, read as the option reads its text."""
    several = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
    listed = value if isinstance(value, list) else [value]
    wrong = InvalidParameterError(f"cannot read {key}: {value!r} in {path}: {action.help}.")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise wrong
        return value
    if (len(listed) != 1 and not several) or value is None:
        raise wrong
    read: Any = action.type or str
    try:
        found = [read(str(item)) for item in listed]
    except argparse.ArgumentTypeError as error:
        raise InvalidParameterError(f"{key} in {path}: {error}.") from None
    except ValueError:
        raise wrong from None
    return found if several else found[0]
