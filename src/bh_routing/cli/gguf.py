"""GGUF files on the command line: what chat, serve and calibrate share."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..errors import InvalidParameterError
from ..settings import TEXT_OPTIONS
from . import common


def is_gguf(model: str) -> bool:
    """Whether MODEL names a GGUF file."""
    return model.lower().endswith(".gguf")


def add_llama_arguments(parser: argparse.ArgumentParser, *, context: bool = True) -> None:
    """What llama.cpp is told."""
    group = parser.add_argument_group("llama.cpp (MODEL is a GGUF file)")
    if context:
        common.add_number(group, "context", "tokens of context", default=4096, least=2)
    common.add_number(group, "threads", "default: the processors there are")


def llama_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The same as arguments of ``Llama``."""
    threads = args.threads or os.cpu_count()
    context = {"n_ctx": args.context} if "context" in args else {}
    return context | {"n_threads": threads, "n_threads_batch": threads}


def load_routed(args: argparse.Namespace) -> Any:
    """The routed ``Llama`` of the command line."""
    from ..engines.llama_cpp.ggml import modules
    from ..engines.llama_cpp.loading import route

    file = None if args.calibration == "none" else args.calibration
    if file is None:
        raise InvalidParameterError(
            "routing in llama.cpp needs a calibration: give --calibration FILE, made by `bh-routing calibrate` from this model in "
            "transformers or from its GGUF file."
        )
    package, _ = modules()
    settings = common.values_of(args, TEXT_OPTIONS)
    return route(package.Llama, model_path=args.model, calibration=file, **settings, **llama_arguments(args))
