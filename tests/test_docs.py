"""README and docs/: programs run and print what they say, commands parse, links lead somewhere, figures name their command."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest

from bh_routing.cli import COMMANDS, build_parser, main

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import refresh_docs  # noqa: E402
from pages import outputs  # noqa: E402
from refresh_docs import PROGRAMS  # noqa: E402

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_filled(page):
    text = page.read_text()
    blocks = re.findall(r"<!-- begin (\S+): ([^\n]+) -->\n(.*?)<!-- end (\S+) -->", text, re.DOTALL)
    assert len(blocks) == text.count("<!-- begin ") == text.count("<!-- end ")
    for begin, command, content, end in blocks:
        assert begin == end
        assert content.strip(), f"{begin} is empty: run {command}"


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_names_what_there_is(page):
    """Every block compiles, and what it imports from this package exists (blocks that need a GPU or a text do not run)."""
    for code in python_blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(("bh_routing", "olmoe_")):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_files_exist(page):
    """What a page calls bh_routing.X.Y (but for keys in quotes) can be imported; what it calls benchmarks/X, say, is there."""
    text = page.read_text()
    for name in re.findall(r"(?<![\w\"])bh_routing(?:\.[A-Za-z_]\w*)+", text):
        pkgutil.resolve_name(name)
    for name in re.findall(r"\b(?:src|benchmarks|scripts|tests|docs|examples)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_print_what_the_page_says(name, tmp_path, monkeypatch):
    """Line by line, but for the digits, which depend on the machine, and for text that the model writes."""
    monkeypatch.chdir(tmp_path)
    blocks = outputs((ROOT / name).read_text())
    assert len(blocks) == len(python_blocks(ROOT / name))
    assert any(said for _, said, _ in blocks)
    for code, said, printed in blocks:
        assert (said is None) == (printed == ""), code
        if said is None:
            continue
        assert len(said.splitlines()) == len(printed.splitlines()), printed
        for expected, line in zip(said.splitlines(), printed.splitlines(), strict=True):
            if re.search(r"\d", expected):
                assert re.sub(r"[\d ]+", "#", line) == re.sub(r"[\d ]+", "#", expected)


def test_readme_example_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ((_, _, printed),) = outputs((ROOT / "README.md").read_text())
    telemetry = printed.rstrip().split("\n")[-7:]
    assert telemetry[0].startswith("Telemetry: 4 routers, ")
    assert re.fullmatch(r"all +\d+ +[1-7]\.\d\d +\d\.\d\d +\d\d\.\d%", telemetry[-1])


@pytest.mark.parametrize(
    "name", ["README.md", "docs/index.md", "docs/quickstart.md", "docs/troubleshooting.md"]
)
def test_newcomers_need_no_statistics(name):
    text = (ROOT / name).read_text().lower()
    for word in ("null hypothes", "false discovery", "p-value"):
        assert word not in text


def test_quickstart_says_budget_and_level():
    printed = "".join(re.findall(r"```text\n(.*?)```", (ROOT / "docs/quickstart.md").read_text(), re.DOTALL))
    assert re.search(r"^[1-7]\.\d\d experts per token, at level 0\.\d{3}$", printed, re.MULTILINE)


def test_readme_output_is_of_this_model():
    """The demo's table in docs/demo.md was printed with the calibration that ships."""
    text = (ROOT / "docs" / "demo.md").read_text()
    assert re.search(r"^own top-8 +8\.00 ± 0\.00 ", text, re.MULTILINE)
    for k in (6, 4, 3, 2):
        assert re.search(rf"^BH, {k} experts +\d\.\d\d ± ", text, re.MULTILINE)
        assert re.search(rf"^top-{k} +{k}\.00 ± 0\.00 ", text, re.MULTILINE)


