"""The price on loads: the rule against its definition as a loop, steps, budgets, statistics, and decoding with a model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from bh_routing import BHRoutingIntegration, RoutingSettings
from bh_routing.calibration.loads import draw_steps, load_budget, solve_price, whole_table
from bh_routing.decision.price import Step, price_loads
from bh_routing.decision.types import Limits
from bh_routing.errors import InvalidInputError, InvalidParameterError
from bh_routing.patching.calls import as_steps
from bh_routing.policies import FixedPrice, PricePolicy, RoutingContext, TablePolicy
from bh_routing.telemetry import figures as telemetry_figures
from caches import after

E, K = 12, 4


def definition(
    keep, first, loss, experts, *, shape, price_load, price_pair, priced, votes, resident
) -> tuple[set[tuple[int, int]], set[tuple[int, int]], list[set[int]]]:
    """Pairs (token, slot) that run, those that others paid for, experts loaded by step: the rule, word for word."""
    batch, steps = shape
    runs, shared, loads = set(), set(), []
    for s in range(steps):
        tokens = [b * steps + s for b in range(batch)]
        members = [t for t in tokens if priced[t]]
        for t in tokens:
            if not priced[t]:
                runs |= {(t, k) for k in range(K) if keep[t][k]}
        worth, loaded = Counter(), {e for e in range(E) if resident[e]}
        for t in members:
            for k in range(K):
                if keep[t][k] and votes[t]:
                    if first[t][k]:
                        loaded.add(experts[t][k])
                    worth[experts[t][k]] += max(loss[t][k] - price_pair, 0.0)
        loaded |= {e for e in range(E) if worth[e] >= price_load}
        loads.append(loaded)
        for t in members:
            for k in range(K):
                e = experts[t][k]
                if keep[t][k] and e in loaded and (first[t][k] or loss[t][k] >= price_pair):
                    runs.add((t, k))
                    alone = first[t][k] or max(loss[t][k] - price_pair, 0.0) >= price_load
                    if votes[t] and not alone and not resident[e]:
                        shared.add((t, k))
    return runs, shared, loads


def case(seed: int, batch: int, steps: int) -> dict[str, Any]:
    """Losses that are multiples of 1/8, so that sums are exact and ties are many; some of them of masked experts."""
    g = torch.Generator().manual_seed(seed)
    num = batch * steps
    experts = torch.rand(num, E, generator=g).argsort(-1)[:, :K]
    loss = torch.randint(0, 9, (num, K), generator=g) / 8.0
    keep = torch.rand(num, K, generator=g) < 0.8
    best = loss.masked_fill(~keep, -1.0).argmax(-1, keepdim=True)
    keep = keep.scatter(1, best, True)
    return {
        "keep": keep,
        "first": torch.zeros_like(keep).scatter(1, best, True),
        "loss": loss,
        "experts": experts,
        "priced": torch.rand(num, generator=g) < 0.8,
        "votes": torch.rand(num, generator=g) < 0.7,
        "resident": torch.rand(E, generator=g) < 0.2,
    }


@pytest.mark.parametrize("min_k", [0, 1])
@pytest.mark.parametrize("price_pair", [0.0, 0.25])
@pytest.mark.parametrize("price_load", [0.0, 0.5, 1.0, 2.5, math.inf])
@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (5, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_rule_is_its_definition(shape, price_load, price_pair, min_k, masked) -> None:
    for seed in range(8):
        made = case(seed, *shape)
        if not min_k:
            made["first"] = torch.zeros_like(made["first"])
        if not masked:
            made |= {
                "priced": torch.ones(len(made["loss"])).bool(),
                "votes": torch.ones(len(made["loss"])).bool(),
            }
            made["resident"] = torch.zeros(E).bool()
        names = {"priced_T": made["priced"], "votes_T": made["votes"], "resident_E": made["resident"]}
        got = price_loads(
            made["keep"],
            made["first"],
            made["loss"],
            made["experts"],
            shape=shape,
            num_experts=E,
            price_load=torch.tensor(price_load),
            price_pair=price_pair,
            **(names if masked else {}),
        )
        lists = {name: tensor.tolist() for name, tensor in made.items()}
        runs, shared, loads = definition(**lists, shape=shape, price_load=price_load, price_pair=price_pair)
        assert {tuple(p) for p in got.keep_TK.nonzero().tolist()} == runs
        assert {tuple(p) for p in got.shared_TK.nonzero().tolist()} == shared
        assert [set(row.nonzero().flatten().tolist()) for row in got.loaded_SE] == loads


# -- policies ----------------------------------------------------------------------------------------------------

CONTEXT = RoutingContext(
    path="layers.0.gate", index=0, num_experts=16, empty=16, top_k=4, route_norm="none", can_widen=True
)


def bound(
    calibration: Any, price: float, context: RoutingContext = CONTEXT, **more: Any
) -> tuple[PricePolicy, TablePolicy]:
    """A price on BH at 0.1, and BH at 0.1."""
    table = calibration.table(0.1)
    price_policy, plain = (
        PricePolicy(table, prices=FixedPrice(price, 1), **more),
        TablePolicy(table, backend="torch"),
    )
    for policy in (price_policy, plain):
        policy.bind([context])
    return price_policy, plain


def router(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Logits, weights and choice of a router, with a masked expert, and tokens without a usable logit."""
    logits = (2.0 * torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))).to(dtype)
    logits[::3, 5] = -torch.inf
    if tokens > 4:
        logits[2, 1], logits[4, 1] = torch.nan, torch.inf
    weights, experts = logits.nan_to_num(0.0).softmax(-1).topk(4, -1)
    return logits, weights, experts


