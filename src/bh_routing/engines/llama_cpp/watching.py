"""Windows of text through a GGUF model, with every pair of the own choice seen, and experts dropped where there is a policy.

Shape legend: T tokens, K slots of the router's own choice, D router logits, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...decision.compensation import Compensation
from ...decision.types import RoutingDecision
from ...policies import RoutingPolicy
from .ggml import numbers
from .hook import Hook
from .shim import GgmlTensor
from .structure import Structure

# (block, raw logits [T, D], own weights [T, K], own experts [T, K], which are dropped [T, K], their outputs [T, K, H], unweighted)
Taker = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass
class Watch:
    """A callback that sees every pair of the own choice, and drops experts where there is a policy."""

    structure: Structure
    take: Taker | None = None
    policy: RoutingPolicy | None = None
    compensations: Mapping[str, Compensation] | None = None

    def __post_init__(self) -> None:
        s = self.structure
        self.contexts = s.contexts()
        names = (s.logits, "ffn_moe_topk", s.weights, s.outputs, "ffn_moe_weighted")
        self.steps = {f"{n}-{b}".encode(): (i, b) for b in self.contexts for i, n in enumerate(names)}
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.chosen: GgmlTensor | None = None
        self.added: Tensor | None = None
        if self.policy is not None:
            self.policy.bind(self.contexts.values())

    def __call__(self, node: GgmlTensor, ask: bool) -> bool:
        step, block = self.steps.get(node.name, (-1, -1))
        if ask:
            if step == 1:
                self.chosen = node
            return (
                step in (0, 2)
                or (step == 3 and self.take is not None)
                or (step == 4 and self.added is not None)
            )
        if step == 0:
            self.logits = numbers(node)[0, 0].clone()
        elif step == 2:
            self._choose(node, block)
        elif step == 3 and self.take is not None:
            self.take(block, *self.seen[block], numbers(node)[0].float().clone())
        elif step == 4 and self.added is not None:
            dropped_TK, rows_TKH = self.seen[block][3], numbers(node)[0]
            token_N = dropped_TK.any(-1).nonzero().squeeze(-1)
            rows_TKH[token_N, dropped_TK[token_N].to(torch.uint8).argmax(-1)] = self.added[token_N]
            self.added = None
        return True

    def _choose(self, node: GgmlTensor, block: int) -> None:
        assert self.chosen is not None
        held = numbers(node)
        weights_TK = held[0, :, :, 0] if node.ne[0] == 1 else held[0, 0]
        own_TK = numbers(self.chosen)[0, 0].long()
        own_weights_TK, dropped_TK = weights_TK.clone(), torch.zeros(own_TK.shape, dtype=torch.bool)
        if self.policy is not None:
            context = self.contexts[block]
            decision: RoutingDecision = self.policy.decide(self.logits, own_weights_TK, own_TK, context)
            weights_TK.copy_(decision.weights_TK)
            dropped_TK = decision.dropped_TK
            made = (self.compensations or {}).get(context.path)
            if made is not None:
                added_TH = made.addition(replace(decision, logits_TE=self.logits))
                self.added = None if added_TH is None else added_TH.float()
        self.seen[block] = (self.logits, own_weights_TK, own_TK, dropped_TK)


class Reader:
    """A loaded model that windows of text are run through, each from an empty memory, with a callback in charge."""

    def __init__(self, llm: Any, hook: Hook) -> None:
        self.llm, self.hook = llm, hook

    def __call__(self, input_ids: Tensor, watch: Watch | None = None) -> Tensor:
        """Logits [T, V] of one window."""
        llm = self.llm
        llm._ctx.kv_cache_clear()
        llm._batch.set_batch(batch=input_ids.tolist(), n_past=0, logits_all=True)
        if watch is None:
            self.hook.to_nobody()
        else:
            self.hook.to_python(watch)
        try:
            llm._ctx.decode(llm._batch)
        finally:
            self.hook.to_nobody()
        self.hook.raise_error()
        shape = (len(input_ids), llm.n_vocab())
        return torch.from_numpy(np.ctypeslib.as_array(llm._ctx.get_logits(), shape).copy())
