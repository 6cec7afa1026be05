"""Talk to a GGUF model in llama.cpp under BH routing; at the end, what the routers did.

One line is one message; an empty line, or the end of the input, ends it. A model without a chat template continues each line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from ..settings import COUNTED
from . import common
from .generate import who_selects
from .gguf import add_llama_arguments, is_gguf, load_routed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.gguf", help="a GGUF file")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="one message, instead of asking for them")
    common.add_number(parser, "max-new-tokens", "of an answer", default=256)
    common.add_flag(parser, "sample", "sample (default: greedy)")
    common.add_routing_arguments(parser)
    add_llama_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if not is_gguf(args.model):
        raise common.InvalidParameterError(
            f"chat runs GGUF files in llama.cpp, expected a name that ends in .gguf, got {args.model!r}; `bh-routing generate` "
            "runs other models."
        )
    llm = load_routed(args)
    template = "tokenizer.chat_template" in llm.metadata
    said: list[dict[str, str]] = []
    greedy = {} if args.sample else {"temperature": 0.0}
    given = {"max_tokens": args.max_new_tokens, "stream": True} | greedy
    try:
        for line in _messages(args.prompt):
            parts = []
            said.append({"role": "user", "content": line})
            answer = llm.create_chat_completion if template else llm.create_completion
            for part in answer(said if template else line, **given):
                choice = part["choices"][0]
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                parts.append(text)
                print(text, end="", flush=True)
            print()
            said.append({"role": "assistant", "content": "".join(parts)})
        if said:
            show(llm.routing)
    finally:
        llm.close()


def _messages(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def show(routing: Any) -> None:
    """One line: what was decided, and what it was decided by."""
    stats = routing.get_routing_stats()
    mean, deviation = (stats.get(name) for name in COUNTED[stats["mode"]])
    level = "" if stats["alpha"] is None else f", alpha {stats['alpha']:.4g}"
    print()
    common.print_text(
        f"{who_selects(stats)} {mean:.2f} of {stats['max_k']} experts per token and layer (standard deviation {deviation:.2f}) over "
        f"{stats['total_tokens']} tokens; procedure {stats['procedure']}{level}, compensation "
        f"{'on' if routing.compensations and stats['mode'] == 'patch' else 'off'}."
    )
