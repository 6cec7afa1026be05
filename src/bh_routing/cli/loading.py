"""From what a person types to a model: a bundled name, a folder, or a hub id -> (model, tokenizer).

transformers' own loader forgives much (a missing weight is filled with random numbers, a warning is logged);
here what does not load completely is an error of one sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InvalidParameterError, ModelLoadError
from ..models import BUNDLED, bundled_calibration, bundled_path

__all__ = ["check_device", "check_dtype", "default_calibration", "load_model", "resolve"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
EXAMPLE_ID = "allenai/OLMoE-1B-7B-0924"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def resolve(name: str) -> tuple[str, str]:
    """What a MODEL argument means: ("bundled" or "folder", path) or ("hub", id). Touches no network.

    Raises
    ------
    ModelLoadError
        For a folder that is missing or holds no model, and for what is none of the three.

    Examples
    --------
    >>> resolve("allenai/OLMoE-1B-7B-0924")
    ('hub', 'allenai/OLMoE-1B-7B-0924')
    >>> resolve("olmoe-nano")[0]
    'bundled'
    """
    if name in BUNDLED:
        path = bundled_path(name)
        _check_folder(path)
        return "bundled", str(path)
    path = Path(name).expanduser()
    if name and path.exists():
        _check_folder(path)
        return "folder", str(path)
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return "hub", name
    raise ModelLoadError(
        f"expected a model: one of {', '.join(BUNDLED)}, a folder, or a hub id such as {EXAMPLE_ID}, got {name!r}, "
        "which is none of these (no such folder)."
    )


def default_calibration(name: str) -> Path | None:
    """The calibration that comes with a model (bundled ones only)."""
    return bundled_calibration(name) if name in BUNDLED else None


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ModelLoadError(f"expected a model folder, got the file {path}; give the folder that it is in.")
    config = path / "config.json"
    if not config.is_file():
        raise ModelLoadError(
            f"expected a model folder with a config.json, got {path} without one; "
            "save a model there with save_pretrained."
        )
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(
            f"{config} is damaged: expected JSON, got {error}; copy the model again."
        ) from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ModelLoadError(
            f"{config} is damaged: expected a model_type in it, got none; copy the model again."
        )
    if not any(match for pattern in WEIGHT_FILES for match in path.glob(pattern)):
        raise ModelLoadError(
            f"expected weights ({', '.join(WEIGHT_FILES)}) in the model folder {path}, got none; copy the model again."
        )
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise ModelLoadError(
            f"expected a tokenizer ({', '.join(TOKENIZER_FILES)}) in the model folder {path}, got none; "
            "save the model's tokenizer there with save_pretrained."
        )


def check_dtype(dtype: str) -> str:
    """Return the name of a dtype, or raise `InvalidParameterError`."""
    if dtype not in DTYPES:
        raise InvalidParameterError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return dtype


def check_device(device: str) -> Any:
    """The torch.device for a name; ``"auto"`` is the GPU where there is one.

    Raises
    ------
    InvalidParameterError
        For a device that torch does not know or cannot use here.
    """
    import torch

    usable = ["cpu"]
    if torch.cuda.is_available():
        usable += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        usable.append("mps")
    if device == "auto":
        return torch.device("cuda" if "cuda" in usable else "cpu")
    if device not in usable:
        raise InvalidParameterError(
            f"device must be auto or one usable here ({', '.join(usable)}), got {device!r}."
        )
    return torch.device(device)


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in eval mode.

    Parameters
    ----------
    name : str
        ``"olmoe-nano"``, a folder, or a hub id (the only case that uses the network).
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``.
    dtype : str
        ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``. Auto is the dtype the weights are stored in,
        but float32 for a bundled model, which is small.

    Returns
    -------
    model, tokenizer

    Raises
    ------
    ModelLoadError
        If the model is missing, damaged or incomplete.
    InvalidParameterError
        For an unknown device or dtype.
    """
    kind, where = resolve(name)
    target = check_device(device)
    check_dtype(dtype)
    if dtype == "auto" and kind == "bundled":
        dtype = "float32"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet(keep_downloads=kind == "hub"), _explained(name, kind):
        tokenizer = AutoTokenizer.from_pretrained(where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := info.get(problem):
            first = sorted(str(item[0] if isinstance(item, tuple) else item) for item in found)[0]
            raise ModelLoadError(
                f"the weights of {name} do not fit its config.json: expected all of the model's weights, got "
                f"{len(found)} {problem.replace('_', ' ')} (such as {first}); copy the model again."
            )
    return model.to(target).eval(), tokenizer


@contextmanager
def _explained(name: str, kind: str) -> Iterator[None]:
    """Turn what transformers, safetensors and tokenizers raise into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        reason = " ".join(str(error).split())
        reason = re.split(r"[.!?] ", reason)[0].rstrip(".: ")[:200]
        if kind == "hub":
            advice = "check the id and the network, or give a folder"
        else:
            advice = "copy the model again"
        raise ModelLoadError(
            f"expected to load a model and its tokenizer from {name}, got {type(error).__name__}: {reason}; {advice}."
        ) from error


@contextmanager
def _quiet(*, keep_downloads: bool) -> Iterator[None]:
    """Without transformers' progress bars and warnings; downloads stay visible on a terminal."""
    import sys

    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars, downloads = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not (keep_downloads and sys.stderr.isatty()):
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if not downloads:
            enable_progress_bars()
