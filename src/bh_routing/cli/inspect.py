"""Print what there is: the plan of a model (every router with path, class, experts, top_k, score function and
normalisation, and what becomes of dropped experts; nothing is patched), or the content of a calibration file.
"""

from __future__ import annotations

import argparse

from . import common
from .calibrate import show_calibration
from .certify import show_certificate
from .tables import print_table

DROPPED = {"registry": "skipped", "wrapper": "in front", "zero": "weight 0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL|FILE.safetensors", help="a model, or a calibration file")
    parser.add_argument("--plot", metavar="OUT", help="of a calibration: draw it to OUT (.png, .svg, .pdf)")
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.model.endswith(".safetensors"):
        _inspect_calibration(args)
        return
    if args.plot is not None:
        raise common.InvalidParameterError(
            f"--plot draws a calibration: expected a FILE.safetensors, got {args.model!r}."
        )
    from ..patching import make_plan, skip_mode

    model, _ = common.load(args)
    plan = make_plan(model)
    common.print_text(common.describe_model(args.model, model))
    found = [skip_mode(layer, "auto") for layer in plan.layers]
    rows = [row | {"dropped": DROPPED[mode]} for row, (mode, _) in zip(plan.rows(), found, strict=True)]
    print_table(None, [*rows[0]], [[str(v) for v in row.values()] for row in rows], text=2, spare=("class",))
    print()
    common.print_text(
        "weights: none = the selected experts' scores as they are; renormalised = rescaled to a fixed sum."
    )
    common.print_text("widen: whether max_k may exceed top_k.")
    common.print_text(
        "dropped: what becomes of a dropped expert. skipped = it is not computed; in front = neither, its tokens are taken "
        "out in front of the experts; weight 0 = it is computed, and costs what it did."
    )
    for reason in dict.fromkeys(reason for _, reason in found if reason is not None):
        common.print_text(f"weight 0: {reason}.")


def _inspect_calibration(args: argparse.Namespace) -> None:
    from ..calibration.calibration import Calibration

    calibration = Calibration.load(args.model)
    if args.plot is not None:
        from ..calibration.plots import plot_calibration

        plot_calibration(calibration, args.plot)
    show_calibration(calibration)
    if calibration.certificate is not None:
        print()
        show_certificate(calibration)
    if args.plot is not None:
        print()
        common.print_text(f"drawn to {args.plot}")
