"""Which model families are supported: found in the installed transformers, with the record of what was tested.

`scan` finds every Mixture-of-Experts family by structure, without importing any model. `families` joins it with
`families.json`, which the conformance suite writes (``make conformance``): a family that only a newer
transformers has is listed too, as untested.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError

RECORD = Path(__file__).with_name("families.json")

# A family has a class of experts, or records router logits of one of its classes.
_EXPERTS = re.compile(r"^@use_experts_implementation|^class \w*Experts\(", re.MULTILINE)
_RECORDER = re.compile(r"[\"']router_logits[\"']: *\[?\s*OutputRecorder\((\w+)")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Attributes
    ----------
    name : str
        The family's folder in transformers.
    router : str
        Router class.
    scoring, weights : str
        What the weights are made of (with "*": something else takes part in the selection), and what the model
        does with the selected ones.
    shrink, widen, skip : str
        "yes", "no" or "-" (not known): fewer experts per token, more than the model's own, dropped experts
        that cost nothing.
    status : str
        "tested", "refused", "untested" or "failed".
    versions : tuple of str
        The transformers versions in which it was tested.
    note : str
        Why, where it is not simply tested.
    """

    name: str
    router: str = "-"
    scoring: str = "-"
    weights: str = "-"
    shrink: str = "-"
    widen: str = "-"
    skip: str = "-"
    status: str = "untested"
    versions: tuple[str, ...] = ()
    note: str = ""


COLUMNS = ("family", "router", "scoring", "weights", "shrink", "widen", "skip", "status")


def scan(root: Path | None = None) -> dict[str, str]:
    """{family: router class} of every Mixture-of-Experts family in a transformers installation.

    Parameters
    ----------
    root : Path, optional
        Folder of transformers' models; default: the installed one.

    Raises
    ------
    MissingDependencyError
        If transformers is not installed.
    """
    if root is None:
        spec = importlib.util.find_spec("transformers")
        if spec is None or spec.origin is None:
            raise MissingDependencyError(
                "the families are those of transformers, which is not installed; pip install transformers."
            )
        root = Path(spec.origin).parent / "models"
    found: dict[str, str] = {}
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        recorded = _RECORDER.search(text)
        if _EXPERTS.search(text) or recorded:
            found.setdefault(path.parent.name, recorded.group(1) if recorded else "-")
    return found


def record() -> dict[str, dict[str, dict[str, Any]]]:
    """What the conformance suite found: {transformers version: {family: fields of `Family`}}."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def families(
    found: Mapping[str, str] | None = None,
    recorded: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    version: str | None = None,
) -> list[Family]:
    """Every family of a transformers version with what is known about it, in order of name.

    Parameters
    ----------
    found : mapping, optional
        From `scan`; default: of the installed transformers.
    recorded : mapping, optional
        Default: `record`.
    version : str, optional
        The transformers version; default: the installed one. Of several records of a family the newest that is
        not newer than it counts.
    """
    if version is None:
        version = installed_version()
    found = scan() if found is None else found
    recorded = record() if recorded is None else recorded
    versions = sorted(recorded, key=version_key)
    rows = []
    for name, router in sorted(found.items()):
        known = [v for v in versions if name in recorded[v]]
        if not known:
            rows.append(
                Family(name=name, router=router, note="not in any transformers version that was tested")
            )
            continue
        nearest = [v for v in known if version_key(v) <= version_key(version)] or known[:1]
        newest = recorded[nearest[-1]][name]
        fields = {key: value for key, value in newest.items() if key in Family.__dataclass_fields__}
        same = tuple(v for v in known if recorded[v][name]["status"] == newest["status"])
        rows.append(Family(**{"router": router, **fields, "name": name, "versions": same}))
    return rows


def version_key(version: str) -> tuple[int, ...]:
    """To sort versions by."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def installed_version() -> str:
    """Version of the installed transformers."""
    return metadata.version("transformers")


def row(family: Family) -> tuple[str, ...]:
    """The family's cells, one per `COLUMNS`."""
    return (
        family.name,
        family.router,
        family.scoring,
        family.weights,
        family.shrink,
        family.widen,
        family.skip,
        " ".join((family.status, ", ".join(family.versions))).strip(),
    )


def table(rows: Iterable[Family]) -> str:
    """The families as aligned text, one line each, and below it why a family is not simply tested."""
    rows = list(rows)
    lines = [COLUMNS, *(row(family) for family in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    if any(family.scoring.endswith("*") for family in rows):
        text += ["", "* something beside that score takes part in the selection (a bias, groups, a factor)"]
    notes = [f"{family.name}: {family.note}" for family in rows if family.note]
    return "\n".join(text + (["", *notes] if notes else []))


__all__ = ["COLUMNS", "Family", "families", "installed_version", "record", "row", "scan", "table"]
