"""The study of docs/results.md on allenai/OLMoE-1B-7B-0924: calibrate, run every policy at every budget, make the report.

    python examples/olmoe_1b_7b.py --calibration-text CALIBRATION.txt --text TEST.txt -o olmoe-results

One command; every finished policy is kept, so that a run that was interrupted goes on where it was. The model (14 GB in
bfloat16) is downloaded unless MODEL is a folder; a GPU with 20 GB of memory is enough. Calibrate on other text than you
measure on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bh_routing import Calibration, calibrate
from bh_routing.calibration.passes import default_window
from bh_routing.cli.common import make_progress
from bh_routing.cli.evaluate import show
from bh_routing.evaluation import RoutingExperimentRunner
from bh_routing.evaluation.figures import to_frame
from bh_routing.models.loading import load_model
from bh_routing.text import TextFile

# Each at every budget of experts per token.
AT_BUDGETS = (
    "topk",
    "topp",
    "minp",
    "threshold",
    "entropy",
    "naee",
    "random",
    "seqtopk",
    "lexi",
    "allocmoe",
    "bh",
    "bh:compensation=mean",
    "bh:compensation=false",
    "topk:compensation=true",
)
ALONE = ("normalised", "uniform", "adaptive", "original")


def policies(budgets: list[float], names: tuple[str, ...] = AT_BUDGETS) -> list[str]:
    """Those without a budget, then every policy budget by budget."""
    at = [f"{name}{',' if ':' in name else ':'}experts={budget:g}" for budget in budgets for name in names]
    return list(ALONE) + at


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="allenai/OLMoE-1B-7B-0924", metavar="MODEL")
    parser.add_argument("--calibration-text", required=True, metavar="FILE")
    parser.add_argument("--text", required=True, action="append", metavar="FILE", help="several times")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2, 3, 4, 5, 6], metavar="N")
    parser.add_argument("--max-tokens", type=int, default=50_000, metavar="N", help="of each text")
    parser.add_argument("--calibration-tokens", type=int, default=500_000, metavar="N")
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)

    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    folder = Path(args.output)
    held = folder / "calibration.safetensors"
    calibration_text = TextFile(args.calibration_text)
    if held.is_file():
        calibration = Calibration.load(held)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        calibration = calibrate(
            model,
            tokenizer,
            calibration_text,
            max_tokens=args.calibration_tokens,
            sensitivity=True,
            sensitivity_tokens=args.calibration_tokens // 4,
        )
        calibration.save(held)
    print(repr(calibration).split("\n")[0])

    with make_progress() as progress:
        bar = progress.add_task("measuring", total=None)
        runner = RoutingExperimentRunner(
            model,
            tokenizer,
            policies(args.budgets),
            {Path(path).name.split(".")[0]: TextFile(path).read() for path in args.text},
            folder,
            calibration=calibration,
            solve_text=next(iter(calibration_text)),
            window=default_window(model),
            batch_tokens=args.batch_tokens,
            max_tokens=args.max_tokens,
            step=lambda done, total, label: progress.update(
                bar, completed=done, total=total, description=label
            ),
        )
        results = runner.run()
    show(results)
    frame = to_frame(results)
    runner.visualize_results(frame)
    print(f"\n{runner.generate_report(frame)}")


if __name__ == "__main__":
    main()
