"""What a calibration of olmoe-nano is good for: every choice of configuration, how strongly to compensate, whether budgets and
null p-values hold on other text, how much text is needed, how fast it is collected, and which models it fits.

    python benchmarks/calibration.py --data DIR [--parts PART ...] [--write docs/calibration.md]

DIR holds mixed/ and wikitext2-test.txt.xz. Choices are compared on equal parts of the valid files, everything else is
measured on the test files, with the calibration that ships with the model. KL is the divergence of the next-token predictions
from the model's own.
"""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import (
    DOMAINS,
    WINDOW,
    arguments,
    markdown_table,
    mixed_documents,
    publish,
    spread_windows,
    table_row,
    write_block,
)
from torch import Tensor

from bh_routing import BHRoutingIntegration, Calibration, RoutingIntegration, TopKPolicy, calibrate
from bh_routing.calibration.fingerprint import EXPERT_TOLERANCE, ROUTER_TOLERANCE, fingerprint
from bh_routing.calibration.fingerprint import distance as relative
from bh_routing.calibration.responses import ROWS
from bh_routing.errors import BHRoutingError, CalibrationWarning
from bh_routing.evaluation import Measured, compare
from bh_routing.models import bundled_calibration
from bh_routing.models.loading import load_model
from bh_routing.patching import make_plan, watch

P_BINS = 1 << 16
BUDGETS = (4.0, 3.0, 2.0)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
FOREIGN = "wikitext2-test"
AMOUNTS = ((24, None), (24, 1024), (6, 1024))  # times --tokens in all; tokens of each document
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


class Bench:
    """The model, the calibration that ships with it, and the texts."""

    def __init__(self, data: Path, tokens: int, page: Path | None) -> None:
        self.model, self.tokenizer = load_model("olmoe-nano", dtype="float32")
        self.calibration = Calibration.load(bundled_calibration())
        self.calibration.check(make_plan(self.model))
        self.data, self.tokens, self.page = data, tokens, page

    def windows(self, name: str) -> list[Tensor]:
        return spread_windows(self.tokenizer, self.data, name, self.tokens)

    def routed(self, windows: list[Tensor], settings: dict[str, dict[str, Any]]) -> list[Measured]:
        """BH with these settings, by label, against the model's own routing."""
        made = {
            label: BHRoutingIntegration(self.model, **{"calibration": self.calibration, **s})
            for label, s in settings.items()
        }
        return compare(self.model, windows, {"own": None, **made})[1:]

    def top_k(self, windows: list[Tensor]) -> tuple[list[float], list[float]]:
        """Experts, and log divergence, of plain top-k below the model's own number."""
        some = range(1, self.model.config.num_experts_per_tok)
        made = {str(k): RoutingIntegration(self.model, TopKPolicy(k)) for k in some}
        found = compare(self.model, windows, {"own": None, **made})[1:]
        return [row.mean_experts for row in found], [math.log(row.kl().value) for row in found]


def told(row: Measured, top_k: tuple[list[float], list[float]]) -> str:
    """Divergence, what it is of top-k's at the same number of experts (between its own on a logarithmic scale), and that number."""
    kl = row.kl().value
    share = kl / math.exp(float(np.interp(row.mean_experts, *top_k)))
    return f"{1000 * kl:.1f} ({share:.0%}) at {row.mean_experts:.2f}"


# -- the parts ---------------------------------------------------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "compensation mean": {"compensation": "mean"},
    "without compensation": {"compensation": "none"},
    "weights preserve, without compensation": {"compensation": "none", "weights": "preserve"},
    "weights sum, without compensation": {"compensation": "none", "weights": "sum"},
    "size sensitivity": {"size": "sensitivity"},
    "size deviation": {"size": "deviation"},
    "size output": {"size": "output"},
    "logprob": {"statistic": "logprob"},
    "logit, model": {"statistic": "logit", "scope": "model"},
    "logit, layer": {"statistic": "logit", "scope": "layer"},
    "scope layer": {"scope": "layer"},
    "null all": {"null": "all"},
    "null trimmed": {"null": "trimmed"},
    "estimator kde": {"estimator": "kde"},
    "estimator normal": {"estimator": "normal"},
    "procedure by": {"procedure": "by"},
    "procedure bonferroni": {"procedure": "bonferroni"},
    "procedure holm": {"procedure": "holm"},
    "procedure hochberg": {"procedure": "hochberg"},
    "procedure storey": {"procedure": "storey"},
    "logit, layer, null all: nearest to the original design": {"statistic": "logit", "scope": "layer", "null": "all"},
}  # fmt: skip


