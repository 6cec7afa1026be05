"""Pictures are written whole, and what they show as held out is held out."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from bh_routing.calibration import Calibration
from bh_routing.calibration.plots import plot_calibration, without_kept_tokens
from bh_routing.errors import InvalidParameterError


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.PDF"])
def test_formats(synthetic_calibration, tmp_path, name):
    plot_calibration(synthetic_calibration(), tmp_path / name)
    head = (tmp_path / name).read_bytes()[:300]
    assert {"png": b"PNG", "svg": b"<?xml", "pdf": b"%PDF"}[name[2:].lower()] in head
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "changes",
    [{"moments": False}, {"reservoir": 0}, {"reservoir": 4000}, {"experts": 8, "top_k": 2, "layers": 1}],
)
def test_whatever_it_holds(synthetic_calibration, tmp_path, changes):
    plot_calibration(synthetic_calibration(**changes), tmp_path / "a.svg")
    shows_p_values = "held-out null p-values" in (tmp_path / "a.svg").read_text()
    assert shows_p_values == (changes.get("reservoir") != 0)


@pytest.mark.parametrize(
    "settings", [{"statistic": "logit"}, {"estimator": "kde"}, {"null": "all", "scope": "layer"}]
)
def test_settings(synthetic_calibration, tmp_path, settings):
    plot_calibration(synthetic_calibration(), tmp_path / "a.png", **settings)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_kept_tokens_are_taken_out(synthetic_calibration):
    calibration = synthetic_calibration(reservoir=1000)
    rest = without_kept_tokens(calibration)
    for kind in ("logit", "logprob"):
        before = calibration.histograms[kind]["unselected"].counts_LEB.sum()
        after = rest.histograms[kind]["unselected"].counts_LEB.sum()
        # 1000 tokens x 2 layers x 12 experts, but for bins that float16 rounding missed
        assert int(before - after) == pytest.approx(24_000, rel=0.005)
        assert bool((rest.histograms[kind]["unselected"].counts_LEB >= 0).all())


def test_kde_pickles(tmp_path):
    import pickle

    x = np.linspace(-5, 5, 400)
    cdf = 0.5 * (1 + torch.erf(torch.from_numpy(x) / 2**0.5)).numpy()
    (tmp_path / "distribution_model_layer_0.pkl").write_bytes(pickle.dumps({"x": x, "cdf": cdf}))
    plot_calibration(Calibration.from_kde_pickles(tmp_path), tmp_path / "a.svg")
    assert "BH thresholds over ranks" in (tmp_path / "a.svg").read_text()


def test_other_formats_are_refused(synthetic_calibration, tmp_path):
    with pytest.raises(
        InvalidParameterError, match=r"must be written to a file that ends in \.png, \.svg, \.pdf"
    ):
        plot_calibration(synthetic_calibration(), tmp_path / "a.jpg")


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, bh_routing.calibration.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
