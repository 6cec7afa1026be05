"""The routing rules to compare with: hand-computed choices, the shared budget, the allocation, the solver."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from bh_routing import RoutingIntegration, TopKPolicy
from bh_routing.decision.price import Step
from bh_routing.errors import BudgetError, InvalidInputError, InvalidParameterError
from bh_routing.evaluation import baselines
from bh_routing.evaluation.baselines import (
    AdaptivePolicy,
    AllocatedPolicy,
    Baseline,
    BatchRule,
    BatchTopKPolicy,
    DynamicSkippingPolicy,
    EntropyPolicy,
    MinPPolicy,
    OpportunisticPolicy,
    PerLayerPolicy,
    RandomPolicy,
    SequenceTopKPolicy,
    SharedExpertsPolicy,
    ThresholdPolicy,
    TopPPolicy,
    UniformPolicy,
    allocate,
    mean_experts,
    solve,
)
from bh_routing.evaluation.entries import POLICIES
from bh_routing.evaluation.profile import lexi_costs, loss_costs
from bh_routing.evaluation.routing_log import RoutingLog, log_routing
from bh_routing.policies import RoutingContext

# every rule that is exported, by its name
BASELINES = {
    rule.name: rule
    for rule in vars(baselines).values()
    if isinstance(rule, type) and issubclass(rule, Baseline) and rule is not Baseline
}

# Five experts, four slots; the probabilities of token 0 are 0.5, 0.2, 0.15, 0.1 (and 0.05 for the expert passed over).
PROBABILITIES = torch.tensor([[0.2, 0.5, 0.1, 0.15, 0.05], [0.24, 0.22, 0.2, 0.18, 0.16]])
OWN = torch.tensor([[1, 0, 3, 2], [0, 1, 2, 3]])
CONTEXT = RoutingContext(path="r", index=0, num_experts=5, empty=5, top_k=4, route_norm="none")


def decide(policy: Baseline, context: RoutingContext = CONTEXT, dtype: torch.dtype = torch.float32) -> Any:
    policy.bind([context])
    logits = PROBABILITIES.to(dtype).log() + 3.0
    return policy.decide(logits, PROBABILITIES.to(dtype).gather(-1, OWN), OWN, context)


@pytest.fixture
def log(tiny_olmoe: Any) -> RoutingLog:
    ids = torch.randint(3, 250, (6, 64), generator=torch.Generator().manual_seed(3))
    return log_routing(tiny_olmoe(), list(ids.split(1)))


@pytest.mark.parametrize(
    ("policy", "counts"),
    [
        (TopPPolicy(0.0), [1, 1]),
        (TopPPolicy(0.49), [1, 3]),
        (TopPPolicy(0.6), [2, 3]),
        (TopPPolicy(0.99), [4, 4]),
        (MinPPolicy(0.35), [2, 4]),
        (MinPPolicy(0.8), [1, 3]),
        (ThresholdPolicy(0.19), [2, 3]),
        (ThresholdPolicy(0.9), [1, 1]),
        (DynamicSkippingPolicy({"r": torch.tensor([1.0, 0.35, 0.35, 0.1])}), [2, 4]),
        (PerLayerPolicy([3]), [3, 3]),
        # H / log 5 is 0.833 and 0.994
        (EntropyPolicy([1, 3], [0.9]), [1, 3]),
        (AdaptivePolicy(0.5), [2, 2]),
        (AdaptivePolicy(0.0), [1, 1]),
    ],
)
def test_counts_by_hand(policy: Baseline, counts: list[int]) -> None:
    decision = decide(policy)
    assert decision.counts_T.tolist() == counts
    for t, count in enumerate(counts):  # OWN is in descending order of probability
        assert decision.experts_TK[t].tolist() == OWN[t, :count].tolist() + [5] * (4 - count)
        kept = PROBABILITIES[t, OWN[t, :count]].tolist()
        assert decision.weights_TK[t, :count].tolist() == kept
        assert not decision.weights_TK[t, count:].any()


def test_skipping_stops_at_the_first_skipped_expert() -> None:
    # rank 2 fails, rank 3 would pass by itself
    betas = {"r": torch.tensor([1.0, 0.3, 0.99, 0.0])}
    assert decide(DynamicSkippingPolicy(betas)).counts_T.tolist() == [2, 2]


def test_top_2_skipping_is_the_published_rule(tiny_olmoe: Any, token_ids: torch.Tensor) -> None:
    """NAEE: skip the second expert where w_2 < median(w_2 / w_1), per layer."""
    log = log_routing(tiny_olmoe(num_experts_per_tok=2), list(token_ids.split(1)))
    policy = DynamicSkippingPolicy.from_log(log, 0.5)
    policy.bind(log.contexts)
    for context in log.contexts:
        logits, weights, experts = log.layer(context.index)
        p = logits.softmax(-1).sort(-1, descending=True).values
        ratio = p[:, 1] / p[:, 0]
        expected = 1 + (ratio >= ratio.quantile(0.5)).long()
        counts = policy.decide(logits, weights, experts, context).counts_T
        # the median itself may round either way
        assert int((counts != expected).sum()) <= 1
        assert 0.45 < float((counts == 2).float().mean()) < 0.6


def test_uniform_weights() -> None:
    halves = torch.tensor([[0.5, 0.5, 0, 0]] * 2)
    assert torch.allclose(decide(UniformPolicy(2)).weights_TK, halves, atol=1e-6)  # float32 division
    kept = decide(UniformPolicy(2, weights="model")).weights_TK
    assert torch.allclose(kept, torch.tensor([[0.35, 0.35, 0, 0], [0.23, 0.23, 0, 0]]))


def test_random_is_seeded_and_keeps_its_number() -> None:
    context = replace(CONTEXT, top_k=4)
    logits = torch.randn(4000, 5)
    own = logits.topk(4).indices
    weights = logits.softmax(-1).gather(-1, own)

    def once(seed: int) -> Any:
        policy = RandomPolicy(2.25, seed=seed)
        policy.bind([context])
        return policy.decide(logits, weights, own, context)

    first, again, other = once(0), once(0), once(1)
    assert torch.equal(first.experts_TK, again.experts_TK)
    assert not torch.equal(first.experts_TK, other.experts_TK)
    assert set(first.counts_T.unique().tolist()) == {2, 3}
    # four standard errors of a share of 0.25 among 4000
    assert abs(float(first.counts_T.double().mean()) - 2.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    share_K = (~first.dropped_TK).double().mean(0)
    assert float((share_K - 2.25 / 4).abs().max()) < 4 * (0.25 / 4000) ** 0.5


def test_sequences_share_their_budget() -> None:
    batch, length, num = 3, 7, 4
    logits = torch.randn(batch * length, 9)
    own = logits.topk(num).indices
    weights = logits.softmax(-1).gather(-1, own)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, 4:] = False
    context = RoutingContext(
        path="r",
        index=0,
        num_experts=9,
        empty=9,
        top_k=num,
        route_norm="none",
        shape=(batch, length),
        mask_T=mask.view(-1),
    )
    policy = SequenceTopKPolicy(2.0)
    policy.bind([context])
    counts = policy.decide(logits, weights, own, context).counts_T.view(batch, length)
    assert not policy.causal
    for b in range(batch):
        real = mask[b]
        assert int(counts[b][real].sum()) == 2 * int(real.sum())
        # the definition: one each, then the largest of what is left in the sequence
        p = weights.view(batch, length, num)[b][real]
        rest = p[:, 1:].flatten().sort(descending=True).values
        bar = rest[int(real.sum()) - 1]
        assert torch.equal(counts[b][real], 1 + (p[:, 1:] >= bar).sum(-1))


def test_a_layer_has_its_share() -> None:
    contexts = [replace(CONTEXT, path=str(i), index=i) for i in range(2)]
    policy = AllocatedPolicy([1.0, 3.5])
    policy.bind(contexts)
    logits = PROBABILITIES.log()
    counts = [
        int(policy.decide(logits, PROBABILITIES.gather(-1, OWN), OWN, c).counts_T.sum()) for c in contexts
    ]
    assert counts == [2, 7]


def test_allocation_equals_brute_force() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        costs = torch.rand(4, 5, generator=generator).tolist()
        for total in (4, 9, 13, 20):
            every = [ks for ks in itertools.product(range(1, 6), repeat=4) if sum(ks) == total]
            best = min(sum(row[k - 1] for row, k in zip(costs, ks, strict=True)) for ks in every)
            chosen = allocate(costs, total)
            assert sum(chosen) == total
            assert sum(row[k - 1] for row, k in zip(costs, chosen, strict=True)) == pytest.approx(
                best, abs=1e-12
            )


def test_allocation_refuses_what_cannot_be() -> None:
    assert allocate([[1.0, 2.0], [3.0]], 9) == [2, 1]
    with pytest.raises(BudgetError, match="must give each of the 2 layers one expert, got 1 in all"):
        allocate([[1.0], [1.0]], 1)
    with pytest.raises(InvalidInputError, match="costs must be finite numbers"):
        allocate([[float("nan")]], 1)


FREE = sorted(set(BASELINES) - {"perlayer", "allocmoe", "uniform", "adaptive"})


@pytest.mark.parametrize(("name", "budget"), [*itertools.product(FREE, [2.0, 4.5]), ("adaptive", 2.0)])
def test_every_rule_meets_a_budget(name: str, budget: float, log: RoutingLog) -> None:
    policy = BASELINES[name].for_budget(budget, log)  # type: ignore[attr-defined]
    assert mean_experts(policy, log) == pytest.approx(budget, rel=0.02)


def test_a_budget_nobody_can_meet(log: RoutingLog) -> None:
    with pytest.raises(
        BudgetError, match=r"no value of topp's p selects 7 experts per token on average: 1 to 6 are"
    ):
        TopPPolicy.for_budget(7.0, log)
    with pytest.raises(
        BudgetError, match=r"seqtopk can keep 1 to 6 experts per token on average, got a budget of 0.5"
    ):
        SequenceTopKPolicy.for_budget(0.5, log)
    with pytest.raises(
        BudgetError, match=r"uniform keeps the same whole number .* got a budget of 2.5; use 2 or 3"
    ):
        UniformPolicy.for_budget(2.5, log)
    with pytest.raises(BudgetError, match=r"within 2 % of 2.5 experts per token: the mean jumps from 2 to 3"):
        solve(lambda x: TopKPolicy(max(1, round(x))), log, 2.5, 1.0, 6.0, "k")


def test_all_rules_are_seen() -> None:
    assert len(BASELINES) == 11


@pytest.mark.parametrize("policy", list(BASELINES.values()), ids=lambda p: p.name)
def test_rules_state_their_source_and_are_registered(policy: type[Baseline]) -> None:
    assert policy.name in POLICIES
    assert policy.source
    assert policy.__doc__


@pytest.mark.parametrize(
    "policy",
    [
        TopPPolicy(0.3),
        MinPPolicy(0.4),
        ThresholdPolicy(0.1),
        EntropyPolicy([1, 3], [0.7]),
        AdaptivePolicy(),
        RandomPolicy(2),
        UniformPolicy(2),
        SequenceTopKPolicy(2.5),
        PerLayerPolicy([2, 5]),
        AllocatedPolicy([2.0, 5.0]),
    ],
    ids=lambda p: p.name,
)
def test_a_patched_model_runs_and_is_restored(
    policy: Baseline, tiny_olmoe: Any, token_ids: torch.Tensor
) -> None:
    model = tiny_olmoe()
    with torch.no_grad():
        before = model(token_ids).logits
        with RoutingIntegration(model, policy) as integration:
            routed = model(token_ids).logits
            assert integration.telemetry.mean_experts_per_token < 6
        assert not torch.allclose(before, routed, atol=1e-3)
        assert torch.equal(before, model(token_ids).logits)


def test_tokens_without_finite_logits_keep_the_models_choice() -> None:
    logits = PROBABILITIES.log()
    logits[1, 0] = float("nan")
    for policy in (
        TopPPolicy(0.1),
        UniformPolicy(1, weights="model"),
        SequenceTopKPolicy(1.0),
        RandomPolicy(1),
    ):
        policy.bind([CONTEXT])
        own = PROBABILITIES.gather(-1, OWN)
        decision = policy.decide(logits, own, OWN, CONTEXT)
        assert torch.equal(decision.experts_TK[1], OWN[1])
        assert torch.equal(decision.weights_TK[1], own[1])
        assert decision.counts_T.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopPPolicy(1.5), "p must be a number from 0 to 1, got 1.5"),
        (lambda: EntropyPolicy([2], []), "entropy needs two or more ks and one threshold fewer, got 1 and 0"),
        (lambda: EntropyPolicy([4, 2], [0.1]), "entropy's ks and thresholds must ascend"),
        (lambda: RandomPolicy(0.5), "k must be at least 1, got 0.5"),
        (lambda: SequenceTopKPolicy(0), "k must be at least 1, got 0"),
        (lambda: decide(PerLayerPolicy([2, 2])), "needs one k for each of the 1 routers, got 2"),
        (lambda: decide(PerLayerPolicy([5])), "k=5 is more than the 4 experts that router r selects"),
        (lambda: decide(AllocatedPolicy([2.0, 2.0])), "needs one k for each of the 1 routers, got 2"),
        (lambda: decide(DynamicSkippingPolicy({})), "naee has no ratios for router r"),
    ],
)
def test_bad_parameters(make: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        make()


def test_profiles_fall_to_the_full_model(tiny_olmoe: Any, token_ids: torch.Tensor) -> None:
    model = tiny_olmoe()
    lexi = lexi_costs(model, batches=2, tokens=16)
    assert [len(row) for row in lexi] == [6, 6]
    for row in lexi:
        assert row[-1] == 0.0
        assert row == sorted(row, reverse=True)
        assert row[0] > 0
    losses = loss_costs(model, list(token_ids.split(1)))
    with torch.no_grad():
        logits = model(token_ids).logits[:, :-1].flatten(0, 1)
    full = float(torch.nn.functional.cross_entropy(logits, token_ids[:, 1:].flatten()))
    for row in losses:
        assert len(row) == 6
        assert row[-1] == pytest.approx(full, abs=1e-5)
        assert row[0] != row[-1]


def test_a_layer_of_fewer_experts_in_a_routing_log() -> None:
    contexts = tuple(
        RoutingContext(path=str(i), index=i, num_experts=num, empty=num, top_k=1)
        for i, num in enumerate((4, 3))
    )
    logits = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, -torch.inf]]])
    own = torch.tensor([[[3], [0]]])
    log = RoutingLog(contexts=contexts, logits_NLE=logits, experts_NLK=own, weights_NLK=torch.ones(1, 2, 1))
    assert [log.layer(i)[0].tolist() for i in range(2)] == [[[1.0, 2.0, 3.0, 4.0]], [[3.0, 2.0, 1.0]]]
    assert [ratios.tolist() for ratios in log.score_ratios()] == [[[1.0]], [[1.0]]]


# Three tokens of one step, five experts, two slots each; the step wants expert 1 most, then 0 (0.70), 2 (0.45), 3, 4.
STEP = torch.tensor([[0.2, 0.5, 0.15, 0.1, 0.05], [0.4, 0.3, 0.1, 0.15, 0.05], [0.1, 0.6, 0.2, 0.06, 0.04]])
STEP_OWN = torch.tensor([[1, 0], [0, 1], [1, 2]])
SHARED = replace(CONTEXT, top_k=2, can_widen=True, step=Step(shape=(3, 1), tokens=3))


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (
            OpportunisticPolicy(1),
            [{0, 1}, {0, 1}, {0, 1}],
        ),  # 0 and 1 are loaded; the third fills up with 0, not its own
        (OpportunisticPolicy(2), [{0, 1}, {0, 1}, {1, 2}]),
        (SharedExpertsPolicy(1), [{0, 1}, {0, 1}, {0, 1}]),  # its tokens' best are more than one
        (SharedExpertsPolicy(1, k0=0), [{1}, {1}, {1}]),
        (SharedExpertsPolicy(3), [{0, 1}, {0, 1}, {1, 2}]),
        (BatchTopKPolicy(1), [{1}, {1}, {1}]),
        (BatchTopKPolicy(2), [{0, 1}, {0, 1}, {1}]),
    ],
)
def test_shared_loads_by_hand(policy: BatchRule, chosen: list[set[int]]) -> None:
    policy.bind([SHARED])
    asked = (STEP.log() + 3.0, STEP.gather(-1, STEP_OWN), STEP_OWN)
    decision = policy.decide(*asked, SHARED)
    for t, experts in enumerate(chosen):
        assert set(decision.experts_TK[t].tolist()) - {5} == experts
        kept = decision.experts_TK[t][decision.experts_TK[t] < 5]
        assert torch.allclose(decision.weights_TK[t][decision.experts_TK[t] < 5], STEP[t, kept])
    columns = replace(
        SHARED, step=Step(shape=(1, 3), tokens=1)
    )  # each token a step of its own: nothing to share
    alone = policy.decide(*asked, columns)
    most = 2 if (policy.takes_others and policy.k0 != 0) or getattr(policy, "loads", 2) > 1 else 1
    assert all(len(set(row) - {5}) <= most for row in alone.experts_TK.tolist())
    prompt = policy.decide(*asked, replace(SHARED, step=None))  # the model's own
    assert torch.equal(prompt.experts_TK, STEP_OWN)
    assert torch.equal(prompt.weights_TK, asked[1])


def test_padding_asks_for_no_loads() -> None:
    real = torch.tensor([True, False, True])
    for policy in (OpportunisticPolicy(1), SharedExpertsPolicy(1), BatchTopKPolicy(1)):
        policy.bind([SHARED])
        decision = policy.decide(
            STEP.log(), STEP.gather(-1, STEP_OWN), STEP_OWN, replace(SHARED, mask_T=real)
        )
        assert set(decision.experts_TK.flatten().tolist()) == {1, 5}


def test_shared_loads_refuse() -> None:
    with pytest.raises(InvalidParameterError, match="oea chooses experts that router r did not select"):
        OpportunisticPolicy(1).bind([CONTEXT])
    with pytest.raises(InvalidParameterError, match="k0=3 is more than the 2 experts that router r selects"):
        OpportunisticPolicy(3).bind([SHARED])
    with pytest.raises(
        InvalidParameterError, match=r"xshare loads a whole number of experts, got loads=2\.5"
    ):
        SharedExpertsPolicy(2.5)
