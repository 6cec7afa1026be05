"""Make one self-contained HTML page of what `bh-routing evaluate` has put into a folder. It opens without a network."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InvalidParameterError
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="FOLDER", help="where `bh-routing evaluate` put its results")
    parser.add_argument(
        "-o", "--output", default="report.html", metavar="FILE.html", help="default report.html"
    )
    parser.add_argument("--calibration", metavar="FILE", help="adds plots of the null and of the p-values")


def run(args: argparse.Namespace) -> None:
    from .._files import write_atomically
    from ..evaluation.report import make_report
    from ..evaluation.results import ResultsFolder

    common.check_output(Path(args.output), "file")
    folder = ResultsFolder(args.results)
    if not folder.run_path.is_file():
        raise InvalidParameterError(
            f"expected results of `bh-routing evaluate` in {args.results}, got no run.json there."
        )
    calibration = None
    if args.calibration is not None:
        from ..calibration.calibration import Calibration

        calibration = Calibration.load(args.calibration)
    results = folder.results()
    page = make_report(results, folder.run(), calibration)
    write_atomically(args.output, page)
    common.print_text(f"{args.output}: {common.plural(len(results), 'result')}, {len(page) / 1e3:.0f} kB.")
