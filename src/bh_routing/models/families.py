"""The table of model families: which of transformers' Mixture-of-Experts families were tested, and what holds for each.

``families.json`` is made by ``make conformance`` (scripts/families_table.py), for the transformers versions at both
ends of the supported range; what is not in it was not tested.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["COLUMNS", "RECORD", "cells", "families", "record", "version_key"]

RECORD = Path(__file__).with_name("families.json")

# family: its folder in transformers. scoring, weights: what the weights are made of (with "*": something else takes
# part in the selection), and what the model does with the selected ones. shrink, widen, skip: fewer experts per token,
# more than the model's own, dropped experts that cost nothing. status: "tested", "refused" or "failed".
COLUMNS = ("family", "router", "scoring", "weights", "shrink", "widen", "skip", "status")

Families = Mapping[str, Mapping[str, str]]


def record() -> dict[str, dict[str, dict[str, str]]]:
    """{transformers version: {family: {column: text, "note": why it is not simply tested}}}, as it is shipped."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def version_key(version: str) -> tuple[int, ...]:
    """To sort versions by.

    >>> sorted(["5.23.0", "5.9.1"], key=version_key)
    ['5.9.1', '5.23.0']
    """
    return tuple(int(part) for part in re.findall(r"\d+", version))


def families(version: str, recorded: Mapping[str, Families] | None = None) -> tuple[str, Families]:
    """The newest tested version that is not newer than ``version`` (else the oldest), and its families."""
    recorded = record() if recorded is None else recorded
    versions = sorted(recorded, key=version_key)
    nearest = [v for v in versions if version_key(v) <= version_key(version)] or versions[:1]
    return nearest[-1], recorded[nearest[-1]]


def cells(name: str, found: Mapping[str, str]) -> Sequence[str]:
    """A family's cells, one per `COLUMNS`.

    >>> cells("olmoe", {"router": "OlmoeTopKRouter", "status": "tested"})
    ['olmoe', 'OlmoeTopKRouter', '-', '-', '-', '-', '-', 'tested']
    """
    return [name, *(found.get(column, "-") for column in COLUMNS[1:])]
