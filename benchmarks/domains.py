"""How near a routed olmoe-nano stays to itself in every domain: against every other rule, at equal experts and at equal
arithmetic, on foreign text, and with a calibration of another domain.

    python benchmarks/domains.py --data DIR [-o FOLDER] [--only PART ...] [--write docs/results.md]

DIR holds wikitext2-test.txt.xz and mixed/. Levels are set on a domain's valid text, so that the mean number of experts there
is the budget (on WikiText-2 and at equal arithmetic: on equal parts of all valid texts), and reported on its test text.
Equal arithmetic is compared on valid text, by which the rank that ships was chosen. The calibrations of other ranks and
those of one domain alone are made here, of fewer tokens than the one that ships, and kept in a folder of FOLDER (default:
build/domains) that is this calibration's, like every figure: sums over blocks of 512 tokens. What is there is not made again.
Intervals: 95 %, paired bootstrap over blocks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import DOMAINS, WINDOW, arguments, domain_file, markdown_table, publish, spread_windows
from torch import Tensor

from bh_routing import Calibration, RoutingIntegration, calibrate
from bh_routing.evaluation.figures import costs
from bh_routing.evaluation.paired import BLOCK
from bh_routing.evaluation.specs import make_routing
from bh_routing.evaluation.workbench import Workbench
from bh_routing.models import bundled_calibration
from bh_routing.models.loading import load_model
from bh_routing.stats.divergence import kl_divergence
from bh_routing.text import in_turn
from bh_routing.text.hashing import short_digest

BUDGETS, ARITHMETIC = (4.0, 3.0, 2.0), (5.0, 4.0, 3.0)
OWN, FOREIGN = "own", "wikitext2-test"
TOKENS = {"valid": 4096, "test": 16_384, FOREIGN: 16_384, "choosing": 8192}
RIVALS = {  # name -> the rule at every budget
    name: tuple(f"{name}:experts={budget}" for budget in (2, 3, 4, 5))
    for name in ("topp", "minp", "threshold", "seqtopk", "allocmoe", "lexi", "naee", "entropy")
}
TOP_K = tuple(f"topk:k={k}" for k in (1, 2, 3, 4, 5, 6))
CALIBRATION_TOKENS = 120_000  # of a calibration that is made here
RANKS = (16, 32, 64)
RESAMPLES = 2000
Blocks = np.ndarray  # sums per block, or [resamples] of a figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One routing on one text: nats per block of text, and of divergence from the model itself; tokens; what it costs."""

    loss_J: Blocks
    kl_J: Blocks
    tokens_J: Blocks
    experts: float = math.nan
    arithmetic: float = math.nan
    kilobytes: float = math.nan


