"""`calibrate`: what is known before any text, then pass by pass over it.

Shape legend: L routed layers.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .._version import __version__
from .._words import check_whole
from ..decision.types import check_temperature
from ..errors import CalibrationError, CalibrationWarning, InvalidParameterError, InvalidTypeError
from ..patching import PatchPlan, is_patched, make_plan, reached_by_text
from ..text import Batch, Document, TextStream
from ..text.hashing import short_digest
from . import compensation_scale, third_pass
from .calibration import Calibration
from .checkpoint import Checkpoint, remove
from .compensation_scale import SpreadWindows, measure_scale
from .data import CalibratedLayer
from .fingerprint import fingerprint, weights_key
from .first_pass import FirstPass
from .forwards import distributed, evaluating, frozen, gather, in_step, progress_bar
from .moments import ENOUGH
from .second_pass import SecondPass


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
    linear: bool = True,
    rank: int | None = None,
    robust_fit: bool = True,
    resume: str | os.PathLike[str] | None = None,
    reservoir: int = 8192,
    seed: int = 0,
    model_id: str | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Calibrate a model's routers on text.

    The model routes as always; nothing of it is changed, and its flags are restored also after an exception.
    Memory does not grow with the text. Under ``torchrun`` the batches are split over the processes and the
    results merged, so that every process returns what a single one would; where the model's weights are sharded over
    the processes (FSDP2), every process runs every batch, in step with the others.

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
        Longest run of tokens in one forward. Default: what the model was trained on, or its context; at most 512.
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
        Keep the mean outputs, for the compensation. Its scale is measured on a few thousand tokens
        (`bh_routing.calibration.compensation_scale`).
    sensitivity : bool
        Collect the loss sensitivities in a second pass, forward and backward, with the experts dropped as the
        first pass's calibration drops them at a third of the router's own number. The same pass fits the
        compensation to what was dropped then.
    sensitivity_tokens : int, optional
        Stop the second pass after so many tokens. Default: as ``max_tokens``.
    linear : bool
        With ``sensitivity`` and ``means`` also the linear compensation and the sizes that follow the token: a third pass
        over at most 16,384 tokens that are held out of their sums.
    rank : int, optional
        Of the linear compensation, in every layer. Default: chosen per layer by what it explains of held-out outputs, up to
        where it takes 3 % of the experts' memory, or to 16 if that is more.
    robust_fit : bool
        The linear compensation's sums come from as many tokens, of which a quarter is text shuffled within its windows and a
        quarter uniformly random: it costs nothing on text like the calibration's, and holds better on other text.
    resume : path, optional
        A folder. The sums are written there every few minutes; a calibration that was interrupted goes on from them when it
        is called again with the same arguments. It is removed when the calibration is whole.
    reservoir : int
        Tokens kept for solving budgets, and for the null of sizes that follow the token.
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
    check_whole(
        max_tokens=(max_tokens, 1),
        document_tokens=(document_tokens, 1),
        window=(window, 2),
        batch_tokens=(batch_tokens, 1),
        reservoir=(reservoir, 0),
        rank=(rank, 1),
        sensitivity_tokens=(sensitivity_tokens, 1),
        trim=(trim, 0),
    )
    if sensitivity and not outputs:
        raise InvalidParameterError(
            "sensitivity=True needs the experts' outputs, got outputs=False; leave outputs=True."
        )
    temperature = check_temperature(temperature)
    plan, left_out = _plan(model)
    stream = TextStream(
        texts,
        tokenizer,
        window=window or default_window(model),
        batch_tokens=batch_tokens,
        seed=seed,
        document_tokens=document_tokens,
    )
    linear = linear and sensitivity and means
    if sensitivity and not stream.repeatable:
        raise InvalidTypeError(
            "sensitivity=True reads the texts twice, got an iterator that can be read once; give a list, or a "
            "function that returns a fresh iterator."
        )
    num_experts = plan.layers[0].context.num_experts
    slots = max(layer.context.top_k for layer in plan.layers)
    blank = Calibration(
        model_id=model_id
        or getattr(getattr(model, "config", None), "name_or_path", "")
        or type(model).__name__,
        library_version=__version__,
        layers=_layers(plan),
        num_experts=num_experts,
        histograms={},
        reservoir_size=reservoir,
        fingerprint_LD=fingerprint(plan.layers),
        temperature=temperature,
        trim=min(slots, max(1, (num_experts - 1) // 4)) if trim is None else trim,
        seed=seed,
        window=stream.window,
        left_out=left_out,
    )
    show = progress if distributed()[0] == 0 else False
    settings = {
        "model": blank.model_id,
        "routers": short_digest(repr((blank.layers, resume and weights_key(plan.layers))).encode()),
        "version": __version__,
        "processes": distributed()[1],
        "max_tokens": max_tokens,
        "document_tokens": document_tokens,
        "window": stream.window,
        "batch_tokens": batch_tokens,
        "temperature": temperature,
        "trim": blank.trim,
        "outputs": outputs,
        "sensitivity": sensitivity,
        "sensitivity_tokens": sensitivity_tokens,
        "linear": linear,
        "robust_fit": robust_fit,
        "reservoir": reservoir,
        "seed": seed,
    }

    def read(what: str, name: str, limit: int | None, **passes: Any) -> None:
        """One pass over this process's share of the text, from where it was interrupted."""
        process, world = distributed()
        stream.start(limit, process, world)

        def add(batch: Batch) -> None:
            for one in passes.values():
                one.add(batch)

        with progress_bar(what, show) as advance:
            Checkpoint(resume, name, process, settings).run(stream, passes, add, advance)

    with evaluating(model), in_step(model):
        first, spread = (
            FirstPass(model, plan, blank, outputs),
            SpreadWindows(stream.window, third_pass.TOKENS),
        )
        read("calibrating", "first", max_tokens, counts=first, windows=spread)
        found: Calibration = functools.reduce(operator.add, gather(first.result(blank)))
        # Every process reads all documents and runs its own batches: what describes the text is counted once.
        found = replace(
            found,
            documents=stream.documents,
            text_digest=f"{stream.digest:032x}",
            document_digests_C=torch.tensor(sorted(stream.document_digests), dtype=torch.int64),
        )
        if found.tokens == 0:
            raise CalibrationError("the text is empty: expected at least one token to calibrate on.")
        if sensitivity:
            windows = spread.result(found.tokens)
            held_out = {batch.index for batch in windows}
            second = SecondPass(model, plan, found, linear=linear, robust=robust_fit, held_out=held_out)
            with frozen(model):
                read("sensitivity", "second", sensitivity_tokens or max_tokens, sums=second)
            found = replace(found, moments=second.result())
        if means and outputs:
            with progress_bar("compensation", show) as advance:
                some = spread.result(found.tokens, compensation_scale.TOKENS)
                scale = measure_scale(model, plan, found, some, advance)
                found = replace(found, compensation_scale=scale)
                if linear:
                    with frozen(model):
                        maps = third_pass.fit_maps(model, plan, found, second.linear, windows, rank, advance)
                        found = replace(found, linear=maps)
                        found = replace(
                            found, token_sizes=third_pass.fit_sizes(model, plan, found, windows, advance)
                        )
                if found.linear is not None:
                    routed = partial(third_pass.at_scales, third_pass.linear_dropping(model, plan, found))
                    scale = measure_scale(model, plan, found, some, advance, routed)
                    found = replace(found, linear_scale=scale)
    gather(None)  # nobody removes what another still needs
    if distributed()[0] == 0:
        remove(resume)
    warn_of_few(found)
    return found if means else found.without_means()


