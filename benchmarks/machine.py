"""The machine a benchmark ran on, for the line under its table: processor, threads, versions, date; no paths."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch
import transformers


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
