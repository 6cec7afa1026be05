"""Run tasks of lm-evaluation-harness under routing policies (needs the package lm_eval). A policy is written as for
`bh-routing evaluate`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .._files import write_atomically
from ..errors import InvalidParameterError
from . import common
from .tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="olmoe-nano, a folder, or a hub id")
    parser.add_argument("--policy", action="append", metavar="POLICY", help="several times; default: full")
    parser.add_argument("--tasks", required=True, metavar="TASK,TASK", help="hellaswag,lambada_openai,...")
    parser.add_argument("--include-path", metavar="FOLDER", help="a folder of one's own task files")
    common.add_calibration_argument(parser)
    common.add_number(parser, "limit", "only the first N items of each task")
    common.add_number(parser, "num-fewshot", "examples before each item", least=0)
    common.add_number(parser, "batch-size", "items per forward", default=8)
    parser.add_argument("-o", "--output", metavar="FILE.json", help="also write the results there")
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from ..evaluation.specs import parse_policy

    policies = [parse_policy(text).text for text in args.policy or ["full"]]
    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    if not tasks:
        raise InvalidParameterError(f"tasks must be names with commas between them, got {args.tasks!r}.")

    from ..evaluation.lm_eval import evaluate, register

    if args.output:
        common.check_output(Path(args.output), "file")
    register()  # what is missing is said before the model is loaded
    model, tokenizer = common.load(args)
    rows = evaluate(
        model,
        tokenizer,
        policies,
        tasks,
        calibration=common.calibration_file(args.calibration, args.model),
        **common.chosen(args, "include_path", "limit", "num_fewshot", "batch_size", "seed"),
    )
    for task, metrics in rows[0]["results"].items():
        cells = [
            [
                row["policy"],
                f"{row['mean_experts_per_token']:.2f}",
                *(f"{row['results'][task][m]:.4f}" for m in metrics),
            ]
            for row in rows
        ]
        print_table(task, ["policy", "experts", *metrics], cells)
        _compare(rows, task)
    if args.output:
        write_atomically(args.output, json.dumps({"model": args.model, "results": rows}, indent=2) + "\n")


def _compare(rows: list[dict[str, Any]], task: str) -> None:
    """Each policy against the full model, item by item."""
    lines = [
        [
            f"{row['policy']}, {metric}",
            str(told["only_here"]),
            str(told["only_full"]),
            f"{told['p']:.3g}",
        ]
        for row in rows
        if row["policy"] != "full"
        for metric, told in row["against_full"].get(task, {}).items()
    ]
    if lines:
        print()
        print_table(
            f"{task}, against full (McNemar's exact test)", ["policy", "only here", "only full", "p"], lines
        )
