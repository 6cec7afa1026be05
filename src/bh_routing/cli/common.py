"""What the commands share: options, checks before a model is loaded, notes on stderr, console and tables."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .._words import Option
from ..errors import InvalidParameterError
from ..settings import TEXT_OPTIONS

if TYPE_CHECKING:
    from rich.console import Console

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


def add_calibration_argument(parser: argparse._ActionsContainer) -> None:
    """--calibration, as `load_calibration` reads it."""
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="calibrated null, made by `bh-routing calibrate`; olmoe-nano comes with one, `none` turns it off",
    )


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least this, or says so."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return value

    return read


def add_number(
    parser: argparse._ActionsContainer, name: str, help: str, *, default: int | None = None, least: int = 1
) -> None:
    """``--name N``, a whole number of at least this; its default is told."""
    told = help if default is None else f"{help} (default {default})"
    parser.add_argument(f"--{name}", type=whole(least), default=default, metavar="N", help=told)


def add_flag(parser: argparse._ActionsContainer, name: str, help: str) -> None:
    """``--name``, true where it is given."""
    parser.add_argument(f"--{name}", action="store_true", help=help)


def add_numbers(parser: argparse._ActionsContainer, name: str, read: Callable[[str], Any], help: str) -> None:
    """``--name N``, which may be given several times."""
    parser.add_argument(f"--{name}", type=read, action="append", metavar="N", help=f"{help}; several times")


def add_window_argument(parser: argparse.ArgumentParser) -> None:
    """--window, as `window_of` reads it."""
    add_number(
        parser,
        "window",
        "tokens per window (default: what the model was trained on, or its context; at most 512)",
        least=2,
    )


def positive(text: str) -> float:
    """Reads a finite number above 0, or says so."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def plural(number: int, word: str) -> str:
    """A number and what it counts.

    >>> plural(1, "result"), plural(1200, "result"), plural(2, "family")
    ('1 result', '1,200 results', '2 families')
    """
    many = word[:-1] + "ies" if word.endswith("y") else word + "s"
    return f"{number:,} {word if number == 1 else many}"


def window_of(name: str, asked: int | None) -> int:
    """Tokens per window for MODEL: what was asked for, at most its context; by default as `default_window` says.

    It reads the configuration only, so that what is wrong is said before the model is loaded.
    """
    from ..calibration.passes import default_window
    from ..models.loading import load_config

    config = load_config(name)
    text_config = config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    if asked is not None and isinstance(context, int) and asked > context:
        raise InvalidParameterError(
            f"window must be at most the {context} tokens that {model_name(name)} was made for, got {asked}; what it says "
            "beyond them means nothing."
        )
    return asked or default_window(argparse.Namespace(config=config))  # type: ignore[arg-type]


def chosen(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the arguments by name, for a function that calls them the same."""
    return {name: getattr(args, name) for name in names}


def add_options(group: argparse._ActionsContainer, options: Mapping[str, Option]) -> None:
    """One option for each field of settings that text can say; not given, it is None."""
    for name, option in options.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", type=option.read, metavar=name[0].upper(), help=option.help
        )


def values_of(args: argparse.Namespace, options: Mapping[str, Option]) -> dict[str, Any]:
    """The fields of settings that were given."""
    given = {option.field or name: getattr(args, name, None) for name, option in options.items()}
    return {field: value for field, value in given.items() if value is not None}


def add_routing_arguments(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = ()) -> None:
    """Every field of `RoutingSettings` that text can say, --calibration, and --config for a file of them all."""
    group = parser.add_argument_group("routing")
    options = {name: option for name, option in TEXT_OPTIONS.items() if name not in leave_out}
    names = ("alpha", "experts", "max_kl", "agreement", "phases")
    levels = {name: options.pop(name) for name in names if name in options}
    add_options(group.add_mutually_exclusive_group(), levels)
    add_options(group, options)
    add_calibration_argument(group)
    add_config_argument(parser)


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """--config, which `with_config` reads."""
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="options from a YAML file of the same names; what is given here goes before it",
    )


def calibration_file(choice: str | None, model: str) -> str | None:
    """What --calibration asks for: a file, `none`, or (not given) the one that comes with the model."""
    from ..models.loading import default_calibration

    path = default_calibration(model) if choice is None else choice
    return None if path is None or choice == "none" else str(path)


def load_calibration(choice: str | None, model: str, budgets: Sequence[float]) -> Calibration | None:
    """The calibration of `calibration_file`.

    Raises where budgets are asked for and there is none to solve them on.
    """
    for budget in budgets:
        if not 0 < budget < float("inf"):
            raise InvalidParameterError(
                f"experts must be a finite number of experts per token above 0, got {budget:g}."
            )
    path = calibration_file(choice, model)
    if path is None:
        if budgets:
            raise InvalidParameterError(
                f"a budget of {budgets[0]:g} experts needs a calibration: give --calibration FILE, made by "
                "`bh-routing calibrate MODEL --text FILE -o FILE`."
            )
        return None
    from ..calibration.calibration import Calibration

    return Calibration.load(path)


def check_output(path: Path, what: str, suffix: str = "") -> None:
    """Find out before the work, not after it, that a file (whose name ends so) or a folder cannot be written."""
    if suffix and path.suffix != suffix:
        raise InvalidParameterError(f"output must be a file name that ends in {suffix}, got {str(path)!r}.")
    if (what == "file" and path.is_dir()) or (what == "folder" and path.exists() and not path.is_dir()):
        other = "folder" if what == "file" else "file"
        raise InvalidParameterError(
            f"output must be a {what}, got the {other} {str(path)!r}; give another name."
        )
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InvalidParameterError(
            f"output must lie in a folder that exists, got {str(path)!r}; make {path.parent} first."
        )
    if not os.access(parent, os.W_OK):
        raise InvalidParameterError(f"output must be a {what} that can be written, got {str(path)!r}.")


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


def warn_of_few(text: str, tokens: int, blocks: int) -> None:
    """A note where a text is too short to judge by."""
    from ..evaluation.paired import FEWEST

    if blocks < FEWEST:
        logging.getLogger(__name__).warning(
            "%s is %s in %s: too short to judge by; at least %d blocks give an interval.",
            text,
            plural(tokens, "token"),
            plural(blocks, "block"),
            FEWEST,
        )


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


def print_text(text: str) -> None:
    """Print a paragraph, broken at the width of the output."""
    print(fill(text, width=make_console().width, break_long_words=False, break_on_hyphens=False))


def load(args: argparse.Namespace, dtype: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of MODEL as `add_model_arguments` lets a person say it."""
    from ..models.loading import load_model

    return load_model(args.model, device=args.device, dtype=dtype or args.dtype)


def describe_model(name: str, model: Any) -> str:
    """One line: what MODEL is called, class, size, dtype, device, threads."""
    import torch

    size = sum(p.numel() for p in model.parameters()) / 1e6
    dtype = str(model.dtype).removeprefix("torch.")
    where = str(model.device)
    if where == "cpu":
        threads = torch.get_num_threads()
        where = f"cpu, {threads} thread{'s' if threads != 1 else ''}"
    return f"{model_name(name)}: {type(model).__name__}, {size:,.1f} M parameters, {dtype} on {where}"


def model_name(name: str) -> str:
    """What to call MODEL in a heading: a folder by its last part."""
    return os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name
