"""The command line, ``bh-routing COMMAND``.

One module per command: ``add_arguments(parser)`` states its options, ``run(args)`` does it and returns the exit
code. `COMMANDS` is the only list of them. Neither this module nor the options import torch, so that ``--help``
answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from .._version import __version__
from ..errors import BHRoutingError
from .common import notes
from .yaml_options import with_config

# command: (module, one line of help), in the order in which --help lists them.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "the embedded model with its own routing and with BH routing, side by side"),
    "generate": ("generate", "continue a text under BH routing and print what the routers did"),
    "calibrate": ("calibrate", "what a model's routers do on a text, once; saved to a file"),
    "certify": ("certify", "what a calibration's levels lose at most on held-out text, with a confidence"),
    "inspect": ("inspect", "what a model's routers are, or what a calibration file holds"),
    "families": ("families", "the model families of transformers that were tested, and what is supported"),
    "evaluate": ("evaluate", "compare routing policies on text: quality, experts, time"),
    "report": ("report", "one HTML page of what evaluate has measured"),
    "lm-eval": ("lm_eval", "tasks of lm-evaluation-harness under routing policies"),
    "bench": ("bench", "time a model with its own routing and with fewer experts, side by side"),
    "finetune": ("finetune", "train a model under routing at a budget: a checkpoint and its calibration"),
    "chat": ("chat", "talk to a GGUF model in llama.cpp under BH routing"),
    "serve": ("serve", "an OpenAI-compatible server, vLLM or llama.cpp, with BH routing"),
    "record": ("record", "router logits, choices and weights of a sample of tokens, to a file"),
}

MODEL_HELP = "MODEL is olmoe-nano (embedded), a folder, or a hub id such as allenai/OLMoE-1B-7B-0924."

USER_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143

__all__ = ["COMMANDS", "main"]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage block."""

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """As in argparse, with a sentence that does not depend on Python's version."""
        if action.choices is not None and value not in action.choices:
            expected = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"expected one of {expected}, got {value!r}")

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message.rstrip('.')}; see `{self.prog} --help`.\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command of `COMMANDS`."""
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = _Parser(
        prog="bh-routing",
        usage="bh-routing [-h] [--version] COMMAND ...",
        description="As many experts as each token needs, in a pretrained Mixture-of-Experts model.",
        epilog=f"commands:\n{listed}\n\n{MODEL_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bh-routing {__version__}")
    commands = parser.add_subparsers(
        prog=parser.prog, metavar="COMMAND", dest="command", required=True, help=argparse.SUPPRESS
    )
    for name, (module, _) in COMMANDS.items():
        command = import_module(f".{module}", __name__)
        sub = commands.add_parser(
            name, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, parser=sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 2: something in what was asked is wrong (one sentence on stderr). 130: interrupted. 143: ended by SIGTERM.
    """
    parser = build_parser()
    prog = parser.prog
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 0
    try:
        args, unknown = parser.parse_known_args(argv)
        prog = args.parser.prog
        if unknown:
            args.parser.error(f"unknown option {unknown[0]!r}")
        if getattr(args, "config", None):
            args = with_config(parser, argv, args.config)
        with notes(), _terminable():
            _check_model_arguments(args)
            return args.run(args) or 0
    except SystemExit as leave:  # argparse's way to end: --help, --version, a usage error
        return int(leave.code or 0)
    except BHRoutingError as error:
        return _fail(prog, str(error))
    except BrokenPipeError:  # the reader of a pipe has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(prog, f"{where}{(error.strerror or str(error) or type(error).__name__).lower()}.")
    except _Terminated:
        print(f"{prog}: ended by a signal.", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print(f"{prog}: interrupted.", file=sys.stderr)
        return INTERRUPTED


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that what was begun is taken back."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `_Terminated` in here."""

    def terminated(_number: int, _frame: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # signals are its owner's business
        yield
        return
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_model_arguments(args: argparse.Namespace) -> None:
    """Say what is wrong with --device and --dtype before anything else is done."""
    from ..models.loading import check_device, check_dtype

    for name, check in (("device", check_device), ("dtype", check_dtype)):
        if hasattr(args, name):
            check(getattr(args, name))


def _fail(prog: str, sentence: str) -> int:
    print(f"{prog}: {' '.join(sentence.split())}", file=sys.stderr)
    return USER_ERROR