class Bench:
    """A model, its calibrations by name, and windows [B, S] of every text."""

    def __init__(self, data: Path, folder: Path, calibration: Path) -> None:
        self.model, self.tokenizer = load_model("olmoe-nano", dtype="float32")
        stated = json.dumps(TOKENS).encode() + calibration.read_bytes()
        self.data, self.folder = data, folder / short_digest(stated)
        self.made = {OWN: Calibration.load(calibration)}
        self.benches: dict[str, Workbench] = {}
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def profile_windows(self) -> list[Tensor]:
        return spread_windows(self.tokenizer, self.data, "mixed-calibration", 8192)

    def windows(self, text: str, tokens: int) -> Tensor:
        return torch.cat(spread_windows(self.tokenizer, self.data, text, tokens))

    @property
    def rank(self) -> int:
        """Of the linear compensation that ships."""
        linear = self.made[OWN].linear
        assert linear is not None
        return int(linear.rank_L.max())

    def calibration(self, name: str) -> Calibration:
        """Of that name; of another rank, or of one domain alone, it is made when it is first asked for."""
        if name not in self.made:
            path = self.folder / f"{name}.safetensors"
            if not path.is_file():
                print(f"calibrating: {name}", flush=True)
                domains = (name,) if name in DOMAINS else DOMAINS
                texts = [domain_file(self.data, domain, "calibration") for domain in domains]
                rank = self.rank if name in DOMAINS else int(name.removeprefix("rank "))
                asked = {
                    "window": WINDOW,
                    "max_tokens": CALIBRATION_TOKENS,
                    "sensitivity": True,
                    "rank": rank,
                }
                with torch.inference_mode(False):  # it takes gradients
                    made = calibrate(self.model, self.tokenizer, lambda: in_turn(texts), **asked)
                made.save(path)
            self.made[name] = Calibration.load(path)
        return self.made[name]

    def integration(self, rule: str, calibration: str = OWN) -> RoutingIntegration:
        if calibration not in self.benches:
            held = self.calibration(calibration)
            self.benches[calibration] = Workbench(self.model, held, self.profile_windows)
        return make_routing(rule, self.benches[calibration])

    def cached(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def keep(self, name: str, held: dict[str, Any]) -> None:
        temporary = self.folder / f"{name}.tmp"
        temporary.write_text(json.dumps(held), encoding="utf-8")
        temporary.replace(self.folder / f"{name}.json")

    @torch.inference_mode()
    def level(self, text: str, form: str, budget: float, calibration: str = OWN) -> str:
        """BH with a form of compensation at the nominal budget whose mean on a text is the budget, as a rule."""
        # The default of min_k, also where the nominal budget is a little off.
        floor = 0 if form == "linear" and budget <= 2.0 else 1

        def rule(nominal: float) -> str:
            return f"bh:compensation={form},experts={nominal:.4f},min_k={floor}"

        held, key = self.cached("levels"), f"{text} {calibration} {rule(budget)}"
        if key not in held:
            windows_BS, nominal = self.windows(text, TOKENS["valid"]), budget
            for _ in range(2):
                integration = self.integration(rule(nominal), calibration)
                with integration:
                    for part in windows_BS.split(8):
                        self.model.model(input_ids=part, use_cache=False)
                nominal = min(8.0, nominal * budget / integration.telemetry.mean_experts_per_token)
            held[key] = nominal
            self.keep("levels", held)
        return rule(held[key])

    @torch.inference_mode()
    def measure(self, text: str, tokens: int, asked: dict[str, tuple[str, str]]) -> dict[str, Run]:
        """Label -> what (rule, calibration) does on a text; the model itself is "full"."""
        held = self.cached(text)
        known = {label: f"{rule} of {calibration}" for label, (rule, calibration) in asked.items()}
        todo = {known[label]: self.integration(*asked[label]) for label in asked if known[label] not in held}
        if todo:
            print(f"{text}: {len(todo)} routings", flush=True)
            sums: dict[str, list[Any]] = {key: [] for key in ("full", *todo)}
            for ids_BS in self.windows(text, tokens).split(4):
                own = self._log_probs(ids_BS)
                sums["full"] += _block_sums(own, own, ids_BS)
                for key, integration in todo.items():
                    with integration:
                        routed = self._log_probs(ids_BS)
                    sums[key] += _block_sums(own, routed, ids_BS)
            for key, blocks in sums.items():
                held[key] = {"blocks": blocks}
                if key != "full":
                    counted = todo[key].telemetry.to_dict()
                    cost = costs(self.model, todo[key], counted["layers"])
                    held[key] |= {
                        "experts": counted["total"]["mean_experts"],
                        "arithmetic": cost["arithmetic_per_token"],
                        "kilobytes": cost["bytes_per_token"] / 1e3,
                    }
            self.keep(text, held)
        return {label: _run(held[key]) for label, key in ({"full": "full"} | known).items()}

    def _log_probs(self, ids_BS: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1)


def _run(held: dict[str, Any]) -> Run:
    loss_J, kl_J, tokens_J = np.asarray(held["blocks"]).T
    costs = {name: value for name, value in held.items() if name != "blocks"}
    return Run(loss_J=loss_J, kl_J=kl_J, tokens_J=tokens_J, **costs)


def _block_sums(own: Tensor, routed: Tensor, ids_BS: Tensor) -> list[list[float]]:
    """[nats, divergence, tokens] of every window, which is a block."""
    assert ids_BS.shape[1] == BLOCK
    nats_BS = -routed.gather(-1, ids_BS[:, 1:].unsqueeze(-1)).squeeze(-1).double()
    kl_BS = kl_divergence(own, routed).double()
    return [[float(n.sum()), float(k.sum()), n.numel()] for n, k in zip(nats_BS, kl_BS, strict=True)]


# -- figures with intervals --------------------------------------------------------------------------------------


class Figures:
    """Figures of one text: a value of all blocks, and of every resample of them."""

    def __init__(self, runs: dict[str, Run]) -> None:
        self.runs, self.full = runs, runs["full"]
        num = len(self.full.tokens_J)
        self.draws_RJ = np.random.default_rng(0).multinomial(num, np.full(num, 1.0 / num), size=RESAMPLES)
        self.draws_RJ = np.concatenate((np.ones((1, num)), self.draws_RJ))  # the first is the text itself

    def mean(self, sums_J: Blocks) -> Blocks:
        """Per token, of the text and of every resample."""
        found: Blocks = (self.draws_RJ @ sums_J) / (self.draws_RJ @ self.full.tokens_J)
        return found

    def rise(self, run: Run) -> Blocks:
        """Relative rise of perplexity over the model itself."""
        found: Blocks = np.expm1(self.mean(run.loss_J - self.full.loss_J))
        return found

    def kl(self, run: Run) -> Blocks:
        """Millinats per token."""
        return 1e3 * self.mean(run.kl_J)

    def at(self, rules: tuple[str, ...], experts: float) -> Run:
        """A rule at a number of experts: block by block a line between its two nearest levels, or through them beyond."""
        runs = sorted((self.runs[rule] for rule in rules), key=lambda run: run.experts)
        place = min(max(sum(run.experts <= experts for run in runs), 1), len(runs) - 1)
        low, high = runs[place - 1], runs[place]
        share = (experts - low.experts) / (high.experts - low.experts)
        loss_J, kl_J = ((1 - share) * getattr(low, n) + share * getattr(high, n) for n in ("loss_J", "kl_J"))
        return Run(loss_J=loss_J, kl_J=kl_J, tokens_J=low.tokens_J, experts=experts)


def cell(figure_R: Blocks, spec: str) -> str:
    """The value with its interval."""
    low, high = np.percentile(figure_R[1:], [2.5, 97.5])
    return f"{format(figure_R[0], spec)} [{format(low, spec)}, {format(high, spec)}]"


# -- the tables --------------------------------------------------------------------------------------------------


def of_domain(bench: Bench, domain: str) -> Figures:
    """Everything on a domain's test text: levels of BH are those of its valid text, other rules are curves."""
    ours = {f"linear at {b:g}": bench.level(f"{domain}-valid", "linear", b) for b in BUDGETS}
    ours |= {f"mean at {b:g}": bench.level(f"{domain}-valid", "mean", b) for b in BUDGETS}
    others = [*TOP_K, *chain.from_iterable(RIVALS.values())]
    asked = ours | dict(zip(others, others, strict=True))
    return Figures(
        bench.measure(f"{domain}-test", TOKENS["test"], {label: (rule, OWN) for label, rule in asked.items()})
    )


def by_domain(bench: Bench) -> str:
    lines = []
    for domain in DOMAINS:
        figures = of_domain(bench, domain)
        for budget in BUDGETS:
            run, mean = figures.runs[f"linear at {budget:g}"], figures.runs[f"mean at {budget:g}"]
            beside = figures.at(TOP_K, run.experts)
            others = {name: figures.kl(figures.at(rules, run.experts))[0] for name, rules in RIVALS.items()}
            best = min(others, key=others.__getitem__)
            lines.append(
                [
                    f"{domain}, {budget:g}",
                    f"{run.experts:.2f}",
                    cell(figures.rise(run) / figures.rise(beside), ".0%"),
                    cell(figures.kl(run), ".1f"),
                    f"{figures.kl(mean)[0]:.1f}",
                    f"{figures.kl(beside)[0]:.1f}",
                    f"{others[best]:.1f} ({best})",
                    f"{run.arithmetic:.2f}",
                    f"{run.kilobytes:.0f}",
                ]
            )
    header = [
        "text, budget",
        "experts",
        "share of top-k's rise",
        "KL, millinats",
        "`mean`",
        "top-k",
        "best other rule",
        "arithmetic",
        "kB read",
    ]
    return f"{markdown_table(header, lines)}\n\n{TOKENS['test']:,} tokens of each test text, in windows of {WINDOW}."


def foreign(bench: Bench) -> str:
    asked = {rule: (rule, OWN) for rule in TOP_K}
    for form in ("mean", "linear"):
        asked |= {f"{form} at {b:g}": (bench.level("mixed-valid", form, b), OWN) for b in BUDGETS}
    figures = Figures(bench.measure(FOREIGN, TOKENS[FOREIGN], asked))
    lines = []
    for budget in BUDGETS:
        for label in (f"topk:k={budget:g}", f"mean at {budget:g}", f"linear at {budget:g}"):
            run = figures.runs[label]
            beside = figures.at(TOP_K, run.experts)
            less = ["", ""]
            if not label.startswith("topk"):
                less = [
                    cell(figures.rise(run) - figures.rise(beside), "+.2%"),
                    f"{figures.kl(beside)[0]:.1f}",
                ]
            lines.append(
                [
                    label.replace("topk:k=", "top-k at "),
                    *_costs(run),
                    cell(figures.rise(run), "+.2%"),
                    less[0],
                    cell(figures.kl(run), ".1f"),
                    less[1],
                ]
            )
    header = ["routing", *COSTS, "perplexity", "rise less top-k's", "KL, millinats", "top-k's KL"]
    tokens = int(figures.full.tokens_J.sum())
    perplexity = math.exp(figures.full.loss_J.sum() / tokens)
    return f"{markdown_table(header, lines)}\n\n{TOKENS[FOREIGN]:,} tokens; the model itself: perplexity {perplexity:.2f}."


COSTS = ("experts", "arithmetic", "kB read")


def _costs(run: Run) -> list[str]:
    return [f"{run.experts:.2f}", f"{run.arithmetic:.2f}", f"{run.kilobytes:.0f}"]


def at_equal_arithmetic(bench: Bench) -> str:
    """Every form with as many experts as leave experts and compensation together the same arithmetic."""
    text, asked = "mixed-valid", {}
    rows: list[str] = []
    forms = {"mean": ("mean", OWN)} | {f"rank {rank}": ("linear", f"rank {rank}") for rank in RANKS}
    for arithmetic in ARITHMETIC:
        rows.append(f"top-k at {arithmetic:g}")
        asked[rows[-1]] = (f"topk:k={arithmetic:g}", OWN)
        for label, (form, calibration) in forms.items():
            rows.append(f"{label} at {arithmetic:g}")
            experts = experts_for(bench, form, calibration, arithmetic)
            if experts >= 1.0:
                asked[rows[-1]] = (bench.level(text, form, experts, calibration), calibration)
    figures = Figures(bench.measure(text, TOKENS["choosing"], asked))
    lines = []
    for label in rows:
        run = figures.runs.get(label)
        lines.append(
            [label, "", "not reached", "", "", ""]
            if run is None
            else [label, *_costs(run), cell(figures.rise(run), "+.2%"), cell(figures.kl(run), ".1f")]
        )
    table = markdown_table(["routing, arithmetic", *COSTS, "perplexity", "KL, millinats"], lines)
    return f"{table}\n\n{TOKENS['choosing']:,} tokens, equal parts of the six valid texts."


def experts_for(bench: Bench, form: str, calibration: str, arithmetic: float) -> float:
    """How many experts a form leaves at this arithmetic: its cost is linear in the dropped pairs."""
    integration = bench.integration(f"bh:compensation={form},experts=4", calibration)
    layers = integration.plan.layers
    each = [sum(p.numel() for p in layer.experts.parameters()) / layer.context.empty for layer in layers]
    added = [integration.compensations.get(layer.path) for layer in layers]
    at = [
        sum(
            0.0 if c is None else c.cost(dropped).multiplications / n
            for c, n in zip(added, each, strict=True)
        )
        for dropped in (0.0, 8.0)
    ]
    fixed, slope = at[0] / len(layers), (at[1] - at[0]) / 8.0 / len(layers)
    return round((arithmetic - fixed - 8.0 * slope) / (1.0 - slope), 3)


def crossed(bench: Bench) -> str:
    """Divergence at 4 experts with a calibration of one domain on the text of each."""
    sources, columns = (*DOMAINS, OWN), []
    for used in DOMAINS:
        asked = {source: (bench.level(f"{used}-valid", "linear", 4.0, source), source) for source in sources}
        figures = Figures(bench.measure(f"{used}-test", TOKENS["test"], asked | {"top-4": ("topk:k=4", OWN)}))
        columns.append(
            [
                f"{figures.kl(run)[0]:.1f} ({run.experts:.2f})"
                for run in (figures.runs[label] for label in [*sources, "top-4"])
            ]
        )
    names = [*DOMAINS, "all six (ships)", "top-4"]
    lines = [[name, *cells] for name, cells in zip(names, zip(*columns, strict=True), strict=True)]
    return markdown_table(["calibrated on", *DOMAINS], lines)


PARTS = {
    "domains": by_domain,
    "equal-arithmetic": at_equal_arithmetic,
    "foreign": foreign,
    "crossed": crossed,
}


def main() -> None:
    parser = arguments(__doc__, threads=False, data=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/domains"), metavar="FOLDER")
    parser.add_argument("--calibration", type=Path, default=bundled_calibration(), metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    bench = Bench(args.data, args.output, args.calibration)
    for part in args.only:
        publish(args.write, part, PARTS[part](bench))


if __name__ == "__main__":
    main()
