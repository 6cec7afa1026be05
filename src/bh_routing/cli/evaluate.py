"""Run routing policies on the same tokens and compare them: perplexity with paired intervals, experts, time. One result
per policy is appended to OUTPUT/results.jsonl as soon as it is done; a run that was interrupted goes on where it was.

A policy is NAME or NAME:KEY=VALUE,KEY=VALUE, for example topk:k=4, topp:p=0.3, bh:experts=4 (a budget: the level is
solved on the calibration's tokens). `bh-routing evaluate --policies` lists all of them.
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
    parser.add_argument("model", metavar="MODEL", nargs="?", help="olmoe-nano, a folder, or a hub id")
    common.add_flag(parser, "policies", "list the policies and their parameters, and do nothing")
    common.add_config_argument(parser)
    parser.add_argument("--policy", action="append", metavar="POLICY", help="may be given several times")
    parser.add_argument(
        "--text", action="append", metavar="FILE", help="UTF-8 text, plain or compressed; several times"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where results are kept")
    common.add_calibration_argument(parser)
    parser.add_argument(
        "--solve-text",
        metavar="FILE",
        help="calibration text for layer profiles, and for budgets without one",
    )
    common.add_window_argument(parser)
    common.add_number(parser, "stride", "step between windows (default: no overlap)")
    common.add_number(parser, "max-tokens", "only the first N tokens of each text", least=2)
    common.add_number(parser, "batch-tokens", "tokens per forward", default=4096)
    common.add_number(
        parser,
        "streams",
        "score so many windows from different places of a text in step, as if decoded together",
    )
    common.add_flag(parser, "kl", "also KL divergence from the full model (twice the time)")
    common.add_number(
        parser,
        "free-running",
        "also let both models continue 32 prompts of each text by N tokens, greedily and sampled: KL along the full "
        "model's own path, and how long the texts agree",
    )
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.policies:
        _list_policies()
        return
    needs = {
        "model": "MODEL",
        "policy": "--policy",
        "output": "-o FOLDER",
        "text": "--text FILE to measure on",
    }
    for name, option in needs.items():
        if not getattr(args, name):
            raise InvalidParameterError(f"evaluate needs {option}.")
    from ..evaluation.specs import parse_policy

    specs = [parse_policy(text) for text in args.policy]
    calibration = common.load_calibration(args.calibration, args.model, [])

    from ..evaluation.runner import RoutingExperimentRunner
    from ..text import TextFile

    texts = {Path(path).name.split(".")[0]: TextFile(path).read() for path in args.text}
    if len(texts) < len(args.text):
        raise InvalidParameterError(f"texts need different names, got {', '.join(map(str, args.text))}.")
    solve_text = None if args.solve_text is None else TextFile(args.solve_text).read()
    common.check_output(Path(args.output), "folder")
    window = common.window_of(args.model, args.window)
    if args.stride is not None and args.stride > window:
        raise InvalidParameterError(f"stride must be at most the window, {window}, got {args.stride}.")
    model, tokenizer = common.load(args)
    with common.make_progress() as progress:
        bar = progress.add_task("measuring", total=None)

        def step(done: int, total: int, label: str) -> None:
            progress.update(bar, completed=done, total=total, description=label)

        runner = RoutingExperimentRunner(
            model,
            tokenizer,
            list({spec.text: spec for spec in specs}.values()),
            texts,
            args.output,
            calibration=calibration,
            solve_text=solve_text,
            window=window,
            model_id=common.model_name(args.model),
            step=step,
            **common.chosen(args, "stride", "batch_tokens", "max_tokens", "streams", "kl", "seed"),
        )
        results = runner.run()
    show(results)
    print()
    if args.free_running:
        _continue(runner, texts, args.free_running)
    common.print_text(
        f"{common.plural(len(results), 'result')} in {runner.folder.results_path}; `bh-routing report {args.output} -o report.html` makes "
        "a page of them."
    )


def _continue(runner: Any, texts: dict[str, str], num: int) -> None:
    """Both models continue the same prompts; a table per text, and ``free_running.json`` in the folder."""
    from ..evaluation.free_running import PROMPT_TOKENS, PROMPTS, free_running, prompts_of

    policies = [label for label in runner.policies if label != "full"]
    routings = [runner.integration(label) for label in policies]
    kept = {}
    for name, text in texts.items():
        prompts, onward = prompts_of(runner.tokenizer, text, PROMPTS, PROMPT_TOKENS, num)
        with common.make_progress() as progress:
            bar = progress.add_task("continuing", total=4 * PROMPTS * num)
            found = free_running(
                runner.model,
                routings,
                prompts,
                onward,
                seeds=(runner.seed, runner.seed + 1),
                advance=lambda tokens, bar=bar, progress=progress: progress.advance(bar, tokens),  # type: ignore[misc]
            )
        kept[name] = dict(zip(policies, found, strict=True))
        lines = [
            [
                f"{label}, {kind}",
                f"{row['kl']:.4f} ± {2 * row['kl_error']:.4f}",
                f"{row['teacher_forced']:.4f}",
                f"{row['ratio']:.2f}",
                f"{row['agreed']:g}",
                f"{row['same']:.0%}",
            ]
            for label, kinds in kept[name].items()
            for kind, row in kinds.items()
        ]
        columns = ["policy", "KL, own text", "KL, this text", "ratio", "agreed", "same"]
        print_table(f"{name}, continued", columns, lines, spare=("ratio", "same"))
        print()
    write_atomically(runner.folder.path / "free_running.json", json.dumps(kept, indent=2) + "\n")
    common.print_text(
        f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {num} new tokens each, decoded with a cache; sampled with two seeds. KL to "
        "the full model, nats per new token: along its own text (± 2 standard errors over continuations), and along the text "
        "as it goes on; agreed: median number of new tokens until the two texts part; same: texts that do not."
    )
    print()


def _list_policies() -> None:
    from ..evaluation.entries import POLICIES

    for name, entry in POLICIES.items():
        note = f" (inspired by {entry.source}: {entry.inspired})" if entry.inspired else ""
        source = f" ({entry.source})" if entry.source and not note else ""
        common.print_text(f"{name}: {entry.summary}{source}{note}")
        for key, (_, text) in entry.parameters.items():
            print(f"    {key}: {text}")


def show(results: list[dict[str, Any]]) -> None:
    """Tables of what was measured, one per text."""
    from ..evaluation.summary import by_arithmetic, cells, datasets_of, measured_kl, summarise

    def starred(row: dict[str, Any], front: str) -> str:
        return ("* " if row[front] else "  ") + str(row["result"]["policy"])

    for dataset in datasets_of(results):
        rows = summarise(results, dataset)
        kl = measured_kl(rows)
        loads = ["loads"] if rows[0]["result"].get("streams") else []
        left, right = (*loads, "experts", "arithmetic", "MB", "perplexity"), ("s", *kl)
        lines = []
        for row in rows:
            changes = [_interval(row["change"]), _interval(row["against_topk"], row["verdict"])]
            lines.append([starred(row, "front"), *cells(row, *left), *changes, *cells(row, *right)])
        columns = ["policy", *left, "vs full", "vs top-k", *right]
        print_table(dataset, columns, lines, spare=("s", "vs full", "MB", "arithmetic"))
        front = [row["result"]["policy"] for row in rows if row["front"]]
        first = rows[0]["result"]
        common.warn_of_few(dataset, first["tokens"], len(first["blocks"]))
        print()
        common.print_text(
            f"{first['tokens']:,} tokens in windows of {first['window']}, stride {first['stride']}; perplexity per token; "
            "changes of perplexity in % ± half of the 95 % interval (paired bootstrap over 512-token blocks); vs top-k: plain top-k at "
            "the same number of experts, ~ where the interval holds 0. Arithmetic: what experts and compensation multiply, in experts "
            "per token and layer; MB: of both, read for one token alone."
        )
        if loads:
            common.print_text(
                f"Loads: experts that a layer reads in a step of {rows[0]['result']['streams']} windows, from places spread over "
                "the text."
            )
        common.print_text(f"Pareto front (*): {', '.join(front)}.")
        ranked = by_arithmetic(rows)
        if any(abs(row["arithmetic"] - row["experts"]) > 0.005 for row in ranked):
            print()
            columns = ["arithmetic", "experts", "perplexity", *kl]
            print_table(
                f"{dataset}, at equal arithmetic: compare lines beside each other",
                ["policy", *columns],
                [[starred(row, "arithmetic_front"), *cells(row, *columns)] for row in ranked],
            )


def _interval(value: Any, verdict: str = "") -> str:
    if value is None:
        return ""
    if not value.known:
        return f"{value.value:+.1%}"
    mark = "~" if verdict == "within noise" else ""
    return f"{mark}{value.value:+.1%} ± {50 * (value.high - value.low):.1f}"
