"""Print the model families of the installed transformers, and what is supported in each."""

from __future__ import annotations

import argparse

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="?", metavar="NAME", help="only families whose name contains NAME")


def run(args: argparse.Namespace) -> None:
    from ..models.families import families, installed_version, table

    rows = [family for family in families() if args.family is None or args.family in family.name]
    if not rows:
        raise common.InvalidParameterError(
            f"no Mixture-of-Experts family of transformers {installed_version()} has {args.family!r} in its name; "
            "`bh-routing families` lists them all."
        )
    print(table(rows))
    print()
    tested = sum(family.status == "tested" for family in rows)
    common.print_text(f"{len(rows)} families in transformers {installed_version()}, {tested} of them tested.")
