"""What stands in for dropped experts: fidelity and perplexity of its forms, at equal experts and at equal arithmetic.

    python benchmarks/compensation.py --data DIR -o FOLDER --rank16 FILE --text-alone FILE [--write docs/results.md]

DIR holds books-valid.txt.xz, wikitext2-test.txt.xz and mixed/. Levels are solved on the first half of books-valid, so that
the mean number of experts there is the budget, and equal arithmetic is compared there, by which the default rank was chosen;
reported on are its second half, WikiText-2 and two texts of mixed/. The two
FILEs are made by the command of olmoe-nano's calibration (docs/calibration.md) with --rank 16, and with --no-robust-fit.
Figures are sums over blocks of 512 tokens, kept in FOLDER: what is there is not measured again. Intervals: 95 %, paired
bootstrap over blocks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import WINDOW, arguments, halves, markdown_table, publish
from torch import Tensor

from bh_routing import BHRoutingIntegration, Calibration, RoutingIntegration, TopKPolicy
from bh_routing.evaluation.figures import costs
from bh_routing.evaluation.paired import BLOCK
from bh_routing.models import bundled_calibration
from bh_routing.models.loading import load_model
from bh_routing.stats.divergence import kl_divergence
from bh_routing.text import TextFile, cut_windows, evenly

BUDGETS, ARITHMETIC = (4.0, 3.0, 2.0), (5.0, 4.0, 3.0)
PAGE_BLOCKS = {"books": "fidelity-books", "wikitext2-test": "fidelity-wikitext2"}
MIXED = ("dialogue-test", "encyclopaedia-test")
TOKENS = {"solving": 8192, "choosing": 16384, "books": 65536, "wikitext2-test": 16384} | dict.fromkeys(
    MIXED, 16384
)
RESAMPLES = 2000
Blocks = np.ndarray  # sums per block, or [resamples] of a figure


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A row of a table: a compensation of a calibration at a budget of experts, or plain top-k."""

    label: str
    budget: float
    calibration: str = ""
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        return f"{self.label} at {self.budget:g}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One routing on one text: nats per block of text, and of divergence from the model itself; tokens; what it costs."""

    loss_J: Blocks
    kl_J: Blocks
    tokens_J: Blocks
    experts: float
    arithmetic: float
    kilobytes: float


