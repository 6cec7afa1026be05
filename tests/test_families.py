"""The table of model families: what the script finds, what was tested, and what the command prints."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from bh_routing.cli import main
from bh_routing.models.families import COLUMNS, families, record, version_key

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from families_table import scan

NEW = """
@use_experts_implementation
class NewExperts(nn.Module):
    pass

class NewModel(nn.Module):
    _can_record_outputs = {"router_logits": OutputRecorder(NewTopKRouter, index=0)}
"""

RECORD = {
    "5.16.1": {"old": {"router": "OldRouter", "scoring": "softmax", "status": "refused", "note": "why"}},
    "5.23.0": {
        "old": {"router": "OldRouter", "scoring": "softmax*", "status": "tested", "passed": 16},
        "gone": {"router": "GoneRouter", "status": "tested"},
    },
}


def test_scan_finds_families_by_structure(tmp_path):
    for name, text in {
        "new": NEW,
        "older": "class OlderExperts(nn.ModuleList):\n    pass\n",
        "listed": '_can_record_outputs = {"router_logits": [\n    OutputRecorder(ListedRouter, index=1)]}\n',
        "dense": "class DenseGate(nn.Module):\n    '''router_logits'''\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"modeling_{name}.py").write_text(text)
    assert scan(tmp_path) == {"listed": "ListedRouter", "new": "NewTopKRouter", "older": "-"}


@pytest.mark.parametrize(
    ("version", "nearest", "status"),
    [
        ("5.16.1", "5.16.1", "refused"),
        ("5.20.0", "5.16.1", "refused"),
        ("5.23.0", "5.23.0", "tested"),
        ("6.0", "5.23.0", "tested"),
        ("5.2", "5.16.1", "refused"),
    ],
)
def test_the_nearest_tested_version_counts(version, nearest, status):
    found, known = families(version, RECORD)
    assert found == nearest
    assert known["old"]["status"] == status
    assert ("gone" in known) == (nearest == "5.23.0")


def test_version_key_sorts_numbers_as_numbers():
    assert sorted(["5.23.0", "5.9.1", "5.16.1"], key=version_key) == ["5.9.1", "5.16.1", "5.23.0"]


def test_every_family_of_the_installed_version_is_recorded():
    """For the versions at both ends, which the conformance suite ran; others may have families more."""
    recorded = record()
    assert {"5.16.1", "5.24.0"} <= set(recorded)
    if metadata.version("transformers") in recorded:
        assert set(scan()) == set(recorded[metadata.version("transformers")])
    for fields in recorded["5.24.0"].values():
        assert fields["status"] in ("tested", "refused")
    assert sum(fields["status"] == "tested" for fields in recorded["5.24.0"].values()) >= 62


def test_command(capsys):
    assert main(["families", "olmo"]) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert header.split() == list(COLUMNS)
    flex, plain = (row.split() for row in rows[:2])
    assert flex == [
        "flex_olmo",
        "FlexOlmoTopKRouter",
        "softmax",
        "by",
        "norm_topk_prob",
        *["yes"] * 3,
        "tested",
    ]
    assert plain[:2] == ["olmoe", "OlmoeTopKRouter"]
    said = " ".join(rows[2:])
    assert said.split(" with ")[0].strip() == "2 families, 2 of them tested,"
    assert f"({metadata.version('transformers')} is installed). `make conformance` in a checkout" in said


def test_command_says_why_a_family_is_refused(capsys):
    assert main(["families", "switch"]) == 0
    assert (
        "\nswitch_transformers: it routes every token to one expert with a capacity limit\n"
        in capsys.readouterr().out
    )


def test_command_with_an_unknown_name(capsys):
    assert main(["families", "nosuchthing"]) == 2
    assert "has 'nosuchthing' in its name" in capsys.readouterr().err
