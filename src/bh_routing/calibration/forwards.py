"""What both passes over text need: forwards, single experts' outputs, flags, progress, several processes.

Shape legend: B windows of a batch, S tokens of a window, T = B * S, K slots, P pairs of a token and one of its
experts, H hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..patching import PatchPlan
from ..patching.adapters import ExpertsForward
from ..patching.instance import execution_device
from ..text import Batch

PAIR_ELEMENTS = 1 << 25  # outputs of (token, expert) pairs that are held at once, P * H


def pair_outputs(inner: ExpertsForward, hidden_TH: Tensor, index_TK: Tensor) -> Tensor:
    """Each of a token's experts' outputs by itself, unweighted, [T * K, H]: top-1 with weight one."""
    pairs_PH = hidden_TH.repeat_interleave(index_TK.shape[-1], 0)
    return inner(pairs_PH, index_TK.reshape(-1, 1), torch.ones_like(pairs_PH[:, :1]))


def pieces(hidden_TH: Tensor, index_TK: Tensor) -> Iterator[slice]:
    """Slices of tokens whose pairs' outputs fit PAIR_ELEMENTS."""
    step = max(1, PAIR_ELEMENTS // max(1, hidden_TH.shape[-1] * index_TK.shape[-1]))
    for begin in range(0, hidden_TH.shape[0], step):
        yield slice(begin, begin + step)


def forward(model: nn.Module, plan: PatchPlan, batch: Batch, *, head: bool = False) -> Tensor | None:
    """Run the model on a batch, without its head where that sees every router.

    Returns the logits [B, S, V] with it, None from a model that predicts no next tokens; without it the hidden states.
    """
    if head and _has_task_head(model):
        return None
    runner: Any = model
    if not head and not _together.get():  # a sharded model gathers its weights where it is called itself
        base = getattr(model, "base_model", None)
        if isinstance(base, nn.Module):
            inside = {id(module) for module in base.modules()}
            if all(id(layer.router) in inside for layer in plan.layers):
                runner = base
    device = execution_device(model)
    mask = None if batch.mask.all() else batch.mask.long().to(device)
    output = runner(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)
    return getattr(output, "logits", None) if head else output[0]


def _has_task_head(model: nn.Module) -> bool:
    """Whether a model answers with scores of labels instead of next tokens (classifiers, reward models)."""
    embeddings = getattr(model, "get_output_embeddings", None)
    heads = (getattr(model, name, None) for name in ("score", "classifier", "qa_outputs"))
    return (embeddings is None or embeddings() is None) and any(isinstance(h, nn.Module) for h in heads)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
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
def progress_bar(what: str, show: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar over tokens, on standard error; None: where that is a terminal."""
    hidden = None if show is None else not show
    with tqdm(desc=what, unit=" tokens", unit_scale=True, leave=False, disable=hidden) as bar:
        yield bar.update


# Whether every process does all of the work, in step with the others: the forwards of a sharded model need all of them.
_together: ContextVar[bool] = ContextVar("together", default=False)


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """In here every process reads all of the text, if the model's weights are sharded over the processes."""
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    token = _together.set(sharded or _together.get())
    try:
        yield
    finally:
        _together.reset(token)


def distributed() -> tuple[int, int]:
    """(rank, number of processes); joins the group that ``torchrun`` describes, with gloo, if none is joined."""
    if _together.get() or not torch.distributed.is_available():
        return 0, 1
    if not torch.distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
            return 0, 1
        torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather(value: Any, *, others_only: bool = False) -> list[Any]:
    """The value of every process, by rank; or of the others."""
    rank, world = distributed()
    if world == 1:
        return [] if others_only else [value]
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return [v for r, v in enumerate(values) if r != rank] if others_only else values
