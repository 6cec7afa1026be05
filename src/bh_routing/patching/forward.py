"""What a model's forward knows and its routers do not: the batch's shape, the padding mask, the phase."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..policies import RoutingContext


class ForwardInfo:
    """The call in progress of one model: filled before its forward, emptied after it."""

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self.mask_T: Tensor | None = None
        # Those without a mask: (the router's, the same completed), which keeps the identity in the key alive.
        self._complete: dict[tuple[int, tuple[int, int]], tuple[RoutingContext, RoutingContext]] = {}

    def clear(self) -> None:
        """Forget the call."""
        self.shape, self.mask_T = None, None

    def complete(self, context: RoutingContext, logits_TE: Tensor) -> RoutingContext:
        """The router's context with what is known of this call (nothing, if the token counts disagree)."""
        if self.shape is None or self.shape[0] * self.shape[1] != logits_TE.shape[0]:
            return context
        mask_T = self.mask_T
        if mask_T is not None and mask_T.device != logits_TE.device:
            mask_T = mask_T.to(logits_TE.device, non_blocking=True)
        if mask_T is not None or torch.compiler.is_compiling():
            return replace(context, shape=self.shape, mask_T=mask_T, phase=self._phase)
        # Making one takes longer than looking it up, at every layer of every decoding step.
        key = (id(context), self.shape)
        if key not in self._complete:
            if len(self._complete) >= 4096:
                self._complete.clear()
            self._complete[key] = (context, replace(context, shape=self.shape, phase=self._phase))
        return self._complete[key][1]

    @property
    def _phase(self) -> Literal["prefill", "decode"]:
        return "decode" if self.shape is not None and self.shape[1] == 1 else "prefill"


CACHES = ("cache", "past_key_values")  # a forward's cache since transformers 5.24, and before


class _Before:
    """Forward pre-hook (with keyword arguments) that reads the call; changes nothing."""

    def __init__(self, info: ForwardInfo, names: tuple[str, ...], causal: bool) -> None:
        self.info, self.names, self.causal = info, names, causal

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        if not self.causal and any(call.get(name) is not None for name in CACHES):
            raise PatchError(
                "the routing policy looks at a whole sequence, which generation with a cache does not have: "
                "expected a forward without past_key_values; use a causal policy to generate."
            )
        tokens = call.get("input_ids")
        if not isinstance(tokens, Tensor):
            tokens = call.get("inputs_embeds")
        self.info.clear()
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        self.info.shape = (tokens.shape[0], tokens.shape[1])
        self.info.mask_T = token_mask(call.get("attention_mask"), *self.info.shape)


class _After:
    """Forward hook that forgets the call, also after an exception."""

    def __init__(self, info: ForwardInfo) -> None:
        self.info = info

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.info.clear()


def token_mask(mask: Any, batch: int, length: int) -> Tensor | None:
    """bool [B * S], False for padding, from whatever attention mask a model was given; None if it tells nothing.

    A two-dimensional mask covers the cache too: the last S columns are this call's. A four-dimensional one
    (static caches) tells by its diagonal which keys are padding, in a prefill; a decode step has no padding.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor) or mask.shape[0] != batch:
        return None
    if mask.dim() == 2 and mask.shape[1] >= length:
        return mask[:, mask.shape[1] - length :].reshape(-1) != 0
    if mask.dim() == 4 and length > 1 and mask.shape[-2] == length and mask.shape[-1] >= length:
        diagonal_BS = mask[:, 0, :, :length].diagonal(dim1=-2, dim2=-1)
        seen_BS = diagonal_BS if diagonal_BS.dtype == torch.bool else diagonal_BS == 0
        return seen_BS.reshape(-1)
    return None


class ForwardObserver:
    """Two hooks on a model that keep a `ForwardInfo` up to date."""

    def __init__(self, model: nn.Module, *, causal: bool) -> None:
        self.model, self.info = model, ForwardInfo()
        parameters = inspect.signature(type(model).forward).parameters.values()
        names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))[
            1:
        ]
        self._before, self._after = _Before(self.info, names, causal), _After(self.info)
        self._handles: list[Any] = []

    def install(self) -> None:
        """Register the hooks."""
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Remove them."""
        while self._handles:
            self._handles.pop().remove()


class _Registered:
    """A hook of ours found on a module whose observer is unknown (a deep copy of a patched model)."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def remove(self) -> None:
        """Take our hooks out of the module's tables."""
        for table, flags in (
            (self.module._forward_pre_hooks, [self.module._forward_pre_hooks_with_kwargs]),
            (
                self.module._forward_hooks,
                [self.module._forward_hooks_with_kwargs, self.module._forward_hooks_always_called],
            ),
        ):
            for key in [k for k, hook in table.items() if isinstance(hook, (_Before, _After))]:
                del table[key]
                for flag in flags:
                    flag.pop(key, None)


def find_observers(module: nn.Module) -> list[_Registered]:
    """Hooks of ours on a module, as something that can be removed."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [_Registered(module)] if any(isinstance(h, (_Before, _After)) for h in hooks) else []
