"""A calibration made in llama.cpp against one made in transformers, both in float32, and used in the other engine."""

from __future__ import annotations

import pytest
import torch

from bh_routing import BHRoutingIntegration, Calibration, calibrate
from bh_routing.cli import main
from bh_routing.engines.llama_cpp import calibrate as calibrate_gguf
from bh_routing.errors import CalibrationError

TOKENS, WINDOW = 1600, 128


@pytest.fixture(scope="module")
def texts() -> list[str]:
    from bh_routing.data import sample_text

    text = sample_text()
    return [text[:2500], text[2500:5000], text[5000:12000]]


@pytest.fixture(scope="module")
def both(nano, gguf_file, texts) -> tuple[Calibration, Calibration]:
    from llama_cpp import Llama

    given = {"max_tokens": TOKENS, "window": WINDOW, "progress": False, "model_id": "nano"}
    mine = calibrate_gguf(
        Llama, model_path=gguf_file("f32"), texts=texts, n_threads=1, n_threads_batch=1, **given
    )
    return mine, calibrate(nano[0], nano[1], texts, batch_tokens=8 * WINDOW, **given)


@pytest.mark.filterwarnings("ignore::bh_routing.errors.CalibrationWarning")
def test_it_is_that_of_transformers(both):
    """Counts to a bin, everything else to rounding; the linear compensation is there without sensitivities."""
    mine, theirs = both
    for name in ("layers", "num_experts", "tokens", "documents", "text_digest", "window", "trim"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert torch.equal(mine.document_digests_C, theirs.document_digests_C)
    for kind, sets in theirs.histograms.items():
        for name, b in sets.items():
            a = mine.histograms[kind][name]
            low, high = min(a.start, b.start), max(x.start + x.counts_LEB.shape[-1] for x in (a, b))
            wide = [torch.zeros(*x.counts_LEB.shape[:2], high - low) for x in (a, b)]
            for into, x in zip(wide, (a, b), strict=True):
                into[..., x.start - low :][..., : x.counts_LEB.shape[-1]] = x.counts_LEB
            assert wide[0].sum() == pytest.approx(float(wide[1].sum()), abs=2)
            assert (wide[0].cumsum(-1) - wide[1].cumsum(-1)).abs().max() <= 2  # one bin off
            assert (wide[0] - wide[1]).abs().sum() < 1e-3 * wide[1].sum()
    torch.testing.assert_close(mine.moments.mean_LEH, theirs.moments.mean_LEH, rtol=0, atol=1e-4)
    assert torch.equal(mine.moments.tokens_LE, theirs.moments.tokens_LE)
    for name in ("hash_N", "document_N"):
        assert torch.equal(getattr(mine.reservoir, name), getattr(theirs.reservoir, name)), name
    chosen = [x.reservoir.experts_NLK.long() for x in (mine, theirs)]
    assert torch.equal(*(experts_NLK.sort(-1).values for experts_NLK in chosen))
    logits_NLE = theirs.reservoir.logits_NLE  # the order is the same, but for experts of equal logits
    assert torch.equal(*(logits_NLE.gather(-1, experts_NLK) for experts_NLK in chosen))
    num = mine.fingerprint_LD.shape[1]
    torch.testing.assert_close(mine.fingerprint_LD, theirs.fingerprint_LD[:, :num])
    assert mine.compensation_scale == pytest.approx(theirs.compensation_scale, abs=0.02)
    assert mine.forms == ("none", "mean", "linear")
    assert bool((mine.linear.r2_L > mine.linear.mean_r2_L).any())
    assert mine.moments.sensitivity_LE is None


@pytest.mark.filterwarnings("ignore::bh_routing.errors.CalibrationWarning")
def test_it_routes_in_both_engines(both, nano, make_llama, logits_of, ids, tmp_path):
    mine, _ = both
    file = tmp_path / "calibration.safetensors"
    mine.save(file)
    with (
        BHRoutingIntegration(nano[0], calibration=str(file), experts_per_token=3) as integrator,
        torch.no_grad(),
    ):
        expected = nano[0](torch.tensor([ids])).logits[0]
    for kind, near in (("f32", 3e-4), ("q8_0", 3.0)):
        llm = make_llama(str(file), kind=kind, experts_per_token=3)
        assert float((logits_of(llm, ids) - expected).abs().max()) < near
        assert llm.routing.get_routing_stats()["mean_experts_per_token"] == pytest.approx(
            integrator.get_routing_stats()["mean_experts_per_token"], abs=0.05
        )


def test_what_cannot_be_calibrated(gguf_file, tmp_path, capsys):
    from llama_cpp import Llama

    with pytest.raises(CalibrationError, match="the text is empty"):
        calibrate_gguf(Llama, model_path=gguf_file("q8_0"), texts=[], window=64)
    with pytest.raises(CalibrationError, match="linear=True reads the texts twice"):
        calibrate_gguf(Llama, model_path=gguf_file("q8_0"), texts=iter(["a"]), window=64)
    text = tmp_path / "text.txt"
    text.write_text("The old man. " * 200)
    out = tmp_path / "calibration.safetensors"
    arguments = ["calibrate", gguf_file("q8_0"), "--text", str(text), "-o", str(out)]
    assert main([*arguments, "--sensitivity"]) == 2
    assert "takes gradients, which llama.cpp does not compute" in capsys.readouterr().err
    assert main([*arguments, "--max-tokens", "400", "--window", "64", "--threads", "1"]) == 0
    assert "It holds no loss sensitivities" in " ".join(capsys.readouterr().out.split())
    assert Calibration.load(out).tokens == 400
