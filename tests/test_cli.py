"""The command line: what it prints, and that what is wrong is one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest

from bh_routing import __version__, is_patched
from bh_routing.cli import COMMANDS, main
from bh_routing.settings import TEXT_OPTIONS, RoutingSettings

UNCALIBRATED = ["--calibration", "none"]


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def loaded(monkeypatch, nano_model, nano_tokenizer):
    """The commands get the model of this test session instead of loading their own."""
    monkeypatch.setattr(
        "bh_routing.models.loading.load_model", lambda *_args, **_options: (nano_model, nano_tokenizer)
    )
    return nano_model


@pytest.fixture
def no_load(monkeypatch):
    """A model must not be loaded before what is wrong with the arguments is said."""

    def refuse(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("bh_routing.models.loading.load_model", refuse)


@pytest.fixture
def run(capsys):
    def call(*argv):
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def bh_routing(*argv, **options):
    return subprocess.run(
        [sys.executable, "-m", "bh_routing", *argv], capture_output=True, text=True, timeout=240, **options
    )


# ------------------------------------------------------------------------------------------------- start


def test_version(run):
    assert run("--version").out == f"bh-routing {__version__}\n"


@pytest.mark.parametrize("argv", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_no_torch(argv):
    code = (
        "import sys; from bh_routing.cli import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(("bh-routing ", "usage: bh-routing "))


def test_every_command_is_listed(run):
    out = run("--help").out
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", out, re.MULTILINE)


def test_as_a_module():
    run = bh_routing("--version")
    assert (run.returncode, run.stdout) == (0, f"bh-routing {__version__}\n")


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.usefixtures("no_load")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["nonsense"],
            f"bh-routing: argument COMMAND: expected one of {', '.join(COMMANDS)}, got 'nonsense'; "
            "see `bh-routing --help`.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--nonsense"],
            "bh-routing generate: unknown option '--nonsense'; see `bh-routing generate --help`.",
        ),
        (
            ["generate", "olmoe-nano"],
            "bh-routing generate: the following arguments are required: -p/--prompt; "
            "see `bh-routing generate --help`.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--alpha", "much"],
            "bh-routing generate: argument --alpha: invalid float value: 'much'; "
            "see `bh-routing generate --help`.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--alpha", "0.1", "--experts", "4"],
            "bh-routing generate: argument --experts: not allowed with argument --alpha; "
            "see `bh-routing generate --help`.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--alpha", "1.5"],
            "bh-routing generate: alpha must be a number strictly between 0 and 1, got 1.5; "
            "0.05 is the usual starting point.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--temperature", "0"],
            "bh-routing generate: temperature must be a finite number above 0, got 0.0; "
            "1.0 leaves the logits alone.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--min-k", "0", "--compensation", "none"],
            "bh-routing generate: min_k must be at least 1, got 0; every token needs an expert.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--min-k", "4", "--max-k", "2"],
            "bh-routing generate: max_k must be at least min_k=4, got 2.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--mode", "maybe"],
            "bh-routing generate: mode must be 'patch' or 'analyze', got 'maybe'.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--experts", "-1"],
            "bh-routing generate: experts must be a finite number of experts per token above 0, got -1.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--max-new-tokens", "0"],
            "bh-routing generate: argument --max-new-tokens: expected a whole number of at least 1, got '0'; see "
            "`bh-routing generate --help`.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--dtype", "int8"],
            "bh-routing generate: dtype must be one of auto, float32, bfloat16, float16, got 'int8'.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--experts", "4", *UNCALIBRATED],
            "bh-routing generate: a budget of 4 experts needs a calibration: give --calibration FILE, made by "
            "`bh-routing calibrate MODEL --text FILE -o FILE`.",
        ),
        (
            ["generate", "olmoe-nano", "-p", "x", "--calibration", "missing.safetensors"],
            "bh-routing generate: there is no calibration file missing.safetensors; make one with "
            "`bh-routing calibrate MODEL --text FILE -o missing.safetensors`.",
        ),
        (
            ["inspect", "missing.safetensors"],
            "bh-routing inspect: there is no calibration file missing.safetensors; make one with "
            "`bh-routing calibrate MODEL --text FILE -o missing.safetensors`.",
        ),
        (
            ["inspect", "olmoe-nano", "--plot", "x.png"],
            "bh-routing inspect: --plot draws a calibration: expected a FILE.safetensors, got 'olmoe-nano'.",
        ),
        (["demo", "--text", "missing.txt"], "bh-routing demo: there is no text file missing.txt."),
        (
            ["demo", "--alpha", "0.1", "2"],
            "bh-routing demo: alpha must be a number strictly between 0 and 1, got 2.0; "
            "0.05 is the usual starting point.",
        ),
        (
            ["demo", "--experts", "4", *UNCALIBRATED],
            "bh-routing demo: a budget of 4 experts needs a calibration: give --calibration FILE, made by "
            "`bh-routing calibrate MODEL --text FILE -o FILE`.",
        ),
        (
            ["calibrate", "olmoe-nano", "-o", "x.safetensors"],
            "bh-routing calibrate: one of the arguments --text --dataset is required; "
            "see `bh-routing calibrate --help`.",
        ),
        (
            ["calibrate", "olmoe-nano", "--text", "missing.txt", "-o", "x.safetensors"],
            "bh-routing calibrate: there is no text file missing.txt.",
        ),
        (
            ["calibrate", "olmoe-nano", "--text", "missing.txt", "-o", "x.json"],
            "bh-routing calibrate: output must be a file name that ends in .safetensors, got 'x.json'.",
        ),
        (
            ["calibrate", "olmoe-nano", "--text", "missing.txt", "-o", "no/such/x.safetensors"],
            "bh-routing calibrate: output must lie in a folder that exists, got 'no/such/x.safetensors'; "
            "make no/such first.",
        ),
    ],
    ids=lambda value: " ".join(value[:5]) if isinstance(value, list) else "",
)
def test_user_error(run, argv, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*argv)
    assert (result.code, result.out, result.err) == (2, "", f"{sentence}\n")
    assert list(tmp_path.iterdir()) == []


def test_user_error_of_the_library_while_a_model_is_loaded(run, loaded):
    result = run("generate", "olmoe-nano", "-p", "x", "--max-k", "65", *UNCALIBRATED)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "bh-routing generate: max_k must not exceed the number of experts, 64, got 65; lower max_k.\n"
    )
    assert not is_patched(loaded)


def test_empty_prompt(run, loaded):
    result = run("generate", "olmoe-nano", "-p", "")
    assert result.code == 2
    assert result.err == "bh-routing generate: prompt must have at least one token, got ''.\n"


def test_missing_model_in_a_process(tmp_path):
    run = bh_routing("inspect", "nowhere", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        "bh-routing inspect: expected a model: one of olmoe-nano, a folder, or a hub id such as "
        "allenai/OLMoE-1B-7B-0924, got 'nowhere', which is none of these (no such folder).\n"
    )


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(_args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("bh_routing.cli.inspect.run", broken)
    with pytest.raises(ZeroDivisionError, match=r"^a bug$"):
        main(["inspect", "olmoe-nano"])


def test_interrupt(monkeypatch, run):
    def interrupted(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("bh_routing.cli.demo.run", interrupted)
    result = run("demo")
    assert (result.code, result.out, result.err) == (130, "", "bh-routing demo: interrupted.\n")


def test_interrupt_of_a_process(tmp_path):
    (tmp_path / "text.txt").write_text("The old man walked to the door.\n")
    code = (
        "import sys, time\n"
        "import bh_routing.calibration.passes, bh_routing.models.loading\n"
        "from bh_routing.cli import main\n"
        "bh_routing.models.loading.load_model = lambda *_args, **_options: (None, None)\n"
        "def endless(*_args, **_options):\n"
        "    print('calibrating', flush=True)\n"
        "    time.sleep(200)\n"
        "bh_routing.calibration.passes.calibrate = endless\n"
        "sys.exit(main(['calibrate', 'olmoe-nano', '--text', 'text.txt', '-o', 'c.safetensors']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs, and so perhaps these tests, with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == "calibrating\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "bh-routing calibrate: interrupted.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-m", "bh_routing", "inspect", "olmoe-nano"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
    )
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, "")


# --------------------------------------------------------------------------------------------- generate


def test_generate(run, loaded):
    result = run(
        "generate", "olmoe-nano", "-p", "The old man", "--max-new-tokens", 6, "--alpha", 0.3, *UNCALIBRATED
    )
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("The old man")
    assert (
        "procedure bh, alpha 0.3, 1 to 8 experts, the token's own null (uncalibrated), mode patch"
        in " ".join(lines)
    )
    rows = [line.split() for line in lines if line.startswith(("model.layers.", "all "))]
    assert [row[0] for row in rows] == [f"model.layers.{i}.mlp.gate" for i in range(4)] + ["all"]
    means = [float(row[1]) for row in rows]
    assert means[-1] == pytest.approx(sum(means[:-1]) / 4, abs=0.01)
    assert all(1.0 <= mean < 8.0 for mean in means)
    assert re.fullmatch(r"note: uncalibrated routing \(pvalues='robust'\) selected .*\n", result.err)
    assert not is_patched(loaded)


@pytest.mark.parametrize(
    ("yaml", "argv", "expected"),
    [
        ("alpha: 0.2\nmin-k: 2", [], (0.2, 2)),
        ("alpha: 0.2\nmin_k: 2", ["--min-k", "1"], (0.2, 1)),  # as the default, and said all the same
        ("experts: 4", ["--alpha", "0.1"], (0.1, 1)),  # an alternative on the command line takes its place
    ],
)
def test_the_command_line_over_yaml_over_defaults(run, loaded, tmp_path, yaml, argv, expected):
    file = tmp_path / "run.yaml"
    file.write_text(f"max-new-tokens: 2\njson: true\n{yaml}\n")
    result = run("generate", "olmoe-nano", "-p", "The old man", "--config", file, *argv, *UNCALIBRATED)
    found = json.loads(result.out)
    assert (found["stats"]["alpha"], found["stats"]["min_k"]) == expected
    assert found["new_tokens"] == 2


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("alhpa: 0.2", "unknown option 'alhpa' in run.yaml; did you mean 'alpha'?"),
        ("alpha: much", "cannot read alpha: 'much' in run.yaml: level, 0 < alpha < 1 (default 0.05)."),
        ("json: 2", "cannot read json: 2 in run.yaml: print one JSON object: text, stats, telemetry."),
        ("- 1", "expected options as key: value in run.yaml, got list."),
        (
            "alpha: 2",
            "alpha must be a number strictly between 0 and 1, got 2.0; 0.05 is the usual starting point.",
        ),
    ],
)
@pytest.mark.usefixtures("no_load")
def test_what_a_yaml_file_cannot_say(run, tmp_path, monkeypatch, yaml, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml)
    result = run("generate", "olmoe-nano", "-p", "x", "--config", "run.yaml")
    assert (result.code, result.out, result.err) == (2, "", f"bh-routing generate: {sentence}\n")


@pytest.mark.usefixtures("no_load")
def test_every_setting_is_an_option(run):
    out = run("generate", "--help").out
    for field in fields(RoutingSettings):
        told = {option.field: name for name, option in TEXT_OPTIONS.items() if option.field}
        name = told.get(field.name, field.name).replace("_", "-")
        assert (f"--{name} " in out) == (
            field.name not in ("collect_stats", "strict", "resident", "batch_invariant")
        )


def test_generate_analyze_leaves_the_text_alone(run, loaded):
    argv = ["generate", "olmoe-nano", "-p", "The old man", "--max-new-tokens", 12, "--json", *UNCALIBRATED]
    analyzed = json.loads(run(*argv, "--mode", "analyze", "--alpha", 0.01).out)
    patched = json.loads(run(*argv, "--mode", "patch", "--alpha", 0.01).out)
    everything = json.loads(run(*argv, "--mode", "patch", "--min-k", 8, "--max-k", 8).out)
    assert analyzed["text"] == everything["text"] != patched["text"]
    assert analyzed["stats"]["bh_would_select_mean"] < 8.0
    assert everything["stats"]["mean_experts_per_token"] == 8.0
    assert analyzed["new_tokens"] == 12
    assert set(analyzed) == {"model", "prompt", "text", "new_tokens", "seconds", "stats", "telemetry"}


def test_generate_seed(run, loaded):
    argv = [
        "generate",
        "olmoe-nano",
        "-p",
        "The",
        "--max-new-tokens",
        12,
        "--json",
        "--sample",
        *UNCALIBRATED,
    ]
    first, again, other = (json.loads(run(*argv, "--seed", seed).out)["text"] for seed in (1, 1, 2))
    assert first == again != other


# ---------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize("columns", ["80", "100"])
def test_inspect_model(run, loaded, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    result = run("inspect", "olmoe-nano")
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines() if "gate" in line]
    assert rows == [
        [
            f"model.layers.{i}.mlp.gate",
            *(["OlmoeTopKRouter"] if columns == "100" else []),
            "64",
            "8",
            "softmax",
            "none",
            "yes",
            "skipped",
        ]
        for i in range(4)
    ]


def test_inspect_says_where_dropped_experts_are_computed(run, loaded, nano_model, monkeypatch):
    monkeypatch.setattr(nano_model.model.layers[1].mlp.experts, "_is_expert_parallel", True, raising=False)
    result = run("inspect", "olmoe-nano")
    assert [line.split()[-2:] for line in result.out.splitlines() if ".1.mlp.gate" in line] == [
        ["weight", "0"]
    ]
    told = " ".join(result.out.split())
    assert (
        "weight 0: model.layers.1.mlp.experts (OlmoeExperts) is expert-parallel, where dropped pairs cannot be taken out."
        in told
    )


# -------------------------------------------------------------------------------- calibrate, inspect FILE


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A calibration of olmoe-nano from a little text, made by the command."""
    from bh_routing.data import sample_text

    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "text.txt").write_text(sample_text())
    run = bh_routing(
        "calibrate",
        "olmoe-nano",
        "--text",
        "text.txt",
        "--max-tokens",
        "4000",
        "-o",
        "c.safetensors",
        cwd=folder,
    )
    few = (
        r"note: \d+ of 256 experts were chosen by fewer than 32 tokens: their sizes and compensations lean on their layer's "
        r"median; about [\d,]+ tokens of such text would do \(this calibration saw 4,000\)\.\n"
    )
    assert (run.returncode, bool(re.fullmatch(few, run.stderr))) == (0, True), run.stderr
    return SimpleNamespace(path=folder / "c.safetensors", out=run.stdout)


