"""Bundled sample text and prompts.

``sample.jsonl`` is original text in six domains and ``prompts.json`` holds short openings for a language model to continue.
Both belong to this project and are distributed under its licence, Apache-2.0.

A line of ``sample.jsonl`` is one document, ``{"text", "source", "domain"}``, of a few hundred words; documents of one source
belong together.  The file is pure ASCII, and `bh_routing.text.TextFile` reads it.
"""

from __future__ import annotations

import json
from importlib.resources import files

__all__ = ["prompts", "sample_documents", "sample_sections", "sample_text"]


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def sample_documents() -> dict[str, list[str]]:
    """Return the documents by domain: fiction, encyclopaedia, docs, code, dialogue and simple, in this order."""
    documents: dict[str, list[str]] = {}
    for row in map(json.loads, _read("sample.jsonl").splitlines()):
        documents.setdefault(row["domain"], []).append(row["text"])
    return documents


def sample_sections() -> dict[str, str]:
    """Return the text of each domain, its documents joined by blank lines."""
    return {domain: "\n\n".join(texts) for domain, texts in sample_documents().items()}


def sample_text() -> str:
    """Return the whole sample text, all documents joined by blank lines."""
    return "\n\n".join(sample_sections().values()) + "\n"


def prompts() -> dict[str, list[str]]:
    """Return the prompts by tier: simple, medium, complex and technical."""
    return json.loads(_read("prompts.json"))
