"""What a model's routers and experts answer to fixed inputs: the same in every dtype, on every device, however it is stored.

Shape legend: R rows of input, H hidden size, E experts, P projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..patching import LayerPlan
from ..patching.adapters import flat_experts
from ..patching.contract import calls, hidden_size
from ..patching.instance import execution_device, find_patch
from ..text.hashing import mix64
from .forwards import evaluating

ROWS = 8  # R
PROJECTIONS = 16  # P


def signs(num: int, first: int, count: int, start: int = 0) -> Tensor:
    """Fixed random signs, float32 [num, count]: those of row i are bits first, first + 1, ... of a hash of start + i."""
    index = np.arange(start, start + num, dtype=np.uint64)
    bits = (mix64(index)[:, None] >> np.arange(first, first + count, dtype=np.uint64)) & np.uint64(1)
    return torch.from_numpy(2.0 * bits.astype(np.float32) - 1.0)


def inputs(width: int) -> Tensor:
    """The rows that every router and expert is asked about, [R, H]: signs, which are exact in every dtype."""
    return signs(width, PROJECTIONS, ROWS).T.contiguous()


def router_logits(layer: LayerPlan) -> Tensor | None:
    """A router's logits on `inputs`, float32 [R, E] on the CPU; None where it cannot be run by itself."""
    if layer.width is None:
        return None
    x_RH, call = inputs(layer.width), layer.call

    def logits(dtype: torch.dtype) -> Tensor | None:
        rows = x_RH.to(execution_device(layer.router), dtype)
        for ask in calls(call.module, call.attribute, layer.block):
            if (answer := ask(rows)) is not None:
                return layer.read(answer[1], answer[0])[0]
        return None

    found = _answer(layer.router, layer.router, logits)
    return found if found is not None or layer.block is None else _answer(layer.block, layer.router, logits)


def expert_output(layer: LayerPlan, seed: int) -> Tensor | None:
    """What one expert of a layer adds with weight 1 to `inputs`, float32 [R, H]; None where it cannot be run by itself.

    ``seed`` chooses the expert.
    """
    experts: Any = layer.experts
    if experts is None:
        return None
    num = min(layer.context.num_experts, layer.ids.empty if layer.ids.filler is None else layer.ids.filler)
    expert = int(mix64(np.arange(seed, seed + 1, dtype=np.uint64))[0] % np.uint64(num))
    patch = find_patch(experts)

    def output(width: int, dtype: torch.dtype) -> Tensor:
        x_RH = inputs(width).to(execution_device(experts), dtype)
        if isinstance(experts, nn.ModuleList):
            answer: Any = experts[expert].forward(x_RH)
            return answer if isinstance(answer, Tensor) else answer[0]
        index_R1 = torch.full((ROWS, 1), expert, device=x_RH.device)
        run = experts.forward if patch is None else patch.inner
        return flat_experts(run, layer.ids)(x_RH, index_R1, torch.ones_like(x_RH[:, :1]))

    weights = [p.shape for p in experts.parameters() if p.dim() > 1][:1]
    stated = (layer.width, hidden_size(experts), *(size for shape in weights for size in shape[:0:-1]))
    for width in dict.fromkeys(w for w in stated if w is not None):
        found = _answer(experts, experts, lambda dtype, width=width: output(width, dtype))  # type: ignore[misc]
        if found is not None:
            return found
    return None


def _answer(run: nn.Module, weights: nn.Module, ask: Callable[[torch.dtype], Tensor | None]) -> Tensor | None:
    """An answer in the first dtype in which there is one, of modules whose weights are all there."""
    held = [t.dtype for t in (*weights.parameters(), *weights.buffers()) if t.is_floating_point()]
    with torch.no_grad(), evaluating(run), whole(run):
        for dtype in dict.fromkeys((*held[:1], torch.float32, torch.bfloat16, torch.float16)):
            try:
                found = ask(dtype)
            except Exception:  # whatever a kind of weights cannot be multiplied with
                continue
            if found is not None and found.dim() == 2 and found.shape[0] == ROWS:
                return found.float().cpu()
    return None


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """In here weights that are sharded over processes are gathered (every process must enter), offloaded ones brought back."""
    with ExitStack() as back:
        for part in module.modules():
            hook = getattr(part, "_hf_hook", None)
            if hook is not None and any(
                p.is_meta for p in part.parameters(recurse=False)
            ):  # offloaded by accelerate
                hook.pre_forward(part)
                back.callback(hook.post_forward, part, None)
            for name, parameter in list(part._parameters.items()):
                sharded: Any = parameter
                if hasattr(sharded, "full_tensor"):  # a DTensor
                    gathered = sharded.detach().full_tensor()
                    part._parameters[name] = nn.Parameter(gathered, requires_grad=False)
                    back.callback(part._parameters.__setitem__, name, parameter)
        yield
