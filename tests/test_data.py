"""The bundled sample text and prompts."""

import ast
import textwrap
from itertools import groupby

import pytest

from bh_routing.data import prompts, sample_sections, sample_text

SECTIONS = ["narrative", "technical", "dialogue", "code"]
TIERS = ["simple", "medium", "complex", "technical"]


def snippets() -> list[str]:
    lines = sample_sections()["code"].split("\n")
    groups = groupby(lines, key=lambda line: line.startswith("    "))
    return [textwrap.dedent("\n".join(group)) for indented, group in groups if indented]


def test_size_and_encoding():
    text = sample_text()
    assert text.isascii()
    assert 30_000 <= len(text.encode()) <= 45_000
    assert "\t" not in text
    assert "\r" not in text


def test_sections():
    sections = sample_sections()
    assert list(sections) == SECTIONS
    assert all(len(body.encode()) >= 7_000 for body in sections.values())
    assert sample_text() == "\n\n".join(sections.values()) + "\n"


def test_headers_are_stripped():
    assert not any(line.startswith("==") for line in sample_text().splitlines())


def test_one_paragraph_a_line():
    for body in sample_sections().values():
        assert all(line and line == line.rstrip() for line in body.split("\n"))


def test_no_paragraph_twice():
    lines = [line.strip() for line in sample_text().splitlines() if line and not line.startswith("    ")]
    assert len(lines) == len(set(lines))
    assert len(snippets()) == len(set(snippets()))


def test_snippets_are_python():
    assert len(snippets()) >= 5
    for snippet in snippets():
        ast.parse(snippet)


def test_snippets_do_what_the_text_says():
    scope = {}
    for snippet in snippets():
        exec(snippet, scope)
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
