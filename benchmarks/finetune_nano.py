"""olmoe-nano fine-tuned at 3.0 experts per token, against a control trained with its own top-8: same steps, data, seed.

    python benchmarks/finetune_nano.py --data DIR [--arm routed|control] [-o build/finetune] [--write docs/training.md]

DIR holds mixed/: equal parts of its six train files are trained on, of its calibration files each model's own calibration is
made, on its valid files settings are chosen and the curves are drawn, on its test files the arms are judged. What is in the
output folder already is not made again. --arm trains and judges that arm alone: the two may run side by side, one thread each;
a step's time counts the processor's time of that thread, refits included.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from pages import WINDOW, arguments, markdown_table, mixed_documents, mixed_text, publish, spread_windows

from bh_routing import BHRoutingIntegration, Calibration, calibrate
from bh_routing.evaluation import perplexity_change
from bh_routing.evaluation.paired import block_sums, perplexity_interval
from bh_routing.evaluation.scoring import score_text
from bh_routing.models import bundled_calibration
from bh_routing.models.loading import load_model
from bh_routing.text import spans
from bh_routing.training.loop import finetune, text_windows
from bh_routing.training.settings import FinetuneSettings

EXPERTS = 3.0
ARMS = ("control", "routed")
REFIT_TOKENS, CALIBRATION_TOKENS, CURVE_TOKENS, JUDGED_TOKENS = 32_768, 98_304, 16_384, 131_072
LOG_EVERY = 25  # steps
ROUTINGS: dict[str, dict[str, Any] | None] = {
    "own top-8": None,
    "3.0 experts": {"experts_per_token": EXPERTS},
    "3.0 experts, without compensation": {"experts_per_token": EXPERTS, "compensation": False},
}


def held_out(tokenizer: Any, data: Path, split: str, tokens: int) -> torch.Tensor:
    """Token ids of equal parts of all domains: whole windows, spread evenly over the files."""
    return torch.cat(spread_windows(tokenizer, data, f"mixed-{split}", tokens)).flatten()


def make_calibration(model: Any, tokenizer: Any, data: Path, tokens: int) -> Calibration:
    """On so many tokens, with the rank of the calibration that ships with the model."""
    linear = Calibration.load(bundled_calibration()).linear
    return calibrate(
        model,
        tokenizer,
        list(mixed_documents(data, "calibration")),
        max_tokens=tokens,
        window=WINDOW,
        sensitivity=True,
        rank=None if linear is None else int(linear.rank_L.max()),
        progress=False,
        model_id="nano",
    )


def losses(model: Any, ids_N: torch.Tensor) -> torch.Tensor:
    return score_text(model, ids_N, spans(len(ids_N), WINDOW)).losses_C


def train(args: argparse.Namespace, arm: str) -> None:
    """Into a folder of the arm: the model, how it was trained, and last its own calibration."""
    settings = FinetuneSettings(
        steps=args.steps,
        experts_per_token=EXPERTS,
        learning_rate=args.learning_rate,
        routed=arm == "routed",
        distil=0.0,
        refit_every=75,
        window=WINDOW,
        seed=args.seed,
    )
    model, tokenizer = load_model("olmoe-nano")
    size = settings.batch_tokens // WINDOW
    text = mixed_text(args.data, "train", 6 * settings.steps * settings.batch_tokens)
    windows_NS = text_windows(tokenizer, [text], WINDOW, settings.steps * size)
    judged_N = held_out(tokenizer, args.data, "valid", CURVE_TOKENS)
    calibration = Calibration.load(bundled_calibration())
    curve: list[dict[str, float]] = []
    spent = {"cpu": 0.0, "since": 0.0}

    def point(step: int) -> None:
        """Loss on valid text as the arm routes: at 8, or at 3.0 with the table in use."""
        model.eval()
        mean = float(losses(model, judged_N).double().mean())
        curve.append({"step": step, "cpu": spent["cpu"], "loss": mean})
        model.train()
        print(arm, curve[-1], flush=True)

    def on_step(step: int, figures: dict[str, float]) -> None:
        spent["cpu"] += time.process_time() - spent["since"]
        if step % LOG_EVERY == 0 or step == settings.steps:
            point(step)
            short = {k: round(v, 4) for k, v in figures.items()}
            print(arm, short, f"{spent['cpu']:.0f} s of processor time", flush=True)
        spent["since"] = time.process_time()

    if settings.routed:
        with BHRoutingIntegration(model, calibration=calibration, experts_per_token=EXPERTS):
            point(0)
    else:
        point(0)
    spent["since"] = time.process_time()
    done = finetune(
        model,
        windows_NS,
        calibration,
        settings,
        make_calibration=lambda m: make_calibration(m, tokenizer, args.data, REFIT_TOKENS),
        on_step=on_step,
    )
    folder = args.output / arm
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "settings": done.settings,
        "seconds": done.seconds,
        "cpu_seconds": spent["cpu"],
        "steps": done.curve,
        "curve": curve,
        "windows": len(windows_NS),
    }
    (folder / "finetune.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    make_calibration(model, tokenizer, args.data, CALIBRATION_TOKENS).save(folder / "calibration.safetensors")


def judge(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Losses of a model ("base": before) in every routing on the test text, with its own calibration."""
    kept = args.output / f"judged-{name}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    folder = args.output / name
    model, tokenizer = load_model("olmoe-nano" if name == "base" else str(folder), dtype="float32")
    ids_N = held_out(tokenizer, args.data, "test", JUDGED_TOKENS)
    calibration = Calibration.load(
        bundled_calibration() if name == "base" else folder / "calibration.safetensors"
    )
    found = {}
    for routing, options in ROUTINGS.items():
        if options is None:
            mean, loss_C = 8.0, losses(model, ids_N)
        else:
            with BHRoutingIntegration(model, calibration=calibration, **options) as integrator:
                loss_C = losses(model, ids_N)
                mean = integrator.telemetry.mean_experts_per_token
        found[routing] = {"experts": mean, "blocks": block_sums(loss_C.tolist())}
        perplexity = perplexity_interval(found[routing]["blocks"]).value
        print(name, routing, f"{mean:.3f}", f"{perplexity:.4f}", flush=True)
    kept.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def won_back(found: dict[str, Any], routing: str, resamples: int = 2000) -> tuple[float, float, float]:
    """Share of the control's gap (log perplexity, 3.0 over 8) that the routed arm wins back, with a paired interval."""
    control8, control3, routed3 = (
        np.array(found[name][r]["blocks"])
        for name, r in (("control", "own top-8"), ("control", routing), ("routed", routing))
    )
    won_J, gap_J = control3[:, 0] - routed3[:, 0], control3[:, 0] - control8[:, 0]
    draws_RJ = np.random.default_rng(0).multinomial(
        len(won_J), np.full(len(won_J), 1 / len(won_J)), size=resamples
    )
    low, high = np.percentile((draws_RJ @ won_J) / (draws_RJ @ gap_J), [2.5, 97.5])
    return float(won_J.sum() / gap_J.sum()), float(low), float(high)