class Bench:
    """A model, its calibrations, and windows [B, S] of every text."""

    def __init__(self, data: Path, folder: Path, calibrations: dict[str, Calibration]) -> None:
        self.model, self.tokenizer = load_model("olmoe-nano")
        self.data, self.folder, self.calibrations = data, folder, calibrations
        self.nominal: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def windows(self, text: str) -> Tensor:
        """Blocks of adjacent windows, evenly over a text."""
        if text in ("solving", "choosing", "books"):
            source: Any = halves(self.data / "books-valid.txt.xz")[text == "books"]
        elif text in MIXED:
            source = TextFile(self.data / "mixed" / f"{text}.jsonl.xz")
        else:
            source = TextFile(self.data / f"{text}.txt.xz").read()
        every = [w for w in cut_windows(self.tokenizer, source, WINDOW) if w.shape[1] == WINDOW]
        per_block = BLOCK // WINDOW
        starts = evenly(range(0, len(every) - per_block + 1, per_block), TOKENS[text] // BLOCK)
        return torch.cat([every[start + i] for start in starts for i in range(per_block)])

    def integration(self, routing: Routing, nominal: float) -> RoutingIntegration:
        if not routing.calibration:
            return RoutingIntegration(self.model, TopKPolicy(int(routing.budget)))
        calibration = self.calibrations[routing.calibration]
        settings = dict(routing.settings)
        return BHRoutingIntegration(
            self.model, alpha=None, calibration=calibration, experts_per_token=nominal, **settings
        )

    @torch.inference_mode()
    def solve(self, routing: Routing) -> float:
        """The nominal budget at which the mean on the choosing text is the budget."""
        if routing.key in self.nominal or not routing.calibration:
            return self.nominal.get(routing.key, routing.budget)
        windows_BS, nominal = self.windows("solving"), routing.budget
        for _ in range(2):
            integration = self.integration(routing, nominal)
            with integration:
                for part in windows_BS.split(16):
                    self.model.model(input_ids=part, use_cache=False)
            nominal *= routing.budget / integration.telemetry.mean_experts_per_token
        self.nominal[routing.key] = nominal
        return nominal

    @torch.inference_mode()
    def measure(self, text: str, routings: list[Routing]) -> dict[str, Run]:
        """All routings on a text; the model itself is "full"."""
        path = self.folder / f"{text}.json"
        held: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        todo = {r.key: self.integration(r, self.solve(r)) for r in routings if r.key not in held}
        if todo:
            sums: dict[str, list[Any]] = {key: [] for key in ("full", *todo)}
            for ids_BS in self.windows(text).split(BLOCK // WINDOW * 4):
                own = self._log_probs(ids_BS)
                sums["full"] += _block_sums(own, own, ids_BS)
                for key, integration in todo.items():
                    with integration:
                        routed = self._log_probs(ids_BS)
                    sums[key] += _block_sums(own, routed, ids_BS)
            for key, blocks in sums.items():
                held[key] = {"blocks": blocks, "experts": 8.0, "arithmetic": 8.0, "bytes": math.nan}
                if key != "full":
                    counted = todo[key].telemetry.to_dict()
                    cost = costs(self.model, todo[key], counted["layers"])
                    held[key]["experts"] = counted["total"]["mean_experts"]
                    held[key]["arithmetic"], held[key]["bytes"] = (
                        cost["arithmetic_per_token"],
                        cost["bytes_per_token"],
                    )
            path.write_text(json.dumps(held))
        found = {}
        for key, one in held.items():
            loss_J, kl_J, tokens_J = np.asarray(one["blocks"]).T
            found[key] = Run(
                loss_J=loss_J,
                kl_J=kl_J,
                tokens_J=tokens_J,
                experts=one["experts"],
                arithmetic=one["arithmetic"],
                kilobytes=one["bytes"] / 1e3,
            )
        return found

    def _log_probs(self, ids_BS: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1)


def _block_sums(own: Tensor, routed: Tensor, ids_BS: Tensor) -> list[list[float]]:
    """[nats, divergence, tokens] of every block."""
    nats_BS = -routed.gather(-1, ids_BS[:, 1:].unsqueeze(-1)).squeeze(-1).double()
    kl_BS = kl_divergence(own, routed).double()
    rows = BLOCK // WINDOW
    return [
        [float(n.sum()), float(k.sum()), n.numel()]
        for n, k in zip(nats_BS.split(rows), kl_BS.split(rows), strict=True)
    ]


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
        return (self.draws_RJ @ sums_J) / (self.draws_RJ @ self.full.tokens_J)

    def rise(self, run: Run) -> Blocks:
        """Relative rise of perplexity over the model itself."""
        return np.expm1(self.mean(run.loss_J - self.full.loss_J))

    def kl(self, run: Run) -> Blocks:
        """Millinats per token."""
        return 1e3 * self.mean(run.kl_J)

    def top_k_at(self, experts: float) -> Run:
        """Plain top-k, interpolated linearly between whole numbers of experts."""
        low = math.floor(experts)
        share = experts - low
        a, b = self.runs[f"top-k at {low}"], self.runs.get(f"top-k at {low + 1}")
        if b is None:
            return a
        mixed = {
            name: (1 - share) * getattr(a, name) + share * getattr(b, name) for name in ("loss_J", "kl_J")
        }
        return Run(**mixed, tokens_J=a.tokens_J, experts=experts, arithmetic=experts, kilobytes=math.nan)


def cell(figure_R: Blocks, spec: str) -> str:
    """The value with its interval."""
    low, high = np.percentile(figure_R[1:], [2.5, 97.5])
    return f"{format(figure_R[0], spec)} [{format(low, spec)}, {format(high, spec)}]"


def _costs(run: Run) -> list[str]:
    return [f"{run.experts:.2f}", f"{run.arithmetic:.2f}", f"{run.kilobytes:.0f}"]


COSTS = ("experts", "arithmetic", "kB read")

TOP_K = [Routing(label="top-k", budget=float(k)) for k in (5, 4, 3, 2, 1)]


def forms(budget: float) -> list[Routing]:
    """Mean, the linear form that ships, and, at equal arithmetic, that of rank 16."""
    own = "olmoe-nano's own"
    return [
        Routing(label="mean", budget=budget, calibration=own, settings=(("compensation", "mean"),)),
        Routing(label="linear, rank 64", budget=budget, calibration=own, settings=_floor(budget)),
        Routing(label="linear, rank 16", budget=budget, calibration="rank 16", settings=_floor(budget)),
    ]


def _floor(budget: float) -> tuple[tuple[str, Any], ...]:
    """`min_k` as its default has it at this budget, also where the nominal budget is a little off."""
    return (("min_k", 0 if budget <= 2.0 else 1),)


def fidelity(bench: Bench, text: str) -> str:
    """Equal experts: perplexity and divergence beside top-k at the same mean number."""
    whole = TOP_K
    rows = [r for budget in BUDGETS for r in forms(budget)[:2]]
    runs = bench.measure(text, whole + rows)
    figures, lines = Figures(runs), []
    for budget in BUDGETS:
        for routing in (Routing(label="top-k", budget=budget), *forms(budget)[:2]):
            run = runs[routing.key]
            beside = figures.top_k_at(run.experts)
            rise_R, beside_R = figures.rise(run), figures.rise(beside)
            last = cell(rise_R / beside_R, ".0%") if text == "books" else cell(rise_R - beside_R, "+.2%")
            same = routing.label == "top-k"
            kl = [cell(figures.kl(run), ".1f"), "" if same else f"{figures.kl(beside)[0]:.1f}"]
            lines.append([routing.key, *_costs(run), cell(rise_R, "+.2%"), "" if same else last, *kl])
    than = "share of top-k's rise" if text == "books" else "rise less top-k's"
    header = ["routing", *COSTS, "perplexity", than, "KL, millinats", "top-k's KL"]
    tokens = int(figures.full.tokens_J.sum())
    perplexity = math.exp(figures.full.loss_J.sum() / tokens)
    return f"{markdown_table(header, lines)}\n\n{TOKENS[text]:,} tokens; the model itself: perplexity {perplexity:.2f}."


def at_equal_arithmetic(bench: Bench, text: str = "choosing") -> str:
    """Every form with as many experts as leave experts and compensation together the same arithmetic."""
    rows: list[tuple[str, Routing | None]] = []
    for arithmetic in ARITHMETIC:
        rows.append((f"top-k at {arithmetic:g}", Routing(label="top-k", budget=arithmetic)))
        for form in forms(4.0):
            experts = experts_for(bench, form, arithmetic)
            settings = form.settings if form.label == "mean" else _floor(experts)
            routing = replace(form, budget=experts, settings=settings) if experts >= 1.0 else None
            rows.append((f"{form.label} at {arithmetic:g}", routing))
    figures = Figures(bench.measure(text, [routing for _, routing in rows if routing is not None]))
    lines = [
        [label, "", "not reached", "", "", ""] if routing is None else _row(figures, routing, label)
        for label, routing in rows
    ]
    return markdown_table(["routing, arithmetic", *COSTS, "perplexity", "KL, millinats"], lines)


def _row(figures: Figures, routing: Routing, label: str) -> list[str]:
    run = figures.runs[routing.key]
    return [label, *_costs(run), cell(figures.rise(run), "+.2%"), cell(figures.kl(run), ".1f")]


def experts_for(bench: Bench, form: Routing, arithmetic: float) -> float:
    """How many experts a form leaves at this arithmetic: its cost is linear in the dropped pairs."""
    integration = bench.integration(form, 4.0)
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


def robust(bench: Bench) -> str:
    """The fit on text, shuffled and random tokens against that on text alone, paired."""
    lines = []
    for text in MIXED:
        pairs = {
            budget: [
                Routing(label=label, budget=budget, calibration=held, settings=_floor(budget))
                for label, held in (("2:1:1", "olmoe-nano's own"), ("text alone", "text alone"))
            ]
            for budget in BUDGETS
        }
        figures = Figures(bench.measure(text, [r for pair in pairs.values() for r in pair]))
        for budget, (ours, alone) in pairs.items():
            a, b = figures.runs[ours.key], figures.runs[alone.key]
            name, experts = f"{text}, {budget:g} experts", f"{a.experts:.2f}, {b.experts:.2f}"
            kl = [f"{figures.kl(run)[0]:.1f}" for run in (a, b)]
            rise = [f"{figures.rise(run)[0]:+.2%}" for run in (a, b)]
            lines.append([name, experts, *kl, cell(figures.kl(a) / figures.kl(b) - 1.0, "+.1%"), *rise])
    header = ["text", "experts", "KL, 2:1:1", "KL, text alone", "difference", "perplexity", "text alone"]
    return markdown_table(header, lines)


PARTS = ("books", "arithmetic", "wikitext2-test", "robust")


def main() -> None:
    parser = arguments(__doc__, threads=False)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--calibration", type=Path, default=bundled_calibration(), metavar="FILE")
    parser.add_argument("--rank16", type=Path, required=True, metavar="FILE")
    parser.add_argument("--text-alone", type=Path, required=True, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    names = {"olmoe-nano's own": args.calibration, "rank 16": args.rank16, "text alone": args.text_alone}
    held = {name: Calibration.load(path) for name, path in names.items() if path.is_file()}
    bench = Bench(args.data, args.output, held)
    for part in args.only:
        if part == "arithmetic":
            publish(args.write, "equal-arithmetic", at_equal_arithmetic(bench))
        elif part == "robust":
            publish(args.write, "robust-fit", robust(bench))
        else:
            publish(args.write, PAGE_BLOCKS[part], fidelity(bench, part))


if __name__ == "__main__":
    main()