def test_what_is_fresh_is_not_made_again(tmp_path, monkeypatch, capsys):
    """A part runs once; again when what the page holds is another; a part that fails is told and left to do."""
    monkeypatch.setattr(refresh_docs, "STATE", tmp_path / "docs.json")
    monkeypatch.setattr(refresh_docs, "package_digest", lambda: "of the package")
    ran, page = [], ["old"]
    parts = {
        name: refresh_docs.Part(name, make=lambda data, name=name: ran.append(name), holds=lambda: page)
        for name in ("one", "two")
    }
    parts["broken"] = refresh_docs.Part("broken", make=lambda data: 1 / 0)
    monkeypatch.setattr(refresh_docs, "parts", lambda: parts)
    assert refresh_docs.main(["--data", str(tmp_path)]) == 1
    assert ran == ["one", "two"]
    assert "failed: broken" in capsys.readouterr().out
    assert refresh_docs.main(["--data", str(tmp_path), "one", "two"]) == 0
    assert ran == ["one", "two"]
    assert "0 of 2 parts to do, 2 fresh." in capsys.readouterr().out
    page[0] = "edited"
    refresh_docs.main(["--data", str(tmp_path), "--plan", "one"])
    assert "1 of 1 parts to do, 0 fresh. 1 of them took 0 s the last time." in capsys.readouterr().out
    assert ran == ["one", "two"]
    refresh_docs.main(["--data", str(tmp_path), "one"])
    assert ran == ["one", "two", "one"]


def test_every_block_belongs_to_a_part():
    """And a command gets this Python and its texts."""
    parts = refresh_docs.parts()
    filled = {(page.name, name) for part in parts.values() for page, name in part.blocks}
    in_pages = {
        (page.name, name) for page in PAGES for name in re.findall(r"<!-- begin (\S+):", page.read_text())
    }
    assert filled == in_pages
    assert len(filled) >= 20
    environment, words = refresh_docs.words_of("COLUMNS=88 make demo", ROOT)
    assert (environment, words) == ({"COLUMNS": "88"}, [sys.executable, "-m", "bh_routing", "demo"])
    assert refresh_docs.words_of("python x.py --text README.md DIR", ROOT)[1][1:] == [
        "x.py", "--text", str(ROOT / "README.md"), str(ROOT),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ command lines


def command_lines(page):
    """Every command line of a page, in blocks of code (joined where it is continued) and in the text, as words."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    lines = re.findall(r"^(?:    )?([^|`\n]*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    lines += re.findall(r"<!-- begin \S+: (.*?) -->", text)
    for line in lines:
        words = shlex.split(line, comments=True) if re.search(COMMAND, line) else []
        while words and (re.match(r"[A-Z_]+=", words[0])):
            del words[0]
        if words and "..." not in words and not words[-1].endswith(":"):  # a line of a log
            yield [word.strip("[]") for word in words]


COMMAND = re.compile(r"^\s*(?:[A-Z_]+=\S+ )*(?:bh-routing|[\w./-]*python|torchrun|scripts/\S+\.sh|make) \S")
ALL_COMMANDS = sorted({tuple(words) for page in PAGES for words in command_lines(page)})


def of(program):
    return [words for words in ALL_COMMANDS if Path(words[0]).name == program]


def test_the_command_lines_are_found():
    assert len(of("bh-routing")) >= 25
    assert len(of("python")) >= 10
    assert len(of("make")) >= 4


@pytest.mark.parametrize("words", of("bh-routing"), ids=" ".join)
def test_commands_parse(words):
    if len(words) == 2:  # a command is only named
        assert words[1] in COMMANDS
        return
    parser = build_parser()
    numbers = {"N", "S"}  # what stands for a number
    args, unknown = parser.parse_known_args(["1" if word in numbers else word for word in words[1:]])
    assert not unknown
    assert args.command == words[1]


@pytest.mark.parametrize("words", [w for w in of("python") if w[1].endswith(".py")], ids=" ".join)
def test_scripts_have_these_options(words):
    script = ROOT / words[1]
    source = script.read_text()
    if "from pages import" in source:
        source += (ROOT / "benchmarks" / "pages.py").read_text()
    for option in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
        assert f'"{option}"' in source, option


@pytest.mark.parametrize("words", of("make"), ids=" ".join)
def test_make_targets_exist(words):
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[1] in phony.split()


QUICK = [
    ("bh-routing", "families"),
    ("bh-routing", "inspect", "olmoe-nano"),
    ("bh-routing", "evaluate", "--policies"),
]


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_quick_commands_run(words, capsys):
    assert words in ALL_COMMANDS
    assert main(words[1:]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5
