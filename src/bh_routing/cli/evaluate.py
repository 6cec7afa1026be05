"""Run routing policies on the same tokens and compare them: perplexity with paired intervals, experts, time. One record
per policy is appended to OUTPUT/results.jsonl as soon as it is done; a run that was interrupted goes on where it was.

A policy is NAME or NAME:KEY=VALUE,KEY=VALUE, for example topk:k=4, topp:p=0.3, bh:experts=4 (a budget: the level is
solved on the calibration's tokens). `bh-routing evaluate --policies` lists all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import InvalidParameterError
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="olmoe-nano, a folder, or a hub id")
    parser.add_argument(
        "--policies", action="store_true", help="list the policies and their parameters, and do nothing"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="the same options from a YAML file")
    parser.add_argument("--policy", action="append", metavar="POLICY", help="may be given several times")
    parser.add_argument(
        "--text", action="append", metavar="FILE", help="UTF-8 text, plain or compressed; several times"
    )
    parser.add_argument(
        "--dataset",
        action="append",
        metavar="NAME",
        help="wikitext, lambada, hellaswag, a hub id, or NAME=FILE.jsonl of one's own rows; several times",
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where results are kept")
    parser.add_argument(
        "--calibration", metavar="FILE", help="olmoe-nano comes with one, `none` turns it off"
    )
    parser.add_argument(
        "--solve-text",
        metavar="FILE",
        help="calibration text for layer profiles, and for budgets without one",
    )
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens per window (default: the context, at most 512)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="step between windows (default: no overlap)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="only the first N tokens of each text")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each data set")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="tokens per forward (default 4096)")
    parser.add_argument(
        "--kl", action="store_true", help="also KL divergence from the full model (twice the time)"
    )
    parser.add_argument(
        "--no-telemetry", action="store_true", help="do not count experts: quality and time only"
    )
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.policies:
        _list_policies()
        return
    if args.config:
        _read_config(args)
    for name, option in (("model", "MODEL"), ("policy", "--policy"), ("output", "-o FOLDER")):
        if not getattr(args, name):
            raise InvalidParameterError(f"evaluate needs {option}.")
    if not args.text and not args.dataset:
        raise InvalidParameterError("evaluate needs something to measure on: --text FILE or --dataset NAME.")
    from ..evaluation.specs import parse_policy
    from .loading import check_device, check_dtype, load_model

    specs = [parse_policy(text) for text in args.policy]
    check_device(args.device)
    check_dtype(args.dtype)
    calibration = common.load_calibration(args.calibration, args.model, [])

    from ..calibration.passes import default_window
    from ..evaluation.datasets import Dataset, load_dataset
    from ..evaluation.runner import RoutingExperimentRunner
    from ..text import TextFile

    data = [Dataset.from_text(_stem(path), TextFile(path).read()) for path in args.text or []]
    data += [load_dataset(name, limit=args.limit) for name in args.dataset or []]
    solve_text = None if args.solve_text is None else TextFile(args.solve_text).read()
    model, tokenizer = load_model(args.model, device=args.device, dtype=args.dtype)
    with common.make_progress() as progress:
        bar = progress.add_task("measuring", total=None)

        def step(done: int, total: int, label: str) -> None:
            progress.update(bar, completed=done, total=total, description=label)

        runner = RoutingExperimentRunner(
            model,
            tokenizer,
            list({spec.text: spec for spec in specs}.values()),
            data,
            args.output,
            calibration=calibration,
            solve_text=solve_text,
            window=args.window or default_window(model),
            stride=args.stride,
            batch_tokens=args.batch_tokens or 4096,
            max_tokens=args.max_tokens,
            kl=args.kl,
            telemetry=not args.no_telemetry,
            seed=args.seed,
            model_id=common.model_name(args.model),
            step=step,
        )
        records = runner.run()
    show(records)
    print()
    common.print_text(
        f"{len(records)} records in {runner.folder.records_path}; `bh-routing report {args.output} -o report.html` makes "
        "a page of them."
    )


def _stem(path: str) -> str:
    return Path(path).name.split(".")[0]


def _read_config(args: argparse.Namespace) -> None:
    """Fill in what the command line does not give from a YAML file of the same names."""
    import yaml

    try:
        held = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidParameterError(f"{args.config} cannot be read as YAML: {error}.") from error
    if not isinstance(held, dict):
        raise InvalidParameterError(
            f"expected options as key: value in {args.config}, got {type(held).__name__}."
        )
    known = {k for k in vars(args) if k not in ("config", "policies", "command", "run", "parser")}
    for key, value in held.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise InvalidParameterError(
                f"unknown option {key!r} in {args.config}; expected some of {', '.join(sorted(known))}."
            )
        if name in ("policy", "text", "dataset"):
            value = [value] if isinstance(value, str) else list(value)
        if getattr(args, name) in (None, False, args.parser.get_default(name)):
            setattr(args, name, value)


def _list_policies() -> None:
    from ..evaluation.entries import ENTRIES, INSPIRED

    for name, entry in ENTRIES.items():
        note = f" (inspired by {entry.source}: {INSPIRED[name]})" if name in INSPIRED else ""
        source = f" ({entry.source})" if entry.source and not note else ""
        common.print_text(f"{name}: {entry.summary}{source}{note}")
        for key, (_, text) in entry.parameters.items():
            print(f"    {key}: {text}")


def show(records: list[dict[str, Any]]) -> None:
    """Tables of what was measured, one per data set."""
    from ..evaluation.summary import other_datasets, summarise, text_datasets

    console = common.make_console()
    for dataset in text_datasets(records):
        rows = summarise(records, dataset)
        kl = any(row["record"]["kl"] is not None for row in rows)
        table = common.make_table(
            dataset, "policy", "experts", "perplexity", "vs full", "vs top-k", *(["KL"] if kl else []), "s"
        )
        for row in rows:
            record = row["record"]
            experts = row["experts"]
            table.add_row(
                ("* " if row["front"] else "  ") + record["policy"],
                "" if experts is None else f"{experts:.2f}",
                "inf" if row["perplexity"] is None else f"{row['perplexity']:.3f}",
                _interval(row["change"]),
                _interval(row["against_topk"], row["verdict"]),
                *([f"{record['kl']:.4f}"] if kl else []),
                f"{record['seconds']:.1f}",
            )
        common.print_table(console, table)
        front = [row["record"]["policy"] for row in rows if row["front"]]
        first = rows[0]["record"]
        print()
        common.print_text(
            f"{first['tokens']:,} tokens in windows of {first['window']}, stride {first['stride']}; perplexity per token; "
            "changes of perplexity in % ± half of the 95 % interval (paired bootstrap over 512-token blocks); vs top-k: plain top-k at "
            "the same number of experts, ~ where the interval holds 0."
        )
        if front:
            common.print_text(f"Pareto front (*): {', '.join(front)}.")
    for dataset in other_datasets(records):
        held = [r for r in records if r["dataset"] == dataset]
        keys = [k for k in ACCURACIES if held[0].get(k) is not None]
        table = common.make_table(dataset, "policy", "experts", *(ACCURACIES[k] for k in keys))
        for record in held:
            experts = record["mean_experts_per_token"]
            table.add_row(
                record["policy"],
                "" if experts is None else f"{experts:.2f}",
                *(f"{record[k]:.4g}" for k in keys),
            )
        common.print_table(console, table)


ACCURACIES = {
    "last_word_accuracy": "last word",
    "last_word_perplexity": "perplexity",
    "choice_accuracy": "accuracy",
    "choice_accuracy_normalised": "by length",
}


def _interval(value: Any, verdict: str = "") -> str:
    if value is None:
        return ""
    mark = "~" if verdict == "within noise" else ""
    return f"{mark}{value.value:+.1%} ± {50 * (value.high - value.low):.1f}"
