"""The results folder: ``run.json`` says of which model and data, ``results.jsonl`` holds one result per line.

A result is appended whole or not at all; a damaged line is skipped with a warning.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from .._files import append_line, write_atomically
from .._files.checks import (
    defined,
    either,
    listed,
    mapping,
    number,
    one_of,
    optional,
    read_json,
    record,
    text,
    whole,
)
from ..calibration.fingerprint import fingerprint, same_model
from ..errors import ResultsError

FORMAT = 1


class ResultsWarning(UserWarning):
    """A results folder holds something that was skipped."""


_NAME, _SETTING = text(4096), either(whole(-(2**63), 2**63), text(4096))
_SIZE, _SHARE = number(0.0, 1e30), optional(number(0.0, 1.0))
_COUNTS = listed(whole(), 0, 1 << 15)
_LAYER = record(
    {
        "tokens": whole(),
        "mean_experts": _SIZE,
        "std_experts": _SIZE,
        "jaccard": _SHARE,
        "lost_weight_share": _SHARE,
        "load_imbalance": optional(_SIZE),
        "own_load_imbalance": optional(_SIZE),
        "unused_experts": optional(whole()),
        "own_unused_experts": optional(whole()),
        "expert_load": _COUNTS,
        "own_expert_load": _COUNTS,
    },
    others=True,
)
_RESULT = record(
    {
        "format": one_of(FORMAT),
        "key": _NAME,
        "policy": _NAME,
        "dataset": _NAME,
        "model": _NAME,
        "perplexity": optional(_SIZE),
        "word_perplexity": optional(_SIZE),
        "token_accuracy": _SHARE,
        "kl": optional(number(-1e30, 1e30)),
        "tokens": whole(1),
        "window": _SETTING,
        "stride": _SETTING,
        "blocks": listed(listed(optional(number(-1e12, 1e12)), 2, 2), 1),
        "seconds": _SIZE,
        "tokens_per_second": _SIZE,
        "mean_experts_per_token": _SIZE,
        "std_experts_per_token": _SIZE,
        "count_histogram": _COUNTS,
        "layers": listed(_LAYER, 1, 1 << 12),
        "active_parameters": optional(_SIZE),
        "flops_per_token": optional(_SIZE),
        "settings": record({}, others=True),
        "shown_counts": listed(_COUNTS, 0, 1 << 12),
        "versions": mapping(_NAME),
        "device": _NAME,
        "dtype": _NAME,
        "threads": _SETTING,
        "seed": _SETTING,
    },
    {"arithmetic_per_token": optional(_SIZE), "bytes_per_token": optional(_SIZE)},  # not in older results
    others=True,
)
_RUN = record(
    {"format": one_of(FORMAT), "model": _NAME},
    {
        "fingerprint": listed(listed(number(-1e30, 1e30), 0, 1 << 16), 1, 1 << 12),
        "data": mapping(
            record({}, {"digest": _NAME, "tokens": whole(), "shown": listed(_NAME)}, others=True)
        ),
    },
    others=True,
)


def check_result(found: Any) -> dict[str, Any]:
    """A result with every field of its type and range; ValueError says which is not."""
    result: dict[str, Any] = _RESULT(found)
    for layer in result["layers"]:
        if len(layer["expert_load"]) != len(layer["own_expert_load"]):
            raise ValueError("expert_load and own_expert_load of a layer must be of the same experts")
    if any(count is None or count != int(count) or count < 1 for _, count in result["blocks"]):
        raise ValueError("a block must be the sum of the losses of so many tokens")
    if len({len(row) for row in result["shown_counts"]}) > 1:
        raise ValueError("shown_counts must be of the same tokens in every layer")
    return result


def check_run(found: Any) -> dict[str, Any]:
    """What ``run.json`` holds, every field of its type; ValueError says which is not."""
    run: dict[str, Any] = _RUN(found)
    return run


class ResultsFolder:
    """Reads and appends results.

    Parameters
    ----------
    path : path
        Made where it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def results_path(self) -> Path:
        """``results.jsonl``."""
        return self.path / "results.jsonl"

    @property
    def run_path(self) -> Path:
        """``run.json``."""
        return self.path / "run.json"

    def run(self) -> dict[str, Any]:
        """What ``run.json`` says; empty where there is none.

        Raises
        ------
        ResultsError
            If it is damaged.
        """
        if not self.run_path.is_file():
            return {}
        try:
            found = read_json(self.run_path.read_bytes())
            if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
                raise ResultsError(f"{self.run_path} is of another version; give another folder.")
            return check_run(found)
        except ValueError as error:
            if isinstance(error, ResultsError):
                raise
            raise ResultsError(
                f"{self.run_path} is damaged: {error}; give another folder, or remove it."
            ) from None

    def open(self, plan: Any, model_id: str, data: dict[str, Any]) -> None:
        """Start or go on with a run of a model; ``data`` is added to what the folder holds about data sets.

        Raises
        ------
        ResultsError
            If the folder holds results of another model.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        ends = [plan.layers[i] for i in (0, -1)]
        held = self.run()
        if held and not same_model(ends, held.get("fingerprint", [])):
            raise ResultsError(
                f"{self.path} holds results of another model ({held['model']}), this one is {model_id}; give "
                "another folder."
            )
        run = {
            "format": FORMAT,
            "model": held.get("model", model_id),
            "fingerprint": held.get("fingerprint") or [fingerprint([layer])[0].tolist() for layer in ends],
            "data": held.get("data", {}) | data,
        }
        write_atomically(self.run_path, json.dumps(run))

    def append(self, result: dict[str, Any]) -> None:
        """Append one result, whole or not at all (also where the disk is full)."""
        append_line(self.results_path, json.dumps(defined(result), allow_nan=False))

    def results(self) -> list[dict[str, Any]]:
        """Every result; of several with one key the last. Damaged lines are skipped with a warning."""
        if not self.results_path.is_file():
            return []
        found: dict[str, dict[str, Any]] = {}
        for i, line in enumerate(self.results_path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                result = check_result(read_json(line))
                found[result["key"]] = result
            except ValueError as error:
                warnings.warn(
                    f"line {i} of {self.results_path} is damaged and was skipped: {error}.",
                    ResultsWarning,
                    stacklevel=2,
                )
        return list(found.values())