def test_calibrate(calibrated):
    assert calibrated.out.startswith(
        "Calibration of olmoe-nano: 4,000 tokens of 1 documents, 4 layers x 64 experts;"
    )
    assert "saved to c.safetensors (" in calibrated.out


def test_calibrate_on_equal_parts_of_books(run, loaded, tmp_path):
    """Four pieces joined by blank lines, of more than 512 tokens each."""
    from bh_routing.data import sample_documents

    fiction = [*sample_documents()["fiction"], *sample_documents()["fiction"]]
    (tmp_path / "text.txt").write_text("\n\n".join("\n".join(fiction[i : i + 2]) for i in range(0, 8, 2)))
    argv = ["--split-on-blank-lines", "--document-tokens", 600, "--window", 256, "--no-outputs"]
    result = run(
        "calibrate", "olmoe-nano", "--text", tmp_path / "text.txt", "-o", tmp_path / "c.safetensors", *argv
    )
    assert result.code == 0, result.err
    assert "2,048 tokens of 4 documents" in " ".join(result.out.split())


def test_inspect_calibration(run, calibrated):
    result = run("inspect", calibrated.path)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0].startswith("Calibration of olmoe-nano: 4,000 tokens of 1 documents")
    assert [line.split()[0] for line in result.out.splitlines() if "gate" in line] == [
        f"model.layers.{i}.mlp.gate" for i in range(4)
    ]


