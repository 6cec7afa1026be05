"""`calibrate`: one streaming pass over text, a second one with backward for the sensitivities.

Shape legend: L routed layers, B windows of a batch, S tokens of a window, T = B * S, E experts, K slots,
P pairs of a token and one of its experts, H hidden size.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .accumulate import LayerCounts, LayerMoments, LayerSensitivity, ReservoirSampler, join_moments
from .calibration import Calibration, CalibrationWarning
from .calibration_file import fingerprint
from .calibration_parts import LayerRecord, Moments
from .compensation import lost_and_kept
from .errors import BudgetError, CalibrationError, InvalidParameterError, InvalidTypeError
from .policies import RoutingPolicy, TopKPolicy
from .routing import check_temperature
from .stream import Batch, Document, TextStream

if TYPE_CHECKING:
    from .patching import LayerPlan, PatchPlan

PAIR_ELEMENTS = 1 << 25  # outputs of (token, expert) pairs that are held at once, P * H


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Document] | Callable[[], Iterable[Document]] | str,
    *,
    max_tokens: int | None = None,
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
        Keep the mean outputs, for the compensation.
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
    from .patching import is_patched, make_plan, reached_by_text

    temperature = check_temperature(temperature)
    for name, value, least in (
        ("max_tokens", max_tokens, 1),
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
    with _evaluating(model):
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
        texts, tokenizer, window=window or default_window(model), batch_tokens=batch_tokens, seed=seed
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
    collector = _Collector(plan, num_experts, slots, temperature, trim, reservoir, outputs)
    with _evaluating(model), _progress("calibrating", progress if rank == 0 else False) as advance:
        stream.start(max_tokens, rank, world)
        for batch in stream:
            collector.run(model, batch)
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
            _evaluating(model),
            _frozen(model),
            _progress("sensitivity", progress if rank == 0 else False) as advance,
        ):
            stream.start(sensitivity_tokens or max_tokens, rank, world)
            sensed = _Sensitivity(plan, result)
            for batch in stream:
                sensed.run(model, batch)
                advance(batch.num_tokens)
            assert result.moments is not None
            result = replace(result, moments=sensed.result(result.moments), _cache={})
    return result if means else result.without_means()


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
            layer.path: LayerCounts(layer.path, num_experts, layer.context.score, temperature, trim)
            for layer in plan.layers
        }
        self.moments = {layer.path: LayerMoments(num_experts) for layer in plan.layers} if outputs else {}
        self.sampler = ReservoirSampler(reservoir, len(plan.layers), num_experts, slots)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.tokens = 0

    def run(self, model: nn.Module, batch: Batch) -> None:
        from .patching import watch

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
        for piece in _pieces(hidden_TH, index_TK):
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
        from . import __version__
        from .calibration_file import stack_layers

        per_layer = [self.counts[layer.path].histograms() for layer in self.plan.layers]
        hidden = max((m.sum_EH.shape[-1] for m in self.moments.values() if m.tokens_E is not None), default=1)
        return Calibration(
            model_id=model_id,
            library_version=__version__,
            layers=tuple(
                LayerRecord(
                    path=layer.path,
                    experts_path=layer.experts_path,
                    top_k=layer.context.top_k,
                    score=layer.context.score,
                    convention=layer.context.convention,
                )
                for layer in self.plan.layers
            ),
            num_experts=self.num_experts,
            histograms={
                kind: {name: stack_layers([h[kind][name] for h in per_layer]) for name in per_layer[0][kind]}
                for kind in per_layer[0]
            },
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


class _Sensitivity:
    """The second pass: how much the loss feels each expert, under the routing that is calibrated for.

    The experts are dropped as the calibration of the first pass drops them at a third of the router's own
    number, so that sensitivities and compensation are those of the state in which they are used.
    """

    def __init__(self, plan: PatchPlan, calibration: Calibration) -> None:
        moments = calibration.moments
        assert moments is not None
        assert moments.mean_LEH is not None
        self.plan = plan
        self.contexts = {layer.path: layer.context for layer in plan.layers}
        self.policy = _rehearsal_policy(calibration, plan)
        self.policy.bind(plan.contexts)
        self.layers = {
            layer.path: LayerSensitivity(mean_EH.float().to(layer.context.device))
            for layer, mean_EH in zip(plan.layers, moments.mean_LEH, strict=True)
        }
        self.choice: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def run(self, model: nn.Module, batch: Batch) -> None:
        from .patching import watch

        self.batch = batch
        with torch.enable_grad(), watch(self.plan, self._on_choice, self._around):
            logits_BSV = forward(model, self.plan, batch, head=True)
            ids_BS = batch.input_ids.to(logits_BSV.device)
            targets_BS = ids_BS[:, 1:].masked_fill(~batch.mask[:, 1:].to(ids_BS.device), -100)
            loss = nn.functional.cross_entropy(
                logits_BSV[:, :-1].flatten(0, 1).float(), targets_BS.flatten(), reduction="sum"
            )
            loss.backward()
        self.choice.clear()

    def _on_choice(
        self, layer: LayerPlan, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, mask: Any
    ) -> None:
        self.choice[layer.path] = (logits_TE.detach(), own_weights_TK.detach(), own_experts_TK)

    def _around(
        self,
        layer: LayerPlan,
        inner: Callable[[Tensor, Tensor, Tensor], Tensor],
        hidden_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        sums = self.layers[layer.path]
        with torch.no_grad():
            dropped_TK = self.policy.decide(*self.choice[layer.path], self.contexts[layer.path]).dropped_TK
        out_TH = inner(hidden_TH, index_TK, weights_TK.masked_fill(dropped_TK, 0.0))
        num = sums.mean_EH.shape[0]
        lost_TE = lost_and_kept(weights_TK, dropped_TK, index_TK, num)[:, :num]
        out_TH = out_TH + lost_TE.to(out_TH.dtype) @ sums.mean_EH.to(out_TH.dtype)
        if not out_TH.requires_grad:
            out_TH = out_TH.detach().requires_grad_()  # the first layer: here the graph begins
        real_T = self.batch.mask_on(hidden_TH.device)
        fixed_TH, fixed_TK = hidden_TH.detach(), weights_TK.detach()

        def on_gradient(gradient_TH: Tensor) -> None:
            with torch.no_grad():
                for piece in _pieces(fixed_TH, index_TK):
                    index = index_TK[piece]
                    outputs_TKH = pair_outputs(inner, fixed_TH[piece], index).view(*index.shape, -1)
                    parts = (
                        outputs_TKH,
                        gradient_TH[piece],
                        index,
                        fixed_TK[piece],
                        dropped_TK[piece],
                    )
                    if real_T is not None:
                        parts = tuple(part[real_T[piece]] for part in parts)  # type: ignore[assignment]
                    sums.update(*parts)

        out_TH.register_hook(on_gradient)
        return out_TH

    def result(self, moments: Moments) -> Moments:
        """The moments with the sums of all processes."""
        ours = [torch.stack(part) for part in zip(*(s.sums() for s in self.layers.values()), strict=True)]
        for theirs in _gather(ours, others_only=True):
            ours = [a + b for a, b in zip(ours, theirs, strict=True)]
        tokens_LE, square_LE, gram_LJJ, cross_LJH = ours
        return replace(
            moments,
            sensitivity_tokens_LE=tokens_LE,
            sensitivity_LE=square_LE / tokens_LE.clamp_min(1),
            gram_LJJ=gram_LJJ,
            cross_LJH=cross_LJH,
        )


def _rehearsal_policy(calibration: Calibration, plan: PatchPlan) -> RoutingPolicy:
    """BH by the first pass at a third of the router's own number of experts; top-k where that has no level."""
    tops = [layer.top_k for layer in calibration.layers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        try:
            return calibration.policy(
                experts_per_token=max(1.0, sum(tops) / len(tops) / 3), size="deviation", scope="model"
            )
        except (BudgetError, CalibrationError):
            return TopKPolicy(max(1, min(tops) // 3))


def pair_outputs(
    inner: Callable[[Tensor, Tensor, Tensor], Tensor], hidden_TH: Tensor, index_TK: Tensor
) -> Tensor:
    """Each of a token's experts' outputs by itself, unweighted, [T * K, H]: top-1 with weight one."""
    pairs_PH = hidden_TH.repeat_interleave(index_TK.shape[-1], 0)
    return inner(pairs_PH, index_TK.reshape(-1, 1), torch.ones_like(pairs_PH[:, :1]))


def _pieces(hidden_TH: Tensor, index_TK: Tensor) -> Iterator[slice]:
    """Slices of tokens whose pairs' outputs fit PAIR_ELEMENTS."""
    step = max(1, PAIR_ELEMENTS // max(1, hidden_TH.shape[-1] * index_TK.shape[-1]))
    for begin in range(0, hidden_TH.shape[0], step):
        yield slice(begin, begin + step)


def forward(model: nn.Module, plan: PatchPlan, batch: Batch, *, head: bool = False) -> Tensor:
    """Run the model on a batch: without its head where that sees every router; returns logits with it."""
    runner: Any = model
    if not head:
        base = getattr(model, "base_model", None)
        if isinstance(base, nn.Module):
            inside = {id(module) for module in base.modules()}
            if all(id(layer.router) in inside for layer in plan.layers):
                runner = base
    device = next(model.parameters()).device
    mask = None if batch.mask.all() else batch.mask.long().to(device)
    output = runner(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
    return output.logits if head else output[0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient; each one's own flag is put back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _progress(what: str, show: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar over tokens, on standard error."""
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description} {task.completed:>12,.0f} tokens {task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, rate="")

        def advance(tokens: int) -> None:
            bar.advance(task, tokens)
            state = bar.tasks[0]
            if state.elapsed:
                bar.update(task, rate=f"({state.completed / state.elapsed:,.0f} per second)")

        yield advance


# ---------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------


def distributed() -> tuple[int, int]:
    """(rank, number of processes); joins the group that ``torchrun`` describes, with gloo, if none is joined."""
    if not torch.distributed.is_available():
        return 0, 1
    if not torch.distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
            return 0, 1
        torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _gather(value: Any, *, others_only: bool = False) -> list[Any]:
    """The value of every process, by rank; or of the others."""
    rank, world = distributed()
    if world == 1:
        return [] if others_only else [value]
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return [v for r, v in enumerate(values) if r != rank] if others_only else values


def _merge_processes(result: Calibration) -> Calibration:
    """One calibration from those of all processes; the same in each."""
    parts = _gather(result)
    first, rest = parts[0], parts[1:]
    # Every process reads all documents and runs its own batches: what describes the text is counted once.
    rest = [replace(part, documents=0, text_digest="0" * 32) for part in rest]
    return first.merge(*rest)


__all__ = ["calibrate", "default_window", "distributed"]