def warn_of_few(found: Calibration) -> None:
    """Say how many experts were seen too rarely to be known, and how much text would do."""
    if found.moments is None:
        return
    tokens_LE = found.moments.tokens_LE
    few, never = int((tokens_LE < ENOUGH).sum()), int((tokens_LE == 0).sum())
    if not few:
        return
    rarest = int(tokens_LE[tokens_LE > 0].min())
    needed = math.ceil(found.tokens * ENOUGH / min(rarest, ENOUGH))
    unseen = f", {never} of them by none" if never else ""
    warnings.warn(
        f"{few} of {tokens_LE.numel()} experts were chosen by fewer than {ENOUGH} tokens{unseen}: their sizes and "
        f"compensations lean on their layer's median; about {max(needed, 2 * found.tokens):,} tokens of such text would "
        f"do (this calibration saw {found.tokens:,}).",
        CalibrationWarning,
        stacklevel=3,
    )


def _plan(model: nn.Module) -> tuple[PatchPlan, tuple[str, ...]]:
    """The routers that a text reaches, all of one width, and the paths of the others."""
    if is_patched(model):
        raise CalibrationError(
            "the model is patched, so that its routers would not show their own choice; unpatch it "
            "(bh_routing.unpatch(model)) and calibrate then."
        )
    plan = make_plan(model)
    with evaluating(model):
        reached = reached_by_text(model, plan)
    left_out = tuple(layer.path for layer in plan.layers if layer.path not in reached) if reached else ()
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(plan.layers)} routers see no token of a text ({left_out[0]}, ...): they are "
            "left out and keep the model's own routing.",
            CalibrationWarning,
            stacklevel=3,
        )
        plan = plan.without(left_out)
    widths = {layer.context.num_experts for layer in plan.layers}
    if len(widths) > 1:
        raise CalibrationError(
            f"the model's routers differ in their number of experts ({sorted(widths)}): one decision table "
            "serves routers of one width only."
        )
    return plan, left_out


def _layers(plan: PatchPlan) -> tuple[CalibratedLayer, ...]:
    return tuple(
        CalibratedLayer(
            path=layer.path,
            experts_path=layer.experts_path,
            top_k=layer.context.top_k,
            score_func=layer.context.score_func,
            route_norm=layer.context.route_norm,
        )
        for layer in plan.layers
    )


def default_window(model: nn.Module) -> int:
    """What the model was trained on (``trained_window`` of its configuration, where it says so), else its context; at most 512."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text_config, "trained_window", None) or getattr(
        text_config, "max_position_embeddings", None
    )
    return min(512, longest) if isinstance(longest, int) and longest > 1 else 512