def configurations(bench: Bench) -> None:
    """The recommended one, and each choice changed by itself."""
    say("\n### Configurations, on valid text\n")
    say(
        f"KL in millinats (share of top-k's at the same number of experts) at the experts that came out; {bench.tokens:,} tokens."
    )
    say_head("configuration", *(f"budget {b:g}" for b in BUDGETS))
    windows = bench.windows("mixed-valid")
    top_k = bench.top_k(windows)
    for label, settings in CONFIGURATIONS.items():
        cells = []
        for budget in BUDGETS:
            try:
                (row,) = bench.routed(windows, {label: {"experts_per_token": budget, **settings}})
                cells.append(told(row, top_k))
            except BHRoutingError as error:
                print(f"{label}, {budget:g}: {error}")
                cells.append("no level meets it")
        say_row(label, *cells)


def scales(bench: Bench) -> None:
    """Divergence by scale of the compensation."""
    measured = bench.calibration.linear_scale
    say("\n### How strongly to compensate\n")
    say(
        f"KL in millinats by scale of the linear compensation; measured on the calibration text: {measured:.2f}. {bench.tokens:,} tokens."
    )
    say_head("text", "budget", *(f"{s:g}" for s in SCALES))
    for text in ("mixed-test", FOREIGN):
        windows = bench.windows(text)
        for budget in BUDGETS:
            asked = {"experts_per_token": budget, "size": "token"}
            found = bench.routed(windows, {f"{s:g}": asked | {"compensation": ("linear", s)} for s in SCALES})
            say_row(text, f"{budget:g}", *(f"{1000 * row.kl().value:.1f}" for row in found))


def budgets(bench: Bench) -> None:
    """What budgets, solved on the calibration text alone, come to on other text."""
    say("\n### Budgets solved on the calibration text, met elsewhere\n")
    say(f"Experts per token, {bench.tokens:,} tokens of each text.")
    say_head("text", *(f"budget {b:g}" for b in BUDGETS))
    for text in (*(f"{domain}-test" for domain in DOMAINS), "mixed-test", FOREIGN):
        found = bench.routed(bench.windows(text), {f"{b:g}": {"experts_per_token": b} for b in BUDGETS})
        means = [(row.mean_experts, b) for row, b in zip(found, BUDGETS, strict=True)]
        say_row(text, *(f"{mean:.2f} ({mean / b - 1:+.1%})" for mean, b in means))


def uniformity(bench: Bench) -> None:
    """Held-out null p-values: experts that the router passed over."""
    say("\n### Held-out null p-values: Kolmogorov-Smirnov distance to uniform\n")
    say(f"{bench.tokens:,} tokens of each text.")
    say_head("null", "text", *(f"layer {i}" for i in range(bench.calibration.num_layers)), "pooled")
    constant = bench.calibration.settings(compensated="mean").size
    for text in ("mixed-test", FOREIGN):
        seen = routers(bench.model, bench.windows(text))
        for label, settings in {
            "model, size from the token": {"scope": "model", "size": "token"},
            "layer, size from the token": {"scope": "layer", "size": "token"},
            "model": {"scope": "model", "size": constant},
            "layer": {"scope": "layer", "size": constant},
            "layer, kde (Silverman)": {"scope": "layer", "size": constant, "estimator": "kde"},
            "layer, normal": {"scope": "layer", "size": constant, "estimator": "normal"},
            "layer, logprob": {"scope": "layer", "statistic": "logprob"},
        }.items():
            nulls = [null_counts(bench.calibration, path, *held, **settings) for path, held in seen.items()]
            say_row(label, text, *(f"{distance(counts_B):.4f}" for counts_B in (*nulls, sum(nulls))))