def same(one: Any, other: Any) -> None:
    for name in ("weights_TK", "experts_TK", "counts_T", "raw_counts_T", "dropped_TK", "fallback_T"):
        assert torch.equal(
            getattr(one, name).view(-1).nan_to_num(-7.0), getattr(other, name).view(-1).nan_to_num(-7.0)
        ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 24])
def test_price_0_is_the_tables_decision(synthetic_calibration, tokens, dtype) -> None:
    policy, plain = bound(synthetic_calibration(), 0.0)
    asked = router(tokens, dtype=dtype)
    for shape in ((tokens, 1), (1, tokens)):
        step = replace(CONTEXT, step=Step(shape=shape, tokens=shape[0]))
        same(policy.decide(*asked, step), plain.decide(*asked, CONTEXT))
    dear, _ = bound(synthetic_calibration(), 1e9)
    same(dear.decide(*asked, CONTEXT), plain.decide(*asked, CONTEXT))  # a prompt has no price


def test_columns_are_priced_one_by_one(synthetic_calibration) -> None:
    policy, _ = bound(synthetic_calibration(), 0.02)
    asked = router(30)
    whole = policy.decide(*asked, replace(CONTEXT, step=Step(shape=(5, 6), tokens=5)))
    assert whole.shared_TK.any()
    for column in range(6):
        rows = torch.arange(column, 30, 6)
        alone = policy.decide(*(x[rows] for x in asked), replace(CONTEXT, step=Step(shape=(5, 1), tokens=5)))
        same(alone, replace(whole, **{n: getattr(whole, n)[rows] for n in (
            "weights_TK", "experts_TK", "counts_T", "raw_counts_T", "dropped_TK", "fallback_T"
        )}))  # fmt: skip


def test_padding_never_votes_and_is_served_by_what_is_loaded(synthetic_calibration) -> None:
    policy, _ = bound(synthetic_calibration(), 0.02)
    logits, weights, experts = router(12)
    real = torch.tensor([True] * 8 + [False] * 4)
    step = replace(CONTEXT, mask_T=real, step=Step(shape=(12, 1), tokens=12))
    masked = policy.decide(logits, weights, experts, step)
    few = policy.decide(
        logits[:8], weights[:8], experts[:8], replace(CONTEXT, step=Step(shape=(8, 1), tokens=12))
    )
    assert torch.equal(masked.experts_TK[:8], few.experts_TK)
    loaded = set(few.experts_TK.flatten().tolist())
    assert set(masked.experts_TK[8:].flatten().tolist()) <= loaded | {16}
    assert not masked.shared_TK[8:].any()


