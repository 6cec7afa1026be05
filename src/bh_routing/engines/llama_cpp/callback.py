"""The callback in Python: what `route.c` is compared with, and what decides where there is no C compiler.

Dropped experts get weight 0 and are computed all the same: it saves no time, and costs the decision's.

Shape legend: T tokens, E experts, K slots of the router's own choice, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .compiled import LlamaCppError
from .ggml import numbers
from .shim import GgmlTensor

if TYPE_CHECKING:
    from .routing import LlamaRouting

COST = (
    "the decision runs in Python: experts are dropped with weight 0 and computed all the same, which saves no time, and "
    "every token takes about 0.2 ms more per layer"
)


class PythonRouter:
    """Decides by the library's own policy; a callback of `bh_routing.engines.llama_cpp.hook.Hook`.

    Parameters
    ----------
    routing : LlamaRouting
    change : bool
        False: only count.
    """

    def __init__(self, routing: LlamaRouting, change: bool) -> None:
        self.routing, self.change = routing, change
        structure = routing.structure
        names = (structure.logits, "ffn_moe_topk", structure.weights, "ffn_moe_weighted")
        self.steps = {
            f"{name}-{block}".encode(): (step, block)
            for block in routing.contexts
            for step, name in enumerate(names)
        }
        self.logits: dict[int, Tensor] = {}
        self.chosen: dict[int, GgmlTensor] = {}
        self.added: dict[int, tuple[Tensor, Tensor]] = {}
        self.computed = 0

    def __call__(self, node: GgmlTensor, ask: bool) -> bool:
        step, block = self.steps.get(node.name, (-1, -1))
        if ask:
            if step == 1:
                self.chosen[block] = node
            return step in (0, 2) or (step == 3 and block in self.added)
        if step == 0:
            self.logits[block] = numbers(node)[0, 0].clone()
        elif step == 2:
            self._decide(node, block)
        elif step == 3:
            self._compensate(node, block)
        return True

    def _decide(self, node: GgmlTensor, block: int) -> None:
        routing, slots = self.routing, self.routing.structure.slots
        chosen = self.chosen[block]
        self.added.pop(block, None)
        if chosen.ne[0] != slots:  # warming up, llama.cpp runs all experts
            return
        weights = numbers(node)
        weights_TK = weights[0, :, :, 0] if node.ne[0] == 1 else weights[0, 0]
        own_TK = numbers(chosen)[0, 0].long()
        logits_TE = self.logits.pop(block)
        if len(logits_TE) != len(own_TK):
            raise LlamaCppError(f"layer {block}: {len(logits_TE)} rows of logits for {len(own_TK)} tokens.")
        if not len(own_TK):
            return
        context = routing.contexts[block]
        decision = routing.policy.decide(logits_TE, weights_TK.clone(), own_TK, context)
        if routing.telemetry is not None:
            routing.telemetry.update(context, decision, logits_TE)
        if not self.change:
            return
        self.computed += own_TK.numel()
        weights_TK.copy_(decision.weights_TK)
        made = routing.compensations.get(context.path)
        added_TH = None if made is None else made.addition(replace(decision, logits_TE=logits_TE))
        if added_TH is not None:
            self.added[block] = (decision.dropped_TK, added_TH.float())

    def _compensate(self, node: GgmlTensor, block: int) -> None:
        """Into the row of each token's first dropped slot, which is 0: the model adds all rows up."""
        dropped_TK, added_TH = self.added.pop(block)
        rows_TKH = numbers(node)[0]
        token_N = dropped_TK.any(-1).nonzero().squeeze(-1)
        rows_TKH[token_N, dropped_TK[token_N].to(torch.uint8).argmax(-1)] = added_TH[token_N]

    def pairs(self, *, reset: bool = False) -> int:
        """(token, expert) pairs that were computed."""
        found = self.computed
        if reset:
            self.computed = 0
        return found
