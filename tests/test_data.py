"""The bundled sample text and prompts."""

import ast
import json
import re
import types
from importlib.resources import files
from itertools import groupby
from textwrap import dedent

import pytest

from bh_routing.data import prompts, sample_documents, sample_sections, sample_text
from bh_routing.text import TextFile

DOMAINS = ["fiction", "encyclopaedia", "docs", "code", "dialogue", "simple"]
TIERS = ["simple", "medium", "complex", "technical"]


def snippets() -> list[str]:
    """The indented blocks of the documentation that are Python."""
    found = []
    for text in sample_documents()["docs"]:
        groups = groupby(text.split("\n"), key=lambda line: line.startswith("    "))
        found += [dedent("\n".join(group)) for indented, group in groups if indented]
    return [code for code in found if not code.startswith("[")]  # an .ini file


def program(source: str) -> types.ModuleType:
    """A Python file of the domain code, run under the name that it has."""
    rows = map(json.loads, files("bh_routing.data").joinpath("sample.jsonl").read_text().splitlines())
    (text,) = (row["text"] for row in rows if row["source"] == source)
    module = types.ModuleType(source)
    exec(compile(text, source, "exec", dont_inherit=True), module.__dict__)
    return module


def test_six_domains_in_equal_parts():
    documents, sections, text = sample_documents(), sample_sections(), sample_text()
    assert list(documents) == list(sections) == DOMAINS
    assert text == "\n\n".join("\n\n".join(d) for d in documents.values()) + "\n"
    assert text.isascii()
    assert len(text) >= 60_000
    assert "\t" not in text
    assert "\r" not in text
    for domain, section in sections.items():
        assert 0.14 < len(section) / len(text) < 0.19, domain


def test_documents_are_units():
    """Many, of a few hundred words each, and no line of prose twice."""
    every = [document for documents in sample_documents().values() for document in documents]
    assert len(every) >= 45
    assert all(900 <= len(document) <= 2_500 for document in every)
    assert all(document == document.strip() for document in every)
    lines = [line for document in every for line in document.split("\n") if len(line) > 50]
    assert len(lines) == len(set(lines))


def test_the_file_is_a_text_file():
    read = list(TextFile(str(files("bh_routing.data").joinpath("sample.jsonl"))).with_sources())
    assert [text for _, text in read] == [d for documents in sample_documents().values() for d in documents]
    assert all(source for source, _ in read)


def test_turns_have_speakers():
    for document in sample_documents()["dialogue"]:
        lines = document.split("\n")
        assert sum(": " in line[:25] for line in lines) >= 0.7 * len(lines)


def test_sums_are_right():
    text = sample_sections()["simple"]
    sums = re.findall(r"(\d+(?: [-+*/] \d+)+) = \$?(\d+)", text)
    assert len(sums) >= 25
    for left, right in sums:
        assert eval(left) == int(right), left


def test_snippets_do_what_the_text_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[server]\nhost = localhost\nport = 8080\ndebug = no\n")
    scope = {}
    assert len(snippets()) >= 12
    for snippet in snippets():
        ast.parse(snippet)
        exec(snippet, scope)
    assert (scope["host"], scope["port"], scope["debug"], scope["timeout"]) == (
        "localhost",
        8080,
        False,
        30.0,
    )
    assert scope["found"] == ["settings.ini"]
    assert not scope["report"].exists()
    scope["replace_text"]("new.txt", "whole")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".txt"] == ["new.txt"]
    assert (tmp_path / "new.txt").read_text() == "whole"
    assert scope["count_words"](["a", "b", "a"]) == {"a": 2, "b": 1}
    assert scope["first_at_least"]([2, 3, 5, 7, 11], 6) == 3
    assert scope["first_at_least"]([2, 3], 6) == 2
    assert [w[0] for w in scope["windows"](list(range(10)), 4, 3)] == [0, 3, 6]
    assert scope["softmax"]([1000.0, 1000.0]) == [0.5, 0.5]
    with pytest.raises(ValueError):
        scope["softmax"]([])
    p_values = [0.3, 0.001, 0.012, 0.021, 0.045, 0.048, 0.4, 0.5, 0.6, 0.7]
    assert scope["step_up"](p_values, 0.10) == {1, 2, 3, 4, 5}
    assert scope["step_up"]([0.9, 0.8], 0.10) == set()
    running = scope["Running"]()
    running.add(2.0)
    with pytest.raises(ZeroDivisionError):
        running.variance()
    running.add(4.0)
    assert running.mean == 3.0
    assert running.variance() == 2.0
    assert list(scope["remember"]("a")) == ["a"]
    assert scope["remember"]("b") == ["a", "b"]
    given = ["a"]
    assert scope["remember_safely"]("b", given) == ["a", "b"]
    assert given == ["a"]


def test_programs_run():
    queue = program("priority_queue.py")
    assert queue.shortest_paths({"a": {"b": 4, "c": 1}, "c": {"b": 2}}, "a") == {"a": 0, "c": 1, "b": 3}
    lines = program("text_wrap.py").format_paragraph("one two three four five six", 12).split("\n")
    assert all(len(line) == 12 for line in lines[:-1])
    assert " ".join(" ".join(lines).split()) == "one two three four five six"
    retry = program("retry.py")
    tried, slept = [], []

    @retry.retry(attempts=3, sleep=slept.append)
    def third():
        tried.append(1)
        if len(tried) < 3:
            raise OSError("not yet")
        return "done"

    assert third() == "done"
    assert len(slept) == 2
    intervals = program("test_intervals.py")
    intervals.test_subtract()
    intervals.test_subtract_agrees_with_sets()
    reader = program("table_reader.py")
    table = "station,day,celsius\nA,2024-01-02,3.5\nA,2024-01-05,-1\nB,2024-02-30,1\n"
    with pytest.raises(reader.TableError, match=r"^line 4: day is out of range"):
        list(reader.read_table(table))
    (summary,) = reader.summarise(reader.read_table(table, skip_errors=True)).values()
    assert (summary.mean, summary.lowest, summary.highest) == (1.25, -1.0, 3.5)


def test_prompts():
    tiers = prompts()
    assert list(tiers) == TIERS
    assert all(len(tier) >= 5 for tier in tiers.values())
    every = [prompt for tier in tiers.values() for prompt in tier]
    assert len(every) == len({prompt.strip().lower() for prompt in every})
    assert all(prompt == prompt.strip() and prompt.isascii() for prompt in every)
    assert all(4 <= len(prompt.split()) <= 40 for prompt in every)


@pytest.mark.parametrize(
    ("tier", "prompt"),
    [
        ("simple", "The capital of France is"),
        ("medium", "To be or not to be,"),
        ("technical", "In machine learning, overfitting occurs when"),
    ],
)
def test_original_prompts_come_first(tier, prompt):
    assert prompts()[tier][0] == prompt
