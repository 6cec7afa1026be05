"""`bh-routing finetune`, and the loop behind it."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from bh_routing import BHRoutingIntegration, is_patched
from bh_routing.calibration.passes import calibrate
from bh_routing.cli import main
from bh_routing.data import sample_text
from bh_routing.errors import InvalidInputError, InvalidParameterError
from bh_routing.training import FinetuneSettings, finetune
from bh_routing.training.loop import batches_of, keeping_all, split_text, text_windows

SMALL = ["--batch-tokens", 256, "--window", 32, "--calibration-tokens", 2048, "--eval-tokens", 256]
DOCUMENTS = torch.randint(3, 256, (60, 64), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*argv):
        code = main(["finetune", *map(str, argv)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(sample_text() * 2, encoding="utf-8")
    return path


@pytest.fixture
def loaded(monkeypatch, tiny_olmoe, nano_tokenizer):
    """A small random model with the tokenizer of olmoe-nano, made anew by every load."""
    made = []

    def load(*_args, **_options):
        made.append(tiny_olmoe(vocab_size=len(nano_tokenizer)))
        return made[-1], nano_tokenizer

    monkeypatch.setattr("bh_routing.models.loading.load_model", load)
    return made


def test_a_checkpoint_and_its_calibration(run, text, loaded, tmp_path):
    from transformers import AutoModelForCausalLM

    done = run("olmoe-nano", "--text", text, "--experts", 3, "--steps", 3, "-o", tmp_path / "out", *SMALL)
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^own routing +6\.00 +\d+\.\d+ +\d+\.\d+ ", done.out, re.MULTILINE)
    assert re.search(r"^BH, 3 experts +[23]\.\d\d +\d+\.\d+ +\d+\.\d+ ", done.out, re.MULTILINE)
    assert "3 steps of 256 tokens at 3 experts in" in done.out
    assert "--experts 3`." in done.out
    (model,) = loaded
    assert not is_patched(model)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    BHRoutingIntegration(
        other, calibration=tmp_path / "out" / "calibration.safetensors", experts_per_token=3.0
    )
    record = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert [entry["step"] for entry in record["curve"]] == [1, 2, 3]
    assert record["settings"]["experts_per_token"] == 3.0
    assert not list(tmp_path.glob("*.tmp"))


def test_same_seed_same_weights(run, text, loaded, tmp_path):
    for name in ("a", "b"):
        options = ["--learning-rate", 1e-2, "--distil", 0.5, "--full-share", 0.5, "--seed", 5]
        done = run(
            "olmoe-nano",
            "--text",
            text,
            "--experts",
            3,
            "--steps",
            2,
            "-o",
            tmp_path / name,
            *SMALL,
            *options,
        )
        assert done.code == 0, done.err
    one, other = loaded
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_control_trains_with_the_own_routing(run, text, loaded, tmp_path):
    done = run(
        "olmoe-nano",
        "--text",
        text,
        "--experts",
        3,
        "--steps",
        2,
        "-o",
        tmp_path / "out",
        *SMALL,
        "--control",
    )
    assert done.code == 0, done.err
    assert "with the model's own routing (control)" in done.out
    record = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert [entry["experts_per_token"] for entry in record["curve"]] == [6.0, 6.0]


def test_texts_of_their_own(run, text, loaded, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(sample_text(), encoding="utf-8")
    done = run(
        "olmoe-nano", "--text", text, "--experts", 3, "--steps", 1, "-o", tmp_path / "out", *SMALL,
        "--calibration-text", other, "--eval-text", other,
    )  # fmt: skip
    assert done.code == 0, done.err


def test_nothing_is_left_behind_when_writing_fails(run, text, loaded, tmp_path, monkeypatch):
    from bh_routing.calibration.calibration import Calibration

    def fail(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Calibration, "save", fail)
    done = run("olmoe-nano", "--text", text, "--experts", 3, "--steps", 1, "-o", tmp_path / "out", *SMALL)
    assert done.code == 2
    assert done.err.endswith("calibration.safetensors: no space left on device.\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--steps", 0], "steps must be an integer of at least 1, got 0."),
        (["--experts", 0.5], "experts must be a number of at least 1, got 0.5."),
        (["--learning-rate", 0], "learning_rate must be a number above 0, got 0.0."),
        (["--full-share", 2], r"full_share must lie in \[0, 1\], got 2.0."),
        (
            ["--eval-tokens", 1],
            "argument --eval-tokens: expected a whole number of at least 2, got '1'; see .*",
        ),
        (["--device", "abacus"], "device must be auto, spread or one usable here .*, got 'abacus'."),
        (["-o", "no/such/out"], "output must lie in a folder that exists, got 'no/such/out'; make .* first."),
        (["-o", "."], "output must be a folder that does not exist yet, got '.'."),
        (["--text", "missing.txt"], "there is no text file missing.txt."),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(run, text, tmp_path, monkeypatch, options, sentence):
    def refuse(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("bh_routing.models.loading.load_model", refuse)
    given = ["--text", text, "--experts", 3, "--steps", 1, "-o", tmp_path / "out"]
    done = run("olmoe-nano", *given, *options)
    assert done.code == 2
    assert re.fullmatch(f"bh-routing finetune: {sentence}\n", done.err)


def test_a_budget_that_no_level_meets_is_said_before_training(run, text, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("bh_routing.training.loop.finetune", lambda *a, **k: pytest.fail("it was trained"))
    done = run("olmoe-nano", "--text", text, "--experts", 9, "--steps", 1, "-o", tmp_path / "out", *SMALL)
    assert done.code == 2
    sentence = r"no level selects 9 experts per token in the model on average: 1 to 5\.\d+ are reachable"
    assert re.search(sentence, done.err)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- the loop


def test_a_text_too_short(run, loaded, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("A few words.\n", encoding="utf-8")
    done = run("olmoe-nano", "--text", path, "--experts", 3, "--steps", 1, "-o", tmp_path / "out")
    assert done.code == 2
    assert (
        "expected a text of at least three pieces (train, calibrate, judge), got 1; give more text."
        in done.err
    )
    with pytest.raises(
        InvalidInputError, match="expected a text of at least 16 windows of 256 tokens, got 3"
    ):
        next(batches_of(torch.zeros(3, 256, dtype=torch.int64), FinetuneSettings(steps=1)))


def test_parts_of_a_text_are_apart():
    pieces = [f"piece {i}\n" for i in range(40)]
    train, calibration, judged = split_text(pieces, 3)
    assert (len(train), len(calibration), len(judged)) == (32, 4, 4)
    assert sorted(train + calibration + judged) == sorted(pieces)
    assert split_text(pieces, 3) == (train, calibration, judged)
    assert split_text(pieces, 4)[0] != train
    assert len(split_text(pieces, 3, (0.0, 0.1))[0]) == 36


def test_windows_and_batches(nano_tokenizer):
    windows = text_windows(nano_tokenizer, [sample_text()] * 3, 64, limit=50)
    assert windows.shape == (50, 64)
    settings = FinetuneSettings(steps=5, batch_tokens=64 * 20, window=64)
    batches = list(batches_of(windows, settings))
    assert [b.shape for b in batches] == [(20, 64)] * 5
    assert torch.equal(batches[3], list(batches_of(windows, settings))[3])
    first = torch.cat(batches[:2])
    assert len(first.unique(dim=0)) == 40  # no window twice in an epoch


def test_keeping_all_is_the_own_routing(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    calibration = calibrate(model, None, DOCUMENTS, progress=False)
    with torch.no_grad():
        own = model(input_ids=token_ids).logits
        with BHRoutingIntegration(model, calibration=calibration, experts_per_token=2.0) as integrator:
            routed = model(input_ids=token_ids).logits
            with keeping_all(integrator):
                assert torch.equal(model(input_ids=token_ids).logits, own)
            assert torch.equal(model(input_ids=token_ids).logits, routed)
    assert not torch.equal(own, routed)


def test_distilling_brings_the_budget_nearer_to_the_teacher(tiny_olmoe):
    model = tiny_olmoe()
    calibration = calibrate(model, None, DOCUMENTS, progress=False)
    windows = torch.tensor(DOCUMENTS)
    settings = FinetuneSettings(
        steps=40, learning_rate=1e-3, warmup=2, batch_tokens=512, window=64, distil=1.0, refit_every=100,
        experts_per_token=1.5, balance=0.0, z=0.0, budget=0.0,
    )  # fmt: skip
    seen = []
    done = finetune(model, windows, calibration, settings, on_step=lambda step, figures: seen.append(figures))
    first, last = (sum(f["divergence"] for f in part) / 5 for part in (seen[:5], seen[-5:]))
    assert last < 0.75 * first  # 0.62 here
    assert len(done.curve) == 40
    assert done.calibration.tokens != calibration.tokens
    assert not model.training
    assert not is_patched(model)


def test_settings_are_checked():
    with pytest.raises(
        InvalidParameterError, match="window must be at least 2 and warmup at least 0, got 1 and 20"
    ):
        FinetuneSettings(steps=1, window=1)
    rates = [FinetuneSettings(steps=100, learning_rate=1.0, warmup=10).rate_at(step) for step in range(100)]
    assert max(rates) < 1.0
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[-1] == pytest.approx(0.01)


def test_nothing_to_train(tiny_olmoe):
    model = tiny_olmoe().requires_grad_(False)
    calibration = calibrate(model, None, DOCUMENTS, progress=False)
    with pytest.raises(InvalidInputError, match="expected a model with weights to train, got one with none"):
        finetune(model, torch.tensor(DOCUMENTS), calibration, FinetuneSettings(steps=1, window=64))
