"""Bundled sample text and prompts.

``sample.txt`` is original prose in four registers and ``prompts.json`` holds short openings for a language
model to continue, in four tiers of difficulty.  Both belong to this project and are distributed under its
licence, Apache-2.0.

Layout of ``sample.txt``: a line ``== name ==`` opens the section ``name``; every other line is one paragraph
(in the section ``code`` a line indented by four or more spaces is a line of a Python snippet); a blank line
ends a section.  The file is pure ASCII.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files

__all__ = ["prompts", "sample_sections", "sample_text"]

_HEADER = re.compile(r"^== (\w+) ==\n", re.MULTILINE)


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def sample_sections() -> dict[str, str]:
    """Return the sample text by section: narrative, technical, dialogue and code, in this order."""
    _, *parts = _HEADER.split(_read("sample.txt"))
    return {name: body.strip("\n") for name, body in zip(parts[::2], parts[1::2], strict=True)}


def sample_text() -> str:
    """Return the whole sample text, without section headers and with a blank line between sections."""
    return "\n\n".join(sample_sections().values()) + "\n"


def prompts() -> dict[str, list[str]]:
    """Return the prompts by tier: simple, medium, complex and technical."""
    return json.loads(_read("prompts.json"))
