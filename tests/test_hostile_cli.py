"""What is wrong with a command is said in one sentence, before anything is loaded; exit code 2."""

from __future__ import annotations

import lzma
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing import BHRoutingIntegration
from bh_routing.cli import main
from bh_routing.cli.common import plural
from bh_routing.evaluation.results import ResultsFolder
from bh_routing.evaluation.specs import parse_policy
from bh_routing.evaluation.summary import datasets_of
from bh_routing.models import bundled_path
from bh_routing.stats.procedures import get_procedure


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "night.txt"
    path.write_text("The old man walked to the window and looked out at the rain. " * 60)
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded fails the test."""

    def loaded(*_args: Any, **_settings: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("bh_routing.models.loading.load_model", loaded)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "--max-tokens", "-5"], "expected a whole number of at least 2, got '-5'"),
        (["evaluate", "--max-tokens", "0"], "expected a whole number of at least 2, got '0'"),
        (["evaluate", "--window", "1"], "expected a whole number of at least 2, got '1'"),
        (
            ["evaluate", "--window", "9999"],
            "window must be at most the 512 tokens that olmoe-nano was made for, got 9999",
        ),
        (["evaluate", "--window", "64", "--stride", "65"], "stride must be at most the window, 64, got 65"),
        (["evaluate", "-o", "{folder}/none/out"], "output must lie in a folder that exists"),
        (["evaluate", "--policy", "bh:experts=inf"], "cannot read experts='inf' of policy bh"),
        (["evaluate", "--policy", "bh:experts=0"], "cannot read experts='0' of policy bh"),
        (["evaluate", "-o", "{folder}/night.txt"], "output must be a folder, got the file"),
        (["record", "--max-tokens", "0"], "expected a whole number of at least 1, got '0'"),
        (["record", "--window", "600"], "window must be at most the 512 tokens"),
        (["record", "-o", "{folder}/none/log.safetensors"], "output must lie in a folder that exists"),
        (["calibrate", "--window", "600"], "window must be at most the 512 tokens"),
        (
            ["calibrate", "--sensitivity-tokens", "100"],
            "--sensitivity-tokens is of the second pass, which was not asked for",
        ),
        (["bench", "--experts", "inf"], "expected a finite number above 0, got 'inf'"),
        (
            ["bench", "--calibration", "none", "--compensation", "mean"],
            "compensation='mean' needs a calibration",
        ),
        (["generate", "-p", "x", "--experts", "inf"], "experts must be a finite number of experts per token"),
        (["bench", "--experts", "0"], "expected a finite number above 0, got '0'"),
        (["bench", "--tokens", "0"], "expected a whole number of at least 1, got '0'"),
        (["generate", "-p", "x", "--max-new-tokens", "0"], "expected a whole number of at least 1, got '0'"),
    ],
)
def test_one_sentence_before_the_model(
    tmp_path: Path, text: Path, no_model: None, capsys: Any, arguments: list[str], sentence: str
) -> None:
    command, *asked = [a.replace("{folder}", str(tmp_path)) for a in arguments]
    needs = {
        "evaluate": {"--text": text, "--policy": "topk:k=4", "-o": tmp_path / "out"},
        "record": {"--text": text, "-o": tmp_path / "log.safetensors"},
        "calibrate": {"--text": text, "-o": tmp_path / "c.safetensors"},
    }.get(command, {})
    for option, value in needs.items():
        if option not in asked:
            asked += [option, str(value)]
    assert main([command, "olmoe-nano", *asked]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"bh-routing {command}: ")
    assert printed.err.count("\n") == 1
    assert sentence in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["night.txt"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[" * 5000 + "]" * 5000, "cannot be read as YAML"),
        ("policy: 5\n", "policy must be one of"),
        ("window: abc\n", "window in {path}: expected a whole number of at least 2, got 'abc'"),
        ("max-tokens: -5\n", "max-tokens in {path}: expected a whole number of at least 2, got '-5'"),
        ("- a\n", "expected options as key: value in {path}, got list"),
        ("a: b: c\n", "cannot be read as YAML"),
    ],
)
def test_odd_yaml(
    tmp_path: Path, text: Path, no_model: None, capsys: Any, content: str, sentence: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content)
    asked = ["evaluate", "olmoe-nano", "--text", str(text), "-o", str(tmp_path / "o"), "--config", str(path)]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert sentence.format(path=path) in said
    assert said.count("\n") == 1


def test_without_a_command(capsys: Any) -> None:
    assert main([]) == 0
    assert "commands:\n  demo" in capsys.readouterr().out


def test_a_reader_that_leaves() -> None:
    """`bh-routing families | head -1`: nothing on stderr."""
    code = "import sys; from bh_routing.cli import main; sys.exit(main(['families']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert said == ""


def test_a_folder_used_again_with_another_window(tmp_path: Path, text: Path, capsys: Any) -> None:
    """Results of other settings are kept apart, and the report names the setting."""
    for window in ("64", "32", "64"):
        asked = [
            "evaluate",
            "olmoe-nano",
            "--text",
            str(text),
            "--policy",
            "topk:k=4",
            "--calibration",
            "none",
        ]
        assert main([*asked, "--window", window, "-o", str(tmp_path / "r"), "--max-tokens", "200"]) == 0
    assert "2 results in" in capsys.readouterr().out
    results = ResultsFolder(tmp_path / "r").results()
    assert len(results) == 4  # the third run found all that it asked for
    assert datasets_of(results) == ["night (window 64, stride 64)", "night (window 32, stride 32)"]
    assert main(["report", str(tmp_path / "r"), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "<h2>night (window 32, stride 32)</h2>" in page


def test_every_policy_is_made_before_the_first_runs(tmp_path: Path, text: Path, capsys: Any) -> None:
    asked = ["evaluate", "olmoe-nano", "--text", str(text), "--max-tokens", "200", "-o", str(tmp_path / "r")]
    assert main([*asked, "--policy", "topk:k=4", "--policy", "topk:k=99"]) == 2
    assert "k=99 is more than the 8 experts" in capsys.readouterr().err
    assert ResultsFolder(tmp_path / "r").results() == []


def test_a_folder_that_holds_its_own_calibration(tmp_path: Path, token_ids: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    own = tmp_path / "model"
    shutil.copytree(bundled_path("olmoe-nano"), own)
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval()
    with (
        BHRoutingIntegration(model, calibration="auto", experts_per_token=4.0) as integrator,
        torch.no_grad(),
    ):
        model(input_ids=token_ids)
    assert integrator.calibration is not None
    (own / "calibration.safetensors").unlink()
    assert BHRoutingIntegration(model, calibration="auto", alpha=0.1).calibration is None


def test_other_names() -> None:
    assert get_procedure("benjamini_hochberg") is get_procedure("bh")
    assert parse_policy("benjamini_hochberg:experts=4").text == parse_policy("bh:experts=4").text
    assert (plural(1, "result"), plural(0, "result"), plural(2, "policy")) == (
        "1 result",
        "0 results",
        "2 policies",
    )


@pytest.mark.parametrize("command", ["calibrate", "record", "report", "lm-eval"])
def test_a_folder_in_the_place_of_a_file(
    tmp_path: Path, text: Path, no_model: None, capsys: Any, command: str
) -> None:
    """A file that is there is replaced, whole; a folder never is."""
    held = tmp_path / "held.safetensors"
    held.mkdir()
    arguments = {
        "calibrate": ["olmoe-nano", "--text", str(text)],
        "record": ["olmoe-nano", "--text", str(text)],
        "report": [str(tmp_path)],
        "lm-eval": ["olmoe-nano", "--tasks", "arc_easy"],
    }[command]
    assert main([command, *arguments, "-o", str(held)]) == 2
    assert f"bh-routing {command}: output must be a file, got the folder" in capsys.readouterr().err
    assert list(held.iterdir()) == []


def test_all_experts_are_a_budget(tmp_path: Path, capsys: Any) -> None:
    """The model's own number means all of it, exactly; between it and what a level reaches there is none."""
    short = tmp_path / "short.txt.xz"
    short.write_bytes(lzma.compress(b"The old man walked to the window. " * 20))
    policies = ["--policy", "full", "--policy", "bh:experts=8"]
    assert main(["evaluate", "olmoe-nano", *policies, "--text", str(short), "-o", str(tmp_path / "r")]) == 0
    printed = capsys.readouterr()
    own, all_of_it = ResultsFolder(tmp_path / "r").results()
    assert all_of_it["mean_experts_per_token"] == 8.0
    assert all_of_it["blocks"] == own["blocks"]
    assert own["window"] == 512  # what the model was trained on
    assert "note: short is" in printed.err
    assert "too short to judge by; at least 10 blocks give an interval" in printed.err
    assert main(["generate", "olmoe-nano", "-p", "x", "--experts", "7.9"]) == 2
    assert "are reachable with min_k=1 and max_k=8, and all 8; change" in capsys.readouterr().err


def test_without_a_network_there_is_no_wait(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def unreachable(*_args: Any, **_settings: Any) -> None:
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda *_: pytest.fail("the hub's client was asked")
    )
    assert main(["generate", "no-such-owner/no-such-model", "-p", "x"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert (
        "no connection to https://huggingface.co (Network is unreachable), and no copy in the cache" in told
    )
