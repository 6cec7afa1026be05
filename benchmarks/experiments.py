"""The study of docs/results.md: every policy at every budget on olmoe-nano, on two texts; its tables and plots.

    python benchmarks/experiments.py --data DIR -o results [--only books-valid] [--write docs/results.md]

DIR holds books-valid.txt.xz (its second half is measured on), wikitext2-test.txt.xz and books-calibration.txt.xz (what
budgets and layer profiles are solved on). What is in the results folder already is not run again, so that the two texts
can be run side by side, and the page written afterwards. A page that is not there is made.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pages import markdown_table, write_block

from bh_routing import Calibration
from bh_routing.cli.common import make_progress
from bh_routing.cli.loading import default_calibration, load_model
from bh_routing.evaluation import Dataset, RoutingExperimentRunner, summarise
from bh_routing.evaluation.report import make_report
from bh_routing.evaluation.report_plots import plots
from bh_routing.evaluation.results import ResultsFolder
from bh_routing.evaluation.scoring import cut_text, score_text
from bh_routing.text import TextFile

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from olmoe_1b_7b import policies

BUDGETS = [2.0, 3.0, 4.0, 5.0, 6.0]
TEXTS = ("books-valid", "wikitext2-test")
AGAINST = (  # whom BH is compared with
    "topk:experts={}",
    "topk:compensation=true,experts={}",
    "allocmoe:experts={}",
    "seqtopk:experts={}",
    "lexi:experts={}",
    "topp:experts={}",
    "bh:compensation=false,experts={}",
)
MAX_TOKENS = 50_000  # of each text, unless --max-tokens says otherwise
ROUNDS = 40  # of what the harness costs
WINDOW = 256  # tokens; what olmoe-nano was trained on


PAGE = """\
# Results on olmoe-nano

Every policy at five budgets on the embedded model, on two texts that neither the training nor the calibration saw: the second
half of `books-valid` (two authors who are not in the training text) and the test text of WikiText-2, which is another kind of
text. Budgets are solved, and layers profiled, on `books-calibration`. [experiments.md](experiments.md) says what the policies
and the figures are.

    python benchmarks/experiments.py --data DIR -o results --write docs/results.md

Read a cell as: rise of perplexity over the full model (8 experts), then whether that is better (▼) or worse (▲) than plain
top-k at the same number of experts or within noise of it (~), where the number of experts that the policy realised on this text (in
brackets) is within 2.5 % of top-k's, or where it is better with fewer or worse with more; no mark where more experts bought less loss. Policies in the order of their rise at 4 experts.

## Read plainly

- **On text of the calibration's kind BH is the best rule at every budget**, and spends 1 to 3 % fewer experts than it was given.
  At 4 of 8 experts it loses 0.8 % of perplexity where top-k loses 2.2 %; at 2 experts 5.3 % against 10.0 %. Against
  Alloc-MoE, the best of the others (at 2 a plain threshold is), it is 0.3 % better at 4 and 2.5 % at 2 experts, outside noise at every budget.
- **Most of that is the selection**: without compensation +1.0 % and +6.7 %, ahead of the others too, though at 5 and 6 experts all
  good rules are within half a percent of each other. Compensation does less for plain top-k (10.0 to 8.6 %).
- **On another kind of text compensation does harm.** WikiText-2 is foreign to this model (perplexity 175 instead of 37). The mean outputs
  were fitted on novels, and with them BH is 0.8 % worse than top-k at 4 experts and 4.6 % worse at 2. Without them it is ahead of top-k again,
  level with Alloc-MoE at 2 and 3 experts and a little behind it at 5 and 6. For such text: calibrate on it, or `compensation=False`.
- **Budgets are solved on calibration text.** On WikiText-2 they come out up to 11 % high (4.37 for 4), as for every rule that looks at the
  router's confidence; top-k, SeqTopK, LExI and Alloc-MoE keep theirs. That is what their ▼ there is worth, and the missing marks elsewhere.
- Top-p, entropy buckets (Adaptive-K) and NAEE's ratio lose more than plain top-k at the same number, on both texts; a plain
  threshold on the probability is better than all three.
- **The original design's default** (`original`: p = 1 - softmax, weights that sum to 1) keeps one expert and doubles the perplexity. Making the
  weights sum to 1 (`normalised`) costs 3.6 % with all 8 experts: this model was trained without.

All this is one model of four layers and 7 M parameters. `examples/olmoe_1b_7b.py` is the same study for OLMoE-1B-7B.

## books-valid, second half

<!-- begin books-valid: python benchmarks/experiments.py --data DIR -o results --write docs/results.md -->
<!-- end books-valid -->

![Rise of perplexity against experts per token, books-valid](results-books-valid.svg)

BH with compensation (the default) against others at the same budget: relative difference of perplexity, negative where BH is
better, 95 % interval of a paired bootstrap over 512-token blocks, ~ where it holds 0. The realised numbers of experts differ by
what the first table shows.

<!-- begin books-valid-noise: python benchmarks/experiments.py --data DIR -o results --write docs/results.md -->
<!-- end books-valid-noise -->

## WikiText-2, test

<!-- begin wikitext2-test: python benchmarks/experiments.py --data DIR -o results --write docs/results.md -->
<!-- end wikitext2-test -->

![Rise of perplexity against experts per token, WikiText-2](results-wikitext2-test.svg)

<!-- begin wikitext2-test-noise: python benchmarks/experiments.py --data DIR -o results --write docs/results.md -->
<!-- end wikitext2-test-noise -->

## What the harness costs