@pytest.mark.parametrize("given", ["mapping", "callable"])
def test_resident_experts_are_free(synthetic_calibration, given) -> None:
    mask = torch.zeros(16, dtype=torch.bool)
    mask[:8] = True
    resident = {CONTEXT.path: mask} if given == "mapping" else {CONTEXT.path: mask}.__getitem__
    policy, plain = bound(synthetic_calibration(), 1e9, resident=resident)
    asked = router(1)
    step = replace(CONTEXT, step=Step(shape=(1, 1), tokens=1))
    got, kept = policy.decide(*asked, step), plain.decide(*asked, CONTEXT)
    best = int(policy.statistic(asked[0], CONTEXT).gather(-1, asked[2]).argmax())
    for slot, expert in enumerate(
        asked[2][0].tolist()
    ):  # one sequence: a threshold, and what is in memory is free
        runs = not kept.dropped_TK[0, slot] and (expert < 8 or slot == best)
        assert bool(got.dropped_TK[0, slot]) is not runs
    wrong = PricePolicy(policy.table, prices=FixedPrice(1.0, 1), resident=lambda path: torch.ones(3))
    wrong.bind([CONTEXT])
    with pytest.raises(
        InvalidInputError, match=r"bool mask of shape \(16,\) for router layers.0.gate, got torch.float32"
    ):
        wrong.decide(*asked, step)


def test_statistics_count_steps_as_a_loop_does(synthetic_calibration) -> None:
    resident = torch.zeros(16, dtype=torch.bool)
    resident[3] = True
    context = replace(CONTEXT, expert_bytes=10)
    policy, _ = bound(synthetic_calibration(), 0.05, resident={context.path: resident})
    telemetry = telemetry_figures.Telemetry([context], [4])
    loads, own_loads, shared = Counter(), Counter(), 0
    for seed, (batch, steps) in enumerate([(1, 1), (5, 1), (4, 6), (40, 30), (3, 2)]):
        asked = router(batch * steps, seed)
        mask = (
            None
            if seed == 1
            else torch.rand(batch * steps, generator=torch.Generator().manual_seed(seed)) < 0.8
        )
        if seed == 4:
            mask = torch.tensor([True, False] * 3)  # a step of padding only
        priced = torch.arange(steps).repeat(batch) > 0 if seed == 3 else None
        asked_now = replace(
            context, mask_T=mask, step=Step(shape=(batch, steps), tokens=batch, priced_T=priced)
        )
        decision = policy.decide(*asked, asked_now)
        telemetry.update(asked_now, decision)
        for s in range(steps):
            members = [b * steps + s for b in range(batch)]
            members = [t for t in members if (mask is None or mask[t]) and (priced is None or priced[t])]
            if members:
                read = {e for t in members for e in decision.experts_TK[t].tolist()} - {16, 3}
                own = {e for t in members for e in decision.own_experts_TK[t].tolist()} - {3}
                loads[len(read)] += 1
                own_loads[len(own)] += 1
                shared += sum(int(decision.shared_TK[t].sum()) for t in members)
    layer = telemetry.to_dict()["layers"][0]
    assert layer["load_histogram"] == [loads[n] for n in range(17)]
    assert layer["own_load_histogram"] == [own_loads[n] for n in range(17)]
    assert (layer["shared_pairs"], layer["steps"]) == (shared, sum(loads.values()))
    saved = sum(n * c for n, c in own_loads.items()) - sum(n * c for n, c in loads.items())
    assert (layer["loads_saved"], layer["bytes_saved"]) == (saved, 10 * saved)
    assert layer["mean_loads"] == pytest.approx(sum(n * c for n, c in loads.items()) / sum(loads.values()))
    assert shared > 0
    assert saved > 0
    telemetry.reset()
    assert telemetry.to_dict()["total"]["steps"] == 0


# -- budgets -----------------------------------------------------------------------------------------------------


def test_steps_are_of_different_documents(synthetic_calibration) -> None:
    reservoir = synthetic_calibration(reservoir=600).reservoir
    documents = torch.arange(600) % 7
    known = replace(reservoir, document_N=documents)
    drawn = draw_steps(known, 5, 300)
    assert drawn.shape == (300, 5)
    assert all(len(set(row)) == 5 for row in documents[drawn].tolist())
    spread = documents[draw_steps(known, 16, 300)]
    assert all(max(Counter(row).values()) <= 3 for row in spread.tolist())  # again only when all have come
    assert torch.equal(drawn, draw_steps(known, 5, 300))
    assert draw_steps(reservoir, 5, 300).max() < 600  # documents that are not known


