"""What the demo prints, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import common
from .strip import print_legend, print_strip
from .tables import print_heading, print_table

if TYPE_CHECKING:
    from ..evaluation import Measured
    from ..evaluation.layer_speed import LayerTime
    from ..evaluation.paired import Interval
    from .demo_parts import Answers, Report, Speed, Strip


def speed(found: Speed) -> None:
    """A real-sized layer."""
    _times("Speed: one MoE layer of OLMoE-1B-7B's shape, one token at a time", found.rows)
    batch = found.batch[0].tokens
    _times(f"The same for {batch} sequences that are decoded together", found.batch)
    print()
    one = ", ".join(f"{row.experts:.1f} experts in {row.ratio:.2f} of the time" for row in found.rows[1:])
    own, dropped, priced = found.batch
    common.print_text(
        f"Alone, a token waits for its own experts: {one}. Together, {batch} read {own.loads:.0f}, and {dropped.loads:.0f} where "
        f"each drops half of its own ({dropped.ratio:.2f} of the time); a price on loads reads {priced.loads:.0f} "
        f"({priced.ratio:.2f})."
    )
    short = "" if found.experts == 64 else f" (OLMoE-1B-7B has 64; {found.experts} need less memory)"
    common.print_text(
        f"{found.experts} experts{short} of {found.megabytes_each:.1f} MB, random bfloat16 weights; ms: median, the rows taking "
        "turns; deciding and counting included. read: distinct experts."
    )


def _times(title: str, rows: Sequence[LayerTime]) -> None:
    print_table(
        title,
        ("routing", "experts", "read", "ms", "of the time", "rounds"),
        [
            (
                row.label,
                f"{row.experts:.2f}",
                f"{row.loads:.1f}",
                f"{row.to_dict()['milliseconds']:.2f}",
                f"{row.ratio:.2f}",
                str(len(row.seconds)),
            )
            for row in rows
        ],
        spare=("rounds", "read"),
    )


def fidelity(report: Report) -> None:
    """How near the predictions stay to the full model's, BH against top-k, and the verdict."""
    _nearness(f"Fidelity: predictions of the next word on {report.source}", report.measured)
    print()
    common.print_text(
        f"{report.tokens:,} tokens of {report.units} documents. agrees: says the same next word as the full model. KL: "
        "divergence from its prediction, in thousandths of a nat, with a 95 % interval (bootstrap over documents). "
        "experts: per token, mean ± standard deviation. MB: weights of experts that one token reads, over all layers."
    )
    if pairs := report.pairs():
        print_table(
            "A budget against top-k at that number, paired, with 95 % intervals",
            ("budget", "kept", "agrees more, points", "interval", "KL lower by", "interval "),
            [
                (
                    ours.label.removeprefix("BH, "),
                    f"{ours.mean_experts:.2f}",
                    *_cells(ours.agreement(cut), 100, "+.1f"),
                    *_cells(_negative(ours.kl(cut)), 1000, ".1f"),
                )
                for ours, cut in pairs
            ],
        )
    print()
    common.print_text(f"Verdict: {report.verdict}")
    if report.certified is not None:
        common.print_text(f"Certified: {report.certified}")
    if report.usual:
        _nearness("As the original design has it: a level, and only watching", report.usual)
        print()
        for row in report.usual:
            if row.would_select is not None:
                common.print_text(
                    f"analyze: the model's own experts run; {row.would_select:.2f} would have been selected."
                )


def _nearness(title: str, rows: Sequence[Measured]) -> None:
    cells = []
    for row in rows:
        value, interval = _cells(row.kl(), 1000, ".1f")
        read = row.bytes_per_token
        cells.append(
            (
                row.label,
                f"{row.mean_experts:.2f} ± {row.std_experts:.2f}",
                "" if read is None else f"{read / 1e6:.2f}",
                f"{row.agreement().value:.1%}",
                value,
                interval,
                f"{row.perplexity:.2f}",
            )
        )
    columns = ("routing", "experts", "MB", "agrees", "KL", "95 % interval", "perplexity")
    print_table(title, columns, cells, spare=("MB", "95 % interval", "perplexity"))


def _cells(interval: Interval, scale: float, form: str) -> tuple[str, str]:
    """Value and interval."""
    low, high = (format(scale * bound, form) for bound in interval[1:])
    return format(scale * interval.value, form), f"[{low}, {high}]" if interval.known else ""


def _negative(interval: Interval) -> Interval:
    return type(interval)(-interval.value, -interval.high, -interval.low)


def strips(found: Sequence[Strip], label: str, most: int) -> None:
    """Who gets the experts: tokens shaded, and the means by layer."""
    print()
    print_heading(f"Who gets the experts ({label})")
    print_legend(most)
    for strip in found:
        mean = sum(strip.experts) / len(strip.experts)
        print(f"{strip.domain}, {mean:.1f} experts per token")
        print_strip(strip.tokens, strip.experts, most)
    layers = range(len(found[0].layers))
    picked = [*layers] if len(layers) <= 6 else sorted({round(i * (len(layers) - 1) / 5) for i in range(6)})
    print_table(
        "Experts per token by layer",
        ("text", *(f"layer {i}" for i in picked), "all"),
        [
            (
                strip.domain,
                *(f"{strip.layers[i]:.1f}" for i in picked),
                f"{sum(strip.layers) / len(strip.layers):.1f}",
            )
            for strip in found
        ],
    )
    means = [sum(strip.layers[i] for strip in found) / len(found) for i in layers]
    if len(means) > 1:
        high, low = max(layers, key=means.__getitem__), min(layers, key=means.__getitem__)
        print()
        common.print_text(
            f"Layer {high} spends most, {means[high]:.1f} experts per token; layer {low} least, {means[low]:.1f}."
        )


def answers(found: Sequence[Answers]) -> None:
    """One answer beside the other: columns of running text, which `print_table` does not fold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = common.make_console()
    for answer in found:
        print()
        print_heading(f"{answer.prompt} ...")
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            header_style="",
            expand=True,
        )
        for name in answer.texts:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(Text(" ".join(text.split())) for text in answer.texts.values()))
        with console.capture() as capture:
            console.print(table)
        print("\n".join(line.rstrip() for line in capture.get().rstrip().split("\n")))