<!-- begin overhead: python benchmarks/experiments.py --data DIR -o results --write docs/results.md -->
<!-- end overhead -->
"""


def read(data: Path, name: str) -> str:
    """A text; of books-valid the second half (the first is for choosing)."""
    text = "".join(TextFile(data / f"{name}.txt.xz"))
    return text[text.index("\n", len(text) // 2) + 1 :] if name == "books-valid" else text


def run(data: Path, output: Path, name: str, calibration: Path | None, max_tokens: int) -> None:
    """Every policy on one text."""
    model, tokenizer = load_model("olmoe-nano")
    path = calibration or default_calibration("olmoe-nano")
    if path is None:
        raise SystemExit("olmoe-nano has no calibration here; give --calibration FILE.")
    start = time.perf_counter()
    with make_progress() as progress:
        bar = progress.add_task("measuring", total=None)
        runner = RoutingExperimentRunner(
            model,
            tokenizer,
            policies([4.0, 2.0, 3.0, 6.0, 5.0]),
            [Dataset.from_text(name, read(data, name))],
            output / name,
            calibration=Calibration.load(path),
            solve_text="".join(TextFile(data / "books-calibration.txt.xz"))[:2_000_000],
            window=WINDOW,
            max_tokens=max_tokens,
            model_id="olmoe-nano",
            step=lambda done, total, label: progress.update(
                bar, completed=done, total=total, description=label
            ),
        )
        records = runner.run()
    print(f"{name}: {len(records)} records, {time.perf_counter() - start:.0f} s")


def overhead(data: Path) -> str:
    """What the harness adds to bare forward passes, and what divergence and telemetry add to that."""
    model, tokenizer = load_model("olmoe-nano")
    ids_N = tokenizer(
        read(data, "books-valid")[:60_000], add_special_tokens=False, return_tensors="pt"
    ).input_ids[0]
    ids_N = ids_N[: 16 * WINDOW]
    windows = cut_text(len(ids_N), WINDOW)
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
    times: dict[str, list[float]] = {name: [] for name in parts}
    names = list(parts)
    for turn in range(ROUNDS + 2):  # in turn, two rounds of warm-up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            parts[name]()
            times[name].append(time.perf_counter() - start)
    times = {name: values[2:] for name, values in times.items()}
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


def _more(times: dict[str, list[float]], name: str, than: str) -> str:
    """Median over rounds of the ratio within the round."""
    ratio = statistics.median(a / b for a, b in zip(times[name], times[than], strict=True))
    return f"{ratio - 1:+.1%}"


def table(output: Path, name: str) -> str:
    """The Markdown table of one text: a row per policy, a column per budget."""
    records = ResultsFolder(output / name).records()
    rows = summarise(records, name)
    by_budget: dict[str, dict[float, dict[str, Any]]] = {}
    alone = []
    for row in rows:
        record = row["record"]
        if record["budget"] is None:
            alone.append(row)
        else:
            by_budget.setdefault(_without_budget(record["policy"]), {})[record["budget"]] = row
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
            row["record"]["policy"],
            f"{row['experts']:.2f}",
            f"{row['perplexity']:.2f}",
            ""
            if row["change"] is None
            else f"{row['change'].value:+.1%} [{row['change'].low:+.1%}, {row['change'].high:+.1%}]",
        ]
        for row in alone
    ]
    second = markdown_table(["policy", "experts", "perplexity", "against the full model"], others)
    head = rows[0]["record"]
    threads = f"{head['threads']} thread" + ("s" if head["threads"] != 1 else "")
    note = (
        f"{head['tokens']:,} tokens in windows of {head['window']}, no overlap; float32, {threads}; "
        + ", ".join(f"{key} {value}" for key, value in head["versions"].items())
    )
    return f"{first}\n\n{second}\n\n{note}."


def noise(output: Path, name: str) -> str:
    """BH against every other policy at each budget, with paired intervals."""
    from bh_routing.evaluation.paired import perplexity_change

    records = {r["policy"]: r for r in ResultsFolder(output / name).records()}
    rows = []
    budgets = [b for b in BUDGETS if all(against.format(f"{b:g}") in records for against in AGAINST)]
    for policy in AGAINST:
        cells = []
        for budget in budgets:
            other = records[policy.format(f"{budget:g}")]
            change = perplexity_change(records[f"bh:experts={budget:g}"]["blocks"], other["blocks"])
            mark = " ~" if change.within_noise else ""
            cells.append(f"{change.value:+.1%} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]{mark}")
        rows.append([_without_budget(policy.format("4")), *cells])
    return markdown_table(["BH against", *(f"{b:g} experts" for b in budgets)], rows)


def _without_budget(policy: str) -> str:
    name, _, body = policy.partition(":")
    rest = ",".join(part for part in body.split(",") if not part.startswith("experts="))
    return f"{name}:{rest}" if rest else name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="default: olmoe-nano's own")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N")
    parser.add_argument("--only", choices=TEXTS)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    args = parser.parse_args()
    for name in TEXTS:
        if args.only in (None, name):
            run(args.data, args.output, name, args.calibration, args.max_tokens)
    if args.write is None:
        return
    if not args.write.exists():
        args.write.write_text(PAGE, encoding="utf-8")
    for name in TEXTS:
        folder = ResultsFolder(args.output / name)
        write_block(args.write, name, table(args.output, name))
        write_block(args.write, f"{name}-noise", noise(args.output, name))
        drawn = plots(folder.records())[f"pareto-{name}"]
        (args.write.parent / f"results-{name}.svg").write_text(drawn, encoding="utf-8")
        (folder.path / "report.html").write_text(
            make_report(folder.records(), folder.run()), encoding="utf-8"
        )
    write_block(args.write, "overhead", overhead(args.data))


if __name__ == "__main__":
    main()
