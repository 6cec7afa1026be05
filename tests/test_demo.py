"""The demo: its sections, at any width, as text and as JSON; the time of a layer; shaded text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from bh_routing import BHRoutingIntegration, Calibration, RoutingIntegration, TopKPolicy, is_patched
from bh_routing.calibration.certificate import Certificate, CertifiedLevel
from bh_routing.cli import main
from bh_routing.cli.demo_parts import PROMPTS, certified
from bh_routing.cli.strip import print_legend, print_strip
from bh_routing.data import sample_documents
from bh_routing.evaluation import compare, layer_speed
from bh_routing.evaluation.paired import mean_change
from bh_routing.models import bundled_calibration

DOMAINS = ["fiction", "encyclopaedia", "docs", "code", "dialogue", "simple"]
ROWS = ["own top-8", "BH, 4 experts", "top-4", "BH, 3 experts", "top-3", "alpha=0.05", "alpha=0.05, analyze"]


@pytest.fixture
def run(capsys, monkeypatch, nano_model, nano_tokenizer):
    """The command on a few tokens of each document, and a layer of small experts."""
    short = {domain: [text[:300] for text in texts] for domain, texts in sample_documents().items()}
    monkeypatch.setattr("bh_routing.data.sample_documents", lambda: short)
    monkeypatch.setattr(layer_speed, "HIDDEN", 64)
    monkeypatch.setattr(layer_speed, "INTERMEDIATE", 32)
    monkeypatch.setattr(
        "bh_routing.models.loading.load_model", lambda *_args, **_options: (nano_model, nano_tokenizer)
    )

    def call(*argv):
        code = main(["demo", "--quick", "--max-new-tokens", "2", *map(str, argv)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    yield call
    assert not is_patched(nano_model)


@pytest.mark.parametrize("width", [50, 200])
def test_sections_in_order_at_any_width(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    result = run()
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= width
    assert not any(line.endswith(" ") for line in lines)
    assert "\x1b" not in result.out
    said = " ".join(result.out.split())
    sections = [
        "olmoe-nano: OlmoeForCausalLM, ",
        "Speed: one MoE layer of OLMoE-1B-7B's shape",
        "Fidelity: predictions of the next word on the bundled text",
        "A budget against top-k at that number, paired",
        "Verdict: ",
        "As the original design has it",
        "Who gets the experts (BH, 4 experts)",
        *(f"{domain}, " for domain in DOMAINS),
        "Experts per token by layer",
        " spends most, ",
        PROMPTS[0],
    ]
    places = [said.index(section) for section in sections]
    assert places == sorted(places)
    assert re.search(
        r"Verdict: (Half the|4\.\d of 8) experts, same next word as the full model in \d\d\.\d% \(top-4: \d\d\.\d%\), "
        r"a real-sized MoE layer in \d\.\d\d of the time( at \d\.\d)?\.",
        said,
    )
    assert re.search(r"the model's own experts run; \d\.\d\d would have been selected\.", said)


def test_what_is_printed_was_measured(run):
    report = json.loads(run("--json").out)
    assert [row["label"] for row in report["routings"]] == ROWS
    own, bh4, top4, bh3, top3, usual, watched = report["routings"]
    assert (own["kl"]["value"], own["agreement"]["value"]) == (0.0, 1.0)
    assert (top4["mean_experts"], top4["share_saved"], top3["mean_experts"]) == (4.0, 0.5, 3.0)
    assert top4["bytes_per_token"] == own["bytes_per_token"] / 2
    assert bh4["mean_experts"] == pytest.approx(4.0, rel=0.12)
    assert 0.0 < bh4["kl"]["value"] < top4["kl"]["value"]
    assert (watched["kl"]["value"], watched["agreement"]["value"], watched["mean_experts"]) == (0.0, 1.0, 8.0)
    # where the model routes as always, later layers see what they always see
    assert watched["would_select"] == pytest.approx(usual["mean_experts"], rel=0.02)
    assert usual["would_select"] is None
    for pair, ours, cut in zip(report["against_top_k"], (bh4, bh3), (top4, top3), strict=True):
        assert (pair["routing"], pair["top_k"]) == (ours["label"], cut["label"])
        assert pair["kl"]["value"] == pytest.approx(ours["kl"]["value"] - cut["kl"]["value"])
        assert pair["kl"]["low"] < pair["kl"]["value"] < pair["kl"]["high"]
    timed = report["layer"]["rows"]
    assert f"{timed[1]['ratio']:.2f} of the time" in report["verdict"]
    assert f"{bh4['agreement']['value']:.1%}" in report["verdict"]
    assert [strip["domain"] for strip in report["strips"]] == DOMAINS
    for strip in report["strips"]:
        assert len(strip["tokens"]) == len(strip["experts"])
        assert len(strip["layers"]) == 4
    assert [set(answer["texts"]) for answer in report["answers"]] == [{"own top-8", "BH, 4 experts"}] * 2


def test_the_least_certified_loss_is_said():
    def level(experts, bound):
        return CertifiedLevel(
            experts_per_token=experts,
            experts=experts,
            bytes_per_token=None,
            risk=bound / 2,
            bound=bound,
            clipped=0.0,
        )

    held = Certificate(
        kl=(level(6.0, 0.008), level(4.5, 0.018), level(3.0, 0.04)),
        confidence=0.95,
        bound="betting",
        documents=1200,
        tokens=600_000,
        text_digest="0",
        window=512,
        fingerprint="0",
        weights="float32",
        settings={},
        compensation=("linear", 0.95),
        date="2026-11-30",
        library_version="0",
    )
    ours = Calibration.load(bundled_calibration())
    assert certified(replace(ours, certificate=None)) is None
    assert certified(replace(ours, certificate=held)) == (
        "at most 0.01 nats from the model itself with 95% confidence: 6.0 experts "
        "(on text like the 1,200 documents that were read for it)."
    )
    assert "at most 0.02 nats" in certified(replace(ours, certificate=replace(held, kl=held.kl[1:])))


def test_without_a_calibration(run):
    result = run("--calibration", "none")
    assert "No calibration: every token is its own null." in result.out
    assert "A budget against" not in result.out
    report = json.loads(run("--calibration", "none", "--json", "--alpha", 0.5, 0.1).out)
    labels = [row["label"] for row in report["routings"]]
    assert labels == ["own top-8", "BH, alpha 0.5", "BH, alpha 0.1", "top-4", "top-3", *ROWS[-2:]]
    experts = [row["mean_experts"] for row in report["routings"]]
    assert experts[0] == 8.0 > experts[1] > experts[2] > 1.0
    assert (report["calibrated"], report["against_top_k"]) == (False, [])


def test_on_another_text(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The old man walked to the door. " * 100)
    out = run("--text", "text.txt", "--calibration", "none").out
    assert "\nFidelity: predictions of the next word on text.txt\n" in out
    assert "\ntext.txt, " in out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "expected text in {path}, got an empty file."),
        (b"\xff\xfe\xfa", "expected UTF-8 text in {path}, got other bytes; convert the file."),
    ],
)
def test_on_no_text(run, tmp_path, content, sentence):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    result = run("--text", path)
    assert (result.code, result.err) == (2, f"bh-routing demo: {sentence.format(path=path)}\n")


# ------------------------------------------------------------------------------------------------- a layer


def test_layer_takes_turns_and_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(layer_speed, "HIDDEN", 64)
    monkeypatch.setattr(layer_speed, "INTERMEDIATE", 32)
    layer = layer_speed.make_layer(16)
    assert all(bool(parameter.isfinite().all()) for parameter in layer.parameters())
    assert layer.experts.down_proj.shape == (16, 64, 32)
    x = torch.randn(1, 3, 64, dtype=torch.bfloat16)
    before = layer(x)
    own, four, two = layer_speed.measure_layer(layer, seconds=0.0)
    assert torch.equal(layer(x), before)
    assert (own.ratio, own.experts, len(own.seconds)) == (1.0, 8.0, 5)
    assert four.experts == four.loads == pytest.approx(4.0, abs=0.5)  # 256 tokens with a deviation of about 2
    assert two.experts == pytest.approx(2.0, abs=0.5)
    assert two.to_dict()["milliseconds"] == median(two.seconds) * 1e3


def test_a_batch_reads_what_a_price_pays_for(monkeypatch):
    monkeypatch.setattr(layer_speed, "HIDDEN", 64)
    monkeypatch.setattr(layer_speed, "INTERMEDIATE", 32)
    layer = layer_speed.make_layer(64)
    own, four, priced = layer_speed.measure_layer(layer, (4.0,), tokens=16, share_loaded=0.5, seconds=0.0)
    assert (own.tokens, own.experts) == (16, 8.0)
    assert 0.7 * own.loads < four.loads < own.loads <= 64
    assert priced.loads == pytest.approx(own.loads / 2, rel=0.1)
    assert four.experts == pytest.approx(4.0, abs=0.4)
    assert priced.experts > 4.0


@pytest.mark.parametrize(("available", "experts"), [(1e9, 16), (10e9, 64), (None, 64)])
def test_a_smaller_layer_where_memory_is_short(monkeypatch, available, experts):
    monkeypatch.setattr(layer_speed, "available_bytes", lambda: available)
    assert layer_speed.experts_that_fit() == experts


# ---------------------------------------------------------------------------------------------- nearness


def test_nearness_is_to_the_first_routing(nano_model, nano_tokenizer):
    """KL and agreement against the definition; documents are what intervals draw."""
    ids = nano_tokenizer(sample_documents()["fiction"][0], return_tensors="pt").input_ids
    windows = [ids[:, :40], ids[:, 40:100], ids[:, 100:130]]
    two = RoutingIntegration(nano_model, TopKPolicy(2))
    own, cut = compare(nano_model, windows, {"own": None, "two": two}, units=[0, 0, 1])
    with torch.no_grad():
        full = [nano_model(w).logits[0, :-1].log_softmax(-1) for w in windows]
        with two:
            few = [nano_model(w).logits[0, :-1].log_softmax(-1) for w in windows]
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(full, few, strict=True)])
    same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(full, few, strict=True)])
    assert cut.kl().value == pytest.approx(float(kl.mean()), rel=1e-5)
    assert cut.agreement().value == pytest.approx(float(same.double().mean()))
    assert cut.agreement(own).value == pytest.approx(float(same.double().mean()) - 1.0)
    assert cut._blocks(cut.losses)[1][1] == 29
    assert own.kl().value == 0.0 < cut.kl().value
    assert cut.bytes_per_token == own.bytes_per_token / 4


def test_analyze_says_what_would_have_run(nano_model, nano_tokenizer):
    ids = nano_tokenizer("The old man walked to the door.", return_tensors="pt").input_ids
    watching = BHRoutingIntegration(nano_model, alpha=0.01, calibration=bundled_calibration(), mode="analyze")
    own, watched = compare(nano_model, [ids], {"own": None, "watching": watching})
    assert watched.mean_experts == 8.0 > watched.would_select > 1.0
    assert torch.equal(own.losses[0], watched.losses[0])


def test_paired_intervals_exclude_what_they_should():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, generator=generator).tolist()
    base = [(10.0 + n, 10) for n in noise]
    shifted = [(12.0 + n, 10) for n in noise]
    change = mean_change(shifted, base)
    assert change == pytest.approx((0.2, 0.2, 0.2))
    assert mean_change(shifted).low < 1.2 < mean_change(shifted).high


# ------------------------------------------------------------------------------------------------- a strip

TOKENS = [
    "The",
    " old",
    " man",
    "\n\n",
    "walked",
    "    ",
    " in",
    "dub",
    "itably",
    ",",
    " so",
    "\n",
    "it",
    ":",
]
VALUES = [1.0, 2.0, 3.0, 8.0, 4.4, 8.0, 6.0, 7.0, 8.0, 1.0, 12.0, 8.0, 2.0, 3.0]


def test_digits_stand_below_their_tokens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "25")
    print_strip(TOKENS, VALUES, 8)
    assert capsys.readouterr().out.split("\n") == [
        "  The old man walked",
        "  1   2   3   4",
        "  indubitably, so it:",
        "  6 7  8     1 +  2 3",
        "",
    ]


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({"COLORTERM": "truecolor"}, "\x1b[37;48;2;8;48;107m 8 "),
        ({"TERM": "xterm-256color", "COLORTERM": ""}, "\x1b[37;48;5;"),
        ({"TERM": "xterm", "COLORTERM": ""}, None),
        ({"COLORTERM": "truecolor", "NO_COLOR": "1"}, None),
    ],
)
def test_colours_by_what_the_terminal_can_do(capsys, monkeypatch, environment, code):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"COLUMNS": "60", "FORCE_COLOR": "1", "TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    most = (
        8 if environment.get("COLORTERM") else 11
    )  # rich keeps a style's codes: other shades for another terminal
    print_legend(most)
    print_strip(TOKENS, VALUES, most)
    out = capsys.readouterr().out
    if code is None:
        assert "\x1b" not in out
        assert "\n  1   2   3 " in out
    else:
        assert code in out
        assert "  1   2" not in out
