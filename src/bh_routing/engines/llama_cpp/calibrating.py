"""Calibration inside llama.cpp, for who has only the GGUF file: the same sums as in `bh_routing.calibration.passes`, seen through the callback.

What needs gradients is not there: loss sensitivities, and sizes that follow the token. So the sizes of experts are those of their outputs,
and what stands in for dropped ones is fitted without the kept experts' part. A calibration made here routes the model in transformers too.

Shape legend: T tokens, K slots of the router's own choice, E experts, H hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._version import __version__
from ...calibration.accumulate import LayerMoments, ReservoirSampler, join_moments, layer_counts
from ...calibration.calibration import Calibration
from ...calibration.compensation_scale import SCALES, TOKENS, SpreadWindows, divergence, vertex
from ...calibration.data import CalibratedLayer, join_layers
from ...calibration.dropping import dropping_policy
from ...calibration.fingerprint import joined
from ...calibration.forwards import progress_bar
from ...calibration.linear_fit import LinearSums
from ...calibration.linear_maps import LinearMaps, choose_fit, largest_rank, shrunk
from ...calibration.passes import warn_of_few
from ...calibration.second_pass import TEXT, mean_logits, strange_windows
from ...calibration.third_pass import TOKENS as HELD_OUT
from ...decision.compensation import Compensation
from ...errors import CalibrationError
from ...text import Batch, Document, TextStream
from .loading import load
from .routing import router_logits
from .structure import Structure
from .watching import Reader, Watch


def calibrate(
    cls: Callable[..., Any],
    *,
    model_path: str | os.PathLike[str],
    texts: Iterable[Document] | Callable[[], Iterable[Document]] | str,
    max_tokens: int | None = None,
    document_tokens: int | None = None,
    window: int = 512,
    linear: bool = True,
    rank: int | None = None,
    robust_fit: bool = True,
    reservoir: int = 8192,
    seed: int = 0,
    model_id: str | None = None,
    progress: bool | None = None,
    **arguments: Any,
) -> Calibration:
    """Calibrate a GGUF model's routers on text, in llama.cpp.

    Parameters
    ----------
    cls : type
        ``llama_cpp.Llama``.
    model_path : str or path
    texts, max_tokens, document_tokens, window, linear, rank, robust_fit, reservoir, seed, model_id, progress
        As in `bh_routing.calibrate`; the texts are read twice where ``linear`` is asked for. ``linear`` needs no sensitivities here.
    **arguments
        ``Llama``'s own.

    Returns
    -------
    Calibration
        Without sensitivities and sizes that follow the token, which take gradients; its fingerprint is of the routers alone.

    Raises
    ------
    CalibrationError
        If the text is empty, or can be read once only where it is read twice.
    UnsupportedModelError, ModelLoadError, MissingDependencyError
        As `bh_routing.engines.llama_cpp.route`.
    """
    # A cache in float32 and no flash attention: nothing but the weights is rounded.
    plain = {"n_ctx": window, "n_batch": window, "n_ubatch": window, "type_k": 0, "type_v": 0}
    llm, hook, structure, routers = load(cls, str(model_path), plain | arguments)
    try:
        stream = TextStream(
            texts,
            lambda text, **_: {"input_ids": llm.tokenize(text.encode(), add_bos=True, special=False)},
            window=window,
            batch_tokens=8 * window,
            seed=seed,
            document_tokens=document_tokens,
        )
        if linear and not stream.repeatable:
            raise CalibrationError(
                "linear=True reads the texts twice, got an iterator that can be read once; give a list, or linear=False."
            )
        blank = _blank(
            structure, routers, model_id or os.path.basename(str(model_path)), seed, window, reservoir
        )
        return _Calibrating(Reader(llm, hook), structure, blank, stream, max_tokens, progress).run(
            linear, rank, robust_fit
        )
    finally:
        llm.close()


def _blank(
    s: Structure,
    routers: Mapping[int, Sequence[Tensor]],
    model_id: str,
    seed: int,
    window: int,
    reservoir: int,
) -> Calibration:
    """All that is known before any text."""
    layers = tuple(
        CalibratedLayer(
            path=s.path(block),
            experts_path=s.experts_path(block),
            top_k=s.slots,
            score_func=s.score_func,
            route_norm=s.route_norm,
        )
        for block in s.blocks
    )
    return Calibration(
        model_id=model_id,
        library_version=__version__,
        layers=layers,
        num_experts=s.experts,
        histograms={},
        reservoir_size=reservoir,
        fingerprint_LD=torch.stack([joined(router_logits(list(routers[block]))) for block in s.blocks]),
        trim=min(s.slots, max(1, (s.experts - 1) // 4)),
        seed=seed,
        window=window,
    )


class _Calibrating:
    """The passes over one text."""

    def __init__(
        self,
        read: Reader,
        s: Structure,
        blank: Calibration,
        stream: TextStream,
        max_tokens: int | None,
        show: Any,
    ) -> None:
        self.read, self.structure, self.blank, self.stream = read, s, blank, stream
        self.max_tokens, self.show = max_tokens, show
        self.paths = {block: s.path(block) for block in s.blocks}

    def run(self, linear: bool, rank: int | None, robust: bool) -> Calibration:
        """Counts and moments; then, on what is dropped, the linear compensation; then how strongly each is applied."""
        spread = SpreadWindows(self.blank.window, HELD_OUT)
        found = self._first(spread)
        some = spread.result(found.tokens, TOKENS)
        full = found.compensation("mean", 1.0)
        found = replace(found, compensation_scale=self._scale(found, some, full))
        if linear:
            maps = self._maps(found, spread.result(found.tokens), rank, robust)
            found = replace(found, linear=maps)
            if maps is not None:
                found = replace(
                    found, linear_scale=self._scale(found, some, found.compensation("linear", 1.0))
                )
        warn_of_few(found)
        return found

    def _batches(self, what: str) -> Iterator[Batch]:
        self.stream.start(self.max_tokens, 0, 1)
        with progress_bar(what, self.show) as advance:
            for batch in self.stream:
                yield batch
                advance(batch.num_tokens)

    def _first(self, spread: SpreadWindows) -> Calibration:
        blank, s = self.blank, self.structure
        counts = dict(zip(blank.paths, layer_counts(blank), strict=True))
        moments = {path: LayerMoments(s.experts) for path in blank.paths}
        sampler = ReservoirSampler(blank.reservoir_size, len(s.blocks), s.experts, s.slots)
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def take(block: int, logits: Tensor, _: Tensor, own: Tensor, __: Tensor, outputs: Tensor) -> None:
            path = self.paths[block]
            counts[path].update(logits, own)
            moments[path].update(outputs.flatten(0, 1), own.flatten())
            seen[block] = (logits, own)

        watch, tokens = Watch(s, take), 0
        for batch in self._batches("calibrating"):
            at = 0
            for ids, mask in zip(batch.input_ids, batch.mask, strict=True):
                num = int(mask.sum())
                self.read(ids[:num], watch)
                here = slice(at, at + num)
                admitted = sampler.admit(batch.hashes[here])
                if len(admitted):
                    logits, own = zip(*(seen[block] for block in s.blocks), strict=True)
                    sampler.add(
                        torch.from_numpy(batch.hashes[here])[admitted],
                        torch.stack([x[admitted].to(torch.float16) for x in logits], 1),
                        torch.stack([x[admitted].to(torch.int16) for x in own], 1),
                        torch.from_numpy(batch.documents[here])[admitted],
                    )
                at += num
            tokens += batch.num_tokens
            spread.add(batch)
        if tokens == 0:
            raise CalibrationError("the text is empty: expected at least one token to calibrate on.")
        return replace(
            blank,
            histograms=join_layers(counts[path].histograms() for path in blank.paths),
            moments=join_moments([moments[path] for path in blank.paths]),
            reservoir=sampler.result() if sampler.size else None,
            tokens=tokens,
            documents=self.stream.documents,
            text_digest=f"{self.stream.digest:032x}",
            document_digests_C=torch.tensor(sorted(self.stream.document_digests), dtype=torch.int64),
        )

    def _maps(
        self, found: Calibration, windows: Sequence[Batch], rank: int | None, robust: bool
    ) -> LinearMaps | None:
        s, moments = self.structure, found.moments
        assert moments is not None
        assert moments.mean_LEH is not None

        def empty() -> dict[int, LinearSums]:
            return {
                b: LinearSums(s.experts, o, s.hidden)
                for b, o in zip(s.blocks, mean_logits(found), strict=True)
            }

        sums, held = empty(), empty()
        means = {
            path: Compensation.mean(m.float()) for path, m in zip(found.paths, moments.mean_LEH, strict=True)
        }

        def watch(into: dict[int, LinearSums]) -> Watch:
            def take(
                b: int, logits: Tensor, weights: Tensor, own: Tensor, dropped: Tensor, outputs: Tensor
            ) -> None:
                into[b].update(logits, outputs, own, weights, dropped)

            return Watch(s, take, dropping_policy(found), means)

        held_out, plain_N, own = {batch.index for batch in windows}, self._plain_ids(), watch(sums)
        for batch in self._batches("compensation"):
            part_B = (torch.arange(len(batch.input_ids)) + batch.index) % 4
            text_B = part_B <= max(TEXT) if robust else torch.ones_like(part_B, dtype=torch.bool)
            strange = iter(
                strange_windows(batch, part_B, plain_N, found.seed).input_ids
                if not bool(text_B.all())
                else ()
            )
            for row, (ids, mask) in enumerate(zip(batch.input_ids, batch.mask, strict=True)):
                is_text = bool(text_B[row])
                if not is_text:
                    ids = next(strange)
                if not (is_text and row == 0 and batch.index in held_out):
                    self.read(ids[: int(mask.sum())], own)
        judge = watch(held)
        for batch in windows:
            self.read(batch.input_ids[0][batch.mask[0]], judge)
        numbers_L = [s.expert_numbers] * len(s.blocks)
        chosen = [
            shrunk(choose_fit(sums[b], held[b], rank, largest_rank(s.expert_numbers, s.hidden)), mean_EH)
            for b, mean_EH in zip(s.blocks, moments.shrunk_means(), strict=True)
        ]
        return LinearMaps.stack(chosen, numbers_L) if any(one.fit.rank for one in chosen) else None

    def _plain_ids(self) -> Tensor:
        """The token ids that stand for text, int64: no control tokens, none unused."""
        from llama_cpp import llama_cpp as low

        vocabulary, num = low.llama_model_get_vocab(self.read.llm._model.model), self.read.llm.n_vocab()
        if self.read.llm.metadata.get("tokenizer.ggml.model", "none") == "none":
            return torch.arange(num)
        odd = low.LLAMA_TOKEN_ATTR_CONTROL | low.LLAMA_TOKEN_ATTR_UNKNOWN | low.LLAMA_TOKEN_ATTR_UNUSED
        return torch.tensor([i for i in range(num) if not low.llama_vocab_get_attr(vocabulary, i) & odd])

    def _scale(self, found: Calibration, windows: Sequence[Batch], full: Mapping[str, Compensation]) -> float:
        """As `bh_routing.calibration.compensation_scale.measure_scale`: where the routed model predicts most like itself."""
        sums = [0.0] * len(SCALES)
        routed = [
            Watch(
                self.structure,
                policy=dropping_policy(found, size=None),
                compensations={path: one.scaled(scale) for path, one in full.items()},
            )
            for scale in SCALES
        ]
        for batch in windows:
            ids = batch.input_ids[0][batch.mask[0]]
            everything = torch.ones(1, len(ids), dtype=torch.bool)
            own_SV = self.read(ids)
            for i, watch in enumerate(routed):
                sums[i] += divergence(own_SV.unsqueeze(0), self.read(ids, watch).unsqueeze(0), everything)
        return vertex(*sums)
