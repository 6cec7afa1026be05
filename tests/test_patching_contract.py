"""Reading a router's contract off its numbers: every score function and normalisation, made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bh_routing import RoutingIntegration
from bh_routing.errors import UnsupportedModelError
from bh_routing.patching import make_plan
from bh_routing.patching.adapters import (
    RouterCall,
    expert_ids,
    flat_experts,
    router_call,
    with_logits_again,
)
from bh_routing.patching.contract import match_outputs, probe
from bh_routing.patching.weighting import Reading, read_weighting
from bh_routing.policies import TopKPolicy

T, E, K = 128, 16, 4

SCORES = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
}


@pytest.fixture
def logits_TE() -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0)) * 1.5


def choose(score_TE: Tensor, select_TE: Tensor | None = None) -> tuple[Tensor, Tensor]:
    experts_TK = (score_TE if select_TE is None else select_TE).topk(K, -1).indices
    return score_TE.gather(-1, experts_TK), experts_TK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("route_norm", ["none", "renormalised"])
@pytest.mark.parametrize("score_func", list(SCORES))
def test_plain_routers(logits_TE, score_func, route_norm, factor, dtype):
    logits_TE = logits_TE.to(dtype)
    weights_TK, experts_TK = choose(SCORES[score_func](logits_TE.float()))
    if route_norm == "renormalised":
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    reading = read_weighting(logits_TE, (weights_TK * factor).to(dtype), experts_TK)
    assert reading[:2] == (score_func, route_norm)
    assert reading.route_scale == pytest.approx(factor, rel=5e-3)
    assert reading.plain
    assert not reading.joint


@pytest.mark.parametrize("score_func", list(SCORES))
def test_a_bias_in_the_selection(logits_TE, score_func):
    score_TE = SCORES[score_func](logits_TE)
    weights_TK, experts_TK = choose(score_TE, score_TE + 0.1 * torch.linspace(-1, 1, E))
    reading = read_weighting(logits_TE, weights_TK, experts_TK)
    assert reading[:2] == (score_func, "none")
    assert not reading.plain


def test_groups_in_the_selection(logits_TE):
    score_TE = logits_TE.sigmoid()
    best_TG = score_TE.view(T, 4, 4).topk(2, -1).values.sum(-1).topk(2, -1).indices
    allowed_TG = torch.zeros(T, 4, dtype=torch.bool).scatter(-1, best_TG, True)
    select_TE = score_TE.masked_fill(~allowed_TG.repeat_interleave(4, -1), 0.0)
    weights_TK, experts_TK = choose(score_TE, select_TE)
    reading = read_weighting(logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK)
    assert reading[:2] == ("sigmoid", "renormalised")
    assert not reading.plain


def test_softmax_over_the_selected_logits_is_renormalised_softmax(logits_TE):
    values_TK, experts_TK = logits_TE.topk(K, -1)
    assert read_weighting(logits_TE, values_TK.softmax(-1), experts_TK) == Reading(
        "softmax", "renormalised", 1.0, False, True
    )


def test_joint_normalisation_is_raw(logits_TE):
    weights_TK, experts_TK = choose(logits_TE.sigmoid())
    shared_T1 = torch.rand(T, 1, generator=torch.Generator().manual_seed(1))
    joint_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + shared_T1)
    assert read_weighting(logits_TE, joint_TK, experts_TK) == Reading("sigmoid", "none", 1.0, True, False)


def test_probabilities_for_logits(logits_TE):
    p_TE = logits_TE.softmax(-1)
    weights_TK, experts_TK = choose(p_TE)
    reading = read_weighting(p_TE, weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK)
    assert reading[:2] == ("probability", "renormalised")
    assert reading.plain


def test_a_factor_per_expert(logits_TE):
    p_TE = logits_TE.softmax(-1)
    weights_TK, experts_TK = choose(p_TE)
    factor_E = torch.linspace(0.5, 1.5, E)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) * factor_E[experts_TK]
    other_E = torch.linspace(1.5, 0.5, E)
    reading = read_weighting(p_TE, weights_TK, experts_TK, {"other": other_E, "factor": factor_E})
    assert reading == Reading("probability", "renormalised", 1.0, False, False, "factor")
    assert read_weighting(p_TE, weights_TK, experts_TK, {"other": other_E}).route_norm == "unknown"


def test_one_expert_per_token(logits_TE):
    p_TE = logits_TE.softmax(-1)
    weights_T1, experts_T1 = p_TE.max(-1, keepdim=True)
    assert read_weighting(logits_TE, weights_T1, experts_T1) == Reading("softmax", "none", 1.0, False, True)
    ones = read_weighting(logits_TE, torch.ones_like(weights_T1), experts_T1)
    assert ones.route_norm == "renormalised"
    arbitrary_T1 = torch.rand(T, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert read_weighting(logits_TE, arbitrary_T1, experts_T1).route_norm == "unknown"


def test_slots_of_weight_zero_are_left_out_of_account(logits_TE):
    weights_TK, experts_TK = choose(logits_TE.softmax(-1))
    weights_TK[::3, 0] = 0.0
    assert read_weighting(logits_TE, weights_TK, experts_TK)[:2] == ("softmax", "none")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x, w, i: (torch.zeros_like(x), w, i), "equal logits tell nothing"),
        (lambda x, w, i: (x.fill_diagonal_(float("nan")), w, i), "not finite"),
        (lambda x, w, i: (x, torch.zeros_like(w), i), "no weights"),
        (lambda x, w, i: (x, w, i + E), "indices outside the logits"),
        (lambda x, w, i: (x[:0], w[:0], i[:0]), "no tokens"),
        (lambda x, w, i: (x, torch.rand_like(w), i), "arbitrary weights"),
    ],
)
def test_nothing_is_claimed_without_evidence(logits_TE, change, why):
    torch.manual_seed(0)
    weights_TK, experts_TK = choose(logits_TE.softmax(-1))
    assert read_weighting(*change(logits_TE.clone(), weights_TK, experts_TK)) == Reading(), why


LOGITS, WEIGHTS, EXPERTS = torch.zeros(5, E), torch.zeros(5, K), torch.zeros(5, K, dtype=torch.int64)


@pytest.mark.parametrize(
    ("outputs", "positions"),
    [
        ((LOGITS, WEIGHTS, EXPERTS), (0, 1, 2)),
        ((WEIGHTS, EXPERTS, LOGITS), (2, 0, 1)),
        ((EXPERTS, WEIGHTS, LOGITS), (2, 1, 0)),
        ((LOGITS, EXPERTS, WEIGHTS), (0, 2, 1)),
        ((LOGITS, WEIGHTS, EXPERTS, torch.zeros(5, 2)), (0, 1, 2)),
        ([LOGITS, WEIGHTS, EXPERTS.int()], (0, 1, 2)),
        ((LOGITS.view(1, 5, E), WEIGHTS, EXPERTS), (0, 1, 2)),
    ],
    ids=["transformers", "design", "indices-first", "weights-last", "extras", "list-int32", "3d"],
)
def test_outputs_are_recognised_in_any_order(outputs, positions):
    found = match_outputs(outputs, "here")
    assert tuple(found) == positions
    replaced = found.replace(outputs, WEIGHTS + 1, EXPERTS + 1)
    assert type(replaced) is type(outputs)
    assert torch.equal(replaced[found.weights], WEIGHTS + 1)
    assert replaced[found.logits] is outputs[found.logits]


@pytest.mark.parametrize(
    ("outputs", "came"),
    [
        (LOGITS, r"one tensor torch\.float32 \(5, 16\)"),
        ((WEIGHTS, EXPERTS), r"torch\.float32 \(5, 4\), torch\.int64 \(5, 4\)"),
        ((LOGITS, WEIGHTS), r"torch\.float32 \(5, 16\), torch\.float32 \(5, 4\)"),
        (
            (EXPERTS, EXPERTS, LOGITS),
            r"torch\.int64 \(5, 4\), torch\.int64 \(5, 4\), torch\.float32 \(5, 16\)",
        ),
        ({"logits": LOGITS}, "dict"),
    ],
)
def test_other_outputs_are_refused_with_what_came(outputs, came):
    with pytest.raises(
        UnsupportedModelError, match=rf"^router here must return .* got \({came}\); this contract"
    ):
        match_outputs(outputs, "here")


class Router(nn.Module):
    """Softmax router; ``needs`` more than hidden states, or three dimensions, if told so."""

    def __init__(self, scale: float = 1.0, needs: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, 8, generator=torch.Generator().manual_seed(3)) * scale)
        self.needs = needs

    def forward(self, hidden, bias=None):
        if self.needs == "bias" and bias is None:
            raise TypeError("bias is missing")
        if self.needs == "3d" and hidden.dim() != 3:
            raise IndexError("three dimensions")
        if self.training:
            hidden = hidden * torch.empty_like(hidden).uniform_(0.9, 1.1)
        logits = torch.nn.functional.linear(hidden.reshape(-1, 8), self.weight)
        score = logits.softmax(-1)
        experts = (score if bias is None else score + bias).topk(K, -1).indices
        return logits, score.gather(-1, experts), experts


class Block(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.gate = router
        self.bias = torch.linspace(-0.5, 0.5, E)

    def forward(self, hidden):
        self.gate(hidden.reshape(-1, 8), self.bias)
        raise AssertionError("the block must be left as soon as its router has answered")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_probe_spreads_the_logits(scale):
    contract = probe(Router(scale), "here")
    assert contract is not None
    assert contract.reading == Reading("softmax", "none", 1.0, False, True)
    assert (contract.num_logits, contract.top_k) == (E, K)


def test_the_probe_uses_three_dimensions_where_two_fail():
    contract = probe(Router(needs="3d"), "here")
    assert contract is not None
    assert contract.reading.plain


def test_the_probe_goes_through_the_block_and_leaves_it():
    router = Router(needs="bias")
    block = Block(router)
    before = dict(router.__dict__)
    contract = probe(router, "here", block)
    assert contract is not None
    assert contract.reading == Reading("softmax", "none", 1.0, False, False)
    assert router.__dict__ == before
    assert probe(router, "here") is None


def test_the_probe_leaves_the_random_state_alone():
    router = Router().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert probe(router, "here") is not None
    assert torch.equal(torch.rand(3), expected)


class InMethod(nn.Module):
    def route_tokens_to_experts(self, hidden_states, router_logits):
        return router_logits.topk(K, -1).indices, router_logits.topk(K, -1).values


def test_a_routing_method_with_its_logits_anywhere():
    block = InMethod()
    call = router_call(nn.Identity(), block)
    assert (call.module, call.attribute, call.logits_argument) == (block, "route_tokens_to_experts", 1)
    outputs = (EXPERTS, WEIGHTS)
    for args, kwargs in (((None, LOGITS), {}), ((None,), {"router_logits": LOGITS})):
        full = call.canonical(args, kwargs, outputs)
        assert full[0] is LOGITS
        assert call.original(full) == outputs
    assert (
        router_call(block, None) == RouterCall(module=block)
        or router_call(block, None).attribute == "forward"
    )


def test_logits_again():
    router = Router().eval()
    call = with_logits_again(RouterCall(module=router))
    assert call is not None
    hidden = torch.randn(2, 3, 8)
    logits, weights, experts = router(hidden)
    full = call.canonical((hidden,), {}, (weights, experts))
    assert torch.equal(full[0], logits)
    assert call.original(full) == (weights, experts)
    assert with_logits_again(RouterCall(module=nn.Sequential(router, Router()))) is None


def test_expert_ids():
    class Experts(nn.Module):
        num_experts = 8

    class WithIdentity(nn.Module):
        num_routed_experts, total_experts = 8, 12

    class WithoutIdentity(nn.Module):
        num_routed_experts = total_experts = 8

    assert expert_ids(Experts(), 9).empty == 8
    assert expert_ids(None, 9).empty == 9
    ids = expert_ids(WithIdentity(), 12)
    assert (ids.empty, ids.filler, ids.can_compact) == (12, 8, True)
    assert not expert_ids(WithoutIdentity(), 8).can_compact

    def inner(hidden, experts, weights):
        assert experts.shape[-1] == 2
        assert torch.equal(weights[:, 1], torch.zeros(3))
        return hidden.unsqueeze(1) * weights[:, :1, None]

    out = flat_experts(inner, ids)(
        torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1), 2.0)
    )
    assert torch.equal(out, torch.full((3, 4), 2.0))


class Unprobed(nn.Module):
    """A router that nothing can run with hidden states alone; its attributes tell its sizes."""

    def __init__(self, selects: int = K) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, 8, generator=torch.Generator().manual_seed(3)))
        self.num_experts, self.top_k, self.selects = E, K, selects

    def forward(self, hidden, temperature):
        logits = torch.nn.functional.linear(hidden, self.weight) / temperature
        values, experts = logits.softmax(-1).topk(self.selects, -1)
        return logits, values, experts


class UnprobedBlock(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = router, Experts()

    def forward(self, hidden, temperature):
        _, weights, experts = self.gate(hidden, temperature)
        return self.experts(hidden, experts, weights)


class Experts(nn.Module):
    num_experts = E

    def forward(self, hidden, experts, weights):
        assert int(experts.max()) < E
        return hidden * weights.sum(-1, keepdim=True)


def test_a_router_that_cannot_be_probed_is_checked_at_its_first_call():
    block = UnprobedBlock(Unprobed())
    (layer,) = make_plan(block).layers
    assert not layer.probed
    assert (layer.context.num_experts, layer.context.top_k, layer.context.can_widen) == (E, K, False)
    hidden, temperature = torch.randn(5, 8), torch.tensor(2.0)
    before = block(hidden, temperature)
    with RoutingIntegration(block, TopKPolicy(2)) as integrator:
        assert not torch.equal(block(hidden, temperature), before)
        assert integrator.telemetry.mean_experts_per_token == 2
    assert torch.equal(block(hidden, temperature), before)


def test_a_router_whose_attributes_are_wrong_is_refused_at_its_first_call():
    block = UnprobedBlock(Unprobed(selects=2))
    with (
        RoutingIntegration(block, TopKPolicy()),
        pytest.raises(
            UnsupportedModelError,
            match="was expected to return logits of 16 experts and 4 slots, got 16 and 2",
        ),
    ):
        block(torch.randn(5, 8), torch.tensor(2.0))


def test_a_router_that_tells_nothing_is_refused():
    router = Unprobed()
    del router.top_k
    with pytest.raises(UnsupportedModelError, match="does not tell how many experts it has and selects"):
        make_plan(UnprobedBlock(router))
