"""The printer of text tables: what it prints at narrow and wide outputs."""

from __future__ import annotations

import pytest

from bh_routing.cli.tables import print_table

COLUMNS = ("policy", "experts", "perplexity", "vs full", "vs top-k", "s")
ROWS = [
    ("full", "8.00", "36.121", "", "", "10.1"),
    ("bh:compensation=false,experts=4", "3.91", "36.482", "+1.0 % ± 0.2", "-1.2 % ± 0.2", "7.3"),
]


def printed(capsys, monkeypatch, width, **settings):
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("night [train]", COLUMNS, ROWS, **settings)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.split("\n")
    assert not any(line.endswith(" ") for line in lines)
    assert lines[:2] == ["", "night [train]"]
    return lines[2:-1]


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_that_fits_is_whole(capsys, monkeypatch, width):
    if width == 80:
        monkeypatch.setattr(f"{__name__}.ROWS", [("bh:experts=4", *row[1:]) for row in ROWS])
    head, rule, first, second = printed(capsys, monkeypatch, width)
    assert head.split() == ["policy", "experts", "perplexity", "vs", "full", "vs", "top-k", "s"]
    assert set(rule) == {"─"}
    assert first.endswith("10.1")
    assert second.endswith(" 3.91      36.482  +1.0 % ± 0.2  -1.2 % ± 0.2   7.3")
    assert max(map(len, (head, rule, first, second))) <= width


def test_columns_are_spared_in_order(capsys, monkeypatch):
    lines = printed(capsys, monkeypatch, 72, spare=("s", "vs top-k", "vs full"))
    assert lines[0].split() == ["policy", "experts", "perplexity", "vs", "full"]
    assert lines[-1] == "Not shown at this width: s, vs top-k."
    assert max(map(len, lines)) <= 72


@pytest.mark.parametrize("spare", [(), ("s",)])
def test_what_does_not_fit_is_printed_row_by_row(capsys, monkeypatch, spare):
    assert printed(capsys, monkeypatch, 50, spare=spare)[6:] == [
        "bh:compensation=false,experts=4",
        "  experts     3.91",
        "  perplexity  36.482",
        "  vs full     +1.0 % ± 0.2",
        "  vs top-k    -1.2 % ± 0.2",
        "  s           7.3",
    ]


def test_no_rows(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_table(None, ("a", "b"), [])
    assert capsys.readouterr().out == "\na  b\n────\n"
