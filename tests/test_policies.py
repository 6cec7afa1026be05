"""The policy contract: tables against p-values against a plain loop, weight rules, widening, fallbacks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bh_routing import RoutingIntegration
from bh_routing.decision.functional import benjamini_hochberg_routing
from bh_routing.decision.select import rank_by_p_values, rank_by_table
from bh_routing.decision.table import DecisionTable
from bh_routing.decision.types import Limits
from bh_routing.decision.weights import apply_weight_rule, plain_rule
from bh_routing.errors import (
    CalibrationMismatchError,
    InvalidInputError,
    InvalidParameterError,
    InvalidTypeError,
)
from bh_routing.policies import (
    Kept,
    PValuePolicy,
    RoutingContext,
    RoutingPolicy,
    TablePolicy,
    TopKPolicy,
)
from bh_routing.stats.procedures import PROCEDURES, Procedure
from bh_routing.stats.pvalues import robust_p_values

E, K, T = 16, 6, 200


def context(**changes):
    settings = {
        "path": "layers.0.gate",
        "index": 0,
        "num_experts": E,
        "empty": E,
        "top_k": K,
        "route_norm": "none",
        "score_func": "softmax",
        "can_widen": True,
    }
    return RoutingContext(**(settings | changes))


def own_choice(logits):
    weights, experts = torch.softmax(logits.float(), -1).topk(K, dim=-1)
    return weights.to(logits.dtype), experts


def count_by_loop(sorted_passes, rule):
    count = 0
    for rank, passes in enumerate(sorted_passes, start=1):
        if passes:
            count = rank
        elif rule == "step_down":
            break
    return count


@pytest.mark.parametrize("clamp", ["after", "inside"])
@pytest.mark.parametrize("rule", ["step_up", "step_down"])
@pytest.mark.parametrize("limits", [(1, None), (2, 4), (6, 6)])
def test_table_against_a_loop(rule, clamp, limits):
    statistic = torch.randint(-3, 4, (T, K)).float()  # integers: many ties
    thresholds = torch.tensor([2.0, 2.0, 0.0, 1.0, -1.0, 0.0] + [-9.0] * (E - K))
    min_k, max_k = limits
    ranking = rank_by_table(statistic, thresholds, rule=rule, limits=Limits(min_k, max_k, clamp))
    kept = ranking.kept()
    top = max_k or K
    for token, row in enumerate(statistic.tolist()):
        order = sorted(range(K), key=lambda slot: (-row[slot], slot))
        passes = [row[slot] >= thresholds[rank] for rank, slot in enumerate(order)]
        raw = count_by_loop(passes, rule)
        inside = count_by_loop(passes[:top], rule)
        count = min(max(inside if clamp == "inside" else raw, min_k), top)
        assert int(kept.raw_counts_T[token]) == raw
        assert int(kept.counts_T[token]) == count
        assert kept.keep_TK[token].nonzero().flatten().tolist() == sorted(order[:count])


def test_p_values_are_compared_in_float64():
    rule = PROCEDURES["bh"], 0.05, 4
    p = torch.tensor([[0.0125, 0.5, 0.5, 0.5]], dtype=torch.float64)
    assert rank_by_p_values(p, *rule).counts_T.tolist() == [1]
    above = torch.nextafter(p, torch.ones_like(p))
    kept = rank_by_p_values(above, *rule)
    assert kept.raw_counts_T.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route_norm", ["none", "renormalised"])
def test_keeping_everything_returns_the_own_choice_bit_for_bit(dtype, route_norm):
    logits = torch.randn(T, E).to(dtype)
    weights, experts = own_choice(logits)
    table = DecisionTable.top_k(E, 1, E)
    for policy in (TopKPolicy(), TablePolicy(table), PValuePolicy("robust", alpha=0.5, min_k=K)):
        policy.bind([context()])
        decision = policy.decide(logits, weights, experts, context(route_norm=route_norm))
        assert torch.equal(decision.weights_TK, weights)
        assert torch.equal(decision.experts_TK, experts)
        assert not bool(decision.dropped_TK.any())


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_table_for_top_k_equals_the_top_k_policy(k):
    logits = torch.randn(T, E)
    weights, experts = own_choice(logits)
    decisions = []
    for policy in (TopKPolicy(k), TablePolicy(DecisionTable.top_k(k, 1, E))):
        policy.bind([context()])
        decisions.append(policy.decide(logits, weights, experts, context()))
    for name in ("weights_TK", "experts_TK", "counts_T"):
        assert torch.equal(getattr(decisions[0], name), getattr(decisions[1], name))
    assert bool((decisions[0].counts_T == k).all())
    assert bool(((decisions[0].experts_TK == E).sum(-1) == K - k).all())


def test_a_probability_threshold():
    logits = torch.randn(T, E) * 2
    weights, experts = own_choice(logits)
    policy = TablePolicy(DecisionTable.threshold(0.1, 1, E))
    policy.bind([context()])
    decision = policy.decide(logits, weights, experts, context())
    expected = (weights >= 0.1).sum(-1).clamp(min=1)
    assert torch.equal(decision.counts_T, expected)
    assert len(expected.unique()) > 2


@pytest.mark.parametrize("procedure", ["bh", "by", "bonferroni", "holm", "hochberg"])
def test_shrinking_is_the_procedure_with_p_equal_one_outside_the_candidates(procedure):
    logits = torch.randn(T, E, dtype=torch.float64) * 2
    weights, experts = own_choice(logits)
    policy = PValuePolicy("robust", procedure=procedure, alpha=0.4)
    policy.bind([context()])
    decision = policy.decide(logits, weights, experts, context())
    p = policy.p_values(logits, context())
    p = torch.ones_like(p).scatter(-1, experts, p.gather(-1, experts))
    raw = PROCEDURES[procedure].rejection_counts(p.sort(-1).values, 0.4)
    assert torch.equal(decision.raw_counts_T, raw)
    assert torch.equal(decision.counts_T, raw.clamp(1, K))
    assert len(raw.unique()) > 2


@pytest.mark.parametrize("procedure", ["bh", "storey", "higher_criticism"])
def test_widening_equals_the_pure_function(procedure):
    logits = torch.randn(T, E) * 2
    weights, experts = own_choice(logits)
    policy = PValuePolicy("robust", procedure=procedure, alpha=0.8, max_k=10, weights="sum")
    policy.bind([context()])
    decision = policy.decide(logits, weights, experts, context())
    sparse, chosen, counts = benjamini_hochberg_routing(logits, 0.8, max_k=10, procedure=procedure)
    assert decision.weights_TK.shape == (T, 10)
    assert torch.equal(decision.counts_T, counts)
    assert torch.equal(decision.experts_TK.masked_fill(decision.experts_TK == E, -1), chosen)
    dense = torch.zeros(T, E + 1).scatter(-1, decision.experts_TK, decision.weights_TK)[:, :E]
    torch.testing.assert_close(dense, sparse, rtol=1e-5, atol=1e-7)  # exp(log-softmax) against softmax
    assert int(counts.max()) > K


def test_widening_with_a_table():
    logits = torch.randn(T, E) * 2
    weights, experts = own_choice(logits)
    policy = TablePolicy(DecisionTable.threshold(0.03, 1, E), max_k=E)
    policy.bind([context()])
    decision = policy.decide(logits, weights, experts, context())
    probability = torch.softmax(logits, -1)
    assert torch.equal(decision.counts_T, (probability >= 0.03).sum(-1).clamp(min=1))
    dense = torch.zeros(T, E + 1).scatter(-1, decision.experts_TK, decision.weights_TK)[:, :E]
    torch.testing.assert_close(dense, probability * (dense > 0), rtol=1e-5, atol=0)
    lost = ~(decision.experts_TK.unsqueeze(1) == experts.unsqueeze(2)).any(-1)
    assert torch.equal(decision.dropped_TK, lost)


def test_weight_rules():
    own = torch.tensor([[0.4, 0.2, 0.1]])
    kept = torch.tensor([[True, True, False]])
    cases = {
        ("model", "none"): [0.4, 0.2, 0.0],
        ("model", "renormalised"): [0.4 * 0.7 / 0.6, 0.2 * 0.7 / 0.6, 0.0],
        ("model", "unknown"): [0.4 / 0.6, 0.2 / 0.6, 0.0],
        ("preserve", "none"): [0.4 * 0.7 / 0.6, 0.2 * 0.7 / 0.6, 0.0],
        ("sum", "none"): [0.4 / 0.6, 0.2 / 0.6, 0.0],
    }
    for (rule, route_norm), expected in cases.items():
        got = apply_weight_rule(own, ~kept, plain_rule(rule, route_norm))
        torch.testing.assert_close(got, torch.tensor([expected]), rtol=1e-6, atol=0)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert torch.equal(apply_weight_rule(own, ~nothing, "sum"), torch.zeros(1, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_k", [None, 10])
def test_non_finite_logits_keep_the_own_choice(bad, max_k):
    logits = torch.randn(4, E) * 2
    weights, experts = own_choice(logits)
    logits[2, 5] = bad
    for policy in (
        PValuePolicy("robust", alpha=0.1, max_k=max_k),
        TablePolicy(DecisionTable.threshold(0.2, 1, E), max_k=max_k),
    ):
        policy.bind([context()])
        decision = policy.decide(logits, weights, experts, context())
        assert decision.fallback_T.tolist() == [False, False, True, False]
        assert torch.equal(decision.experts_TK[2, :K], experts[2])
        assert torch.equal(decision.weights_TK[2, :K], weights[2])
        assert decision.counts_T[2] == K
        assert bool(torch.isfinite(decision.weights_TK).all())


@pytest.mark.parametrize("max_k", [None, 10])
def test_masked_experts_have_p_one_and_the_others_are_routed_as_without_them(max_k):
    """A logit of -inf is an expert that is not there: same p-values, same choice as over the other E - 2."""
    logits = torch.randn(64, E) * 2
    logits[:, [3, 9]] = float("-inf")
    weights, experts = own_choice(logits)
    there = [e for e in range(E) if e not in (3, 9)]
    assert torch.equal(robust_p_values(logits)[:, there], robust_p_values(logits[:, there]))
    assert bool((robust_p_values(logits)[:, [3, 9]] == 1).all())
    for policy in (
        PValuePolicy("robust", alpha=0.1, max_k=max_k),
        PValuePolicy(lambda x, _context: torch.zeros_like(x), alpha=0.1, max_k=max_k),
        TablePolicy(DecisionTable.threshold(0.2, 1, E), max_k=max_k),
    ):
        policy.bind([context()])
        decision = policy.decide(logits, weights, experts, context())
        assert not bool(decision.fallback_T.any())
        kept = decision.experts_TK[decision.experts_TK < E]
        assert not bool(((kept == 3) | (kept == 9)).any())
        assert float(decision.counts_T.double().mean()) > 1
        assert bool(torch.isfinite(decision.weights_TK).all())


def test_gradients_reach_the_kept_weights_only():
    logits = torch.randn(8, E, requires_grad=True)
    weights, experts = torch.softmax(logits, -1).topk(K, dim=-1)
    policy = TopKPolicy(2)
    policy.bind([context()])
    decision = policy.decide(logits, weights, experts, context())
    (grad,) = torch.autograd.grad(decision.weights_TK.sum(), weights)
    assert torch.equal(grad, torch.tensor([1.0] * 2 + [0.0] * (K - 2)).expand(8, K))


def test_set_table_rewrites_the_same_buffers():
    policy = TablePolicy(DecisionTable.threshold(0.2, 1, E))
    policy.bind([context()])
    buffers = [b.data_ptr() for b in policy._rows["layers.0.gate"]]
    policy.set_table(DecisionTable.threshold(0.01, 1, E))
    assert [b.data_ptr() for b in policy._rows["layers.0.gate"]] == buffers
    logits = torch.randn(T, E)
    weights, experts = own_choice(logits)
    counts = policy.decide(logits, weights, experts, context()).counts_T
    assert torch.equal(counts, (weights >= 0.01).sum(-1).clamp(min=1))
    with pytest.raises(InvalidParameterError, match="statistic='logit', the one in use 'logprob'"):
        policy.set_table(DecisionTable.top_k(2, 1, E))


@pytest.mark.parametrize(
    ("policy", "changes", "error", "message"),
    [
        (
            TopKPolicy(7),
            {},
            InvalidParameterError,
            "k=7 is more than the 6 experts that router layers.0.gate",
        ),
        (
            TablePolicy(DecisionTable.top_k(2, 1, 8)),
            {},
            InvalidParameterError,
            "the table has 8 experts, router layers.0.gate has 16",
        ),
        (
            TablePolicy(DecisionTable.top_k(2, 1, E)),
            {"index": 1},
            CalibrationMismatchError,
            "the table has 1 layers, the model has a router number 1",
        ),
        (
            PValuePolicy(max_k=8),
            {"can_widen": False},
            InvalidParameterError,
            "max_k=8 asks router layers.0.gate for more than the 6 experts",
        ),
        (
            PValuePolicy(max_k=17),
            {},
            InvalidParameterError,
            "max_k must not exceed the number of experts, 16",
        ),
        (PValuePolicy(min_k=7), {}, InvalidParameterError, "min_k=7 is more than the 6 experts"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_when_bound(policy, changes, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        policy.bind([context(**changes)])


def test_unknown_settings():
    with pytest.raises(
        InvalidParameterError, match=r"weights must be 'model', 'preserve' or 'sum', got 'norm'\."
    ):
        TopKPolicy(2, weights="norm")
    with pytest.raises(InvalidParameterError, match="unknown pvalues='kde'"):
        PValuePolicy("kde")
    with pytest.raises(InvalidParameterError, match="rule must be 'step_up' or 'step_down', got 'up'"):
        DecisionTable.top_k(2, 1, E).with_thresholds(torch.zeros(1, E), rule="up")


class Broken(RoutingPolicy):
    """Keeps everything, but for what a test changes."""

    name = "broken"

    def __init__(self, change):
        super().__init__()
        self.change = change

    def decide(self, logits_TE, own_weights_TK, own_experts_TK, context):
        keep_TK = torch.ones_like(own_experts_TK, dtype=torch.bool)
        counts_T = keep_TK.sum(-1)
        kept = Kept(keep_TK, counts_T, counts_T)
        return self.change(self.shrink(kept, logits_TE, own_weights_TK, own_experts_TK, context))


def changed(**changes):
    return lambda decision: replace(
        decision, **{name: change(getattr(decision, name)) for name, change in changes.items()}
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.weights_TK, InvalidTypeError, "must return a RoutingDecision, got Tensor; return self.shrink("),
        (changed(weights_TK=lambda x: x.double()), InvalidTypeError, "weights_TK must be a tensor of torch.float32, got torch.float64."),
        (changed(counts_T=lambda x: 3), InvalidTypeError, "counts_T must be a tensor of torch.int64, got int."),
        (changed(experts_TK=lambda x: x[:, :2]), InvalidInputError, "experts_TK must have shape (8, 6), got (8, 2)."),
        (changed(experts_TK=lambda x: x - 99), InvalidInputError, "experts_TK must be an expert, or 16 for an empty slot, 0 to 16, got values from -"),
        (changed(counts_T=lambda x: x + 1), InvalidInputError, "counts_T must be a number of slots, 0 to 6, got values from 7 to 7."),
    ],
)  # fmt: skip
def test_a_policy_that_returns_something_else_is_told_at_its_first_decision(
    tiny_olmoe, change, error, message
):
    with RoutingIntegration(tiny_olmoe(), Broken(change)) as it, pytest.raises(error) as caught:
        it.model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]))
    assert str(caught.value).startswith("policy 'broken' (Broken) at router model.layers.0.mlp.gate: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("pvalues", "error", "message"),
    [
        (lambda logits, context: logits, InvalidInputError, "p-values must lie between 0 and 1, got values from -"),
        (lambda logits, context: logits.long(), InvalidTypeError, "pvalues must give a floating-point tensor like the logits, got torch.int64."),
        (lambda logits, context: logits[:, :3], InvalidInputError, "pvalues must have the shape of the logits, (200, 16) up to leading dimensions, got (200, 3)."),
    ],
)  # fmt: skip
def test_p_values_that_are_none(pvalues, error, message):
    policy = PValuePolicy(pvalues)
    policy.bind([context()])
    logits = torch.randn(T, E)
    with pytest.raises(error) as caught:
        policy.decide(logits, *own_choice(logits), context())
    assert message in str(caught.value)
    if pvalues(logits, None) is logits:
        with pytest.raises(error, match="p-values must lie between 0 and 1"):
            benjamini_hochberg_routing(logits, pvalues=logits)


def test_a_procedure_of_ones_own():
    """BH by another name decides as BH; nonsense is told."""
    mine = Procedure(
        name="mine", critical_values=lambda alpha, num: [alpha * k / num for k in range(1, num + 1)]
    )
    logits = torch.randn(T, E)
    decisions = []
    for procedure in ("bh", mine):
        policy = PValuePolicy(alpha=0.3, procedure=procedure)
        policy.bind([context()])
        decisions.append(policy.decide(logits, *own_choice(logits), context()))
        counts = benjamini_hochberg_routing(logits, 0.3, procedure=procedure)[2]
        assert torch.equal(counts, benjamini_hochberg_routing(logits, 0.3)[2])
    assert torch.equal(decisions[0].experts_TK, decisions[1].experts_TK)
    assert len(decisions[0].counts_T.unique()) > 2
    all_of_them = Procedure(name="all", count=lambda p_TE, alpha: torch.full(p_TE.shape[:1], p_TE.shape[1]))
    assert benjamini_hochberg_routing(logits, max_k=E, procedure=all_of_them)[2].unique().tolist() == [E]
    falling = Procedure(name="falling", critical_values=lambda alpha, num: torch.linspace(alpha, 0, num))
    with pytest.raises(
        InvalidParameterError, match="of procedure 'falling' must be 16 numbers that do not decrease"
    ):
        benjamini_hochberg_routing(logits, procedure=falling)
    with pytest.raises(InvalidParameterError, match="exactly one of critical_values and count, got neither"):
        Procedure(name="none")


def test_a_table_whose_sizes_follow_the_token():
    """The policy's statistic, its widened choice and its buffers; None and slopes do not mix."""
    generator = torch.Generator().manual_seed(2)
    logits_TE = torch.randn(50, 6, generator=generator)
    own_weights_TK, own_experts_TK = torch.softmax(logits_TE, -1).topk(3, -1)
    slopes_LDE = torch.randn(1, 6, 6, generator=generator)
    center_LD = torch.randn(1, 6, generator=generator)
    table = DecisionTable(
        thresholds_LE=torch.full((1, 6), -1.5),
        offset_LE=torch.zeros(1, 6),
        slopes_LDE=slopes_LDE,
        center_LD=center_LD,
    )
    context = RoutingContext(
        path="gate", index=0, num_experts=6, empty=6, top_k=3, route_norm="none", can_widen=True
    )
    told_TE = ((logits_TE - center_LD[0]) @ slopes_LDE[0]).clamp(-2, 2)
    expected_TE = torch.log_softmax(logits_TE, -1) + told_TE
    for max_k in (None, 5):
        policy = TablePolicy(table, max_k=max_k)
        policy.bind([context])
        torch.testing.assert_close(policy.statistic(logits_TE, context), expected_TE, atol=2e-6, rtol=0)
        counts_T = policy.decide(logits_TE, own_weights_TK, own_experts_TK, context).counts_T
        judged_TE = expected_TE if max_k else expected_TE.gather(-1, own_experts_TK)
        assert torch.equal(counts_T, (judged_TE >= -1.5).sum(-1).clamp(1, max_k or 3))
    buffers = [b.data_ptr() for b in policy._rows["gate"]]
    policy.set_table(replace(table, slopes_LDE=-slopes_LDE, center_LD=center_LD + 1))
    assert [b.data_ptr() for b in policy._rows["gate"]] == buffers
    assert torch.equal(policy._rows["gate"][2].float(), -slopes_LDE[0])
    with pytest.raises(
        InvalidParameterError, match="the new table has follows_token=False, the one in use True"
    ):
        policy.set_table(replace(table, slopes_LDE=None, center_LD=None))


def test_a_tables_slopes_are_checked():
    parts = {"thresholds_LE": torch.zeros(2, 4), "offset_LE": torch.zeros(2, 4)}
    with pytest.raises(InvalidInputError, match="slopes_LDE and center_LD belong together"):
        DecisionTable(**parts, slopes_LDE=torch.zeros(2, 4, 4))
    with pytest.raises(InvalidInputError, match=r"slopes_LDE must be float32 of shape \(2, 4, 4\)"):
        DecisionTable(**parts, slopes_LDE=torch.zeros(2, 4, 3), center_LD=torch.zeros(2, 4))
    with pytest.raises(InvalidInputError, match="center_LD must be finite"):
        DecisionTable(**parts, slopes_LDE=torch.zeros(2, 4, 4), center_LD=torch.full((2, 4), float("nan")))
