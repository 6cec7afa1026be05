"""The study of docs/results.md: every policy at every budget on olmoe-nano, on two texts; its tables and plots.

    python benchmarks/experiments.py --data DIR -o results [--only mixed-test] [--write docs/results.md]

DIR holds mixed/ (equal parts of the test files are measured on; budgets and layer profiles are solved on equal parts of the
calibration files) and wikitext2-test.txt.xz. Of each text windows are measured that are spread evenly over it. What is in
the results folder already is not run again, so that the two texts can be run side by side, and the page written afterwards.
With --only the other text's part of the page, and what the harness costs, stay as they are.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import Times, in_turn, ratio
from pages import WINDOW, arguments, markdown_table, mixed_text, publish, spread_windows

from bh_routing import Calibration
from bh_routing.cli.common import make_progress
from bh_routing.evaluation import RoutingExperimentRunner, summarise
from bh_routing.evaluation.report import make_report
from bh_routing.evaluation.report_plots import plots, svg_text
from bh_routing.evaluation.results import ResultsFolder
from bh_routing.evaluation.scoring import score_text
from bh_routing.evaluation.summary import cells as figures
from bh_routing.models import bundled_calibration
from bh_routing.models.loading import load_model
from bh_routing.text import spans

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from olmoe_1b_7b import policies

BUDGETS = [2.0, 3.0, 4.0, 5.0, 6.0]
TEXTS = ("mixed-test", "wikitext2-test")
AGAINST = (  # whom BH is compared with
    "topk:experts={}",
    "topk:compensation=true,experts={}",
    "allocmoe:experts={}",
    "seqtopk:experts={}",
    "lexi:experts={}",
    "topp:experts={}",
    "bh:compensation=mean,experts={}",
    "bh:compensation=false,experts={}",
)
MAX_TOKENS = 32_768  # of each text, unless --max-tokens says otherwise
ROUNDS = 40  # of what the harness costs


def read(tokenizer: Any, data: Path, name: str, tokens: int) -> str:
    """About so many tokens of a text, from places that are spread evenly over it."""
    windows = spread_windows(tokenizer, data, name, tokens)
    return "".join(tokenizer.decode(window_1S[0]) for window_1S in windows)


def run(data: Path, output: Path, name: str, max_tokens: int) -> None:
    """Every policy on one text."""
    model, tokenizer = load_model("olmoe-nano")
    start = time.perf_counter()
    with make_progress() as progress:
        bar = progress.add_task("measuring", total=None)
        runner = RoutingExperimentRunner(
            model,
            tokenizer,
            policies([4.0, 2.0, 3.0, 6.0, 5.0]),
            {name: read(tokenizer, data, name, max_tokens)},
            output / name,
            calibration=Calibration.load(bundled_calibration()),
            solve_text=mixed_text(data, "calibration", 120_000),
            window=WINDOW,
            max_tokens=max_tokens,
            model_id="olmoe-nano",
            step=lambda done, total, label: progress.update(
                bar, completed=done, total=total, description=label
            ),
        )
        results = runner.run()
    print(f"{name}: {len(results)} results, {time.perf_counter() - start:.0f} s")


def overhead(data: Path) -> str:
    """What the harness adds to bare forward passes, and what divergence and telemetry add to that."""
    model, tokenizer = load_model("olmoe-nano")
    ids_N = torch.cat(spread_windows(tokenizer, data, "mixed-test", 16 * WINDOW)).flatten()
    windows = spans(len(ids_N), WINDOW)
    ids_BS = ids_N.view(-1, WINDOW)

    @torch.no_grad()
    def bare() -> None:
        """Forward passes and the loss that perplexity is made of."""
        logits = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        torch.nn.functional.cross_entropy(logits, ids_BS[:, 1:].flatten(), reduction="none")

    def harness() -> None:
        score_text(model, ids_N, windows)

    @torch.no_grad()
    def with_kl() -> None:
        score_text(model, ids_N, windows, reference=lambda ids: model(input_ids=ids, use_cache=False).logits)

    from bh_routing import RoutingIntegration, TopKPolicy

    quiet = RoutingIntegration(model, TopKPolicy(4), collect_stats=False)
    counting = RoutingIntegration(model, TopKPolicy(4))

    def patched(integration: Any) -> Any:
        def call() -> None:
            with integration:
                harness()

        return call

    parts = {
        "bare": bare,
        "harness": harness,
        "kl": with_kl,
        "quiet": patched(quiet),
        "counting": patched(counting),
    }
    times = in_turn(parts, 0.0, rounds=ROUNDS + 2, warm_up=2)
    base = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        ["forward passes and loss", f"{base['bare'] * 1e3:.0f}", ""],
        [
            "the harness (adds guesses, blocks, batching)",
            f"{base['harness'] * 1e3:.0f}",
            _more(times, "harness", "bare"),
        ],
        [
            "with KL divergence",
            f"{base['kl'] * 1e3:.0f}",
            _more(times, "kl", "harness") + " over the harness",
        ],
        ["under top-4, counting nothing", f"{base['quiet'] * 1e3:.0f}", ""],
        [
            "under top-4, with telemetry",
            f"{base['counting'] * 1e3:.0f}",
            _more(times, "counting", "quiet") + " over not counting",
        ],
    ]
    return markdown_table([f"16 windows of {WINDOW} tokens", f"ms, median of {ROUNDS}", "added"], rows)


def _more(times: Times, name: str, than: str) -> str:
    """Median over rounds of the ratio within the round."""
    return f"{ratio(times, name, than) - 1:+.1%}"


def table(output: Path, name: str) -> str:
    """The Markdown table of one text: a row per policy, a column per budget."""
    results = ResultsFolder(output / name).results()
    rows = summarise(results, name)
    by_budget: dict[str, dict[float, dict[str, Any]]] = {}
    alone = []
    for row in rows:
        result = row["result"]
        if result["budget"] is None:
            alone.append(row)
        else:
            by_budget.setdefault(_without_budget(result["policy"]), {})[result["budget"]] = row
    lines = []
    budgets = [b for b in BUDGETS if all(b in found for found in by_budget.values())]
    for policy, found in by_budget.items():
        cells = []
        for budget in budgets:
            row = found[budget]
            mark = {"better": "▼", "worse": "▲", "within noise": "~", "": ""}[row["verdict"]]
            cells.append(f"{row['change'].value:+.1%} {mark}".strip() + f" ({row['experts']:.2f})")
        lines.append((found[4.0]["change"].value, [policy, *cells]))
    header = ["policy", *(f"{b:g} experts" for b in budgets)]
    first = markdown_table(header, [cells for _, cells in sorted(lines, key=lambda line: line[0])])
    others = [
        [
            row["result"]["policy"],
            f"{row['experts']:.2f}",
            f"{row['perplexity']:.2f}",
            ""
            if row["change"] is None
            else f"{row['change'].value:+.1%} [{row['change'].low:+.1%}, {row['change'].high:+.1%}]",
        ]
        for row in alone
    ]
    second = markdown_table(["policy", "experts", "perplexity", "against the full model"], others)
    at_four = [row for row in rows if row["result"]["budget"] == 4.0]
    spent = markdown_table(
        ["policy at 4 experts", "experts", "arithmetic", "MB read", "against the full model"],
        [
            [
                _without_budget(row["result"]["policy"]),
                *figures(row, "experts", "arithmetic", "MB"),
                f"{row['change'].value:+.1%}",
            ]
            for row in sorted(at_four, key=lambda row: row["change"].value)
        ],
    )
    head = rows[0]["result"]
    threads = f"{head['threads']} thread" + ("s" if head["threads"] != 1 else "")
    note = (
        f"{head['tokens']:,} tokens in windows of {head['window']}, no overlap; float32, {threads}; "
        + ", ".join(f"{key} {value}" for key, value in head["versions"].items())
    )
    return f"{first}\n\n{spent}\n\n{second}\n\n{note}."


def noise(output: Path, name: str) -> str:
    """BH against every other policy at each budget, with paired intervals."""
    from bh_routing.evaluation.paired import perplexity_change

    results = {r["policy"]: r for r in ResultsFolder(output / name).results()}
    rows = []
    budgets = [b for b in BUDGETS if all(against.format(f"{b:g}") in results for against in AGAINST)]
    for policy in AGAINST:
        cells = []
        for budget in budgets:
            other = results[policy.format(f"{budget:g}")]
            change = perplexity_change(results[f"bh:experts={budget:g}"]["blocks"], other["blocks"])
            mark = " ~" if change.within_noise else ""
            cells.append(f"{change.value:+.1%} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]{mark}")
        rows.append([_without_budget(policy.format("4")), *cells])
    return markdown_table(["BH against", *(f"{b:g} experts" for b in budgets)], rows)


def _without_budget(policy: str) -> str:
    name, _, body = policy.partition(":")
    rest = ",".join(part for part in body.split(",") if not part.startswith("experts="))
    return f"{name}:{rest}" if rest else name


def main() -> None:
    parser = arguments(__doc__, threads=False, data=True)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N")
    parser.add_argument("--only", choices=TEXTS)
    args = parser.parse_args()
    texts = TEXTS if args.only is None else [args.only]
    for name in texts:
        run(args.data, args.output, name, args.max_tokens)
    if args.write is None:
        return
    for name in texts:
        folder = ResultsFolder(args.output / name)
        publish(args.write, name, table(args.output, name))
        publish(args.write, f"{name}-noise", noise(args.output, name))
        drawn = svg_text(plots(folder.results())[f"pareto-{name}"])
        (args.write.parent / f"results-{name}.svg").write_text(drawn, encoding="utf-8")
        (folder.path / "report.html").write_text(
            make_report(folder.results(), folder.run()), encoding="utf-8"
        )
    if args.only is None:
        publish(args.write, "overhead", overhead(args.data))


if __name__ == "__main__":
    main()
