"""olmoe-nano fine-tuned at 3.0 experts per token, against a control trained with its own top-8: same steps, data, seed.

    python benchmarks/finetune_nano.py train --arm routed|control --data DIR --out OUT [--steps N ...]
    python benchmarks/finetune_nano.py judge --data DIR --out OUT
    python benchmarks/finetune_nano.py page --data DIR --out OUT [--write docs/training.md]

DIR holds mixed/: equal parts of its six train files are trained on, of its calibration files each model's own calibration is
made, on its valid files settings are chosen and the curves are drawn, on its test files the arms are judged. The two arms
may run side by side, one thread each; a step's time counts the processor's time of that thread, refits included.
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


def train(args: argparse.Namespace) -> None:
    settings = FinetuneSettings(
        steps=args.steps,
        experts_per_token=EXPERTS,
        routed=args.arm == "routed",
        learning_rate=args.learning_rate,
        full_share=args.full_share,
        distil=args.distil,
        budget=args.budget,
        balance=args.balance,
        z=args.z,
        refit_every=args.refit_every,
        window=WINDOW,
        seed=args.seed,
    )
    model, tokenizer = load_model("olmoe-nano")
    size = settings.batch_tokens // WINDOW
    text = mixed_text(args.data, "train", 6 * settings.steps * settings.batch_tokens)
    windows_NS = text_windows(tokenizer, [text], WINDOW, settings.steps * size)
    judged_N = held_out(tokenizer, args.data, "valid", args.curve_tokens)
    calibration = Calibration.load(bundled_calibration())
    curve: list[dict[str, float]] = []
    spent = {"cpu": 0.0, "since": 0.0}

    def point(step: int) -> None:
        """Loss on valid text as the arm routes: at 8, or at 3.0 with the table in use."""
        model.eval()
        mean = float(losses(model, judged_N).double().mean())
        curve.append({"step": step, "cpu": spent["cpu"], "loss": mean})
        model.train()
        print(args.arm, curve[-1], flush=True)

    def on_step(step: int, figures: dict[str, float]) -> None:
        spent["cpu"] += time.process_time() - spent["since"]
        if step % args.log_every == 0 or step == settings.steps:
            point(step)
            short = {k: round(v, 4) for k, v in figures.items()}
            print(args.arm, short, f"{spent['cpu']:.0f} s of processor time", flush=True)
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
        make_calibration=lambda m: make_calibration(m, tokenizer, args.data, args.refit_tokens),
        on_step=on_step,
    )
    folder = args.out / args.arm
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
    make_calibration(model, tokenizer, args.data, args.calibration_tokens).save(
        folder / "calibration.safetensors"
    )


def judge(args: argparse.Namespace) -> None:
    """Losses of every model and routing on held-out text, each model with its own calibration."""
    found: dict[str, dict[str, Any]] = {}
    for name in args.arms:
        model, tokenizer = load_model(
            "olmoe-nano" if name == "base" else str(args.out / name), dtype="float32"
        )
        ids_N = held_out(tokenizer, args.data, args.split, args.tokens)
        calibration_file = (
            bundled_calibration() if name == "base" else args.out / name / "calibration.safetensors"
        )
        calibration = Calibration.load(calibration_file)
        found[name] = {}
        for routing, options in ROUTINGS.items():
            if options is None:
                mean, loss_C = 8.0, losses(model, ids_N)
            else:
                with BHRoutingIntegration(model, calibration=calibration, **options) as integrator:
                    loss_C = losses(model, ids_N)
                    mean = integrator.telemetry.mean_experts_per_token
            found[name][routing] = {"experts": mean, "blocks": block_sums(loss_C.tolist())}
            print(
                name,
                routing,
                f"{mean:.3f}",
                f"{perplexity_interval(found[name][routing]['blocks']).value:.4f}",
                flush=True,
            )
        path = args.out / f"judged-{args.split}-{name}.json"
        path.write_text(json.dumps(found[name]) + "\n", encoding="utf-8")


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
    add = parser.add_argument
    add("what", choices=("train", "judge", "page"))
    add("--arm", choices=("routed", "control"), default="routed")
    add("--arms", nargs="+", default=["base", *ARMS], metavar="NAME", help="judge: base, and folders of OUT")
    add("--out", type=Path, required=True)
    add("--steps", type=int, default=1000)
    add("--learning-rate", type=float, default=1e-3)
    add("--full-share", type=float, default=0.0)
    add("--distil", type=float, default=0.0)
    add("--budget", type=float, default=0.1)
    add("--balance", type=float, default=0.006)
    add("--z", type=float, default=0.001)
    add("--refit-every", type=int, default=225)
    add("--refit-tokens", type=int, default=32_768)
    add("--calibration-tokens", type=int, default=131_072)
    add("--curve-tokens", type=int, default=16_384)
    add("--log-every", type=int, default=100)
    add("--tokens", type=int, default=131_072, help="to judge on")
    add("--split", choices=("valid", "test"), default="test", help="to judge on")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what != "page":
        (train if args.what == "train" else judge)(args)
        return
    found = {
        name: json.loads((args.out / f"judged-{args.split}-{name}.json").read_text(encoding="utf-8"))
        for name in ("base", *ARMS)
    }
    records = {
        name: json.loads((args.out / name / "finetune.json").read_text(encoding="utf-8"))
        for name in ("control", "routed")
    }
    text = tables(found, records)
    publish(args.write, "finetune", text)
    if args.write:  # the picture beside it
        draw(records, found, args.write.with_name("training.png"))


if __name__ == "__main__":
    main()
