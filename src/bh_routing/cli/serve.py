"""Start an OpenAI-compatible server with BH routing, on this machine only unless --host says otherwise: vLLM's, or, of a GGUF file,
llama-cpp-python's.

In vLLM, after start-up every MoE layer must say that it is routed, else the server is ended. What vLLM logs goes to stderr.
"""

from __future__ import annotations

import argparse
import shlex
import signal
from typing import Any

from ..errors import InvalidParameterError
from ..settings import TEXT_OPTIONS
from . import common
from .gguf import add_llama_arguments, is_gguf, load_routed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="olmoe-nano, a folder, a hub id, or a GGUF file")
    common.add_routing_arguments(parser, leave_out=["skip"])
    common.add_flag(parser, "padded", "on CPU: compute unused slots, too (to compare; it saves little)")
    parser.add_argument(
        "--under-load",
        type=float,
        metavar="N",
        help="experts per token, below --experts, while many requests wait (4, 8, 16: in three steps)",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000")
    server.add_argument("--name", metavar="NAME", help="what clients call the model (default: MODEL)")
    server.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16")
    server.add_argument(
        "--start-timeout", type=float, default=1800, metavar="S", help="seconds to wait for it (default 1800)"
    )
    server.add_argument(
        "--vllm",
        default="",
        metavar="ARGS",
        help='more arguments for vLLM in one string: --vllm "--max-model-len 4096 --tensor-parallel-size 2"',
    )
    add_llama_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if is_gguf(args.model):
        return _serve_gguf(args)
    from ..engines.vllm import serving

    plan = make_plan(args)
    serving.check_installed()
    _check_budget(plan)
    signal.signal(signal.SIGTERM, _interrupt)  # a server of a service manager must take its children along
    with serving.Server(plan) as server:
        server.wait_until_ready(args.start_timeout)
        routed = server.check_routed()
        print(f"\n{plan.name} at {plan.url}/v1: {routed}")
        print(serving.how_to_talk(plan), flush=True)
        code = server.process.wait()
    if code:
        raise server.ended()


def _serve_gguf(args: argparse.Namespace) -> None:
    for name, default in (("padded", False), ("under_load", None), ("dtype", "auto"), ("vllm", "")):
        if getattr(args, name) != default:
            raise InvalidParameterError(
                f"--{name.replace('_', '-')} is an option of vLLM, and {args.model} runs in llama.cpp; leave it out."
            )
    from ..engines.llama_cpp.serving import serve

    llm = load_routed(args)
    try:
        serve(llm, args.name or common.model_name(args.model), args.host, args.port)
    finally:
        llm.close()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def make_plan(args: argparse.Namespace) -> Any:
    """What the arguments ask for; raises for what is wrong before anything is started."""
    from ..engines.vllm.serving import ServerPlan
    from ..engines.vllm.settings import Settings
    from ..models.loading import resolve

    _, model = resolve(args.model)
    common.load_calibration(args.calibration, args.model, [] if args.experts is None else [args.experts])
    asked = {
        "calibration": common.calibration_file(args.calibration, args.model),
        "ragged": not args.padded,
        "under_load": args.under_load,
    }
    settings = Settings.from_dict(asked | common.values_of(args, TEXT_OPTIONS))
    return ServerPlan(
        model=model,
        name=args.name or common.model_name(args.model),
        settings=settings,
        host=args.host,
        port=args.port,
        arguments=("--dtype", args.dtype, *shlex.split(args.vllm)),
    )


def _check_budget(plan: Any) -> None:
    """Solve the budget here, where its error is one sentence, before vLLM is started."""
    from ..engines.vllm.routing import EngineRouting

    EngineRouting(plan.settings)
