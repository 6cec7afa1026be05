"""`RoutingExperimentRunner`: every policy on the same tokens, one record each, resumable.

Shape legend: N tokens of a text, T tokens of a call, B windows of a batch, S tokens of one, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..calibration.calibration import Calibration
from ..errors import InvalidParameterError
from ..integration import RoutingIntegration
from ..policies import RoutingPolicy
from ..text import Window, cut_windows, spans
from .datasets import Dataset
from .notes import costs, to_frame, versions, watch_counts, word_perplexity
from .paired import BLOCK, block_sums
from .results import FORMAT, ResultsFolder
from .scoring import encode_pair, score_continuations, score_text
from .specs import PolicySpec, make_routing, parse_policy
from .strategy import RoutingStrategy, StrategyPolicy
from .workbench import Workbench

logger = logging.getLogger(__name__)

SOLVE_WINDOWS = 16  # of the calibration text, for layer profiles
SHOWN = 192  # tokens of each text that the report shows one by one
_LAYER_KEYS = (
    "path",
    "tokens",
    "mean_experts",
    "std_experts",
    "jaccard",
    "lost_weight_share",
    "count_histogram",
    "load_imbalance",
    "own_load_imbalance",
    "unused_experts",
    "own_unused_experts",
    "expert_load",
    "own_expert_load",
)

AnyPolicy = str | PolicySpec | RoutingPolicy | RoutingStrategy


class RoutingExperimentRunner:
    """Runs policies on data sets and keeps the results in a folder.

    Parameters
    ----------
    model, tokenizer
        A transformers model that this library can patch, and its tokenizer.
    policies : sequence, or mapping of label to policy
        Policies as text (``"bh:experts=4"``), policy objects, or `RoutingStrategy` objects. The model's own
        routing (``"full"``) is always run first: the others are compared with it.
    datasets : sequence of Dataset, or mapping of name to text
    output_dir : path
        Holds ``run.json`` and ``results.jsonl``; a policy that is in there with the same data and settings is not
        run again.
    calibration : Calibration or path, optional
        For calibrated policies, and what budgets are solved on.
    solve_text : str, optional
        Calibration text: the layer profiles of allocmoe need it, and budgets where there is no calibration.
    window, stride : int
        Tokens per window, and the step between windows (default: no overlap).
    batch_tokens : int
        Tokens per forward, about.
    max_tokens : int, optional
        Only so many tokens of each text.
    kl : bool
        Also the divergence from the full model's next-token distribution: one more forward per batch.
    telemetry : bool
        Count experts (per layer, load, overlap). Without: quality and time only.
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
        policies: Sequence[AnyPolicy] | Mapping[str, AnyPolicy],
        datasets: Sequence[Dataset] | Mapping[str, str],
        output_dir: str | os.PathLike[str],
        *,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        solve_text: str | None = None,
        window: int = 512,
        stride: int | None = None,
        batch_tokens: int = 4096,
        max_tokens: int | None = None,
        kl: bool = False,
        telemetry: bool = True,
        seed: int = 0,
        model_id: str | None = None,
        step: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        if calibration is not None and not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        self.calibration = calibration
        self.policies = _labelled(policies)
        if isinstance(datasets, Mapping):
            datasets = [Dataset.from_text(name, text) for name, text in datasets.items()]
        self.datasets = list(datasets)
        names = [d.name for d in self.datasets]
        if not names or len(set(names)) != len(names):
            raise InvalidParameterError(f"expected data sets with different names, got {names}.")
        self.window, self.stride, self.batch_tokens = window, stride, batch_tokens
        self.max_tokens, self.kl, self.telemetry, self.seed = max_tokens, kl, telemetry, seed
        self.folder = ResultsFolder(output_dir)
        self.model_id = model_id or getattr(model.config, "name_or_path", "") or type(model).__name__
        self._step = step
        windows = (
            []
            if solve_text is None
            else cut_windows(tokenizer, solve_text, min(window, 512), limit=SOLVE_WINDOWS)
        )
        self.bench = Workbench(model, calibration, windows, collect_stats=telemetry)
        self._texts: dict[str, tuple[Tensor, list[Window], float]] = {}
        self._done = self._total = 0

    # -- running -----------------------------------------------------------------------------------------

    def run_all_experiments(self) -> Any:
        """Run what is not in the folder yet, and return everything asked for as a DataFrame.

        An interruption (Ctrl-C) leaves the model as it was and keeps every finished record.

        Raises
        ------
        RecordError
            If the folder holds results of another model.
        MissingDependencyError
            Without pandas.
        """
        return to_frame(self.run())

    def run(self) -> list[dict[str, Any]]:
        """The same, as a list of records."""
        self.folder.open(
            self.bench.plan,
            self.model_id,
            {
                data.name: {"kind": data.kind, "digest": data.digest} | self._shown(data)
                for data in self.datasets
            },
        )
        held = {record["key"]: record for record in self.folder.records()}
        todo = [
            (label, policy, data)
            for label, policy in self.policies.items()
            for data in self.datasets
            if self._key(label, policy, data) not in held
        ]
        self._done, self._total = 0, sum(self._size(data) for _, _, data in todo)
        routings: dict[str, RoutingIntegration] = {}
        for label, policy, data in todo:
            if label not in routings:
                routings = {label: self._integration(policy)}  # one at a time
            record = self._measure(label, policy, routings[label], data)
            self.folder.append(record)
            held[record["key"]] = record
        return [
            held[self._key(label, policy, data)]
            for label, policy in self.policies.items()
            for data in self.datasets
        ]

    def _integration(self, policy: AnyPolicy) -> RoutingIntegration:
        torch.manual_seed(self.seed)
        if isinstance(policy, (str, PolicySpec)):
            integration = make_routing(policy, self.bench)
        else:
            made = StrategyPolicy(policy) if isinstance(policy, RoutingStrategy) else policy
            integration = RoutingIntegration(self.model, made, collect_stats=self.telemetry)
        return integration

    def _measure(
        self, label: str, policy: AnyPolicy, integration: RoutingIntegration, data: Dataset
    ) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        integration.reset_stats()
        integration.policy.bind(integration.plan.contexts)  # a seeded policy starts anew
        bare = label == "full" and not self.telemetry
        start = time.perf_counter()
        figures = self._measure_text(label, integration, data, bare) if data.kind == "text" else None
        if figures is None:
            figures = self._measure_continuations(label, integration, data)
        counts = self._counts(integration)
        return (
            {
                "format": FORMAT,
                "key": self._key(label, policy, data),
                "policy": label,
                "spec": policy.text if isinstance(policy, PolicySpec) else None,
                "dataset": data.name,
                "kind": data.kind,
                "model": self.model_id,
            }
            | figures
            | counts
            | costs(self.model, integration, counts.get("layers"))
            | {
                "wall_seconds": time.perf_counter() - start,
                "alpha": getattr(integration, "alpha", getattr(integration.policy, "alpha", None)),
                "budget": policy.budget if isinstance(policy, PolicySpec) else None,
                "settings": integration.policy.describe() | {"compensation": bool(integration.means)},
                "causal": integration.policy.causal,
                "seed": self.seed,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "versions": versions(),
                "device": str(self.model.device),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
            }
        )

    def _measure_text(
        self, label: str, integration: RoutingIntegration, data: Dataset, bare: bool
    ) -> dict[str, Any]:
        ids_N, windows, words = self._text(data)
        counted: list[list[int]] = []

        @contextmanager
        def around(number: int) -> Iterator[None]:
            if number or bare or not self.telemetry:
                yield
                return
            with watch_counts(integration.policy) as seen:
                yield
            num = min(SHOWN, windows[0].end - windows[0].begin)
            counted.extend(
                seen[c.path][0][:num].tolist() for c in integration.plan.contexts if c.path in seen
            )

        def reference(ids_BS: Tensor) -> Tensor:
            integration.unpatch_model()
            try:
                return self.model(input_ids=ids_BS, use_cache=False).logits
            finally:
                integration.patch_model()

        def step(tokens: int) -> None:
            self._advance(tokens, label)

        if bare:
            scores = score_text(self.model, ids_N, windows, batch_tokens=self.batch_tokens, step=step)
        else:
            with integration:
                scores = score_text(
                    self.model,
                    ids_N,
                    windows,
                    batch_tokens=self.batch_tokens,
                    reference=reference if self.kl else None,
                    around=around,
                    step=step,
                )
        losses = scores.losses_C.double()
        loss = float(losses.mean())
        return {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "loss": loss,
            "word_perplexity": word_perplexity(loss, ids_N.numel(), words),
            "token_accuracy": float(scores.hits_C.double().mean()),
            "kl": None if scores.kl_C is None else float(scores.kl_C.double().mean()),
            "tokens": ids_N.numel(),
            "scored_tokens": losses.numel(),
            "block": BLOCK,
            "blocks": block_sums(losses.numpy()),
            "seconds": scores.seconds,
            "tokens_per_second": sum(w.end - w.begin for w in windows) / scores.seconds,
            "window": self.window,
            "stride": self.stride or self.window,
            "shown_counts": counted,
        }

    def _measure_continuations(
        self, label: str, integration: RoutingIntegration, data: Dataset
    ) -> dict[str, Any]:
        pairs: list[tuple[list[int], list[int]]] = []
        for item in data.items:
            endings = [item[1]] if data.kind == "last_word" else [" " + ending for ending in item[1]]
            pairs += [encode_pair(self.tokenizer, item[0], ending) for ending in endings]
        with integration:
            results, seconds = score_continuations(
                self.model,
                pairs,
                batch_tokens=self.batch_tokens,
                step=lambda num: self._advance(num * self._size(data) // len(pairs), label),
            )
        if data.kind == "last_word":
            loss = -sum(r[0] for r in results) / len(results)
            return {
                "last_word_accuracy": sum(r[1] for r in results) / len(results),
                "last_word_perplexity": math.exp(loss) if loss < 700 else math.inf,
                "items": len(results),
                "seconds": seconds,
            }
        right = right_by_length = at = 0
        for _, endings, wanted in data.items:
            scores = [r[0] for r in results[at : at + len(endings)]]
            at += len(endings)
            right += max(range(len(scores)), key=scores.__getitem__) == wanted
            scaled = [score / len(ending) for score, ending in zip(scores, endings, strict=True)]
            right_by_length += max(range(len(scaled)), key=scaled.__getitem__) == wanted
        return {
            "choice_accuracy": right / len(data.items),
            "choice_accuracy_normalised": right_by_length / len(data.items),
            "items": len(data.items),
            "seconds": seconds,
        }

    def _counts(self, integration: RoutingIntegration) -> dict[str, Any]:
        if not self.telemetry:
            return {"mean_experts_per_token": None, "std_experts_per_token": None, "layers": None}
        figures = integration.telemetry.to_dict()
        total = figures["total"]
        return {
            "mean_experts_per_token": total["mean_experts"],
            "std_experts_per_token": total["std_experts"],
            "share_saved": total["share_saved"],
            "share_floor": total["share_floor"],
            "share_ceiling": total["share_ceiling"],
            "jaccard": total["jaccard"],
            "count_histogram": total["count_histogram"],
            "layers": [{key: layer[key] for key in _LAYER_KEYS} for layer in figures["layers"]],
        }

    # -- data --------------------------------------------------------------------------------------------

    def _text(self, data: Dataset) -> tuple[Tensor, list[Window], float]:
        """Token ids, windows and (for the word level) the number of words of the tokens that are read."""
        if data.name not in self._texts:
            text = data.items[0]
            encoded = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
            ids_N = encoded.input_ids[0]
            words = float(len(text.split()))
            if self.max_tokens is not None and ids_N.numel() > self.max_tokens:
                words *= self.max_tokens / ids_N.numel()
                ids_N = ids_N[: self.max_tokens]
            self._texts[data.name] = (ids_N, spans(ids_N.numel(), self.window, self.stride), words)
        return self._texts[data.name]

    def _shown(self, data: Dataset) -> dict[str, Any]:
        if data.kind != "text":
            return {}
        ids_N, windows, _ = self._text(data)
        shown = ids_N[: min(SHOWN, windows[0].end)].tolist()
        return {"shown": [self.tokenizer.decode([token]) for token in shown], "tokens": ids_N.numel()}

    def _size(self, data: Dataset) -> int:
        """About how many tokens a policy reads."""
        if data.kind == "text":
            return sum(w.end - w.begin for w in self._text(data)[1])
        if data.kind == "last_word":
            return sum(len(i[0]) // 4 for i in data.items)
        return sum(len(i[0]) // 4 * len(i[1]) for i in data.items)

    def _advance(self, tokens: int, label: str) -> None:
        self._done += tokens
        if self._step is not None:
            self._step(min(self._done, self._total), self._total, label)

    def _key(self, label: str, policy: AnyPolicy, data: Dataset) -> str:
        """What makes two records the same experiment."""
        described = policy.text if isinstance(policy, PolicySpec) else repr(policy)
        calibration = self.calibration
        settings = [
            label,
            described,
            data.digest,
            self.window,
            self.stride or self.window,
            self.max_tokens,
            self.kl,
            self.telemetry,
            self.seed,
            str(self.model.dtype),
            None if calibration is None else (calibration.text_digest, calibration.tokens),
            # the profiles and the solver's text
            [hashlib.sha256(w.numpy().tobytes()).hexdigest() for w in self.bench.windows[:1]],
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    # -- what comes of it --------------------------------------------------------------------------------

    def visualize_results(self, df: Any) -> list[Path]:
        """Write the plots of a DataFrame's records as SVG files into the folder; returns their paths."""
        from .report_plots import plots

        paths = []
        for name, svg in plots(self._records_of(df)).items():
            path = self.folder.path / f"{name}.svg"
            path.write_text(svg, encoding="utf-8")
            paths.append(path)
        return paths

    def generate_report(self, df: Any) -> Path:
        """Write ``report.html`` of a DataFrame's records into the folder; returns its path."""
        from .report import make_report

        page = make_report(self._records_of(df), self.folder.run(), self.calibration)
        path = self.folder.path / "report.html"
        path.write_text(page, encoding="utf-8")
        return path

    def _records_of(self, df: Any) -> list[dict[str, Any]]:
        wanted = set(df["key"])
        return [record for record in self.folder.records() if record["key"] in wanted]


def _labelled(policies: Sequence[AnyPolicy] | Mapping[str, AnyPolicy]) -> dict[str, AnyPolicy]:
    """Label -> policy, text parsed, the model's own routing first."""
    if isinstance(policies, Mapping):
        given = [(str(label), p) for label, p in policies.items()]
    else:
        given = [(_label(p), p) for p in policies]
    parsed = [(label, parse_policy(p) if isinstance(p, str) else cast(AnyPolicy, p)) for label, p in given]
    if not isinstance(policies, Mapping):
        parsed = [(p.text if isinstance(p, PolicySpec) else label, p) for label, p in parsed]
    labels = [label for label, _ in parsed]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InvalidParameterError(
            f"policy {min(twice)!r} is there twice; give a mapping of labels to policies."
        )
    return {"full": parse_policy("full"), **dict(parsed)}


def _label(policy: AnyPolicy) -> str:
    if isinstance(policy, str):
        return policy
    return policy.text if isinstance(policy, PolicySpec) else policy.name