def tables(found: dict[str, Any], records: dict[str, Any]) -> str:
    """The page's block."""
    names = {"base": "before", "control": "control (top-8)", "routed": "routed (3.0)"}
    reference = found["control"]["own top-8"]["blocks"]
    rows = []
    for name, title in names.items():
        for routing, cell in found[name].items():
            value = perplexity_interval(cell["blocks"]).value
            change = perplexity_change(cell["blocks"], reference)
            rows.append([f"{title}, {routing}", f"{cell['experts']:.2f}", f"{value:.2f}", _percent(change)])
    header = ["model and routing", "experts", "perplexity", "over the control's top-8"]
    lines = [markdown_table(header, rows), ""]
    rows = []
    for routing in list(ROUTINGS)[1:]:
        gap = perplexity_change(found["control"][routing]["blocks"], reference)
        left = perplexity_change(found["routed"][routing]["blocks"], reference)
        share, low, high = won_back(found, routing)
        rows.append(
            [
                routing,
                _percent(gap),
                _percent(left),
                f"**{100 * share:.0f} %** [{100 * low:.0f}, {100 * high:.0f}]",
            ]
        )
    lines += [markdown_table(["", "control's gap", "what is left of it", "won back"], rows), ""]
    at8 = perplexity_change(found["routed"]["own top-8"]["blocks"], reference)
    tokens = sum(count for _, count in reference)
    minutes = ", ".join(f"{name} {record['cpu_seconds'] / 60:.1f}" for name, record in records.items())
    s = records["routed"]["settings"]
    lines += [
        f"At 8 experts the routed model is {_percent(at8)} from the control. Intervals: 95 %, paired bootstrap over "
        f"blocks of 512 tokens of {tokens:,.0f} tokens of equal parts of the six test files. {s['steps']} steps of "
        f"{s['batch_tokens']} tokens, AdamW, peak rate {s['learning_rate']:g}, full_share {s['full_share']:g}, distil "
        f"{s['distil']:g}, complete refit every {s['refit_every']} steps. Minutes of one core's time: {minutes}.",
        "",
        describe_machine(1) + ".",
    ]
    return "\n".join(lines)


