"""From what a person types to a model: a bundled name, a folder, or a hub id -> (model, tokenizer).

What is missing or damaged is transformers' to find; here it becomes an error of one sentence. What transformers
forgives (a missing weight is filled with random numbers, a missing tokenizer is an empty one) is an error too.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import InvalidParameterError, MissingDependencyError, ModelLoadError
from . import BUNDLED, bundled_calibration, bundled_path

__all__ = ["check_device", "check_dtype", "default_calibration", "load_config", "load_model", "resolve"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
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
        return "bundled", str(bundled_path(name))
    path = Path(name).expanduser()
    if name and path.is_file():
        raise ModelLoadError(f"expected a model folder, got the file {path}; give the folder that it is in.")
    if name and path.exists():
        if not (path / "config.json").is_file():
            raise ModelLoadError(
                f"expected a model folder with a config.json, got {path} without one; "
                "save a model there with save_pretrained."
            )
        return "folder", str(path)
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return "hub", name
    raise ModelLoadError(
        f"expected a model: one of {', '.join(BUNDLED)}, a folder, or a hub id such as {EXAMPLE_ID}, got {name!r}, "
        "which is none of these (no such folder)."
    )


CALIBRATION = "calibration.safetensors"  # in a model's folder: its own


def default_calibration(name: str) -> Path | None:
    """The calibration that comes with a model: of a bundled one, or ``calibration.safetensors`` in its folder."""
    if name in BUNDLED:
        return bundled_calibration(name)
    path = Path(name).expanduser() / CALIBRATION
    return path if name and path.is_file() else None


def load_config(name: str) -> Any:
    """A model's configuration, without its weights.

    Raises
    ------
    ModelLoadError
        If it is missing or damaged.
    """
    kind, where = resolve(name)
    from transformers import AutoConfig

    with _quiet(downloads=False), _explained(name, kind):
        if kind == "hub":
            _check_hub(where)
        return AutoConfig.from_pretrained(where)


def check_dtype(dtype: str) -> str:
    """Return the name of a dtype, or raise `InvalidParameterError`."""
    if dtype not in DTYPES:
        raise InvalidParameterError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return dtype


def check_device(device: str) -> Any:
    """The torch.device for a name; ``"auto"`` is the GPU where there is one, None stands for ``"spread"``.

    Raises
    ------
    InvalidParameterError
        For a device that torch does not know or cannot use here.
    MissingDependencyError
        For ``"spread"`` without accelerate.
    """
    import torch

    if device == "spread":
        if importlib.util.find_spec("accelerate") is None:
            raise MissingDependencyError(
                "device spread needs accelerate; pip install 'bh-routing[accelerate]', or name one device."
            )
        return None
    usable = ["cpu"]
    if torch.cuda.is_available():
        usable += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        usable.append("mps")
    if device == "auto":
        return torch.device("cuda" if "cuda" in usable else "cpu")
    if device not in usable:
        raise InvalidParameterError(
            f"device must be auto, spread or one usable here ({', '.join(usable)}), got {device!r}."
        )
    return torch.device(device)


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in eval mode.

    Parameters
    ----------
    name : str
        ``"olmoe-nano"``, a folder, or a hub id (the only case that uses the network).
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"``, ``"mps"``, or ``"spread"``: over all of them and what the
        disk holds, by accelerate (``device_map="auto"``).
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

    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    spread = {"device_map": "auto"} if target is None else {}
    with _quiet(downloads=kind == "hub"), _explained(name, kind):
        if kind == "hub":
            _check_hub(where)
        config = AutoConfig.from_pretrained(where)
        tokenizer = AutoTokenizer.from_pretrained(where, config=config)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("a tokenizer without words")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **spread,
        )
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := info.get(problem):
            first = sorted(str(item[0] if isinstance(item, tuple) else item) for item in found)[0]
            raise ModelLoadError(
                f"the weights of {name} do not fit its config.json: expected all of the model's weights, got "
                f"{len(found)} {problem.replace('_', ' ')} (such as {first}); copy the model again."
            )
    return (model if target is None else model.to(target)).eval(), tokenizer


def _check_hub(name: str) -> None:
    """Without a network and without a copy in the cache, say so at once: the hub's client tries for 40 s.

    Raises
    ------
    OSError
        If there is no connection, and no copy.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10.0)
    except (HfHubHTTPError, FileMetadataError):
        return  # it answered: whatever is wrong is transformers' to tell
    except Exception as error:  # of the HTTP client, which is another one in every version
        raise OSError(f"no connection to {constants.ENDPOINT} ({error}), and no copy in the cache") from None


@contextmanager
def _explained(name: str, kind: str) -> Iterator[None]:
    """Turn what transformers, safetensors and tokenizers raise into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        reason, *more = re.split(r"(?<=[.!?]) ", " ".join(str(error).split()))
        for sentence in more:  # as many as make a line or two
            if len(reason) + len(sentence) > 250:
                break
            reason += " " + sentence
        if isinstance(error, ImportError):
            advice = "install what is missing"
        elif kind == "hub":
            advice = "check the id and the network, or give a folder"
        else:
            advice = "copy the model again"
        raise ModelLoadError(
            f"expected to load a model and its tokenizer from {name}, got {type(error).__name__}: "
            f"{reason.rstrip('.: ')[:400]}; {advice}."
        ) from error


@contextmanager
def _quiet(*, downloads: bool) -> Iterator[None]:
    """Without progress bars, warnings and retries told one by one; downloads stay visible on a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    with ExitStack() as restore:
        for name in ("transformers", "huggingface_hub"):
            logger = logging.getLogger(name)
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if transformers_logging.is_progress_bar_enabled():
            restore.callback(transformers_logging.enable_progress_bar)
        transformers_logging.disable_progress_bar()
        if not are_progress_bars_disabled() and not (downloads and sys.stderr.isatty()):
            restore.callback(enable_progress_bars)
            disable_progress_bars()
        yield
