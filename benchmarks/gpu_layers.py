"""What `gpu.py` checks and times of one layer beyond its experts: compensation, tokens without an expert, the price of loads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bh_routing.decision.compensation import Compensation, LinearCompensation
from bh_routing.decision.linear_products import grouped, looped
from bh_routing.decision.price import price_loads
from bh_routing.decision.select import decide_by_table
from bh_routing.decision.types import Limits, RoutingDecision, TableSettings
from bh_routing.patching.expert_math import grouped_forward


def linear_compensation(d: Any, rank: int = 15) -> LinearCompensation:
    """A random one of a layer's size; with the mean 16 rows, which grouped products take as they are."""
    shape = (d.experts, rank, d.hidden)
    made = Compensation.linear(
        center_D=torch.zeros(d.experts),
        low_D=torch.full((d.experts,), -8.0),
        high_D=torch.full((d.experts,), 8.0),
        whiten_DR=torch.randn(d.experts, rank) * d.experts**-0.5,
        mean_EH=torch.randn(d.experts, d.hidden) * 0.02,
        slope_ERH=torch.randn(shape) * 0.02,
    )
    return made.to(d.device)


def decided(d: Any, tokens: int, min_k: int, top_k: int) -> RoutingDecision:
    """A decision from random logits in which tokens keep 0 to ``top_k`` experts, where ``min_k`` lets them."""
    logits_TE = (2.0 * torch.randn(tokens, d.experts)).to(d.device, d.dtype)
    weights_TK, experts_TK = torch.softmax(logits_TE.float(), -1).topk(top_k, -1)
    thresholds_E = torch.linspace(-1.0, -3.5, d.experts, device=d.device)
    how = TableSettings(empty=d.experts, limits=Limits(min_k))
    offset_E = torch.zeros(d.experts, device=d.device)
    with d.without_waiting():
        found = decide_by_table(logits_TE, weights_TK.to(d.dtype), experts_TK, thresholds_E, offset_E, how)
    return replace(found, logits_TE=logits_TE)


@torch.no_grad()
def check_compensation(d: Any, experts: Any, top_k: int) -> str:
    """The linear compensation against its loop over dropped experts; tokens without any expert get it alone."""
    held, worst, without = linear_compensation(d), 0.0, 0
    for tokens in d.tokens:
        for min_k in (0, 1):
            decision = decided(d, tokens, min_k, top_k)
            with d.without_waiting():
                got_TH = grouped(held.maps_EQH, held.regressors(decision.logits_TE), decision)
            expected_TH = looped(held.maps_EQH, lambda z=decision.logits_TE: held.regressors(z), decision)
            if expected_TH is None:
                continue
            scale = float(expected_TH.abs().max())
            worst = max(worst, float((got_TH.float() - expected_TH.float()).abs().max()) / max(scale, 1e-6))
            alone_T = decision.counts_T == 0
            assert min_k == 0 or not bool(alone_T.any())
            hidden_TH = torch.randn(tokens, d.hidden, device=d.device, dtype=d.dtype)
            with d.without_waiting():
                out_TH = grouped_forward(experts, hidden_TH, decision.experts_TK, decision.weights_TK)
            assert bool(out_TH.isfinite().all())
            assert not bool(out_TH[alone_T].any()), (
                "a token without an expert has output 0 before its compensation"
            )
            without += int(alone_T.sum())
    assert worst < 2e-2, worst  # products of bfloat16 rows, summed in float32 in another order
    assert without > 0
    return f"linear compensation within {worst:.1e} of its loop; {without:,} tokens without any expert"


def check_price(d: Any, top_k: int) -> str:
    """The price of loads against the same function on the host, on losses that are small integers."""
    compared = 0
    for tokens in d.tokens:
        for price in (0.0, 6.0, 20.0):
            experts_TK = torch.rand(tokens, d.experts).topk(top_k, -1).indices
            loss_TK = torch.randint(0, 5, (tokens, top_k)).float()
            keep_TK = torch.rand(tokens, top_k) < 0.8
            first_TK = keep_TK & (torch.arange(top_k) == keep_TK.int().argmax(-1, keepdim=True))
            inputs = (keep_TK, first_TK, loss_TK, experts_TK)
            expected = price_loads(*inputs, shape=(tokens, 1), num_experts=d.experts, price_load=price)
            moved = [x.to(d.device) for x in inputs]
            with d.without_waiting():
                got = price_loads(*moved, shape=(tokens, 1), num_experts=d.experts, price_load=price)
            for name in expected._fields:
                assert torch.equal(getattr(got, name).cpu(), getattr(expected, name)), (name, tokens, price)
            assert price or torch.equal(expected.keep_TK, keep_TK), "no price: what was decided"
            compared += tokens
    return (
        f"the price of loads on {compared:,} tokens: the experts and pairs of the same function on the host"
    )


def with_loads(experts_TK: Tensor, weights_TK: Tensor, loads: int, empty: int) -> tuple[Tensor, Tensor]:
    """Indices and weights where so many of the experts that most tokens chose are loaded, and others are left out."""
    most_E = torch.bincount(experts_TK.flatten(), minlength=empty).topk(loads).indices
    gone_TK = ~torch.isin(experts_TK, most_E)
    return experts_TK.masked_fill(gone_TK, empty), weights_TK.masked_fill(gone_TK, 0.0)