def amounts(bench: Bench) -> None:
    """Calibrations of more or fewer tokens, without outputs, against valid text."""
    say("\n### How much text\n")
    say("Statistic logprob, null per layer: Kolmogorov-Smirnov distance of null p-values on valid text.")
    layers = (f"layer {i}" for i in range(bench.calibration.num_layers))
    say_head("tokens", "of each document", *layers, "budget 4 there")
    windows = bench.windows("mixed-valid")
    seen = routers(bench.model, windows)
    for times, of_each in AMOUNTS:
        calibration = calibrate(
            bench.model,
            bench.tokenizer,
            mixed_documents(bench.data, "calibration"),
            max_tokens=times * bench.tokens,
            document_tokens=of_each,
            window=WINDOW,
            outputs=False,
            progress=False,
        )
        settings = {"statistic": "logprob", "scope": "layer"}
        values = [distance(null_counts(calibration, path, *held, **settings)) for path, held in seen.items()]
        (row,) = bench.routed(windows, {"": {"calibration": calibration, "experts_per_token": 4.0}})
        shown = (f"{v:.4f}" for v in values)
        say_row(
            f"{calibration.tokens:,}", f"{of_each:,}" if of_each else "all", *shown, f"{row.mean_experts:.3f}"
        )


def null_counts(
    calibration: Calibration, path: str, logits_TE: Tensor, own_TK: Tensor, **settings: Any
) -> np.ndarray:
    """p-values of one layer's passed-over experts, counted in P_BINS equal bins."""
    p_TE = calibration.p_values(logits_TE, path, **settings)
    passed_TE = torch.ones_like(p_TE, dtype=torch.bool).scatter(-1, own_TK, False)
    return np.histogram(p_TE[passed_TE].numpy(), bins=P_BINS, range=(0.0, 1.0))[0]


def distance(counts_B: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance between binned p-values and the uniform distribution, to within 1 / P_BINS."""
    share_B = counts_B.cumsum() / counts_B.sum()
    return float(np.abs(share_B - np.arange(1, len(counts_B) + 1) / len(counts_B)).max())


def routers(model: Any, windows: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Router logits and own choice of every token, {path: ([T, E], [T, K])}."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(layer: Any, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor, mask: Any) -> None:
        seen.setdefault(layer.path, []).append((logits_TE.clone(), experts_TK.clone()))

    with watch(make_plan(model), keep):
        for window_1S in windows:
            model(input_ids=window_1S, use_cache=False)
    return {
        p: (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])) for p, parts in seen.items()
    }


def speed(bench: Bench) -> None:
    """Calibration without outputs against plain forwards of the same batches, in turn."""
    say("\n### Speed of calibration without outputs\n")
    say("Processor seconds, in turn; tokens per second of the best round, ratios as medians over rounds.")
    forwards = ("forwards without head, tokens/s", "calibration", "against it", "against forwards with head")
    say_head("model", "tokens", *forwards)
    ids = torch.randint(3, 1000, (2, WINDOW), generator=torch.Generator().manual_seed(0))
    for label, model, windows_BS in (
        ("olmoe-nano", bench.model, torch.cat(bench.windows("mixed-valid"))),
        ("one layer of OLMoE-1B-7B's shape", olmoe_layer(), ids),
    ):
        times = calibration_times(model, windows_BS)
        tokens = windows_BS.numel()
        rates = (f"{tokens / min(times[name]):,.0f}" for name in ("without head", "calibration"))
        ratios = (
            statistics.median(a / b for a, b in zip(times[name], times["calibration"], strict=True))
            for name in ("without head", "with head")
        )
        say_row(label, f"{tokens:,}", *rates, *(f"{ratio:.1%}" for ratio in ratios))


def calibration_times(model: Any, windows_BS: Tensor, rounds: int = 9) -> dict[str, list[float]]:
    documents = windows_BS.tolist()

    def plain(runner: Any) -> None:
        for part in windows_BS.split(4096 // WINDOW):
            runner(input_ids=part, use_cache=False)

    jobs = {
        "with head": lambda: plain(model),
        "without head": lambda: plain(model.base_model),
        "calibration": lambda: calibrate(
            model, None, documents, outputs=False, window=WINDOW, reservoir=4096, progress=False
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.process_time()  # processor time, so that a busy machine does not decide
            job()
            if number:
                times[name].append(time.process_time() - start)
    return times


def olmoe_layer() -> Any:
    """One random layer of OLMoE-1B-7B's shape, bfloat16, with a small vocabulary."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(num_hidden_layers=1, vocab_size=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    for module in model.modules():  # what to_empty leaves uninitialised
        if hasattr(module, "inv_freq"):
            module.inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 128, 2) / 128)
    return model