@pytest.mark.parametrize("one_price", [True, False])
def test_a_budget_of_loads_is_met_on_the_steps_that_it_is_solved_on(synthetic_calibration, one_price) -> None:
    calibration = synthetic_calibration()
    table = whole_table(calibration, calibration.settings(size="sensitivity"))
    budget = load_budget(calibration, 7.0, table, Limits(), first=0, one_price=one_price)
    for tokens in (4, 16):
        prices = budget.at(tokens)
        met = [
            float((w >= p).sum(-1).double().mean())
            for w, p in zip(budget.worths(tokens), prices, strict=True)
        ]
        assert sum(met) / 2 == pytest.approx(7.0, rel=0.01)  # one step's load more or less
        assert (len(set(prices)) == 1) is one_price
        if not one_price:
            assert met == pytest.approx([7.0, 7.0], rel=0.01)
    assert budget.at(16)[0] > budget.at(4)[0]  # more sequences share
    assert budget.at(1) == (0.0, 0.0)  # a token has four
    lower = load_budget(calibration, 1.0, table, Limits(), first=1, one_price=True)
    assert lower.at(16) == (math.inf, math.inf)  # the best of every token is more


def test_the_price_between_loads() -> None:
    worth = torch.tensor([[0.0, 1.0, 2.0, torch.inf], [0.0, 0.5, 3.0, 4.0]])
    for loads, price, reached in (
        (0.5, math.inf, 0.5),
        (1.0, 4.0, 1.0),
        (2.0, 2.0, 2.0),
        (3.0, 0.0, 3.0),
        (9.0, 0.0, 3.0),
    ):
        assert solve_price(worth, loads) == (price, reached)


# -- with a model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration() -> Any:
    from bh_routing import Calibration
    from bh_routing.models import bundled_calibration

    return Calibration.load(bundled_calibration())


@pytest.fixture
def prompts(nano_tokenizer: Any) -> torch.Tensor:
    from bh_routing.data import sample_text

    ids = nano_tokenizer(sample_text()[:6000], return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: 6 * 24].view(6, 24)


def total(integration: Any) -> dict[str, Any]:
    return integration.telemetry.to_dict()["total"]


def histograms(integration: Any) -> list[list[int]]:
    return [layer["load_histogram"] for layer in integration.telemetry.to_dict()["layers"]]


def test_a_teacher_forced_batch_is_what_generate_does(nano_model, calibration, prompts) -> None:
    """Same tokens, same loads: the prompt without a price, then one step after another."""
    new, length = 8, prompts.shape[1]
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompts)
    integration = BHRoutingIntegration(nano_model, calibration=calibration, distinct_experts=14)
    with integration, torch.no_grad():
        decoded = nano_model.generate(prompts, attention_mask=mask, **options)
        told = (histograms(integration), total(integration))
        integration.reset_stats()
        with as_steps(length):
            logits = nano_model(input_ids=decoded[:, :-1], use_cache=False).logits
        forced = (histograms(integration), total(integration))
    assert torch.equal(logits[:, length - 1 :].argmax(-1), decoded[:, length:])
    assert told[0] == forced[0]
    for name in ("steps", "mean_loads", "own_mean_loads", "shared_pairs", "bytes_saved"):
        assert told[1][name] == forced[1][name], name
    assert told[1]["steps"] == 4 * (new - 1)  # the first new token comes out of the prompt
    assert told[1]["mean_loads"] < 0.6 * told[1]["own_mean_loads"]


def test_sequences_that_have_ended_do_not_vote(nano_model, calibration, prompts) -> None:
    ended = []
    integration = BHRoutingIntegration(nano_model, calibration=calibration, price_load=0.01)
    integration.watchers.append(lambda router, context, decision, logits: ended.append((context, decision)))
    with integration, torch.no_grad():
        first = nano_model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        stop = int(first[0, -2])  # what the first sequence says in its second step ends it
        ended.clear()
        nano_model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=0,
        )
    context, decision = ended[-1]
    assert context.mask_T is not None
    assert not context.mask_T.all()
    assert context.mask_T.any()
    running = set(decision.experts_TK[context.mask_T].flatten().tolist())
    assert set(decision.experts_TK[~context.mask_T].flatten().tolist()) <= running | {context.empty}


