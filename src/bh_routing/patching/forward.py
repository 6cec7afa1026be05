"""The patch around a model's own forward: it reads the call, and refuses models whose modules are no longer those planned."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from .calls import Call, Forwards, past_length, step_of, token_mask
from .checkpointing import carry, forget_carried
from .instance import InstancePatch

CACHES = ("cache", "past_key_values")  # a forward's cache since transformers 5.24, and before


class ForwardPatch(InstancePatch):
    """Around the forward of a model (or of a lone block): tells `Forwards` when it begins, what it is, and when it ends.

    Parameters
    ----------
    causal : bool
        False for a policy that looks at whole sequences: a forward with a cache is refused.
    edges : sequence of (parent, name, child)
        The way to each router and its experts, as planned (`way_to`).
    """

    def __init__(
        self,
        module: nn.Module,
        forwards: Forwards,
        *,
        causal: bool,
        edges: Sequence[tuple[nn.Module, str, nn.Module]] = (),
    ) -> None:
        super().__init__(module)
        self.forwards, self.causal = forwards, causal
        self.edges = list(edges)
        self.checkpointed = [m for m in module.modules() if hasattr(m, "gradient_checkpointing")]
        parameters = inspect.signature(type(module).forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = tuple(p.name for p in parameters if p.kind in kinds)[1:]

    def install(self) -> None:
        super().install()
        self.module.register_forward_pre_hook(refuse_replica)

    def remove(self) -> None:
        hooks = self.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is refuse_replica]:
            del hooks[key]
        for module in self.checkpointed:
            forget_carried(module)
        super().remove()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        call = self.forwards.begin()
        try:
            if call.routed:
                self._look(call, args, kwargs)
            return self.inner(*args, **kwargs)
        finally:
            self.forwards.end(call)

    def _look(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the call, and that the modules are still those that were patched."""
        if not torch.compiler.is_compiling():
            for index, (parent, name, child) in enumerate(self.edges):
                now = parent._modules.get(name)
                if now is not child:
                    self.edges[index] = (parent, name, still_runs(now, child, name))
            if self.module.training and torch.is_grad_enabled():
                for module in self.checkpointed:
                    carry(module, self.forwards)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if not self.causal and cache is not None:
            raise PatchError(
                "the routing policy looks at a whole sequence, which generation with a cache does not have: "
                "expected a forward without past_key_values; use a causal policy to generate."
            )
        tokens = given.get("input_ids")
        if not isinstance(tokens, Tensor):
            tokens = given.get("inputs_embeds")
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        batch, length = call.shape = (tokens.shape[0], tokens.shape[1])
        call.step = step_of(cache, batch, length, tokens.device)
        mask = given.get("attention_mask")
        past = past_length(cache)
        call.cached = cache is not None and not (isinstance(past, int) and past == 0)
        call.mask_T = None if mask is None else token_mask(mask, batch, length, past)
        ended_B = self.forwards.here.ended_B
        if ended_B is not None and length == 1 and len(ended_B) == batch:
            real_T = ~ended_B.to(tokens.device)
            call.mask_T = real_T if call.mask_T is None else call.mask_T.to(tokens.device) & real_T


def refuse_replica(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: a replica of DataParallel shares its original's patch, which would run the original's weights.

    Raises
    ------
    PatchError
    """
    if getattr(module, "_is_replica", False):
        raise PatchError(
            f"a patched {type(module).__name__} was replicated by torch.nn.DataParallel, whose replicas would run the "
            "original's routers: expected DistributedDataParallel, or one device; unpatch the model before replicating it."
        )


def still_runs(now: nn.Module | None, child: nn.Module, name: str) -> nn.Module:
    """What stands in a planned module's place, if it still runs that module: a wrapper around it and nothing like it.

    Raises
    ------
    PatchError
        If it is another module, or holds a copy of it that runs in its place.
    """
    inside = [] if now is None else list(now.modules())
    if any(m is child for m in inside) and sum(type(m) is type(child) for m in inside) == 1:
        assert now is not None
        return now
    hint = " (PEFT's modules_to_save makes such copies)" if len(inside) > 1 else ""
    raise PatchError(
        f"{name} ({type(child).__name__}) was replaced by {type(now).__name__}{hint} after the model was patched, so "
        "that its routing would not be seen: unpatch the model, and patch it anew as it is now."
    )


def way_to(root: nn.Module, modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of every step from a module down to some of those inside it, each once."""
    above = {
        id(child): (parent, name, child)
        for parent in root.modules()
        for name, child in parent.named_children()
    }
    steps: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
    for module in modules:
        while module is not root and id(module) in above:
            step = above[id(module)]
            steps[id(step[0]), step[1]] = step
            module = step[0]
    return list(steps.values())
