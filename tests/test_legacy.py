"""KDE pickles of the original work: what is read, and what is refused by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.kde_pickles import read_arrays
from bh_routing.errors import CalibrationError, CalibrationFileError, CalibrationMismatchError
from bh_routing.policies import RoutingContext, TablePolicy

LAYERS, E = 3, 64


def write(folder: Path, suffix: str = "", protocol: int | None = None, layers: int = LAYERS) -> None:
    x = np.linspace(-8.0, 8.0, 2001)
    for layer in range(layers):
        cdf = scipy.stats.norm.cdf(x, loc=-1.0 - layer, scale=1.2)
        with (folder / f"distribution_model_layer_{layer}{suffix}.pkl").open("wb") as file:
            pickle.dump({"x": x, "cdf": cdf}, file, protocol=protocol)


@pytest.mark.parametrize("protocol", range(6))
def test_p_values_are_those_of_the_distribution(tmp_path, protocol):
    write(tmp_path, protocol=protocol)
    calibration = Calibration.from_kde_pickles(tmp_path)
    logits = torch.linspace(-6, 4, 50).repeat(E, 1).T.contiguous()
    for layer in range(LAYERS):
        expected = scipy.stats.norm.sf(logits.double().numpy(), loc=-1.0 - layer, scale=1.2)
        # the grid's step is 0.008: linear interpolation is off by at most 0.2 x 0.008^2 / 8
        np.testing.assert_allclose(calibration.p_values(logits, layer).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("suffix", "variant", "null"),
    [
        ("", "", "all"),
        ("_gaussian", "gaussian", "all"),
        ("_epanechnikov", "_epanechnikov", "all"),
        ("_tophat", "tophat", "all"),
        ("_linear", "linear", "all"),
        ("_trimmed_8", "trimmed_8", "trimmed"),
    ],
)
def test_variants(tmp_path, suffix, variant, null):
    write(tmp_path, suffix)
    calibration = Calibration.from_kde_pickles(tmp_path, variant=variant)
    settings = calibration.settings()
    assert (settings.statistic, settings.null, settings.scope) == ("logit", null, "layer")
    assert repr(calibration).startswith(
        f"Calibration by the KDE files in {tmp_path}: 3 layers x 64 experts, statistic logit, null {null}, "
    )


def test_table_decides_as_p_values_do(tmp_path):
    write(tmp_path)
    calibration = Calibration.from_kde_pickles(tmp_path)
    logits_TE = torch.randn(400, E) * 1.2 - 3.0 + (torch.rand(400, E) < 0.07) * 4.0
    weights_TK, own_TK = logits_TE.softmax(-1).topk(8, -1)
    context = RoutingContext(
        path="model.layers.2.mlp.gate", index=2, num_experts=E, empty=E, top_k=8, route_norm="none"
    )
    policy = calibration.policy(alpha=0.1)
    assert isinstance(policy, TablePolicy)
    policy.bind([context])
    fast = policy.decide(logits_TE, weights_TK, own_TK, context)
    p_TK = calibration.p_values(logits_TE, context.path).gather(-1, own_TK)
    ranks = torch.arange(1, 9)
    slow_T = ((p_TK.sort(-1).values <= 0.1 * ranks / E) * ranks).amax(-1).clamp(1, 8)
    assert torch.equal(fast.counts_T, slow_T)
    assert len(slow_T.unique()) > 3


class _Evil:
    def __reduce__(self):
        return os.system, ("true",)


class _Nested:
    def __reduce__(self):
        return np.load, ("file.npy",)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"x": _Evil(), "cdf": np.ones(3)}, r"(posix|nt)\.system"),
        (_Nested(), r"numpy(\.lib\.\w+)?\.load"),
        ({"x": np.array([_Evil()], dtype=object)}, r"(posix|nt)\.system"),
        (Path("x"), r"pathlib\S*Path"),
    ],
)
def test_anything_but_arrays_is_refused_by_name(tmp_path, content, name):
    path = tmp_path / "distribution_model_layer_0.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(
        CalibrationFileError, match=rf"was refused: it asks for {name}; only numpy arrays are read"
    ):
        Calibration.from_kde_pickles(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.arange(3.0)}, "holds no array 'cdf'; it holds x"),
        (
            {"x": np.arange(3.0), "cdf": np.zeros(2)},
            "must be finite and of one length of at least 2, got 3 and 2",
        ),
        ({"x": np.arange(2.0), "cdf": np.array([0.0, np.nan])}, "must be finite and of one length"),
        ({"x": np.zeros(2), "cdf": np.array([0.0, 1.0])}, "'x' must increase strictly"),
        ({"x": np.arange(2.0), "cdf": np.array([1.0, 0.0])}, "this is no distribution function"),
        ({"x": np.arange(2.0), "cdf": np.array([0.0, 1.5])}, "this is no distribution function"),
        ({"x": np.zeros((2, 2)), "cdf": np.zeros(4)}, "'x' must be a flat array of numbers, got float64"),
        ([1, 2], "must hold a dict with the arrays 'x' and 'cdf', got list"),
    ],
)
def test_wrong_content(tmp_path, arrays, message):
    (tmp_path / "distribution_model_layer_0.pkl").write_bytes(pickle.dumps(arrays))
    with pytest.raises(CalibrationFileError, match=message):
        Calibration.from_kde_pickles(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"not a pickle", pickle.dumps({"x": np.zeros(99)})[:-40]])
def test_damaged_file(tmp_path, damage):
    path = tmp_path / "distribution_model_layer_0.pkl"
    path.write_bytes(damage)
    with pytest.raises(CalibrationFileError, match=r"was refused|cannot be read as a pickled dict"):
        read_arrays(path)


def test_missing_files(tmp_path):
    write(tmp_path, "_gaussian")
    with pytest.raises(CalibrationFileError, match=r"variants that are there: 'gaussian'\."):
        Calibration.from_kde_pickles(tmp_path)
    (tmp_path / "distribution_model_layer_1_gaussian.pkl").unlink()
    with pytest.raises(CalibrationFileError, match="lacks layer 1 of the variant 'gaussian'"):
        Calibration.from_kde_pickles(tmp_path, variant="gaussian")
    with pytest.raises(CalibrationFileError, match="there is no folder"):
        Calibration.from_kde_pickles(tmp_path / "elsewhere")


def test_what_it_cannot_do(tmp_path):
    write(tmp_path)
    calibration = Calibration.from_kde_pickles(tmp_path)
    with pytest.raises(CalibrationError, match="a budget is solved on the calibration's tokens"):
        calibration.solve(4.0)
    with pytest.raises(
        CalibrationMismatchError, match="got statistic='logprob'; calibrate the model for anything"
    ):
        calibration.table(0.1, statistic="logprob")
    with pytest.raises(CalibrationError, match="keep the pickles, or calibrate the model"):
        calibration.save(tmp_path / "c.safetensors")
    with pytest.raises(CalibrationMismatchError, match="have no layer 3; they have 3 layers"):
        calibration.p_values(torch.zeros(1, E), 3)


def test_wrong_model(tmp_path, tiny_olmoe):
    from bh_routing.patching import make_plan

    write(tmp_path, layers=2)
    Calibration.from_kde_pickles(tmp_path, num_experts=16).check(make_plan(tiny_olmoe()))
    with pytest.raises(
        CalibrationMismatchError, match="are of 2 layers with 64 experts, the model has 2 with 16"
    ):
        Calibration.from_kde_pickles(tmp_path).check(make_plan(tiny_olmoe()))
