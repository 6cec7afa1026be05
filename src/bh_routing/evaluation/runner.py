"""`RoutingExperimentRunner`: every policy on the same tokens, one result each, resumable.

Shape legend: N tokens of a text, T tokens of a call, B windows of a batch, S tokens of one, V vocabulary, E experts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_atomically
from ..calibration.calibration import Calibration
from ..errors import InvalidInputError, InvalidParameterError
from ..integration import RoutingIntegration
from ..policies import RoutingContext
from ..telemetry.figures import to_frame
from ..text import Window, cut_windows, spans
from .figures import result_of
from .results import FORMAT, ResultsFolder
from .scoring import TextScores, score_text, whole_streams
from .specs import Policy, PolicySpec, labelled, make_routing
from .workbench import Workbench

SOLVE_WINDOWS = 16  # of the calibration text, for layer profiles
SHOWN = 192  # tokens of each text that the report shows one by one


@dataclass(frozen=True, kw_only=True, eq=False)
class _Text:
    """What is read of a text: its tokens, where they are cut, and how many words they are."""

    ids_N: Tensor
    windows: list[Window]
    words: float
    digest: str

    @property
    def shown(self) -> int:
        """Tokens that the report shows one by one: at most the first window."""
        return min(SHOWN, self.windows[0].end)

    @property
    def forwarded(self) -> int:
        """Tokens that go through the model."""
        return sum(w.end - w.begin for w in self.windows)


class RoutingExperimentRunner:
    """Runs policies on texts and keeps the results in a folder.

    Parameters
    ----------
    model, tokenizer
        A transformers model that this library can patch, and its tokenizer.
    policies : sequence, or mapping of label to policy
        Policies as text (``"bh:experts=4"``) or policy objects. The model's own routing (``"full"``) is always run
        first: the others are compared with it.
    datasets : mapping of name to text
        What perplexity is measured on. Accuracies on tasks: `bh_routing.evaluation.lm_eval`.
    output_dir : path
        Holds ``run.json`` and ``results.jsonl``; a policy that is in there with the same text and settings is not
        run again.
    calibration : Calibration or path, optional
        For calibrated policies, and what budgets are solved on.
    solve_text : str, optional
        Calibration text: the layer profiles of allocmoe need it, and budgets where there is no calibration.
    window, stride : int
        Tokens per window, and the step between windows (default: no overlap).
    streams : int, optional
        Score so many windows from different places of a text, cut to a multiple of that, as if they were decoded together.
    batch_tokens : int
        Tokens per forward, about (not with streams, which all go through one).
    max_tokens : int, optional
        Only so many tokens of each text.
    kl : bool
        Also the divergence from the full model's next-token distribution: one more forward per batch.
    seed : int
    model_id : str, optional
        Default: the name the model was loaded by.
    step : callable, optional
        ``step(done, total, label)`` after every batch, for a progress bar.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policies: Sequence[Policy] | Mapping[str, Policy],
        datasets: Mapping[str, str],
        output_dir: str | os.PathLike[str],
        *,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        solve_text: str | None = None,
        window: int = 512,
        stride: int | None = None,
        batch_tokens: int = 4096,
        max_tokens: int | None = None,
        streams: int | None = None,
        kl: bool = False,
        seed: int = 0,
        model_id: str | None = None,
        step: Callable[[int, int, str], None] = lambda done, total, label: None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        if calibration is not None and not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        self.calibration = calibration
        self.policies = labelled(policies)
        self.window, self.stride, self.batch_tokens = window, stride or window, batch_tokens
        self.max_tokens, self.streams, self.kl, self.seed = max_tokens, streams, kl, seed
        if streams is not None and self.stride != window:
            raise InvalidParameterError(
                f"streams are windows that do not overlap, got stride {stride} for windows of {window}; leave it out."
            )
        self.folder = ResultsFolder(output_dir)
        self.model_id = model_id or getattr(model.config, "name_or_path", "") or type(model).__name__
        self._step = step
        if not datasets:
            raise InvalidParameterError("expected texts to measure on, {name: text}, got none.")
        self.texts = {name: self._read(name, text) for name, text in datasets.items()}
        windows: list[Tensor] = []
        if solve_text is not None:
            windows = cut_windows(tokenizer, solve_text, min(window, 512), limit=SOLVE_WINDOWS)
        self.bench = Workbench(model, calibration, windows, streams=streams or 1)

    def _read(self, name: str, text: str) -> _Text:
        if not text.strip():
            raise InvalidInputError(f"expected text in data set {name}, got none.")
        ids_N = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[
            0
        ]
        cut_N = ids_N[: self.max_tokens]
        if self.streams is not None:
            cut_N = cut_N[: whole_streams(len(cut_N), self.window, self.streams)]
        return _Text(
            ids_N=cut_N,
            windows=spans(len(cut_N), self.window, self.stride),
            words=len(text.split()) * len(cut_N) / len(ids_N),
            digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        )

    # -- running -----------------------------------------------------------------------------------------

    def run_all_experiments(self) -> Any:
        """Run what is not in the folder yet, and return everything asked for as a DataFrame.

        An interruption (Ctrl-C) leaves the model as it was and keeps every finished result.

        Raises
        ------
        ResultsError
            If the folder holds results of another model.
        MissingDependencyError
            Without pandas.
        """
        return to_frame(self.run())

    def run(self) -> list[dict[str, Any]]:
        """The same, as a list of results."""
        data = {
            name: {
                "digest": text.digest,
                "tokens": len(text.ids_N),
                "shown": [self.tokenizer.decode([i]) for i in text.ids_N[: text.shown].tolist()],
            }
            for name, text in self.texts.items()
        }
        self.folder.open(self.bench.plan, self.model_id, data)
        held = {result["key"]: result for result in self.folder.results()}
        wanted = {self._key(label, name): (label, name) for label in self.policies for name in self.texts}
        todo = {key: pair for key, pair in wanted.items() if key not in held}
        done, total = 0, sum(self.texts[name].forwarded for _, name in todo.values())
        # All of them before the first runs: what is wrong with the last is not said after hours.
        asked = {label: self.integration(label) for label, _ in todo.values()}
        for label, group in groupby(todo.items(), key=lambda item: item[1][0]):
            integration = asked[label]
            for key, (_, name) in group:

                def step(tokens: int) -> None:
                    nonlocal done
                    done += tokens
                    self._step(done, total, label)  # noqa: B023 - called within this turn

                scores, shown = self._score(integration, self.texts[name], step)
                held[key] = self._result(key, label, name, integration, scores, shown)
                self.folder.append(held[key])
        return [held[key] for key in wanted]

    def integration(self, label: str) -> RoutingIntegration:
        """One of its policies on its model, not patched."""
        torch.manual_seed(self.seed)
        if isinstance(policy := self.policies[label], PolicySpec):
            return make_routing(policy, self.bench)
        return RoutingIntegration(self.model, policy)

    def _score(
        self, integration: RoutingIntegration, text: _Text, step: Callable[[int], None]
    ) -> tuple[TextScores, list[list[int]]]:
        """Scores of a text, and per layer the number of experts of its first tokens."""
        torch.manual_seed(self.seed)
        integration.reset_stats()
        integration.policy.reset()
        shown: dict[str, list[int]] = {}

        def watch(router: Any, context: RoutingContext, decision: Any, logits_TE: Tensor) -> None:
            if context.path not in shown:
                shown[context.path] = decision.counts_T[: text.shown].tolist()

        def own_logits(ids_BS: Tensor) -> Tensor:
            integration.unpatch_model()
            try:
                logits_BSV: Tensor = self.model(input_ids=ids_BS, use_cache=False).logits
                return logits_BSV
            finally:
                integration.patch_model()

        integration.watchers.append(watch)
        try:
            with integration:
                scores = score_text(
                    self.model,
                    text.ids_N,
                    text.windows,
                    batch_tokens=self.batch_tokens,
                    streams=self.streams,
                    reference=own_logits if self.kl else None,
                    step=step,
                )
        finally:
            integration.watchers.remove(watch)
        return scores, [shown[c.path] for c in integration.plan.contexts if c.path in shown]

    def _result(
        self,
        key: str,
        label: str,
        name: str,
        integration: RoutingIntegration,
        scores: TextScores,
        shown: list[list[int]],
    ) -> dict[str, Any]:
        policy, text = self.policies[label], self.texts[name]
        spec = policy if isinstance(policy, PolicySpec) else None
        named = {
            "format": FORMAT,
            "key": key,
            "policy": label,
            "spec": None if spec is None else spec.text,
            "budget": None if spec is None else spec.budget,
            "dataset": name,
            "model": self.model_id,
            "tokens": len(text.ids_N),
            "text": text.digest,
            "calibration": None if self.calibration is None else self.calibration.text_digest,
            "window": self.window,
            "stride": self.stride,
            "streams": self.streams,
            "seed": self.seed,
            "tokens_per_second": text.forwarded / scores.seconds,
            "shown_counts": shown,
        }
        return named | result_of(self.model, integration, scores, text.words)

    def _key(self, label: str, name: str) -> str:
        """What makes two results the same experiment."""
        policy, calibration = self.policies[label], self.calibration
        settings = [
            label,
            policy.text if isinstance(policy, PolicySpec) else repr(policy),
            name,
            self.texts[name].digest,
            self.window,
            self.stride,
            self.max_tokens,
            self.kl,
            *([] if self.streams is None else [self.streams]),
            self.seed,
            str(self.model.dtype),
            None if calibration is None else (calibration.text_digest, calibration.tokens),
            # the profiles and the solver's text
            [hashlib.sha256(w.numpy().tobytes()).hexdigest() for w in self.bench.windows[:1]],
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    # -- what comes of it --------------------------------------------------------------------------------

    def visualize_results(self, df: Any) -> list[Path]:
        """Write the plots of a DataFrame's results as SVG files into the folder; returns their paths.

        Raises
        ------
        MissingDependencyError
            Without matplotlib.
        """
        from .report_plots import plots, svg_text

        paths = []
        for name, figure in plots(self._results_of(df)).items():
            paths.append(self.folder.path / f"{name}.svg")
            write_atomically(paths[-1], svg_text(figure))
        return paths

    def generate_report(self, df: Any) -> Path:
        """Write ``report.html`` of a DataFrame's results into the folder; returns its path.

        Raises
        ------
        MissingDependencyError
            Without matplotlib.
        """
        from .report import make_report

        page = make_report(self._results_of(df), self.folder.run(), self.calibration)
        path = self.folder.path / "report.html"
        write_atomically(path, page)
        return path

    def _results_of(self, df: Any) -> list[dict[str, Any]]:
        wanted = set(df["key"])
        return [result for result in self.folder.results() if result["key"] in wanted]
