"""`calibrate`: one streaming pass over text, a second one with backward for the sensitivities.

Shape legend: L routed layers, T tokens of a batch, E experts, K slots of the router's own choice, P pairs of a token
and one of its experts, H hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..decision.types import check_temperature
from ..errors import CalibrationError, CalibrationWarning, InvalidParameterError, InvalidTypeError
from ..text import Batch, Document, TextStream
from .accumulate import LayerCounts, LayerMoments, ReservoirSampler, join_moments
from .calibration import Calibration
from .data import LayerRecord, join_layers
from .fingerprint import fingerprint
from .running import distributed, evaluating, forward, frozen, gather, pair_outputs, pieces, progress_bar
from .second_pass import Rehearsal
from .strength import SpreadWindows, measure_strength

if TYPE_CHECKING:
    from ..patching import LayerPlan, PatchPlan


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Document] | Callable[[], Iterable[Document]] | str,
    *,
    max_tokens: int | None = None,
    document_tokens: int | None = None,
    window: int | None = None,
    batch_tokens: int = 4096,
    temperature: float = 1.0,
    trim: int | None = None,
    outputs: bool = True,
    means: bool = True,
    sensitivity: bool = False,
    sensitivity_tokens: int | None = None,
    reservoir: int = 8192,
    seed: int = 0,
    model_id: str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Calibrate a model's routers on text.

    The model routes as always; nothing of it is changed, and its flags are restored also after an exception.
    Memory does not grow with the text. Under ``torchrun`` the batches are split over the processes and the
    results merged, so that every process returns what a single one would.

    Parameters
    ----------
    model : nn.Module
        A transformers model with supported routers, unpatched.
    tokenizer
        Called as ``tokenizer(text)["input_ids"]``; may be None if every document is token ids.
    texts : iterable of str, or of sequences of token ids
        The documents; one string is one document. An iterator can be read once only, so that with
        ``sensitivity`` it must be a sequence or a function that returns a fresh iterator.
    max_tokens : int, optional
        Stop after so many tokens.
    document_tokens : int, optional
        At most so many tokens of each document (one window at least), in windows that lie evenly over it. What is
        exchangeable with the text in use is a document, not a token: so no long one outweighs the others.
    window : int, optional
        Longest run of tokens in one forward. Default: the model's context, at most 512.
    batch_tokens : int
        Tokens per forward, about.
    temperature : float
        Divides the router logits before the statistic.
    trim : int, optional
        For the trimmed null: leave out so many of the highest and of the lowest logits of each token. Default:
        the router's top-k, at most a quarter of the experts.
    outputs : bool
        Collect sizes and means of the experts' outputs (each expert's output is then formed by itself, and
        the layer's output is their weighted sum). Without: ``logit`` and ``logprob`` only, at nearly the
        speed of a plain forward.
    means : bool
        Keep the mean outputs, for the compensation. Its strength is measured on a few thousand tokens
        (`bh_routing.calibration.strength`).
    sensitivity : bool
        Collect the loss sensitivities in a second pass, forward and backward, with the experts dropped as the
        first pass's calibration drops them at a third of the router's own number. The same pass fits the
        compensation to what was dropped then.
    sensitivity_tokens : int, optional
        Stop the second pass after so many tokens. Default: as ``max_tokens``.
    reservoir : int
        Tokens kept for solving budgets.
    seed : int
        Chooses the tokens kept.
    model_id : str, optional
        Default: the name the model was loaded by.
    progress : bool, optional
        Show a progress bar on standard error. Default: if that is a terminal.

    Returns
    -------
    Calibration

    Raises
    ------
    NoRoutersError, UnsupportedModelError
        If the model cannot be watched.
    CalibrationError
        If the text is empty, the model is patched, its routers differ in width, or its logits are not finite.
    InvalidParameterError, InvalidTypeError
        For a parameter out of range.
    """
    from ..patching import is_patched, make_plan, reached_by_text

    temperature = check_temperature(temperature)
    for name, value, least in (
        ("max_tokens", max_tokens, 1),
        ("document_tokens", document_tokens, 1),
        ("window", window, 2),
        ("batch_tokens", batch_tokens, 1),
        ("reservoir", reservoir, 0),
        ("sensitivity_tokens", sensitivity_tokens, 1),
        ("trim", trim, 0),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InvalidParameterError(f"{name} must be an integer of at least {least}, got {value!r}.")
    if sensitivity and not outputs:
        raise InvalidParameterError(
            "sensitivity=True needs the experts' outputs, got outputs=False; leave outputs=True."
        )
    if is_patched(model):
        raise CalibrationError(
            "the model is patched, so that its routers would not show their own choice; unpatch it "
            "(bh_routing.unpatch(model)) and calibrate then."
        )
    plan = make_plan(model)
    with evaluating(model):
        reached = reached_by_text(model, plan)
    left_out = tuple(layer.path for layer in plan.layers if layer.path not in reached)
    if reached and left_out:
        warnings.warn(
            f"{len(left_out)} of {len(plan.layers)} routers see no token of a text ({left_out[0]}, ...): they are "
            "left out and keep the model's own routing.",
            CalibrationWarning,
            stacklevel=2,
        )
        plan = plan.without(left_out)
    widths = {layer.context.num_experts for layer in plan.layers}
    if len(widths) > 1:
        raise CalibrationError(
            f"the model's routers differ in their number of experts ({sorted(widths)}): one decision table "
            "serves routers of one width only."
        )
    stream = TextStream(
        texts,
        tokenizer,
        window=window or default_window(model),
        batch_tokens=batch_tokens,
        seed=seed,
        document_tokens=document_tokens,
    )
    if sensitivity and not stream.repeatable:
        raise InvalidTypeError(
            "sensitivity=True reads the texts twice, got an iterator that can be read once; give a list, or a "
            "function that returns a fresh iterator."
        )
    num_experts = widths.pop()
    slots = max(layer.context.top_k for layer in plan.layers)
    if trim is None:
        trim = min(slots, max(1, (num_experts - 1) // 4))
    rank, world = distributed()
    some = SpreadWindows(stream.window)
    collector = _Collector(plan, num_experts, slots, temperature, trim, reservoir, outputs)
    with evaluating(model), progress_bar("calibrating", progress if rank == 0 else False) as advance:
        stream.start(max_tokens, rank, world)
        for batch in stream:
            collector.run(model, batch)
            some.add(batch)
            advance(batch.num_tokens)
        result = collector.result(
            model_id or getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__,
            stream,
            reservoir,
            seed,
        )
    result = _merge_processes(result)
    if reached:
        result = replace(result, left_out=left_out)
    if result.tokens == 0:
        raise CalibrationError("the text is empty: expected at least one token to calibrate on.")
    if sensitivity:
        with (
            evaluating(model),
            frozen(model),
            progress_bar("sensitivity", progress if rank == 0 else False) as advance,
        ):
            stream.start(sensitivity_tokens or max_tokens, rank, world)
            sensed = Rehearsal(plan, result)
            for batch in stream:
                sensed.run(model, batch)
                advance(batch.num_tokens)
            assert result.moments is not None
            result = replace(result, moments=sensed.result(result.moments))
    if not means:
        return result.without_means()
    if outputs:
        with (
            evaluating(model),
            progress_bar("compensation", progress if rank == 0 else False) as advance,
        ):
            strength = measure_strength(model, plan, result, some.result(result.tokens), advance)
        result = replace(result, compensation_strength=strength)
    return result


def default_window(model: nn.Module) -> int:
    """The model's context, at most 512 tokens."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text_config, "max_position_embeddings", None)
    return min(512, longest) if isinstance(longest, int) and longest > 1 else 512


class _Collector:
    """The first pass: counts, moments and kept tokens of every layer."""

    def __init__(
        self,
        plan: PatchPlan,
        num_experts: int,
        slots: int,
        temperature: float,
        trim: int,
        reservoir: int,
        outputs: bool,
    ) -> None:
        self.plan, self.num_experts, self.slots = plan, num_experts, slots
        self.temperature, self.trim = temperature, trim
        self.counts = {
            layer.path: LayerCounts(layer.path, num_experts, layer.context.score_func, temperature, trim)
            for layer in plan.layers
        }
        self.moments = {layer.path: LayerMoments(num_experts) for layer in plan.layers} if outputs else {}
        self.sampler = ReservoirSampler(reservoir, len(plan.layers), num_experts, slots)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.tokens = 0

    def run(self, model: nn.Module, batch: Batch) -> None:
        from ..patching import watch

        self.seen.clear()
        self.batch = batch
        around = self._around if self.moments else None
        with torch.inference_mode(), watch(self.plan, self._on_choice, around):
            forward(model, self.plan, batch)
            self._flush(batch)

    def _on_choice(
        self, layer: LayerPlan, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, mask: Any
    ) -> None:
        if logits_TE.shape[0] != self.batch.input_ids.numel():
            raise CalibrationError(
                f"router {layer.path} saw {logits_TE.shape[0]} tokens of {self.batch.input_ids.numel()}: "
                "expected every router to see every token of the batch; this model cannot be calibrated."
            )
        self.seen[layer.path] = (logits_TE, own_experts_TK)

    def _around(
        self,
        layer: LayerPlan,
        inner: Callable[[Tensor, Tensor, Tensor], Tensor],
        hidden_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        parts = []
        real_T = self.batch.mask_on(hidden_TH.device)
        for piece in pieces(hidden_TH, index_TK):
            index, weights = index_TK[piece], weights_TK[piece]
            outputs_PH = pair_outputs(inner, hidden_TH[piece], index)
            each_TKH = outputs_PH.view(*index.shape, -1)
            parts.append((each_TKH.float() * weights.float().unsqueeze(-1)).sum(1).to(hidden_TH.dtype))
            real_P = None if real_T is None else real_T[piece].repeat_interleave(index.shape[-1])
            experts_P = index.flatten()
            if real_P is not None:
                outputs_PH, experts_P = outputs_PH[real_P], experts_P[real_P]
            self.moments[layer.path].update(outputs_PH, experts_P)
        return torch.cat(parts)

    def _flush(self, batch: Batch) -> None:
        admitted = self.sampler.admit(batch.hashes)
        kept_logits, kept_experts = [], []
        for layer in self.plan.layers:
            if layer.path not in self.seen:
                raise CalibrationError(
                    f"router {layer.path} was never called by the model's forward: expected every router to "
                    "see the text; a kernel that replaces the whole block bypasses its router."
                )
            logits_TE, own_TK = self.seen[layer.path]
            rows = batch.rows_on(logits_TE.device)
            if rows is not None:
                logits_TE, own_TK = logits_TE.index_select(0, rows), own_TK.index_select(0, rows)
            self.counts[layer.path].update(logits_TE, own_TK)
            if len(admitted):
                chosen = admitted.to(logits_TE.device)
                kept_logits.append(logits_TE[chosen].to("cpu", torch.float16))
                own = own_TK[chosen].to("cpu", torch.int16)
                kept_experts.append(nn.functional.pad(own, (0, self.slots - own.shape[-1]), value=-1))
        if len(admitted):
            self.sampler.add(
                torch.from_numpy(batch.hashes)[admitted],
                torch.stack(kept_logits, 1),
                torch.stack(kept_experts, 1),
            )
        self.tokens += batch.num_tokens
        self.seen.clear()

    def result(self, model_id: str, stream: TextStream, reservoir: int, seed: int) -> Calibration:
        hidden = max((m.sum_EH.shape[-1] for m in self.moments.values() if m.tokens_E is not None), default=1)
        return Calibration(
            model_id=model_id,
            library_version=__version__,
            layers=tuple(
                LayerRecord(
                    path=layer.path,
                    experts_path=layer.experts_path,
                    top_k=layer.context.top_k,
                    score_func=layer.context.score_func,
                    route_norm=layer.context.route_norm,
                )
                for layer in self.plan.layers
            ),
            num_experts=self.num_experts,
            histograms=join_layers(self.counts[layer.path].histograms() for layer in self.plan.layers),
            moments=join_moments(list(self.moments.values()), hidden) if self.moments else None,
            reservoir=self.sampler.result() if reservoir else None,
            reservoir_size=reservoir,
            fingerprint_LD=torch.stack([fingerprint(layer.router) for layer in self.plan.layers]),
            temperature=self.temperature,
            trim=self.trim,
            tokens=self.tokens,
            documents=stream.documents,
            text_digest=f"{stream.digest:032x}",
            seed=seed,
            window=stream.window,
        )


def _merge_processes(result: Calibration) -> Calibration:
    """One calibration from those of all processes; the same in each."""
    parts = gather(result)
    first, rest = parts[0], parts[1:]
    # Every process reads all documents and runs its own batches: what describes the text is counted once.
    rest = [replace(part, documents=0, text_digest="0" * 32) for part in rest]
    return first.merge(*rest)


__all__ = ["calibrate", "default_window", "distributed"]
