"""The results folder: ``run.json`` says of which model and data, ``results.jsonl`` holds one result per line.

A result is appended whole or not at all; a damaged line is skipped with a warning.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from .._files import write_atomically
from ..calibration.fingerprint import TOLERANCE, compare, fingerprint
from ..errors import ResultsError

FORMAT = 1


class ResultsWarning(UserWarning):
    """A results folder holds something that was skipped."""


def _defined(value: Any) -> Any:
    """The same with None for what JSON does not know (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and value - value != 0.0 else value


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
            found = json.loads(self.run_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResultsError(
                f"{self.run_path} is damaged: {error}; give another folder, or remove it."
            ) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ResultsError(f"{self.run_path} is of another version; give another folder.")
        return found

    def open(self, plan: Any, model_id: str, data: dict[str, Any]) -> None:
        """Start or go on with a run of a model; ``data`` is added to what the folder holds about data sets.

        Raises
        ------
        ResultsError
            If the folder holds results of another model.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        prints = [fingerprint(plan.layers[i].router).tolist() for i in (0, -1)]
        held = self.run()
        if held and compare(torch.tensor(prints), torch.tensor(held["fingerprint"])) > TOLERANCE:
            raise ResultsError(
                f"{self.path} holds results of another model ({held['model']}), this one is {model_id}; give "
                "another folder."
            )
        run = {
            "format": FORMAT,
            "model": held.get("model", model_id),
            "fingerprint": prints,
            "data": held.get("data", {}) | data,
        }
        text = json.dumps(run, ensure_ascii=False)
        write_atomically(self.run_path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def append(self, result: dict[str, Any]) -> None:
        """Append one result, whole or not at all (also where the disk is full)."""
        line = json.dumps(_defined(result), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self.results_path.open("ab") as file:
            size = file.seek(0, os.SEEK_END)
            if size and not self._ends_whole():
                line = b"\n" + line
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                os.truncate(self.results_path, size)
                error.filename = error.filename or str(self.results_path)
                raise

    def _ends_whole(self) -> bool:
        with self.results_path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def results(self) -> list[dict[str, Any]]:
        """Every result; of several with one key the last. Damaged lines are skipped with a warning."""
        if not self.results_path.is_file():
            return []
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(self.results_path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                result = json.loads(line)
                if result["format"] != FORMAT:
                    raise ValueError("another version")
                found[result["key"]] = result
            except (ValueError, KeyError, TypeError) as error:
                warnings.warn(
                    f"line {number} of {self.results_path} is damaged and was skipped: {error}.",
                    ResultsWarning,
                    stacklevel=2,
                )
        return list(found.values())