# -- which models a calibration fits -----------------------------------------------------------------------


def rounded(bits: int, group: int | None = None) -> Callable[[Any], None]:
    """Rounds every matrix of a model to so many bits a weight, a scale for each row, or for each ``group`` of a row."""

    def change(model: Any) -> None:
        for weight in (w for w in model.parameters() if w.dim() > 1):
            groups = weight.view(-1, group or weight.shape[-1])
            scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            groups.copy_((groups / scale).round() * scale)

    return change


def trained(windows: list[Tensor], steps: int, rate: float) -> Callable[[Any], None]:
    """Trains every weight of a model with AdamW, 2,048 tokens a step."""

    def change(model: Any) -> None:
        optimiser = torch.optim.AdamW(model.parameters(), rate)
        with torch.enable_grad():
            for step in range(steps):
                first = step * (2048 // WINDOW)
                ids = torch.cat([windows[(first + i) % len(windows)] for i in range(2048 // WINDOW)])
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimiser.step()
                optimiser.zero_grad()

    return change


def permuted(model: Any) -> None:
    """The rows of every router in another order."""
    for layer in make_plan(model).layers:
        layer.router.weight.copy_(layer.router.weight.roll(1, 0))


def random(model: Any) -> None:
    """Weights as they are before any training."""
    model.load_state_dict(type(model)(model.config).state_dict())


def fingerprints(bench: Bench) -> None:
    """How far a changed model's answers lie from the calibration's: a block of its own."""
    windows = bench.windows("mixed-valid")
    expected_LD = bench.calibration.fingerprint_LD
    logits = ROWS * bench.calibration.num_experts

    def row(label: str, change: Callable[[Any], None]) -> list[str]:
        model = copy.deepcopy(bench.model)
        change(model)
        found_LD = fingerprint(make_plan(model).layers)
        cells = []
        for columns, most in (
            (slice(logits), ROUTER_TOLERANCE),
            (slice(logits, None), EXPERT_TOLERANCE),
        ):
            apart = [relative(a[columns], b[columns]) for a, b in zip(found_LD, expected_LD, strict=True)]
            cells.append(f"{min(apart):.2g} to {max(apart):.2g}" + (": refused" if max(apart) > most else ""))
        return [label, *cells]

    rows = [
        row("bfloat16", lambda model: model.to(torch.bfloat16)),
        row("float16", lambda model: model.to(torch.float16)),
        row("8 bits a weight, a scale per row", rounded(8)),
        row("4 bits a weight, a scale per 32", rounded(4, 32)),
        row("3 bits a weight, a scale per 32", rounded(3, 32)),
        row("20 steps of AdamW on every weight, 2,048 tokens each, rate 1e-5", trained(windows, 20, 1e-5)),
        row("the same at 1e-4", trained(windows, 20, 1e-4)),
        row("the same at 1e-3", trained(windows, 20, 1e-3)),
        row("every router's rows permuted", permuted),
        row("random weights", random),
    ]
    publish(bench.page, "fingerprints", markdown_table(["", "router logits", "expert's output"], rows))


PARTS = {
    part.__name__: part
    for part in (fingerprints, configurations, scales, budgets, uniformity, amounts, speed)
}


def main() -> None:
    parser = arguments(__doc__, threads=False, data=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text (default 8,192)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore", CalibrationWarning)
    logging.getLogger("bh_routing").setLevel(logging.ERROR)  # unusual settings on purpose
    bench = Bench(args.data, args.tokens, args.write)
    start = time.perf_counter()
    for name in args.parts:
        PARTS[name](bench)
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")
    if args.write and SAID:
        write_block(args.write, "calibration", "\n".join(SAID))


if __name__ == "__main__":
    with torch.no_grad():
        main()
