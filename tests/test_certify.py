"""Certificates: what is measured, what is concluded, what is kept in a file, and what is refused."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from bh_routing import BHRoutingIntegration, Calibration
from bh_routing._files.tensors import tensors_digest
from bh_routing.calibration import checkpoint
from bh_routing.calibration.certify import documents_needed, fixed_sequence, simultaneous
from bh_routing.calibration.passes import calibrate
from bh_routing.cli import main
from bh_routing.errors import CalibrationFileError, CertificateError, InvalidParameterError
from bh_routing.evaluation import document_losses as module
from bh_routing.evaluation.certify import certify
from bh_routing.evaluation.document_losses import Documents
from bh_routing.evaluation.unlike import unlike
from bh_routing.settings import RoutingSettings
from bh_routing.stats.risk import p_value, upper_bound

WINDOW = 24
READ = {"window": WINDOW, "batch_tokens": 128, "progress": False, "levels": [5.0, 3.0, 1.5]}


def tokenizer(text, **_):
    return {"input_ids": list(text.encode())}


def texts(num: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(10, 60))) for _ in range(num)]


HELD: dict[str, Calibration] = {}


@pytest.fixture
def model(tiny_olmoe):
    return tiny_olmoe()


@pytest.fixture
def calibration(model):
    if "plain" not in HELD:
        HELD["plain"] = calibrate(
            model, tokenizer, texts(40, 1), window=32, batch_tokens=256, reservoir=512, progress=False
        )
    return HELD["plain"]


@pytest.fixture
def certified(model, calibration):
    """The simultaneous curve."""
    if "curve" not in HELD:
        HELD["curve"] = certify(model, tokenizer, texts(50, 2), calibration, **READ)
    return HELD["curve"]


# -- conclusions -----------------------------------------------------------------------------------------------


def test_the_walk_stops_at_the_first_level_that_is_not_rejected():
    rng = np.random.default_rng(0)
    losses = np.stack([rng.uniform(0.0, 2 * mean, 100) for mean in (0.02, 0.05, 0.2, 0.01)])
    found = fixed_sequence(losses, 0.1, 0.05)
    assert found == [p_value(x, 0.1, delta=0.05) for x in losses[:3]]
    assert found[1] <= 0.05 < found[2]
    assert simultaneous(losses, 0.05) == [upper_bound(x, delta=0.05 / 4) for x in losses]


def test_how_many_documents_it_takes():
    losses = np.random.default_rng(1).uniform(0.0, 0.1, 40)
    needed = documents_needed(losses, 0.08, 0.05)
    assert needed > 40
    assert (
        p_value(np.resize(losses, needed), 0.08) <= 0.05 < p_value(np.resize(losses, needed * 9 // 10), 0.08)
    )
    assert documents_needed(losses, 0.04, 0.05) is None


# -- measurements ----------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, calibration, documents, budget):
    """Mean KL and share of changed words of each document, window by window."""
    losses = []
    routing = BHRoutingIntegration(model, calibration=calibration, experts_per_token=budget)
    for text in documents:
        kl, changed, scored = 0.0, 0, 0
        for ids in torch.tensor(list(text.encode())).split(WINDOW):
            own = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            with routing:
                routed = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            kl += float((own.exp() * (own - routed)).sum())
            changed += int((own.argmax(-1) != routed.argmax(-1)).sum())
            scored += len(own)
        losses.append((min(kl / scored, 0.1), changed / scored))
    return np.array(losses)


def test_the_risk_is_the_mean_over_documents(model, calibration, certified):
    held = certified.certificate
    assert [level.experts_per_token for level in held.kl] == [5.0, 3.0, 1.5]
    expected = by_hand(model, calibration, texts(50, 2)[:50], 3.0)
    assert held.kl[1].risk == pytest.approx(expected[:, 0].mean(), rel=1e-4)
    assert held.agreement[1].risk == pytest.approx(expected[:, 1].mean(), rel=1e-9)
    assert held.kl[1].clipped == pytest.approx((expected[:, 0] >= 0.1).mean())
    assert held.kl[1].bound == pytest.approx(
        0.1 * upper_bound(expected[np.argsort(digests(texts(50, 2))), 0] / 0.1, delta=0.05 / 3), rel=1e-4
    )
    assert abs(held.kl[1].experts - 3.0) < 0.3
    assert (held.documents, held.weights, held.engine, held.window) == (50, "float32", "transformers", WINDOW)


def digests(documents):
    return [f"{d:032x}" for d in Documents.read(documents, 0).digests]


def test_texts_of_one_source_count_once(model, calibration):
    documents = texts(12, 3)
    read = Documents.read(
        [("book", text) for text in documents[:6]] + [("", text) for text in documents[6:]] + [documents[7]],
        0,
    )
    assert len(read) == 7
    assert len(read.texts) == 12
    found = certify(
        model,
        tokenizer,
        [("book", t) for t in documents[:6]] + documents[6:],
        calibration,
        **READ | {"levels": [3.0]},
    ).certificate
    parts = by_hand(model, calibration, ["".join(documents[:1]), *documents], 3.0)
    assert found.documents == 7
    weights = [len(t.encode()) - -(-len(t.encode()) // WINDOW) for t in documents[:6]]
    book = np.average(parts[1:7, 1], weights=weights)
    assert found.agreement[0].risk == pytest.approx(np.mean([book, *parts[7:, 1]]))


def test_an_interrupted_run_goes_on(model, calibration, certified, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    add, calls = module._Reader.add, []

    def stops(self, batch):
        calls.append(batch.index)
        if len(calls) == 5:
            raise KeyboardInterrupt
        add(self, batch)

    monkeypatch.setattr(module._Reader, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        certify(model, tokenizer, texts(50, 2), calibration, resume=tmp_path / "parts", **READ)
    found = certify(model, tokenizer, texts(50, 2), calibration, resume=tmp_path / "parts", **READ)
    assert calls[4:6] == [4, 4]  # none is read twice
    assert found.certificate == certified.certificate
    assert torch.equal(found.text_profile.usage_LE, certified.text_profile.usage_LE)
    assert not (tmp_path / "parts").exists()


# -- a target --------------------------------------------------------------------------------------------------


def test_a_target_certifies_down_to_the_last_level_that_passes(model, calibration, certified):
    risks = [level.risk for level in certified.certificate.kl]
    target = (risks[1] + risks[2]) / 2
    found = certify(model, tokenizer, texts(50, 2), calibration, max_kl=target, **READ).certificate
    assert [level.experts_per_token for level in found.kl] == [5.0, 3.0]
    assert [level.bound for level in found.kl] == [pytest.approx(target)] * 2
    assert found.agreement == ()
    assert found.level(max_kl=target * 1.01).experts_per_token == 3.0
    with pytest.raises(CertificateError, match="is not certified: the least that this"):
        found.level(max_kl=target * 0.9)
    with pytest.raises(CertificateError, match=r"agreement=0\.9 needs a certificate of it"):
        found.level(agreement=0.9)


def test_nothing_certified_says_what_would_do(model, calibration):
    with pytest.raises(
        CertificateError,
        match=r"with 5 experts the smallest loss that 50 documents certify is max_kl=0\.\d+, and max_kl=0\.001 would take about [\d,]+ documents more",
    ) as told:
        certify(model, tokenizer, texts(50, 2), calibration, max_kl=0.001, **READ)
    least = float(str(told.value).split("certify is max_kl=")[1].split(",")[0])
    assert certify(model, tokenizer, texts(50, 2), calibration, max_kl=least, **READ).certificate.kl
    with pytest.raises(CertificateError, match=r"no number of documents would do for agreement=0\.999"):
        certify(model, tokenizer, texts(50, 2), calibration, agreement=0.999, **READ)


# -- use -------------------------------------------------------------------------------------------------------


def test_a_named_loss_is_the_level_that_is_certified_for_it(model, certified, tmp_path):
    certified.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert loaded.certificate == certified.certificate
    assert torch.equal(loaded.text_profile.usage_range_Q, certified.text_profile.usage_range_Q)
    bounds = [level.bound for level in loaded.certificate.kl]
    routed = BHRoutingIntegration(model, calibration=loaded, max_kl=bounds[1] + 1e-6)
    assert routed.budget == 3.0
    assert routed.alpha == BHRoutingIntegration(model, calibration=loaded, experts_per_token=3.0).alpha
    routed.set_level(max_kl=bounds[2] + 1e-6)
    assert routed.budget == 1.5
    routed.set_level(agreement=1 - loaded.certificate.agreement[0].bound)
    assert (routed.budget, routed.get_routing_stats()["agreement"]) == (
        5.0,
        pytest.approx(1 - loaded.certificate.agreement[0].bound),
    )
    with pytest.raises(CertificateError, match=r"max_kl=0\.0001 is not certified: the least"):
        routed.set_level(max_kl=0.0001)
    assert routed.budget == 5.0


def test_other_weights_and_engines_are_told(model, certified, caplog):
    half, named = model.to(torch.bfloat16), certified.certificate.kl[2].bound + 1e-6
    with caplog.at_level(logging.WARNING, "bh_routing"):
        BHRoutingIntegration(half, calibration=certified, max_kl=named, strict=False)
    assert (
        sum(
            "certified on float32 weights in transformers, this is bfloat16 in transformers" in r.getMessage()
            for r in caplog.records
        )
        == 1
    )
    settings = RoutingSettings(max_kl=named)
    assert settings.elsewhere(certified, "float32", "transformers") is None
    assert "this is float32 in vLLM" in settings.elsewhere(certified, "float32", "vLLM")
    assert RoutingSettings(experts_per_token=3).elsewhere(certified, "float32", "vLLM") is None


def test_other_settings_are_refused(model, calibration, certified):
    with pytest.raises(
        CertificateError, match=r"was certified with compensation mean at [\d.]+, got procedure='holm'"
    ):
        RoutingSettings(max_kl=0.05, procedure="holm").policy(certified)
    with pytest.raises(CertificateError, match="got compensation none at 0"):
        RoutingSettings(max_kl=0.05, compensation="none").policy(certified)
    RoutingSettings(max_kl=0.099, procedure="bh").policy(certified)
    with pytest.raises(CertificateError, match=r"max_kl=0\.05 needs a calibration with a certificate"):
        RoutingSettings(max_kl=0.05).policy(calibration)
    with pytest.raises(InvalidParameterError, match="needs a calibration"):
        RoutingSettings(max_kl=0.05).policy(None)
    with pytest.raises(InvalidParameterError, match="expected a level or a budget, got both"):
        RoutingSettings(max_kl=0.05, experts_per_token=4)
    with pytest.raises(InvalidParameterError, match="max_kl cannot be had together with a price"):
        RoutingSettings(max_kl=0.05, price_load=1.0)
    with pytest.raises(InvalidParameterError, match="max_kl must be nats per token above 0, got -1"):
        RoutingSettings(max_kl=-1)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"max_kl": 0.1}, "max_kl must be above 0 and below 0.1 nats"),
        ({"agreement": 1.0}, "agreement must be above 0 and below 1"),
        ({"max_kl": 0.01, "agreement": 0.9}, "expected max_kl or agreement, got both"),
        ({"confidence": 0.2}, "confidence must be at least 0.5"),
        ({"settings": RoutingSettings(alpha=0.1)}, "expected settings without a level"),
        ({"settings": RoutingSettings(price_load=0.1)}, "a price on loads drops other experts"),
        ({"bound": "student"}, "bound must be 'betting' or 'hoeffding-bentkus'"),
    ],
)
def test_what_cannot_be_asked(model, calibration, asked, sentence):
    with pytest.raises(InvalidParameterError, match=sentence):
        certify(model, tokenizer, texts(5, 2), calibration, **READ | asked)


def test_the_calibration_s_own_text_is_refused(model, calibration):
    own = texts(40, 1)
    with pytest.raises(
        CertificateError, match="3 of 8 documents are of the text that the calibration was made from"
    ):
        certify(model, tokenizer, texts(5, 2) + own[:3], calibration, **READ)


def test_what_changes_a_level_loses_the_certificate(certified):
    other = replace(certified.uncertified(), text_digest="1" * 32)
    assert (certified + other).certificate is None
    assert certified.without_means().certificate is None
    assert certified.without_means().text_profile is None


def test_a_damaged_certificate_is_refused(certified, tmp_path):

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "c.safetensors"
    certified.save(path)
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for change, sentence in (
        (lambda c: c["kl"][0].update(risk=0.9), "certified bound must be at least the measured risk"),
        (lambda c: c["kl"][0].update(bound="low"), r"kl\[0\].bound must be a finite number"),
        (lambda c: c.update(fingerprint="0" * 16), "certificate is of another model"),
        (lambda c: c.pop("confidence"), "confidence is missing"),
        (lambda c: c.update(compensation=["none"]), "compensation must be a list of 2"),
    ):
        header = json.loads(metadata["header"])
        change(header["certificate"])
        text = json.dumps(header, sort_keys=True)
        save_file(tensors, path, metadata | {"header": text, "digest": tensors_digest(text, tensors)})
        with pytest.raises(CalibrationFileError, match=sentence):
            Calibration.load(path)


def test_how_unlike_a_text_is(model, calibration, certified):
    like = unlike(model, tokenizer, texts(30, 9), certified, progress=False)
    other = unlike(model, tokenizer, ["ab" * (10 + i) for i in range(12)], certified, progress=False)
    assert like["usage"]["beyond"] < 0.25
    assert like["usage"]["low"] < like["usage"]["here"] < like["usage"]["high"]
    assert other["usage"]["beyond"] == 1.0
    assert other["usage"]["here"] > 2 * like["usage"]["here"]
    with pytest.raises(CertificateError, match="this calibration has none"):
        unlike(model, tokenizer, texts(3, 9), calibration)


# -- the command -----------------------------------------------------------------------------------------------


def test_the_command_certifies_compares_and_is_used(tmp_path, capsys):
    from bh_routing.data import sample_text
    from bh_routing.models import bundled_calibration

    words = sample_text().split()
    rows = [{"text": " ".join(words[i : i + 40]), "source": f"s{i // 80}"} for i in range(0, 1600, 40)]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    text, out = str(tmp_path / "held-out.jsonl"), tmp_path / "out.safetensors"
    held = ["--calibration", str(bundled_calibration())]
    asked = [
        "certify",
        "olmoe-nano",
        *held,
        "--text",
        text,
        "-o",
        str(out),
        "--window",
        "48",
        "--document-tokens",
        "48",
    ]
    assert main([*asked, "--levels", "4", "2", "--max-kl", "0.09"]) == 0
    told = capsys.readouterr().out
    assert "these 20 documents" in told  # two lines of each source
    assert "Last level certified: 2 experts per token." in " ".join(told.split())
    found = Calibration.load(out).certificate
    assert (found.target, found.window, found.document_tokens) == (pytest.approx(0.09), 48, 48)
    assert not out.with_suffix(".certify-parts").exists()
    assert (
        main(
            [
                "generate",
                "olmoe-nano",
                "-p",
                "Once",
                "--max-new-tokens",
                "2",
                "--calibration",
                str(out),
                "--max-kl",
                "0.09",
            ]
        )
        == 0
    )
    assert "KL at most 0.09" in capsys.readouterr().out
    assert (
        main(["generate", "olmoe-nano", "-p", "Once", "--calibration", str(out), "--agreement", "0.9"]) == 2
    )
    assert "agreement=0.9 needs a certificate of it" in capsys.readouterr().err
    compare = ["certify", "olmoe-nano", "--calibration", str(out), "--compare", str(tmp_path / "same.jsonl")]
    assert main(compare) == 0
    assert "usage of experts" in capsys.readouterr().out
    assert main([*asked, "--levels", "4", "--max-kl", "0.001"]) == 2
    assert "nothing can be certified at max_kl=0.001" in capsys.readouterr().err


def test_the_model_that_comes_along_has_a_certificate(nano_model):
    from bh_routing.models import bundled_calibration

    routed = BHRoutingIntegration(nano_model, calibration=bundled_calibration(), max_kl=0.01)
    held = routed.calibration.certificate
    assert held.target is None
    assert held.documents >= 500
    level = held.level(max_kl=0.01)
    assert routed.budget == level.experts_per_token < 5
    assert level.risk < level.bound <= 0.01


def test_calibrating_and_certifying_at_once(tmp_path, capsys):
    words = [f"word{i % 97} number{i % 13}" for i in range(1600)]
    rows = [json.dumps({"text": f"{' '.join(words[i : i + 20])} {i}"}) + "\n" for i in range(0, 1600, 20)]
    (tmp_path / "own.jsonl").write_text("".join(rows[:20]))
    (tmp_path / "held-out.jsonl").write_text("".join(rows[20:]))
    out = tmp_path / "out.safetensors"
    asked = [
        "calibrate",
        "olmoe-nano",
        "--text",
        str(tmp_path / "own.jsonl"),
        "-o",
        str(out),
        "--window",
        "32",
    ]
    assert main([*asked, "--document-tokens", "32", "--certify", str(tmp_path / "held-out.jsonl")]) == 0
    assert "these 60 documents" in " ".join(capsys.readouterr().out.split())
    assert Calibration.load(out).certificate.documents == 60
    again = ["certify", "olmoe-nano", "--calibration", str(out), "--text", str(tmp_path / "own.jsonl")]
    assert main(again) == 2
    assert "20 of 20 documents are of the text that the calibration was made from" in capsys.readouterr().err
