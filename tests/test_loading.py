"""A model from a name, a folder or a hub id; everything that is missing or damaged is one sentence."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from bh_routing.errors import InvalidParameterError, MissingDependencyError, ModelLoadError
from bh_routing.models import bundled_calibration, bundled_path
from bh_routing.models.loading import default_calibration, load_model, resolve


@pytest.fixture
def folder(tmp_path):
    """A copy of olmoe-nano to damage."""
    return shutil.copytree(bundled_path(), tmp_path / "model")


def change_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def message(name, **options):
    with pytest.raises(ModelLoadError) as caught:
        load_model(str(name), **options)
    return str(caught.value)


def test_bundled():
    model, tokenizer = load_model("olmoe-nano", device="cpu")
    assert type(model).__name__ == "OlmoeForCausalLM"
    assert model.dtype == torch.float32
    assert not model.training
    assert len(tokenizer) == model.config.vocab_size


def test_folder_keeps_the_stored_dtype(folder):
    model, _ = load_model(str(folder))
    assert model.dtype == torch.bfloat16
    assert load_model(str(folder), dtype="float16")[0].dtype == torch.float16


def test_loading_prints_nothing(capfd, folder):
    load_model(str(folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("olmoe-nano", ("bundled", str(bundled_path()))),
        (str(bundled_path()), ("folder", str(bundled_path()))),
        ("allenai/OLMoE-1B-7B-0924", ("hub", "allenai/OLMoE-1B-7B-0924")),
    ],
)
def test_resolve(name, meaning):
    assert resolve(name) == meaning


def test_calibration_beside_a_model():
    assert default_calibration("olmoe-nano") == bundled_calibration()
    assert default_calibration(str(bundled_path())) == bundled_path() / "calibration.safetensors"
    assert default_calibration("") is None
    assert default_calibration("allenai/OLMoE-1B-7B-0924") is None


def test_unknown_bundled_name():
    with pytest.raises(InvalidParameterError) as caught:
        bundled_path("olmoe-mega")
    assert str(caught.value) == "expected a bundled model, one of olmoe-nano, got 'olmoe-mega'."


@pytest.mark.parametrize("name", ["", "foo", "./foo", "/no/such/folder", "~/no-such-folder-here", "a/b/c"])
def test_no_such_model(name):
    assert message(name) == (
        "expected a model: one of olmoe-nano, a folder, or a hub id such as allenai/OLMoE-1B-7B-0924, "
        f"got {name!r}, which is none of these (no such folder)."
    )


def test_hub_without_network():
    text = message("allenai/no-such-model-at-all")
    assert text.startswith(
        "expected to load a model and its tokenizer from allenai/no-such-model-at-all, got "
    )
    assert text.endswith("; check the id and the network, or give a folder.")


def test_retries_are_not_told_one_by_one(monkeypatch, capfd):
    """What huggingface_hub says when there is no network, at each of its retries."""

    def unreachable(*_, **__):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("We couldn't connect.")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    assert message("allenai/no-such-model-at-all") == (
        "expected to load a model and its tokenizer from allenai/no-such-model-at-all, got OSError: We couldn't "
        "connect; check the id and the network, or give a folder."
    )
    assert capfd.readouterr() == ("", "")


def test_spread_over_the_devices(monkeypatch):
    asked = {}
    original = AutoModelForCausalLM.from_pretrained

    def load(*args, **options):
        asked.update(options)
        return original(*args, **options)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    model, _ = load_model("olmoe-nano", device="spread")
    assert asked["device_map"] == "auto"
    assert not model.training
    asked.clear()
    load_model("olmoe-nano", device="cpu")
    assert "device_map" not in asked
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        load_model("olmoe-nano", device="spread")
    assert str(caught.value) == (
        "device spread needs accelerate; pip install 'bh-routing[accelerate]', or name one device."
    )


def test_file_instead_of_folder(folder):
    path = folder / "model.safetensors"
    assert message(path) == f"expected a model folder, got the file {path}; give the folder that it is in."


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert message(folder) == (
        f"expected a model folder with a config.json, got {folder} without one; save a model there with "
        "save_pretrained."
    )


def unloadable(folder, reason):
    """The one sentence for what transformers refuses."""
    return f"expected to load a model and its tokenizer from {folder}, got {reason}; copy the model again."


def test_damaged_config(folder):
    (folder / "config.json").write_text("[1, 2")
    config = folder / "config.json"
    assert message(folder) == unloadable(
        folder, f"OSError: It looks like the config file at '{config}' is not a valid JSON file"
    )


@pytest.mark.parametrize("content", ["{}", "[1]"])
def test_config_without_model_type(folder, content):
    (folder / "config.json").write_text(content)
    assert message(folder) == unloadable(
        folder,
        f"ValueError: Unrecognized model in {folder}. Should have a `model_type` key in its config.json",
    )


def test_unknown_model_type(folder):
    change_config(folder, model_type="nonsense")
    text = message(folder)
    assert text.startswith(f"expected to load a model and its tokenizer from {folder}, got ValueError: ")
    assert "model type `nonsense`" in text
    assert text.endswith("; copy the model again.")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    text = message(folder)
    assert text.startswith(
        f"expected to load a model and its tokenizer from {folder}, got FileNotFoundError: "
    )
    assert f"{folder / 'model.safetensors'}" in text
    (folder / "model.safetensors.index.json").unlink()
    text = message(folder)
    assert text.startswith(
        f"expected to load a model and its tokenizer from {folder}, got OSError: Error no file named "
    )
    assert text.endswith("; copy the model again.")


@pytest.mark.parametrize("keep", [0, 100_000])
def test_truncated_weights(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    text = message(folder)
    assert text.startswith(
        f"expected to load a model and its tokenizer from {folder}, got SafetensorError: "
        "Error while deserializing header: "
    )
    assert text.endswith("; copy the model again.")


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    text = message(folder)
    assert text.startswith(
        f"expected to load a model and its tokenizer from {folder}, got ValueError: Couldn't instantiate the backend tokenizer"
    )
    assert text.endswith("; copy the model again.")


def test_an_empty_tokenizer_is_none(folder):
    """What transformers makes of a folder without any tokenizer file: one that knows two words."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert message(folder) == unloadable(folder, "ValueError: a tokenizer without words")


