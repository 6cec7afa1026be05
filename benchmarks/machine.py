"""Timing on a shared machine, where everything takes turns, and the line under a table that says which machine it was."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

Times = dict[str, list[float]]


def in_turn(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    *,
    rounds: int = 40,
    warm_up: int = 3,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> Times:
    """Seconds of each call, one value per round after ``warm_up``; who is first changes from round to round.

    At least so many seconds and rounds. ``after`` each call is timed with it (waiting for a GPU), ``before`` is not.
    """
    times: Times = {name: [] for name in calls}
    names = list(calls)
    end, turn = time.perf_counter() + seconds, 0
    while turn < rounds or time.perf_counter() < end:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            before()
            start = time.perf_counter()
            calls[name]()
            after()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
        turn += 1
    return times


def ratio(times: Times, name: str, base: str) -> float:
    """Median over rounds of the ratio within the round: times alone wander on a shared machine."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def processor() -> str:
    """The processor's name, with the instruction sets that matter for bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    name = facts.get("model name", platform.machine())
    family = facts.get("cpu family")
    flags = set(facts.get("flags", "").split())
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name}{f' (family {family})' if family else ''}{', ' + ', '.join(known) if known else ''}"


def describe_machine(threads: int) -> str:
    """One line."""
    day = datetime.date.today().isoformat()
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
    limit = f"; oneDNN held to {isa}" if isa else ""
    return (
        f"{processor()}, {threads} thread{'s' if threads != 1 else ''}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}{limit}; {day}"
    )