def test_levels_and_prices_change_while_it_runs(nano_model, calibration, prompts) -> None:
    integration = BHRoutingIntegration(nano_model, calibration=calibration, distinct_experts=14)

    def loads(**level: Any) -> tuple[float, float]:
        if level:
            integration.set_level(**level)
        integration.reset_stats()
        nano_model(input_ids=prompts)
        return total(integration)["mean_loads"], total(integration)["mean_experts"]

    with integration, torch.no_grad(), as_steps():
        first, again = loads(), loads(distinct_experts=10)
        assert again[0] < first[0] == pytest.approx(14, rel=0.15)  # another text than the calibration's
        assert loads(price_load=0.0)[1] == 8.0
        both = loads(experts_per_token=4, distinct_experts=14)
        assert both[1] < first[1]
        assert integration.budget == 4
        kept = loads(distinct_experts=100)  # the level stays
        assert integration.get_routing_stats()["distinct_experts"] == 100
    with pytest.raises(InvalidParameterError, match="a budget of loads or their price, got both"):
        integration.set_level(distinct_experts=3, price_load=1.0)
    plain = BHRoutingIntegration(nano_model, calibration=calibration, experts_per_token=4)
    with plain, torch.no_grad():
        nano_model(input_ids=prompts)
    assert kept[1] == total(plain)["mean_experts"]
    with pytest.raises(
        InvalidParameterError, match="settings of a TablePolicy, which is in use, got some of a PricePolicy"
    ):
        plain.set_level(distinct_experts=14)


def test_price_0_leaves_generation_as_it_was(nano_model, calibration, prompts) -> None:
    options = {
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
    }
    options |= {"return_dict_in_generate": True, "output_logits": True}
    for level in ({}, {"experts_per_token": 4}):
        found = []
        settings = ({"price_load": 0.0} | level, level)[: 2 if level else 1]
        for chosen in settings:
            with BHRoutingIntegration(nano_model, calibration=calibration, **chosen):
                found.append(nano_model.generate(prompts, **options).logits)
        if not level:
            found.append(nano_model.generate(prompts, **options).logits)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_decoding_takes_the_same_price(nano_model, calibration, prompts) -> None:
    integration = BHRoutingIntegration(nano_model, calibration=calibration, distinct_experts=14)
    torch._dynamo.reset()

    def step() -> torch.Tensor:
        with torch.no_grad():
            cache = nano_model(input_ids=prompts[:, :8], use_cache=True).past_key_values
            return run(input_ids=prompts[:, 8:9], **after(nano_model, cache)).logits

    with integration:
        run: Any = nano_model
        eager = step()
        run = torch.compile(nano_model, backend="eager", fullgraph=True)
        integration.policy._price.clear()  # a batch size that was never seen
        assert torch.allclose(step(), eager, atol=5e-3)  # the compensation is summed in bfloat16
        integration.reset_stats()
        integration.set_level(price_load=0.0)  # the same graph
        step()
        assert total(integration)["loads_saved"] == 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"distinct_experts": 0},
            "distinct_experts must be a number of experts per layer and step above 0, got 0",
        ),
        ({"price_load": -1.0}, "price_load must be a finite number of at least 0, got -1.0"),
        ({"price_load": math.nan}, "price_load must be a finite number of at least 0, got nan"),
        (
            {"distinct_experts": 3, "price_load": 1.0},
            "got both distinct_experts=3 and price_load=1.0; give one of them",
        ),
        ({"resident": {}}, "resident says which loads are free, which needs a price on loads"),
        (
            {"distinct_experts": 3, "batch_invariant": True},
            "do not depend on the other sequences of a batch, and a price on loads",
        ),
        ({"pvalues": "batch", "batch_invariant": True}, "and pvalues='batch' makes them depend on those"),
    ],
)
def test_settings_that_cannot_be(settings, match) -> None:
    with pytest.raises(InvalidParameterError, match=match):
        RoutingSettings(**settings)


def test_what_a_calibration_cannot_price(synthetic_calibration, nano_model, calibration) -> None:
    plain = synthetic_calibration(sensitivity=False)
    with pytest.raises(
        InvalidParameterError,
        match="one price for the whole model, which needs sizes in the units of the loss",
    ):
        RoutingSettings(price_load=0.1).policy(plain)
    policy = RoutingSettings(distinct_experts=12).policy(plain)  # one price for each layer
    assert len(set(policy.prices.at(16))) == 2
    with pytest.raises(InvalidParameterError, match="distinct_experts=7 needs a calibration"):
        RoutingSettings(distinct_experts=7).policy()
    with pytest.raises(
        InvalidParameterError, match="acts on a decision table, which the procedure 'storey' does not have"
    ):
        RoutingSettings(distinct_experts=7, alpha=0.1, procedure="storey").policy(plain)
    with pytest.raises(
        InvalidParameterError, match="decides within the model's own choice, of 8 experts in router"
    ):
        BHRoutingIntegration(nano_model, calibration=calibration, distinct_experts=20, max_k=12)
