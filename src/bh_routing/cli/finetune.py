"""Fine-tune a model under routing at a budget: every batch runs with as many experts as the budget allows on average,
and (--full-share) with the model's own number, so that quality is kept at both. Writes an ordinary checkpoint and its
calibration into the folder OUT, and prints perplexities before and after on text that was set aside.

All weights are trained. Parts of the text are kept out of training, unless --calibration-text and --eval-text name
others: a tenth to calibrate on, a tenth to judge by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_atomically, write_folder
from ..errors import InvalidParameterError
from ..training.settings import TEXT_OPTIONS, FinetuneSettings
from . import common
from .tables import print_table

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration

PIECE = 8192  # characters: what is set aside, or shuffled, as a whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="olmoe-nano, a folder, or a hub id")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text, plain or .xz, .gz, .bz2"
    )
    parser.add_argument(
        "--experts", type=common.positive, required=True, metavar="N", help="experts per token on average"
    )
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="updates of the weights")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="the folder to write; must not exist"
    )
    parser.add_argument("--calibration-text", nargs="+", metavar="FILE", help="calibrate on this text")
    parser.add_argument("--eval-text", nargs="+", metavar="FILE", help="judge by this text")
    common.add_number(parser, "calibration-tokens", "at most so many", default=65_536, least=2)
    common.add_number(parser, "eval-tokens", "at most so many", default=16_384, least=2)
    common.add_flag(parser, "control", "train with the model's own routing instead; the table is the same")
    group = parser.add_argument_group("training")
    common.add_options(group, TEXT_OPTIONS)
    common.add_config_argument(parser)
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    out = Path(args.output)
    _check_output(out)
    from ..text import TextFile

    if not args.experts >= 1:
        raise InvalidParameterError(f"experts must be a number of at least 1, got {args.experts:g}.")
    files = {
        name: [TextFile(path, PIECE) for path in getattr(args, name) or ()]
        for name in ("text", "calibration_text", "eval_text")
    }
    settings = FinetuneSettings(
        steps=args.steps,
        experts_per_token=args.experts,
        routed=not args.control,
        seed=args.seed,
        **common.values_of(args, TEXT_OPTIONS),
    )
    _finetune(args, settings, files, out)


def _finetune(
    args: argparse.Namespace, settings: FinetuneSettings, files: dict[str, list[Any]], out: Path
) -> None:
    from ..calibration.passes import calibrate
    from ..integration import BHRoutingIntegration
    from ..training.loop import finetune, text_windows

    texts = _texts(files, settings.seed)
    dtype = "float32" if args.dtype == "auto" else args.dtype
    model, tokenizer = common.load(args, dtype)
    print(common.describe_model(args.model, model))
    size = max(1, settings.batch_tokens // settings.window)
    windows_NS = text_windows(tokenizer, texts["text"], settings.window, settings.steps * size)
    judged_NS = text_windows(
        tokenizer, texts["eval_text"], settings.window, max(1, args.eval_tokens // settings.window)
    )

    def make_calibration(model: Any) -> Calibration:
        return calibrate(
            model,
            tokenizer,
            texts["calibration_text"],
            max_tokens=args.calibration_tokens,
            sensitivity=True,
            seed=args.seed,
            model_id=args.model,
        )

    calibration = make_calibration(model)
    # What cannot be served is said before anything is trained.
    BHRoutingIntegration(model, calibration=calibration, experts_per_token=settings.experts_per_token)
    before = _judge(model, judged_NS, calibration, settings.experts_per_token)
    with common.make_progress() as bar:
        task = bar.add_task("training", total=settings.steps)

        def on_step(step: int, figures: dict[str, float]) -> None:
            bar.update(task, completed=step, description=f"training (loss {figures['loss']:.3f})")

        done = finetune(model, windows_NS, calibration, settings, on_step=on_step)
    calibration = make_calibration(model)
    after = _judge(model, judged_NS, calibration, settings.experts_per_token)
    rows = _table(before, after, settings)
    record = {"settings": done.settings, "seconds": done.seconds, "table": rows, "curve": done.curve}

    from transformers.utils import logging

    def write(folder: Path) -> None:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model.save_pretrained(folder)
        finally:
            if shown:
                logging.enable_progress_bar()
        tokenizer.save_pretrained(folder)
        calibration.save(folder / "calibration.safetensors")
        write_atomically(folder / "finetune.json", json.dumps(record, indent=1) + "\n")

    write_folder(out, write)
    _show(rows, done, settings, int(judged_NS[:, 1:].numel()), out)


def _judge(
    model: Any, judged_NS: Any, calibration: Calibration, experts: float
) -> dict[str, tuple[float, Any]]:
    """Mean experts and losses per token, of the own routing and of the budget."""
    import torch

    from ..evaluation.perplexity import window_losses
    from ..integration import BHRoutingIntegration

    def losses() -> Any:
        return torch.cat([window_losses(model, row.unsqueeze(0)) for row in judged_NS])

    own = losses()
    with BHRoutingIntegration(model, calibration=calibration, experts_per_token=experts) as integrator:
        routed = losses()
        stats = integrator.telemetry.mean_experts_per_token
        slots = sum(c.top_k for c in integrator.plan.contexts) / len(integrator.plan.contexts)
    return {"own": (slots, own), "budget": (stats, routed)}


def _table(before: Any, after: Any, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """One row per routing: perplexity before and after, its change, and the distance to the own routing each time."""
    from ..evaluation.paired import block_sums, perplexity_change, perplexity_interval

    rows = []
    for name, title in (("own", "own routing"), ("budget", f"BH, {settings.experts_per_token:g} experts")):
        blocks = [block_sums(x[name][1]) for x in (before, after)]
        own = [block_sums(x["own"][1]) for x in (before, after)]
        change = perplexity_change(blocks[1], blocks[0])
        rows.append(
            {
                "routing": title,
                "experts": [before[name][0], after[name][0]],
                "perplexity": [perplexity_interval(b).value for b in blocks],
                "change": [change.value, *((change.low, change.high) if change.known else (None, None))],
                "over_own": [perplexity_change(b, o).value for b, o in zip(blocks, own, strict=True)],
            }
        )
    return rows


def _show(rows: list[dict[str, Any]], done: Any, settings: FinetuneSettings, tokens: int, out: Path) -> None:
    columns = ("routing", "experts", "before", "after", "change [95 % interval]", "over own")
    cells = []
    for row in rows:
        value, low, high = ("" if x is None else f"{100 * x:+.2f}" for x in row["change"])
        cells.append(
            (
                row["routing"],
                f"{row['experts'][1]:.2f}",
                *(f"{x:.2f}" for x in row["perplexity"]),
                f"{value}% [{low}, {high}]" if low else f"{value}%",
                " → ".join(f"{100 * x:+.2f}%" for x in row["over_own"]),
            )
        )
    print_table("Perplexity", columns, cells)
    print()
    how = (
        f"at {settings.experts_per_token:g} experts"
        if settings.routed
        else "with the model's own routing (control)"
    )
    common.print_text(
        f"{settings.steps} steps of {settings.batch_tokens} tokens {how} in {done.seconds:.0f} s; judged by {tokens:,} "
        "tokens that were set aside, each time with a calibration of its own. over own: against the same weights with "
        "the model's own routing, before and after."
    )
    common.print_text(
        f"saved to {out}; use it with `bh-routing generate {out} -p TEXT --calibration {out / 'calibration.safetensors'} "
        f"--experts {settings.experts_per_token:g}`."
    )


def _texts(files: dict[str, list[Any]], seed: int) -> dict[str, list[str]]:
    """Pieces to train on, to calibrate on and to judge by."""
    from ..training.loop import split_text

    def pieces(name: str) -> list[str]:
        return [piece for file in files[name] for piece in file]

    shares = tuple(0.0 if files[name] else 0.1 for name in ("calibration_text", "eval_text"))
    train, calibration, judged = split_text(pieces("text"), seed, shares)  # type: ignore[arg-type]
    return {
        "text": train,
        "calibration_text": pieces("calibration_text") or calibration,
        "eval_text": pieces("eval_text") or judged,
    }


def _check_output(out: Path) -> None:
    """Find out before the training, not after it, that the folder cannot be written."""
    if out.exists():
        raise InvalidParameterError(f"output must be a folder that does not exist yet, got {str(out)!r}.")
    common.check_output(out, "folder")
