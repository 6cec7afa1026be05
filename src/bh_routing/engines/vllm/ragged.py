"""The experts' kernel, called with the kept (token, expert) pairs only.

Shape legend: T tokens, K slots, P kept pairs, H hidden size.

The CPU kernel computes every slot, also those of weight 0: at one token that costs little, because the expert's weights
are loaded anyway, at many tokens everything. Here the slots of weight 0 never reach it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def kept_only(kernel: Kernel, out_TH: Tensor, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> int:
    """Call ``kernel(out, x, weights, experts)`` with the pairs whose weight is not 0, and write to ``out_TH``.

    Parameters
    ----------
    kernel : callable
        Writes ``sum_k weights[t, k] * f_experts[t, k](x[t])`` to ``out``; it must accept any number of slots.
    out_TH, x_TH : Tensor
        Output and input, contiguous, in the model's dtype.
    weights_TK, experts_TK : Tensor
        float32 and integer; unused slots have weight 0.

    Returns
    -------
    int
        Pairs computed.

    Notes
    -----
    Where nothing was dropped the kernel is called as it would have been. With one token its kept slots are one call.
    Else each pair is a row of its own, in the model's dtype, and rows are added in float32: in bfloat16 the last bit
    of a token's output may differ from the kernel's own sum.
    """
    if x_TH.shape[0] == 1:
        return _one_token(kernel, out_TH, x_TH, weights_TK, experts_TK)
    kept_TK = weights_TK != 0
    token_P, slot_P = kept_TK.nonzero(as_tuple=True)
    pairs = token_P.numel()
    if pairs == kept_TK.numel():
        kernel(out_TH, x_TH, weights_TK, experts_TK)
    elif pairs == 0:
        out_TH.zero_()
    else:
        rows_PH = x_TH.index_select(0, token_P)
        each_PH = torch.empty_like(rows_PH)
        kernel(
            each_PH,
            rows_PH,
            weights_TK[token_P, slot_P].unsqueeze(1),
            experts_TK[token_P, slot_P].unsqueeze(1),
        )
        sum_TH = torch.zeros(out_TH.shape, dtype=torch.float32, device=out_TH.device)
        out_TH.copy_(sum_TH.index_add_(0, token_P, each_PH.float()))
    return pairs


def _one_token(kernel: Kernel, out_TH: Tensor, x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> int:
    """One call with the kept slots, chosen in plain Python.

    Reading an expert's weights empties the caches; each tensor operation after it costs 5 to 20 microseconds.
    """
    weights = weights_TK.tolist()[0]
    kept = [slot for slot, weight in enumerate(weights) if weight != 0]
    if len(kept) == len(weights):
        kernel(out_TH, x_TH, weights_TK, experts_TK)
    elif not kept:
        out_TH.zero_()
    else:
        experts = experts_TK.tolist()[0]
        kernel(
            out_TH,
            x_TH,
            torch.tensor([[weights[slot] for slot in kept]], dtype=weights_TK.dtype),
            torch.tensor([[experts[slot] for slot in kept]], dtype=experts_TK.dtype),
        )
    return len(kept)
