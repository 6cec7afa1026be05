"""The table of model families: what is found, what was tested, and how the two are joined."""

from __future__ import annotations

import pytest

from bh_routing.cli import main
from bh_routing.models.families import (
    COLUMNS,
    Family,
    families,
    installed_version,
    record,
    row,
    scan,
    table,
    version_key,
)

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


def test_a_new_family_is_listed_as_untested():
    (found,) = families({"new": "NewTopKRouter"}, RECORD, "5.30.0")
    assert (found.name, found.router, found.status) == ("new", "NewTopKRouter", "untested")
    assert found.note == "not in any transformers version that was tested"


@pytest.mark.parametrize(
    ("version", "status", "versions"),
    [
        ("5.16.1", "refused", ("5.16.1",)),
        ("5.20.0", "refused", ("5.16.1",)),
        ("5.23.0", "tested", ("5.23.0",)),
        ("6.0", "tested", ("5.23.0",)),
        ("5.2", "refused", ("5.16.1",)),
    ],
)
def test_the_nearest_tested_version_counts(version, status, versions):
    (found,) = families({"old": "OldRouter"}, RECORD, version)
    assert (found.status, found.versions) == (status, versions)


def test_version_key_sorts_numbers_as_numbers():
    assert sorted(["5.23.0", "5.9.1", "5.16.1"], key=version_key) == ["5.9.1", "5.16.1", "5.23.0"]


def test_table():
    text = table(
        [
            Family(name="a", scoring="sigmoid*", status="tested", versions=("1", "2")),
            Family(name="bb", note="why"),
        ]
    )
    lines = text.splitlines()
    assert lines[0].split() == list(COLUMNS)
    assert lines[2].split() == ["a", "-", "sigmoid*", "-", "-", "-", "-", "tested", "1,", "2"]
    assert lines[3].endswith("untested")
    assert lines[-1] == "bb: why"
    assert len(row(Family(name="a"))) == len(COLUMNS)


def test_every_family_of_the_installed_version_is_recorded():
    """For the versions at both ends, which the conformance suite ran; others may have families more."""
    recorded = record()
    assert {"5.16.1", "5.23.0"} <= set(recorded)
    if installed_version() in recorded:
        assert set(scan()) == set(recorded[installed_version()])
    for fields in recorded["5.23.0"].values():
        assert fields["status"] in ("tested", "refused")
    assert sum(fields["status"] == "tested" for fields in recorded["5.23.0"].values()) >= 62


def test_command(capsys):
    assert main(["families", "olmo"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == list(COLUMNS)
    assert "OlmoeTopKRouter" in out
    assert "FlexOlmoTopKRouter" in out
    assert "Mixtral" not in out
    assert f"2 families in transformers {installed_version()}, 2 of them tested." in out


def test_command_with_an_unknown_name(capsys):
    assert main(["families", "nosuchthing"]) == 2
    assert "has 'nosuchthing' in its name" in capsys.readouterr().err
