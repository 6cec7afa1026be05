"""How well calibrated routing does on a model: every configuration, the comparison, uniformity, budgets, speed.

    python benchmarks/calibration.py --calibrate-on FILE --choose-and-report FILE --also FILE [--save CALIBRATION]

The first text is books joined by blank lines. The first half of the second text is for choosing: configurations are
compared there, and every method's level or parameter is solved so that its mean number of experts there is the budget.
The second half, and the third text, are for reporting. Losses are paired: a bootstrap over blocks of 512 tokens gives
the intervals. Prints Markdown tables and writes everything to benchmarks/results/calibration.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import arguments, markdown_table, table_row, write_block
from torch import Tensor

from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.compensation_scale import divergence
from bh_routing.calibration.passes import calibrate
from bh_routing.decision.compensation import Compensation
from bh_routing.errors import BHRoutingError, CalibrationWarning
from bh_routing.evaluation.baselines import MinPPolicy, ThresholdPolicy, TopPPolicy
from bh_routing.integration import RoutingIntegration
from bh_routing.models.loading import load_model
from bh_routing.patching import make_plan, watch
from bh_routing.policies import RoutingPolicy, TopKPolicy
from bh_routing.stats.histogram import Histogram
from bh_routing.text import TextFile
from bh_routing.training.loop import text_windows

BLOCK, RESAMPLES = 512, 2000
P_BINS = 1 << 16
BUDGETS = (4.0, 3.0, 2.0)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
DOCUMENT_TOKENS = (None, 100_000, 60_000, 30_000, 19_000)
PARTS = ("documents", "choose", "report", "scale", "budgets", "uniformity", "speed")
SAID: list[str] = []


def say(text: str) -> None:
    """Print, and keep for the page."""
    print(text, flush=True)
    SAID.append(text)


def say_row(*cells: str) -> None:
    """A row of a table that is printed as it is measured."""
    say(table_row(cells))


def say_head(*titles: str) -> None:
    """Begin such a table."""
    say(f"\n{markdown_table(titles, [])}")


# -- measuring ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Text:
    """Windows of token ids, int64 [B, S], under a name."""

    name: str
    windows_BS: Tensor

    def spread(self, tokens: int) -> Text:
        """So many tokens, in blocks of adjacent windows that lie evenly over the text."""
        num, window = self.windows_BS.shape
        per_block = max(1, BLOCK // window)
        blocks = min(max(1, tokens // (per_block * window)), num // per_block)
        starts = [i * (num // per_block) // blocks * per_block for i in range(blocks)]
        rows = [start + i for start in starts for i in range(per_block)]
        return replace(self, windows_BS=self.windows_BS[rows])


@torch.inference_mode()
def losses(model: Any, windows_BS: Tensor, batch: int = 16) -> np.ndarray:
    """Nats per token, float64 [B, S - 1]."""
    parts = []
    for part in windows_BS.split(batch):
        logits_BSV = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(
            logits_BSV.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
        )
        parts.append(nats.view(len(part), -1))
    return torch.cat(parts).double().numpy()


@dataclass(frozen=True, eq=False)
class Run:
    """One routing on one text: losses [B, S - 1], mean experts, mean experts per layer."""

    losses_BS: np.ndarray
    mean_experts: float
    layers: list[float]


def run(
    model: Any, text: Text, policy: RoutingPolicy | None, compensations: dict[str, Compensation] | None = None
) -> Run:
    if policy is None:
        return Run(losses(model, text.windows_BS), math.nan, [])
    integration = RoutingIntegration(model, policy, compensations=compensations)
    with integration:
        measured = losses(model, text.windows_BS)
    total = integration.telemetry.to_dict()
    return Run(measured, total["total"]["mean_experts"], [row["mean_experts"] for row in total["layers"]])


def change(run: Run, base: Run) -> float:
    """Relative change of perplexity."""
    return math.expm1(float((run.losses_BS - base.losses_BS).mean()))


def intervals(ours: Run, base: Run, topk: Run, window: int) -> dict[str, tuple[float, float, float]]:
    """Change of perplexity, and its share of top-k's, with 95 % intervals from a paired bootstrap over blocks."""
    per_block = max(1, BLOCK // window)

    def blocks(run: Run) -> np.ndarray:
        rows = (run.losses_BS - base.losses_BS).mean(1)
        return rows[: len(rows) // per_block * per_block].reshape(-1, per_block).mean(1)

    a, b = blocks(ours), blocks(topk)
    draws = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    change_R, topk_R = np.expm1(a[draws].mean(1)), np.expm1(b[draws].mean(1))
    figures = {
        "change": (change(ours, base), change_R),
        "share": (change(ours, base) / change(topk, base), change_R / topk_R),
    }
    return {
        name: (value, *(float(q) for q in np.percentile(sample, [2.5, 97.5])))
        for name, (value, sample) in figures.items()
    }


def at_mean(
    make: Callable[[float], RoutingPolicy], budget: float, measure: Callable[[RoutingPolicy], float]
) -> tuple[RoutingPolicy, float]:
    """A policy whose measured mean is the budget: its nominal budget is corrected twice by what came out."""
    nominal, policy, found = budget, make(budget), math.nan
    for _ in range(3):
        found = measure(policy)
        if abs(found - budget) <= 0.003 * budget:
            break
        nominal = min(max(1.0, nominal * budget / found), 8.0)
        policy = make(nominal)
    return policy, found


# -- the parts ---------------------------------------------------------------------------------------------


def configurations(calibration: Calibration) -> list[tuple[str, dict[str, Any], str, str]]:
    """(label, settings, form of compensation, weights): the recommended one, and each choice changed by itself."""
    best = calibration.forms[-1]
    rows: list[tuple[str, dict[str, Any], str, str]] = [("recommended", {}, best, "model")]
    if best == "linear":
        rows += [("compensation mean", {}, "mean", "model")]
    rows += [
        ("without compensation", {}, "none", "model"),
        ("weights preserve, without compensation", {}, "none", "preserve"),
        ("weights sum, without compensation", {}, "none", "sum"),
    ]
    for label, settings in (
        ("size sensitivity", {"size": "sensitivity"}),
        ("size deviation", {"size": "deviation"}),
        ("size output", {"size": "output"}),
        ("logprob", {"statistic": "logprob"}),
        ("logit, model", {"statistic": "logit", "scope": "model"}),
        ("logit, layer", {"statistic": "logit", "scope": "layer"}),
        ("scope layer", {"scope": "layer"}),
        ("null all", {"null": "all"}),
        ("null trimmed", {"null": "trimmed"}),
        ("estimator kde", {"estimator": "kde"}),
        ("estimator normal", {"estimator": "normal"}),
        ("procedure by", {"procedure": "by"}),
        ("procedure bonferroni", {"procedure": "bonferroni"}),
        ("procedure holm", {"procedure": "holm"}),
        ("procedure hochberg", {"procedure": "hochberg"}),
        ("procedure storey", {"procedure": "storey"}),
        ("logit, layer, null all: nearest to the original design", {"statistic": "logit", "null": "all"}),
    ):
        rows.append((label, settings, best, "model"))
    if calibration.moments is None or calibration.moments.sensitivity_LE is None:
        rows = [row for row in rows if row[1].get("size") != "sensitivity"]
    return rows


def choose(model: Any, calibration: Calibration, text: Text) -> list[dict[str, Any]]:
    """Every configuration on the choosing half, at each budget; the mean that came out is printed beside it."""
    base = run(model, text, None)
    topk = {b: run(model, text, TopKPolicy(int(b))) for b in BUDGETS}
    held_by = {form: calibration.compensation(form) for form in calibration.forms}
    rows = []
    for label, settings, form, weights in configurations(calibration):
        row: dict[str, Any] = {"configuration": label, "settings": settings}
        for budget in BUDGETS:

            def make(nominal: float, settings=settings, weights=weights, form=form):
                return calibration.policy(
                    experts_per_token=nominal, weights=weights, compensated=form, **settings
                )

            held: dict[int, Run] = {}

            def measure(policy: RoutingPolicy, held=held, form=form) -> float:
                held[0] = run(model, text, policy, held_by[form] or None)
                return held[0].mean_experts

            try:
                _, found = at_mean(make, budget, measure)
            except BHRoutingError as error:
                row[f"{budget:g}"] = {"failed": str(error)}
                continue
            lost = change(held[0], base)
            row[f"{budget:g}"] = {
                "change": lost,
                "share": lost / change(topk[budget], base),
                "mean": found,
                "layers": held[0].layers,
            }
        rows.append(row)
        say_row(label, *(_configuration_cell(row[f"{budget:g}"]) for budget in BUDGETS))
    return rows


def _configuration_cell(cell: dict[str, Any]) -> str:
    if "failed" in cell:
        return "no level meets it"
    return f"{cell['change']:+.2%} ({cell['share']:.0%}) at {cell['mean']:.2f}"


def methods(
    model: Any, calibration: Calibration
) -> dict[str, tuple[Callable[[float], RoutingPolicy], dict[str, Compensation] | None]]:
    """What is compared: from a budget to a policy, and the compensation it runs with."""
    from bh_routing.evaluation.routing_log import RoutingLog

    log = RoutingLog.from_calibration(calibration)
    compensations = calibration.compensation()
    others = {}
    if calibration.forms[-1] == "linear":
        others["BH, compensation mean"] = (
            lambda b: calibration.policy(experts_per_token=b, compensated="mean"),
            calibration.compensation("mean"),
        )
    return others | {
        "BH, recommended": (lambda b: calibration.policy(experts_per_token=b), compensations),
        "Bonferroni, otherwise recommended": (
            lambda b: calibration.policy(experts_per_token=b, procedure="bonferroni"),
            compensations,
        ),
        "BH, without compensation": (
            lambda b: calibration.policy(experts_per_token=b, compensated="none"),
            None,
        ),
        "top-p": (lambda b: TopPPolicy.for_budget(b, log), None),
        "min-p": (lambda b: MinPPolicy.for_budget(b, log), None),
        "probability threshold": (lambda b: ThresholdPolicy.for_budget(b, log), None),
    }


def report(model: Any, calibration: Calibration, choosing: Text, reporting: list[Text]) -> dict[str, Any]:
    """Every method at the same mean, solved on the choosing half, on each reporting text."""
    tuned: dict[str, dict[float, RoutingPolicy]] = {}
    compared = methods(model, calibration)
    for label, (make, compensations) in compared.items():
        tuned[label] = {
            b: at_mean(
                make,
                b,
                lambda p, compensations=compensations: run(model, choosing, p, compensations).mean_experts,
            )[0]
            for b in BUDGETS
        }
    result: dict[str, Any] = {}
    for text in reporting:
        base = run(model, text, None)
        perplexity = math.exp(float(base.losses_BS.mean()))
        tokens = text.windows_BS.numel()
        say(f"\n#### {text.name}: {tokens:,} tokens, all 8 experts: perplexity {perplexity:.2f}")
        say_head("method", "budget", "mean", "perplexity change", "share of top-k's")
        rows = []
        for budget in BUDGETS:
            topk = run(model, text, TopKPolicy(int(budget)))
            runs = {f"top-{int(budget)}": topk} | {
                label: run(model, text, tuned[label][budget], compensations)
                for label, (_, compensations) in compared.items()
            }
            for label, measured in runs.items():
                figures = intervals(measured, base, topk, text.windows_BS.shape[1])
                rows.append(
                    {"method": label, "budget": budget, "mean": measured.mean_experts}
                    | {"layers": measured.layers}
                    | figures
                )
                change_, share = figures["change"], figures["share"]
                say_row(
                    label,
                    f"{budget:g}",
                    f"{measured.mean_experts:.2f}",
                    f"{change_[0]:+.2%} ({change_[1]:+.2%} to {change_[2]:+.2%})",
                    f"{share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%})",
                )
        result[text.name] = {"tokens": tokens, "perplexity": perplexity, "rows": rows}
    return result


def budgets_held_out(model: Any, calibration: Calibration, texts: list[Text]) -> list[dict[str, Any]]:
    """What a budget, solved on the calibration text alone, comes to on other text."""
    names = (f"{t.name}, {t.windows_BS.numel():,} tokens" for t in texts)
    say_head("budget", *names)
    rows = []
    for budget in BUDGETS:
        policy = calibration.policy(experts_per_token=budget)
        found = [run(model, text, policy, calibration.compensation()).mean_experts for text in texts]
        rows.append({"budget": budget} | {t.name: f for t, f in zip(texts, found, strict=True)})
        say_row(f"{budget:g}", *(f"{f:.3f} ({f / budget - 1:+.1%})" for f in found))
    return rows


def scales(model: Any, calibration: Calibration, texts: list[Text]) -> list[dict[str, Any]]:
    """Divergence from the model's own predictions, and change of perplexity, by scale of the compensation."""
    say(
        f"\nThe form {calibration.forms[-1]}; measured on the calibration text: "
        f"{calibration.linear_scale if calibration.linear is not None else calibration.compensation_scale:.2f}. "
        "In each cell the divergence"
    )
    say("KL(own || routed) in millinats per token, and the change of perplexity.")
    say_head("text", "budget", "top-k", *(f"{s:g}" for s in SCALES))
    own_compensations = calibration.compensation()
    by_scale = {f"{s:g}": calibration.compensation(None, s) for s in SCALES}
    rows = []
    for text in texts:
        base = run(model, text, None)
        for budget in BUDGETS:
            policy, _ = at_mean(
                lambda b: calibration.policy(experts_per_token=b),
                budget,
                lambda p, text=text: run(model, text, p, own_compensations).mean_experts,
            )
            cells: dict[str, Any] = {"top-k": (TopKPolicy(int(budget)), None)}
            cells |= {label: (policy, compensations) for label, compensations in by_scale.items()}
            row: dict[str, Any] = {"text": text.name, "budget": budget}
            for label, (one, compensations) in cells.items():
                row[label] = (
                    1000 * divergence_from_own(model, text, one, compensations),
                    change(run(model, text, one, compensations), base),
                )
            rows.append(row)
            shown = (f"{row[label][0]:.1f}, {row[label][1]:+.2%}" for label in cells)
            say_row(text.name, f"{budget:g}", *shown)
    return rows


@torch.inference_mode()
def divergence_from_own(
    model: Any, text: Text, policy: RoutingPolicy, compensations: dict[str, Compensation] | None
) -> float:
    """Mean KL(own || routed) per token, nats."""
    total = 0.0
    integration = RoutingIntegration(model, policy, compensations=compensations)
    for part in text.windows_BS.split(8):
        own_BSV = model(input_ids=part, use_cache=False).logits
        with integration:
            routed_BSV = model(input_ids=part, use_cache=False).logits
        total += divergence(own_BSV, routed_BSV, torch.ones_like(part, dtype=torch.bool))
    return total / text.windows_BS.numel()


def documents(
    model: Any, tokenizer: Any, args: argparse.Namespace, choosing: Text
) -> dict[str, list[dict[str, Any]]]:
    """Calibrations of more or fewer tokens of each book, on the choosing half; and each book against the others.

    Statistic logprob, null per layer, no outputs: how far the null is from held-out text of other authors.
    """
    say(
        "\nStatistic logprob, null per layer: Kolmogorov-Smirnov distance of the choosing half's null p-values."
    )
    seen = routed(model, choosing)
    say_head("tokens of each book", "in all", *(f"layer {i}" for i in range(len(seen))), "budget 4 there")
    settings = {"statistic": "logprob", "scope": "layer"}

    def collect(texts: Any, most: int | None) -> Calibration:
        return calibrate(
            model, tokenizer, texts, document_tokens=most, window=args.window, outputs=False, model_id="books"
        )

    by_cap = []
    for most in DOCUMENT_TOKENS:
        calibration = collect(TextFile(args.calibrate_on, None), most)
        values = [distance(null_counts(calibration, p, *choice, **settings)) for p, choice in seen.items()]
        mean = run(model, choosing, calibration.policy(experts_per_token=4.0)).mean_experts
        by_cap.append({"most": most, "tokens": calibration.tokens, "layers": values, "mean": mean})
        shown = (f"{v:.4f}" for v in values)
        say_row(f"{most:,}" if most else "all", f"{calibration.tokens:,}", *shown, f"{mean:.3f}")

    books = [collect([text], args.document_tokens) for text in TextFile(args.calibrate_on, None)]
    say(f"\nEach of the {len(books)} books against the others, the same distance, least to most: ")
    against = []
    for i, book in enumerate(books):
        others = [b for j, b in enumerate(books) if j != i]
        against.append(book_distances(book, others[0].merge(*others[1:])))
    columns = list(zip(*against, strict=True))
    say(", ".join(f"layer {i}: {min(c):.3f} to {max(c):.3f}" for i, c in enumerate(columns)) + ".")
    return {"document_tokens": by_cap, "books": [{"layers": row} for row in against]}


def book_distances(book: Calibration, others: Calibration) -> list[float]:
    """Largest difference of the two distribution functions of passed-over log-scores, per layer."""
    ours, theirs = (c.histograms["logprob"]["unselected"] for c in (book, others))
    shares = []
    for one, other in ((ours, theirs), (theirs, ours)):
        aligned = one + Histogram(other.start, torch.zeros_like(other.counts_LEB))  # on the bins of both
        counts_LB = aligned.counts_LEB.sum(1).double()
        shares.append((counts_LB / counts_LB.sum(-1, keepdim=True)).cumsum(-1))
    return (shares[0] - shares[1]).abs().amax(-1).tolist()


def uniformity(model: Any, calibration: Calibration, texts: list[Text]) -> list[dict[str, Any]]:
    """Kolmogorov-Smirnov distance of held-out null p-values to uniform: experts that the router passed over."""
    rows = []
    say_head("null", "text", *(f"layer {i}" for i in range(calibration.num_layers)), "pooled")
    constant = calibration.settings(compensated="mean").size
    token: tuple[tuple[str, dict[str, Any]], ...] = ()
    if calibration.token_sizes is not None:
        token = tuple(
            (f"{scope}, empirical, size from the token", {"scope": scope, "size": "token"})
            for scope in ("layer", "model")
        )
    for text in texts:
        seen = routed(model, text)
        for label, settings in (
            *token,
            ("layer, empirical", {"scope": "layer"}),
            ("layer, kde (Silverman)", {"scope": "layer", "estimator": "kde"}),
            ("layer, normal", {"scope": "layer", "estimator": "normal"}),
            ("layer, empirical, logprob", {"scope": "layer", "statistic": "logprob"}),
            ("model, empirical", {"scope": "model"}),
            ("model, kde (Silverman)", {"scope": "model", "estimator": "kde"}),
        ):
            if "statistic" not in settings:
                settings = {"size": constant} | settings
            nulls = [null_counts(calibration, path, *choice, **settings) for path, choice in seen.items()]
            values = [distance(counts_B) for counts_B in nulls]
            pooled = distance(sum(nulls))
            rows.append({"null": label, "text": text.name, "layers": values, "pooled": pooled})
            say_row(label, text.name, *(f"{v:.4f}" for v in (*values, pooled)))
    return rows


def null_counts(
    calibration: Calibration, path: str, logits_TE: Tensor, own_TK: Tensor, **settings: Any
) -> np.ndarray:
    """p-values of one layer's passed-over experts, counted in P_BINS equal bins."""
    counts_B = np.zeros(P_BINS, dtype=np.int64)
    for logits, own in zip(logits_TE.split(1 << 16), own_TK.split(1 << 16), strict=True):
        p_TE = calibration.p_values(logits, path, **settings)
        passed_TE = torch.ones_like(p_TE, dtype=torch.bool).scatter(-1, own, False)
        counts_B += np.histogram(p_TE[passed_TE].numpy(), bins=P_BINS, range=(0.0, 1.0))[0]
    return counts_B


def distance(counts_B: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance between binned p-values and the uniform distribution, to within 1 / P_BINS."""
    share_B = counts_B.cumsum() / counts_B.sum()
    return float(np.abs(share_B - np.arange(1, len(counts_B) + 1) / len(counts_B)).max())


@torch.inference_mode()
def routed(model: Any, text: Text) -> dict[str, tuple[Tensor, Tensor]]:
    """Router logits and own choice of every token, {path: ([T, E], [T, K])}."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(layer: Any, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor, mask: Any) -> None:
        seen.setdefault(layer.path, []).append((logits_TE.clone(), experts_TK.clone()))

    plan = make_plan(model)
    with watch(plan, keep):
        for part in text.windows_BS.split(16):
            model(input_ids=part, use_cache=False)
    return {
        p: (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])) for p, parts in seen.items()
    }


def speed(model: Any, label: str, windows_BS: Tensor, rounds: int = 7) -> dict[str, Any]:
    """Calibration without outputs against plain forwards of the same batches, in turn; processor seconds."""
    documents = [row.tolist() for row in windows_BS]
    window = windows_BS.shape[1]
    base_model = model.base_model

    @torch.inference_mode()
    def plain(runner: Any) -> None:
        for part in windows_BS.split(max(1, 4096 // window)):
            runner(input_ids=part, use_cache=False)

    def collect() -> None:
        calibrate(model, None, documents, outputs=False, window=window, reservoir=4096, progress=False)

    times: dict[str, list[float]] = {"with head": [], "without head": [], "calibration": []}
    for number in range(rounds + 1):
        for name, job in (
            ("with head", lambda: plain(model)),
            ("without head", lambda: plain(base_model)),
            ("calibration", collect),
        ):
            start = time.process_time()  # processor time, so that a busy machine does not decide
            job()
            if number:
                times[name].append(time.process_time() - start)
    tokens = windows_BS.numel()
    best = {name: min(values) for name, values in times.items()}
    row = {
        "model": label,
        "tokens": tokens,
        **{f"{name}, tokens per second": tokens / value for name, value in best.items()},
        "speed against forwards with head": best["with head"] / best["calibration"],
        "speed against forwards without head": best["without head"] / best["calibration"],
        **{
            f"median ratio {name}": statistics.median(
                a / b for a, b in zip(times[name], times["calibration"], strict=True)
            )
            for name in ("without head", "with head")
        },
    }
    rates = (f"{tokens / best[name]:,.0f}" for name in ("without head", "calibration"))
    ratios = (f"{row[f'median ratio {name}']:.1%}" for name in ("without head", "with head"))
    say_row(label, f"{tokens:,}", *rates, *ratios)
    return row


def olmoe_layer() -> Any:
    """One random layer of OLMoE-1B-7B's shape, bfloat16, with a small vocabulary."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(num_hidden_layers=1, vocab_size=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    for module in model.modules():  # what to_empty leaves uninitialised
        if hasattr(module, "inv_freq"):
            module.inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 128, 2) / 128)
    return model


def main() -> None:
    parser = arguments(__doc__, threads=False)
    parser.add_argument("--model", default="olmoe-nano")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibrate-on", metavar="FILE", required=True, help="text to calibrate on")
    parser.add_argument(
        "--choose-and-report", metavar="FILE", required=True, help="text: its halves choose and report"
    )
    parser.add_argument("--also", metavar="FILE", help="a text of another domain, reported as well")
    parser.add_argument("--calibration", metavar="FILE", help="use this calibration instead of making one")
    parser.add_argument("--save", metavar="FILE", help="write the calibration")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--document-tokens", type=int, default=30_000, help="to calibrate on, of each book")
    parser.add_argument("--choose-tokens", type=int, default=32_768)
    parser.add_argument("--report-tokens", type=int, default=131_072)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "calibration.json"))
    args = parser.parse_args()
    warnings.simplefilter("ignore", CalibrationWarning)
    started = time.perf_counter()
    torch.set_grad_enabled(False)

    model, tokenizer = load_model(args.model, dtype=args.dtype)
    result: dict[str, Any] = {
        "model": args.model,
        "dtype": str(model.dtype),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if args.calibration:
        calibration = Calibration.load(args.calibration)
    else:
        start = time.perf_counter()
        calibration = calibrate(
            model,
            tokenizer,
            TextFile(args.calibrate_on, None),
            document_tokens=args.document_tokens,
            window=args.window,
            sensitivity=True,
            model_id=args.model,
        )
        result["calibration_seconds"] = time.perf_counter() - start
    if args.save:
        calibration.save(args.save)
    calibration.check(make_plan(model))
    print(calibration, flush=True)

    windows = text_windows(tokenizer, [TextFile(args.choose_and_report).read()], args.window)
    half = len(windows) // 2
    first = Text("first half", windows[:half])
    whole = [Text("second half", windows[half:])]
    if args.also:
        name = Path(args.also).name.split(".")[0]
        whole.append(Text(name, text_windows(tokenizer, [TextFile(args.also).read()], args.window)))
    choosing = first.spread(args.choose_tokens)
    reporting = [text.spread(args.report_tokens) for text in whole]

    if "documents" in args.parts:
        say("\n### How much of each document")
        result["documents"] = documents(model, tokenizer, args, first.spread(args.report_tokens))
    if "choose" in args.parts:
        say("\n### Configurations, on the choosing half\n")
        say("Perplexity change (share of top-k's) at the mean that came out.")
        say_head("configuration", *(f"{b:g}" for b in BUDGETS))
        result["configurations"] = choose(model, calibration, choosing)
    if "report" in args.parts:
        say("\n### Comparison at the same mean number of experts")
        result["comparison"] = report(model, calibration, choosing, reporting)
    if "scale" in args.parts:
        say("\n### How strongly to compensate")
        short = [text.spread(args.choose_tokens) for text in whole]
        result["scale"] = scales(model, calibration, short)
    if "budgets" in args.parts:
        say("\n### Budgets solved on the calibration text, met elsewhere")
        result["budgets"] = budgets_held_out(model, calibration, whole)
    if "uniformity" in args.parts:
        say("\n### Held-out null p-values: Kolmogorov-Smirnov distance to uniform")
        result["uniformity"] = uniformity(model, calibration, whole)
    if "speed" in args.parts:
        say("\n### Speed of calibration without outputs\n")
        say("Processor seconds, in turn; tokens per second of the best round, ratios as medians over rounds.")
        forwards = (
            "forwards without head, tokens/s",
            "calibration",
            "against it",
            "against forwards with head",
        )
        say_head("model", "tokens", *forwards)
        rows = [speed(model, args.model, first.spread(32_768).windows_BS, rounds=15)]
        ids = torch.randint(3, 1000, (2, 512), generator=torch.Generator().manual_seed(0))
        rows.append(speed(olmoe_layer(), "one layer of OLMoE-1B-7B's shape", ids, rounds=9))
        result["speed"] = rows
    result["seconds"] = time.perf_counter() - started
    print(f"\n{result['seconds']:.0f} seconds in all")
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.write:
        write_block(args.write, "calibration", "\n".join(SAID))


if __name__ == "__main__":
    main()