def test_inspect_plot(run, calibrated, tmp_path):
    picture = tmp_path / "c.png"
    result = run("inspect", calibrated.path, "--plot", picture)
    assert (result.code, result.err) == (0, "")
    assert "drawn to" in result.out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_plot_of_another_format(run, calibrated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("inspect", calibrated.path, "--plot", "c.bmp")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "bh-routing inspect: a picture must be written to a file that ends in .png, .svg, .pdf, got 'c.bmp'.\n"
    )


def test_generate_with_a_budget(run, loaded, calibrated):
    argv = [
        "generate",
        "olmoe-nano",
        "-p",
        "The old man walked to the",
        "--calibration",
        calibrated.path,
        "--json",
    ]
    three, six = (json.loads(run(*argv, "--experts", n).out)["stats"] for n in (3, 6))
    assert (three["experts_per_token"], three["calibrated"]) == (3.0, True)
    assert 0.0 < three["alpha"] < six["alpha"] < 1.0
    # 45 tokens of another text than the 4,000 that the level was solved on
    assert three["mean_experts_per_token"] == pytest.approx(3.0, abs=1.0)
    assert six["mean_experts_per_token"] == pytest.approx(6.0, abs=1.0)


def test_calibration_of_another_model(run, monkeypatch, calibrated, tiny_olmoe, nano_tokenizer):
    monkeypatch.setattr(
        "bh_routing.models.loading.load_model", lambda *_args, **_options: (tiny_olmoe(), nano_tokenizer)
    )
    result = run("generate", "tiny", "-p", "x", "--calibration", calibrated.path)
    assert result.code == 2
    assert result.err.startswith("bh-routing generate: ")
    assert result.err.count("\n") == 1