def _percent(interval: Any) -> str:
    value, low, high = (100 * x for x in interval)
    return f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]"


def draw(records: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    """Perplexity on valid text while training, and the end result on test text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"control": "#777777", "routed": "#1f6fb4"}
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for name, record in records.items():
        points = record["curve"]
        label = "control, at 8" if name == "control" else "routed, at 3.0"
        left.plot(
            [p["step"] for p in points],
            [np.exp(p["loss"]) for p in points],
            "o-",
            ms=3,
            color=colours[name],
            label=label,
        )
    left.set(xlabel="step", ylabel="perplexity", title="valid text")
    left.legend(frameon=False)
    steps = records["routed"]["steps"]
    width = max(1, len(steps) // 50)
    counts = [
        np.mean([s["experts_per_token"] for s in steps[i : i + width]]) for i in range(0, len(steps), width)
    ]
    middle.plot(range(0, len(steps), width), counts, color=colours["routed"])
    middle.axhline(EXPERTS, color="#bbbbbb", lw=1, zorder=0)
    middle.set(
        xlabel="step", ylabel="experts per token", title="routed arm, training batches", ylim=(2.5, 3.5)
    )
    groups = list(ROUTINGS)
    for i, (name, title) in enumerate((("base", "before"), ("control", "control"), ("routed", "routed"))):
        values = [perplexity_interval(found[name][r]["blocks"]).value for r in groups]
        bars = right.bar(
            np.arange(3) + 0.27 * (i - 1),
            values,
            0.25,
            label=title,
            color=("#d0d0d0", "#777777", "#1f6fb4")[i],
        )
        right.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
    lowest = min(perplexity_interval(found[n][r]["blocks"]).value for n in found for r in groups)
    highest = max(perplexity_interval(found[n][r]["blocks"]).value for n in found for r in groups)
    right.set(
        ylim=(lowest - 0.5 * (highest - lowest), highest + 0.45 * (highest - lowest)),
        title="test text",
    )
    right.set_xticks(range(3), ["top-8", "3.0", "3.0, no\ncompensation"])
    right.legend(frameon=False, fontsize=7, ncols=3, loc="upper center")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = arguments(__doc__, threads=False, data=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/finetune"), metavar="FOLDER")
    parser.add_argument("--arm", choices=ARMS, help="only this one, and no tables")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    arms = (args.arm,) if args.arm else ARMS
    for arm in arms:
        if not (args.output / arm / "calibration.safetensors").exists():
            train(args, arm)
    found = {name: judge(args, name) for name in ("base", *arms)}
    if args.arm:
        return
    records = {
        name: json.loads((args.output / name / "finetune.json").read_text(encoding="utf-8")) for name in arms
    }
    publish(args.write, "finetune", tables(found, records))
    if args.write:  # the picture beside it
        draw(records, found, args.write.with_name("training.png"))


if __name__ == "__main__":
    main()