def test_a_tokenizer_under_another_name(folder):
    """Which files make a tokenizer is transformers' to know."""
    (folder / "tokenizer.json").rename(folder / "tokenizer.5.0.0.json")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["fast_tokenizer_files"] = ["tokenizer.5.0.0.json"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert (
        load_model(str(folder))[1]("The old man").input_ids
        == load_model("olmoe-nano")[1]("The old man").input_ids
    )


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    text = message(folder)
    assert text.startswith(f"expected to load a model and its tokenizer from {folder}, got ")
    assert text.endswith("; copy the model again.")


def test_missing_weights_are_not_invented(folder):
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    change_config(folder, num_hidden_layers=layers + 1)
    assert message(folder) == (
        f"the weights of {folder} do not fit its config.json: expected all of the model's weights, got 11 missing "
        f"keys (such as model.layers.{layers}.input_layernorm.weight); copy the model again."
    )


def test_weights_of_another_shape(folder):
    change_config(folder, num_experts=32)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert message(folder) == (
        f"the weights of {folder} do not fit its config.json: expected all of the model's weights, got {3 * layers} "
        "mismatched keys (such as model.layers.0.mlp.experts.down_proj); copy the model again."
    )


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unusable_device(device):
    with pytest.raises(InvalidParameterError) as caught:
        load_model("olmoe-nano", device=device)
    text = str(caught.value)
    assert text.startswith("device must be auto, spread or one usable here (cpu")
    assert text.endswith(f"), got {device!r}.")


def test_unknown_dtype():
    with pytest.raises(InvalidParameterError) as caught:
        load_model("olmoe-nano", dtype="int8")
    assert str(caught.value) == "dtype must be one of auto, float32, bfloat16, float16, got 'int8'."
