"""Print the model families of transformers that were tested, and what is supported in each."""

from __future__ import annotations

import argparse
from importlib import metadata

from . import common
from .tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "family", nargs="?", default="", metavar="NAME", help="only families with NAME in theirs"
    )


def run(args: argparse.Namespace) -> None:
    from ..models.families import COLUMNS, cells, families

    installed = metadata.version("transformers")
    version, known = families(installed)
    found = {name: fields for name, fields in known.items() if args.family in name}
    if not found:
        raise common.InvalidParameterError(
            f"no Mixture-of-Experts family of transformers {version} has {args.family!r} in its name; "
            "`bh-routing families` lists them all."
        )
    rows = [cells(name, fields) for name, fields in found.items()]
    print_table(None, COLUMNS, rows, text=len(COLUMNS), spare=("router", "shrink"))
    notes = [f"{name}: {fields['note']}" for name, fields in found.items() if fields["note"]]
    if any("*" in fields.get("scoring", "") for fields in found.values()):
        notes.insert(
            0, "*: something beside that score takes part in the selection (a bias, groups, a factor)"
        )
    print("\n" + "".join(f"{note}\n" for note in notes))
    tested = sum(fields["status"] == "tested" for fields in found.values())
    common.print_text(
        f"{len(found)} families, {tested} of them tested, with transformers {version} ({installed} is installed). "
        "`make conformance` in a checkout makes the table of the installed version."
    )
