"""What the commands share: options, checks before a model is loaded, notes on stderr, console and tables."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ..errors import InvalidParameterError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..calibration.calibration import Calibration

PIPED_WIDTH = 88  # columns where there is no terminal to ask


# ------------------------------------------------------------------------------------------------ options


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and how the model is loaded: --device, --dtype, --seed."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--device",
        default="auto",
        help="auto (a GPU where there is one), cpu, cuda, cuda:N, mps, spread (over all, by accelerate)",
    )
    group.add_argument(
        "--dtype", default="auto", help="auto (as stored; olmoe-nano in float32), float32, bfloat16, float16"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")


def add_routing_arguments(parser: argparse.ArgumentParser) -> None:
    """What BHRoutingIntegration takes."""
    group = parser.add_argument_group("routing")
    add_choice_arguments(group)
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="divides the router logits (default 1)"
    )


def add_choice_arguments(group: argparse._ActionsContainer) -> None:
    """What decides which experts run, here and in an engine: level or budget, calibration, limits, mode."""
    level = group.add_mutually_exclusive_group()
    level.add_argument("--alpha", type=float, metavar="A", help="level, 0 < A < 1 (default 0.05)")
    level.add_argument(
        "--experts",
        type=float,
        metavar="N",
        help="a budget instead: N experts per token on average (needs a calibration)",
    )
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="calibrated null, made by `bh-routing calibrate`; olmoe-nano comes with one, `none` turns it off",
    )
    group.add_argument("--min-k", type=int, default=1, metavar="K", help="at least K experts (default 1)")
    group.add_argument(
        "--max-k", type=int, metavar="K", help="at most K experts (default: the model's own top-k)"
    )
    group.add_argument(
        "--mode",
        default="patch",
        help="patch: BH routing decides; analyze: the model routes as always, BH is counted",
    )


def check_routing_arguments(args: argparse.Namespace) -> None:
    """Raise for a setting out of range, before a model is loaded for it."""
    from ..decision.types import check_k, check_temperature
    from ..stats.procedures import check_alpha
    from .loading import check_device, check_dtype

    if args.mode not in ("patch", "analyze"):
        raise InvalidParameterError(f"mode must be 'patch' or 'analyze', got {args.mode!r}.")
    if args.alpha is not None:
        check_alpha(args.alpha)
    check_temperature(args.temperature)
    check_k(args.min_k, args.max_k)
    check_device(args.device)
    check_dtype(args.dtype)


def load_calibration(choice: str | None, model: str, budgets: Sequence[float]) -> Calibration | None:
    """The calibration that --calibration asks for: a file, `none`, or (not given) the one that comes with the model.

    Raises where budgets are asked for and there is none to solve them on.
    """
    from .loading import default_calibration

    for budget in budgets:
        if not budget > 0:
            raise InvalidParameterError(
                f"experts must be a number of experts per token above 0, got {budget:g}."
            )
    path = default_calibration(model) if choice is None else choice
    if path is None or choice == "none":
        if budgets:
            raise InvalidParameterError(
                f"a budget of {budgets[0]:g} experts needs a calibration: give --calibration FILE, made by "
                "`bh-routing calibrate MODEL --text FILE -o FILE`."
            )
        return None
    from ..calibration.calibration import Calibration

    return Calibration.load(path)


# ------------------------------------------------------------------------------------------------- notes


@contextmanager
def notes() -> Iterator[None]:
    """Print what the library logs or warns about as one line on stderr, each sentence once."""
    seen: set[str] = set()

    def note(message: object) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            print(f"note: {text}", file=sys.stderr)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("bh_routing")
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        warnings.filterwarnings("default", module=r"bh_routing(\.|$)")
        warnings.showwarning = lambda message, *_args, **_kwargs: note(message)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate


@contextmanager
def muted(name: str) -> Iterator[None]:
    """Without the warnings of one logger, where a command says the same in its own words."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------------------------ output


def make_console(*, stderr: bool = False) -> Console:
    """A console of at most 100 columns, without colour where the output is not a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if "COLUMNS" not in os.environ:
        console.width = min(console.width, 100) if stream.isatty() else PIPED_WIDTH
    return console


def make_progress() -> Any:
    """A progress bar on stderr that vanishes when it is done; nothing where stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=make_console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def make_table(title: str | None, *columns: str, left: int = 1) -> Table:
    """A plain table: the first ``left`` columns are text, the others numbers."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=None if title is None else escape(title),
        title_justify="left",
        title_style="bold",
        header_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for i, name in enumerate(columns):
        table.add_column(
            name, justify="left" if i < left else "right", overflow="fold", no_wrap=i < left == 1
        )
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table after an empty line, narrower where it would not fit, without blanks at the ends of its lines."""
    unbounded = console.options.update(width=10_000)
    for blanks in (2, 1, 0):
        table.padding = (0, blanks, 0, 0)
        if console.measure(table, options=unbounded).maximum <= console.width:
            break
    else:
        table.padding = (0, 2, 0, 0)  # its cells are folded anyway
    with console.capture() as capture:
        console.print(table)
    print("\n" + "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n")))


def print_text(text: str) -> None:
    """Print a paragraph, broken at the width of the output."""
    print(fill(text, width=make_console().width, break_long_words=False, break_on_hyphens=False))


def describe_model(name: str, model: Any) -> str:
    """One line: name, class, size, dtype, device, threads."""
    import torch

    size = sum(p.numel() for p in model.parameters()) / 1e6
    dtype = str(model.dtype).removeprefix("torch.")
    where = str(model.device)
    if where == "cpu":
        threads = torch.get_num_threads()
        where = f"cpu, {threads} thread{'s' if threads != 1 else ''}"
    return f"{name}: {type(model).__name__}, {size:,.1f} M parameters, {dtype} on {where}"


def model_name(name: str) -> str:
    """What to call MODEL in a heading: a folder by its last part."""
    return os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name