def test_dataset_without_the_package(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    result = run("calibrate", "olmoe-nano", "--dataset", "some/texts", "-o", "c.safetensors")
    assert (result.code, result.err) == (
        2,
        "bh-routing calibrate: --dataset needs datasets, which is not installed; "
        "pip install 'bh-routing[datasets]', or give a file with --text.\n",
    )


class FakeDatasets:
    """What the datasets package is asked for."""

    @staticmethod
    def load_dataset(name, config, *, split, streaming):
        assert (config, split, streaming) == (None, "train", True)
        if name == "broken/texts":
            raise ConnectionError("no network.")

        class Rows(list):
            column_names = ("text", "title")

        return Rows({"text": f"The old man number {i} walked to the door.", "title": ""} for i in range(400))


def test_dataset(run, loaded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    monkeypatch.chdir(tmp_path)
    argv = [
        "calibrate",
        "olmoe-nano",
        "-o",
        "c.safetensors",
        "--max-tokens",
        2000,
        "--no-outputs",
        "--dataset",
    ]
    result = run(*argv, "some/texts")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Calibration of olmoe-nano: 2,000 tokens of ")
    assert run(*argv, "some/texts", "--column", "body").err == (
        "bh-routing calibrate: column must be one of the data set's columns (text, title), got 'body'.\n"
    )
    assert run(*argv, "broken/texts").err == (
        "bh-routing calibrate: expected to open the data set broken/texts (split train), got ConnectionError: "
        "no network.\n"
    )


# ------------------------------------------------------------------------------------------------ common


def test_notes_are_printed_once(capsys):
    import logging
    import warnings

    from bh_routing.cli.common import notes

    with notes():
        for _ in range(2):
            logging.getLogger("bh_routing.integration").warning("something %s", "odd")
        warnings.warn_explicit("of ours", UserWarning, "f.py", 1, module="bh_routing.calibration")
        warnings.warn_explicit("of another library", UserWarning, "f.py", 1, module="transformers.x")
    assert capsys.readouterr().err == "note: something odd\nnote: of ours\n"


@pytest.mark.slow
def test_calibrate_under_torchrun(tmp_path, calibrated):
    """Two processes write what one wrote."""
    from bh_routing import Calibration
    from bh_routing.data import sample_text

    (tmp_path / "text.txt").write_text(sample_text())
    argv = ["calibrate", "olmoe-nano", "--text", "text.txt", "--max-tokens", "4000", "-o", "c.safetensors"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, "-m", "bh_routing", *argv], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("saved to c.safetensors (") == 1
    one, two = Calibration.load(calibrated.path), Calibration.load(tmp_path / "c.safetensors")
    assert (one.tokens, one.text_digest) == (two.tokens, two.text_digest)
    one, two = one.table(alpha=0.2).thresholds_LE, two.table(alpha=0.2).thresholds_LE
    assert bool(((one - two).abs().nan_to_num(0.0) <= 1e-4).all())  # infinite in both: nan, hence 0
    assert bool((one.isinf() == two.isinf()).all())
