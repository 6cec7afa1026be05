"""Telemetry against a plain loop over tokens, and where it must not count, synchronise or recompile.

Shape legend: T tokens, E experts, K slots of the router's own choice, S slots of the decision.
"""

import copy
import json
import math
import pickle
import statistics
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bh_routing.decision.types import RoutingDecision
from bh_routing.errors import InvalidInputError, MissingDependencyError
from bh_routing.policies import PValuePolicy, RoutingContext, TopKPolicy
from bh_routing.telemetry.counters import CALLS, TOKENS
from bh_routing.telemetry.figures import Telemetry

E, K = 16, 4


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def context(path="layers.0.gate", index=0, **more) -> RoutingContext:
    return RoutingContext(**{"path": path, "index": index, "num_experts": E, "empty": E, "top_k": K} | more)


def random_decision(generator, num_tokens, slots=K, empty=E, fallback=True, dtype=torch.float32):
    """Any decision that keeps the contract: counts within [1, slots], raw counts within [0, E]."""
    rand = partial(torch.rand, generator=generator)
    own = rand(num_tokens, E).argsort(-1)[:, :K]
    own_weights = (rand(num_tokens, K) / K).to(dtype)
    raw = torch.randint(0, E + 1, (num_tokens,), generator=generator)
    counts = raw.clamp(1, slots)
    broken = rand(num_tokens) < 0.2 if fallback else torch.zeros(num_tokens, dtype=torch.bool)
    counts = torch.where(broken, K, counts)
    if slots == K:
        keep = (rand(num_tokens, K).argsort(-1).argsort(-1) < counts[:, None]) | broken[:, None]
        experts, weights = own.masked_fill(~keep, empty), own_weights.masked_fill(~keep, 0.0)
    else:
        keep = torch.arange(slots) < counts[:, None]
        experts = rand(num_tokens, E).argsort(-1)[:, :slots]
        experts = torch.where(broken[:, None], nn.functional.pad(own, (0, slots - K), value=empty), experts)
        experts = experts.masked_fill(~keep, empty)
        weights = (rand(num_tokens, slots) / slots).to(dtype).masked_fill(~keep, 0.0)
        keep = (own[..., None] == experts[:, None]).any(-1)
    own_weights = own_weights.masked_fill(broken[:, None], float("nan"))
    weights = weights.masked_fill(broken[:, None], float("nan"))
    return RoutingDecision(
        weights_TK=weights,
        experts_TK=experts,
        counts_T=counts,
        raw_counts_T=raw,
        dropped_TK=~keep,
        own_weights_TK=own_weights,
        own_experts_TK=own,
        empty=empty,
        fallback_T=broken if fallback else None,
    )


def finite(values):
    return [v if math.isfinite(v) else 0.0 for v in values]


def loop(calls, slots=K, empty=E):
    """The definition of every figure, token by token; `calls` are (decision, mask_T or None)."""
    counts, raws, decided, own_all, gone, entropies = [], [], [], [], [], []
    selected = own_weight = lost = 0.0
    floor = ceiling = fallback = padding = kept_own = union = 0
    weight_by_expert = Counter()
    for decision, mask in calls:
        for t in range(len(decision.counts_T)):
            if mask is not None and not mask[t]:
                padding += 1
                continue
            count, raw = int(decision.counts_T[t]), int(decision.raw_counts_T[t])
            counts.append(count)
            weights = finite(decision.weights_TK[t].double().tolist())
            own_weights = finite(decision.own_weights_TK[t].double().tolist())
            experts = decision.experts_TK[t].tolist()
            own, dropped = decision.own_experts_TK[t].tolist(), decision.dropped_TK[t].tolist()
            if decision.fallback_T is not None and decision.fallback_T[t]:
                fallback += 1
            else:
                raws.append(raw)
                floor += count > raw
                ceiling += count < raw
                shares = [w / sum(weights) for w in weights]
                entropies.append(-sum(p * math.log(p) for p in shares if p > 0))
            chosen = [e for e in experts if e < empty]
            decided += chosen
            for e, w in zip(experts, weights, strict=True):
                weight_by_expert[e] += w
            own_all += own
            gone += [e for e, d in zip(own, dropped, strict=True) if d]
            selected += sum(weights)
            own_weight += sum(own_weights)
            lost += sum(w for w, d in zip(own_weights, dropped, strict=True) if d)
            kept_own += len(set(own) & set(chosen))
            union += len(set(own) | set(chosen))
    n = len(counts)
    load, own_load = Counter(decided), Counter(own_all)
    loads, own_loads = [load[e] for e in range(E)], [own_load[e] for e in range(E)]
    return {
        "router_calls": len(calls),
        "tokens": n,
        "decisions": n,
        "padding_tokens": padding,
        "fallback_tokens": fallback,
        "mean_experts": statistics.fmean(counts),
        "std_experts": statistics.pstdev(counts),
        "min_experts": min(counts),
        "max_experts": max(counts),
        "share_at_min": counts.count(min(counts)) / n,
        "share_at_max": counts.count(max(counts)) / n,
        "share_without_expert": counts.count(0) / n,
        "mean_raw_count": statistics.fmean(raws),
        "floor_tokens": floor,
        "ceiling_tokens": ceiling,
        "share_floor": floor / n,
        "share_ceiling": ceiling / n,
        "share_saved": 1 - sum(counts) / (n * K),
        "mean_selected_weight": selected / n,
        "mean_own_weight": own_weight / n,
        "mean_lost_weight": lost / n,
        "lost_weight_share": lost / own_weight,
        "mean_entropy": statistics.fmean(entropies),
        "own_kept_share": kept_own / (n * K),
        "decided_own_share": kept_own / sum(counts),
        "jaccard": kept_own / union,
        "load_imbalance": max(loads) / statistics.fmean(loads),
        "load_cv": statistics.pstdev(loads) / statistics.fmean(loads),
        "unused_experts": loads.count(0),
        "own_load_imbalance": max(own_loads) / statistics.fmean(own_loads),
        "own_load_cv": statistics.pstdev(own_loads) / statistics.fmean(own_loads),
        "own_unused_experts": own_loads.count(0),
        "count_histogram": [counts.count(k) for k in range(slots + 1)],
        "raw_count_histogram": [raws.count(k) for k in range(E + 1)],
        "expert_load": loads,
        "own_expert_load": own_loads,
        "dropped_load": [gone.count(e) for e in range(E)],
        "expert_weight": [weight_by_expert[e] for e in range(E)],
    }


def run(telemetry, calls, ctx):
    for decision, mask in calls:
        telemetry.update(replace(ctx, mask_T=mask), decision)


def random_calls(generator, slots=K, masked=True, **more):
    calls = []
    for num_tokens in (1, 7, 30):
        mask = torch.rand(num_tokens, generator=generator) < 0.7 if masked and num_tokens > 1 else None
        calls.append((random_decision(generator, num_tokens, slots, **more), mask))
    return calls


def assert_same(got, expected):
    for key, value in expected.items():
        # 1e-6: entropies are taken in float32; everything else agrees far closer
        assert got[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("fallback", [True, False], ids=["fallback", "finite"])
@pytest.mark.parametrize("slots", [K, 7], ids=["narrow", "wide"])
def test_equals_a_loop_over_tokens(generator, slots, fallback, masked, dtype):
    calls = random_calls(generator, slots, masked, fallback=fallback, dtype=dtype)
    telemetry = Telemetry([context()], [slots])
    run(telemetry, calls, context())
    expected = loop(calls, slots)
    layer = telemetry.to_dict()["layers"][0]
    assert_same(layer, expected)
    fixed = {"path": "layers.0.gate", "index": 0, "num_experts": E, "top_k": K, "slots": slots}
    no_steps = dict.fromkeys(("steps", "loads_saved", "bytes_saved", "shared_pairs"), 0)
    no_steps |= dict.fromkeys(("load_histogram", "own_load_histogram"), [0] * (E + 1))
    no_steps |= dict.fromkeys(("mean_loads", "own_mean_loads"))
    assert layer == fixed | no_steps | {key: layer[key] for key in expected}
    assert telemetry.mean_experts_per_token == pytest.approx(expected["mean_experts"])
    assert telemetry.std_experts_per_token == pytest.approx(expected["std_experts"])
    assert telemetry.total_forward_passes == len(calls)
    assert telemetry.num_tokens == expected["tokens"]


def test_counts_by_hand():
    """Two tokens of four slots: one keeps experts 2 and 0 and gives up 1 and 3, one keeps all; one is padding."""
    decision = RoutingDecision(
        weights_TK=torch.tensor([[0.4, 0.0, 0.1, 0.0], [0.25] * 4, [0.5, 0.0, 0.0, 0.0]]),
        experts_TK=torch.tensor([[2, E, 0, E], [0, 1, 2, 3], [5, E, E, E]]),
        counts_T=torch.tensor([2, 4, 1]),
        raw_counts_T=torch.tensor([1, 9, 1]),
        dropped_TK=torch.tensor([[False, True, False, True], [False] * 4, [False, True, True, True]]),
        own_weights_TK=torch.tensor([[0.4, 0.2, 0.1, 0.1], [0.25] * 4, [0.5, 0.1, 0.1, 0.1]]),
        own_experts_TK=torch.tensor([[2, 1, 0, 3], [0, 1, 2, 3], [5, 6, 7, 8]]),
        empty=E,
    )
    telemetry = Telemetry([context()], [K])
    telemetry.update(context(mask_T=torch.tensor([True, True, False])), decision)
    layer = telemetry.to_dict()["layers"][0]
    assert layer["count_histogram"] == [0, 0, 1, 0, 1]
    assert layer["expert_load"] == [2, 1, 2, 1] + [0] * 12
    assert layer["dropped_load"] == [0, 1, 0, 1] + [0] * 12
    assert (layer["tokens"], layer["padding_tokens"], layer["router_calls"]) == (2, 1, 1)
    assert (layer["floor_tokens"], layer["ceiling_tokens"], layer["mean_raw_count"]) == (1, 1, 5.0)
    assert layer["share_saved"] == 0.25
    assert layer["mean_lost_weight"] == pytest.approx(0.15)
    assert layer["mean_selected_weight"] == pytest.approx(0.75)
    assert layer["unused_experts"] == 12
    assert layer["load_imbalance"] == pytest.approx(2 / (6 / 16))
    token_0 = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert layer["mean_entropy"] == pytest.approx((token_0 + math.log(4)) / 2, rel=1e-6)


def test_total_is_over_all_tokens_of_all_layers(generator):
    contexts = [context(f"layers.{i}.gate", i) for i in range(3)]
    telemetry = Telemetry(contexts, [K] * 3)
    calls = [random_calls(generator), random_calls(generator, masked=False)]
    for ctx, layer_calls in zip(contexts, calls, strict=False):
        run(telemetry, layer_calls, ctx)
    total = telemetry.to_dict()["total"]
    both = loop(calls[0] + calls[1])
    summed = ("router_calls", "decisions", "mean_experts", "std_experts", "share_floor", "mean_entropy")
    summed += ("share_saved", "lost_weight_share", "count_histogram", "fallback_tokens", "mean_raw_count")
    assert_same(total, {key: both[key] for key in summed})
    assert total["tokens"] == telemetry.num_tokens == 38
    assert total["padding_tokens"] == loop(calls[0])["padding_tokens"] > 0
    assert total["layers"] == 3
    assert total["silent_layers"] == telemetry.silent_layers() == ["layers.2.gate"]


def test_before_the_first_call():
    telemetry = Telemetry([context()], [K])
    figures = telemetry.to_dict()
    layer, total = figures["layers"][0], figures["total"]
    json.dumps(figures, allow_nan=False)
    assert layer["mean_experts"] is total["mean_experts"] is None
    assert total["tokens"] == total["router_calls"] == 0
    assert math.isnan(telemetry.mean_experts_per_token)
    assert math.isnan(telemetry.std_experts_per_token)
    assert telemetry.silent_layers() == ["layers.0.gate"]
    assert "nan" in repr(telemetry)
    assert Telemetry([], []).to_dict()["total"]["layers"] == 0


def test_no_tokens_is_a_call(generator):
    telemetry = Telemetry([context()], [K])
    empty = random_decision(generator, 0)
    telemetry.update(context(), empty)
    telemetry.update(context(mask_T=torch.zeros(0, dtype=torch.bool)), empty)
    assert (telemetry.total_forward_passes, telemetry.num_tokens) == (2, 0)
    assert telemetry.silent_layers() == []


def test_all_padding_leaves_no_trace_but_the_call(generator):
    telemetry, ctx = Telemetry([context()], [K]), context()
    run(telemetry, [(random_decision(generator, 5), torch.zeros(5, dtype=torch.bool))], ctx)
    layer = telemetry.to_dict()["layers"][0]
    assert (layer["tokens"], layer["padding_tokens"], layer["router_calls"]) == (0, 5, 1)
    assert sum(layer["expert_load"]) == sum(layer["own_expert_load"]) == 0


def test_a_row_without_weight_has_no_entropy(generator):
    decision = random_decision(generator, 3, fallback=False)
    telemetry = Telemetry([context()], [K])
    telemetry.update(context(), replace(decision, weights_TK=torch.zeros(3, K)))
    assert telemetry.to_dict()["layers"][0]["mean_entropy"] == 0.0


def test_non_finite_logits_are_found_where_the_decision_does_not_tell(generator):
    decision = random_decision(generator, 3, fallback=False)
    logits = torch.randn(3, E, generator=generator)
    logits[1, 2] = float("nan")
    logits[2, 0] = float("inf")
    logits[0, 1] = float("-inf")  # a masked expert
    telemetry = Telemetry([context()], [K])
    telemetry.update(context(), decision, logits)
    assert telemetry.to_dict()["layers"][0]["fallback_tokens"] == 2


def test_experts_beyond_the_module_are_not_in_the_load(generator):
    """Logits wider than the experts module: 14 real experts, two that compute nothing."""
    real = 14
    decision = random_decision(generator, 40, empty=real, fallback=False)
    ctx = context(empty=real)
    telemetry = Telemetry([ctx], [K])
    telemetry.update(ctx, decision)
    layer = telemetry.to_dict()["layers"][0]
    own = torch.bincount(decision.own_experts_TK.flatten(), minlength=E)
    assert layer["own_expert_load"] == own[:real].tolist()
    assert own[real:].sum() > 0
    assert layer["expert_load"] == torch.bincount(decision.experts_TK.flatten(), minlength=E)[:real].tolist()
    assert layer["share_saved"] == pytest.approx(1 - decision.counts_T.sum().item() / (40 * K))


@pytest.mark.parametrize("policy", [PValuePolicy(alpha=0.5), PValuePolicy(alpha=0.5, max_k=7)], ids=repr)
def test_a_real_policy(generator, policy):
    ctx = context(can_widen=True)
    policy.bind([ctx])
    logits = 3 * torch.randn(50, E, generator=generator)
    logits[7, 3] = float("nan")
    weights, experts = logits.nan_to_num(-9.0).softmax(-1).topk(K)
    decision = policy.decide(logits, weights, experts, ctx)
    telemetry = Telemetry([ctx], [policy.slots(ctx)])
    telemetry.update(ctx, decision, logits)
    layer = telemetry.to_dict()["layers"][0]
    assert layer["fallback_tokens"] == 1
    assert len(set(decision.counts_T.tolist())) > 2
    assert_same(layer, loop([(decision, None)], policy.slots(ctx)))


def test_keeping_everything_saves_and_loses_nothing(generator):
    logits = torch.randn(20, E, generator=generator)
    weights, experts = logits.softmax(-1).topk(K)
    telemetry = Telemetry([context()], [K])
    telemetry.update(context(), TopKPolicy().decide(logits, weights, experts, context()))
    layer = telemetry.to_dict()["layers"][0]
    assert (layer["share_saved"], layer["mean_lost_weight"], layer["jaccard"]) == (0.0, 0.0, 1.0)
    assert layer["share_at_min"] == layer["share_at_max"] == 1.0
    assert layer["expert_load"] == layer["own_expert_load"]


def test_merge_equals_one_run_over_both(generator):
    first, second = random_calls(generator), random_calls(generator)
    one, two, both = (Telemetry([context()], [K]) for _ in range(3))
    run(one, first, context())
    run(two, second, context())
    run(both, first + second, context())
    before = two.to_dict()
    assert one.merge(two) is one
    merged, expected = one.to_dict(), both.to_dict()
    # float64 sums in another order
    for got, want in zip(
        (*merged["layers"], merged["total"]), (*expected["layers"], expected["total"]), strict=True
    ):
        assert got.keys() == want.keys()
        for key, value in want.items():
            exact = value is None or isinstance(value, str)
            assert got[key] == (value if exact else pytest.approx(value, rel=1e-12))
    assert two.to_dict() == before


@pytest.mark.parametrize(
    ("contexts", "slots"),
    [
        ([context("other")], [K]),
        ([context(num_experts=8, empty=8)], [K]),
        ([context()], [7]),
        ([context(), context("second", 1)], [K, K]),
    ],
    ids=["path", "experts", "slots", "number"],
)
def test_merge_refuses_other_routers(contexts, slots):
    with pytest.raises(InvalidInputError, match="only telemetry of the same routers can be merged"):
        Telemetry([context()], [K]).merge(Telemetry(contexts, slots))


def test_reset_writes_into_the_same_buffers(generator):
    telemetry = Telemetry([context()], [K])
    fresh = telemetry.to_dict()
    buffers = [vars(layer) for layer in telemetry._layers.values()]
    addresses = [[v.data_ptr() for v in b.values() if isinstance(v, torch.Tensor)] for b in buffers]
    run(telemetry, random_calls(generator), context())
    assert telemetry.to_dict() != fresh
    telemetry.reset()
    assert telemetry.to_dict() == fresh
    assert addresses == [[v.data_ptr() for v in b.values() if isinstance(v, torch.Tensor)] for b in buffers]


def test_inputs_are_left_alone(generator):
    decision = random_decision(generator, 9)
    copies = copy.deepcopy(decision)
    mask = torch.ones(9, dtype=torch.bool)
    Telemetry([context()], [K]).update(context(mask_T=mask), decision)
    for name in RoutingDecision.__slots__:
        before, after = getattr(copies, name), getattr(decision, name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before.nan_to_num(-7), after.nan_to_num(-7)), name
    assert mask.all()


def test_copies_count_for_themselves(generator):
    telemetry = Telemetry([context()], [K])
    run(telemetry, random_calls(generator), context())
    figures = telemetry.to_dict()
    for other in (copy.deepcopy(telemetry), pickle.loads(pickle.dumps(telemetry))):
        assert other.to_dict() == figures
        run(other, random_calls(generator), context())
        assert other.to_dict() != figures
    assert telemetry.to_dict() == figures


def test_frame(generator):
    pandas = pytest.importorskip("pandas")
    contexts = [context(f"layers.{i}.gate", i) for i in range(2)]
    telemetry = Telemetry(contexts, [K, 7])
    run(telemetry, random_calls(generator), contexts[0])
    frame = telemetry.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["path"].tolist() == ["layers.0.gate", "layers.1.gate"]
    assert frame["slots"].tolist() == [K, 7]
    layer = telemetry.to_dict()["layers"][0]
    scalars = {key: value for key, value in layer.items() if not isinstance(value, list)}
    assert frame.iloc[0].dropna().to_dict() == {k: v for k, v in scalars.items() if v is not None}
    assert [k for k, v in scalars.items() if v is None] == [
        "mean_loads",
        "own_mean_loads",
    ]  # no step was decoded
    assert math.isnan(frame["mean_experts"][1])


def test_frame_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r"^to_frame needs pandas.*'bh-routing\[frame\]'"):
        Telemetry([context()], [K]).to_frame()


def test_repr(generator):
    telemetry = Telemetry([context()], [K])
    run(telemetry, [(random_decision(generator, 25, fallback=False), None)], context())
    layer = telemetry.to_dict()["layers"][0]
    lines = repr(telemetry).splitlines()
    assert lines[0] == "Telemetry: 1 routers, 1 calls, 25 tokens"
    assert lines[1].split() == ["layer", "tokens", "mean", "std", "saved"]
    row = ["25", f"{layer['mean_experts']:.2f}", f"{layer['std_experts']:.2f}", f"{layer['share_saved']:.1%}"]
    assert lines[2].split() == ["layers.0.gate", *row]
    assert lines[3].split() == ["all", *row]


def test_wrong_use(generator):
    telemetry = Telemetry([context()], [K])
    with pytest.raises(
        InvalidInputError, match=r"^router x is none of the 1 that this telemetry was made for"
    ):
        telemetry.update(context("x"), random_decision(generator, 2))
    with pytest.raises(
        InvalidInputError, match=r"made for 4 slots .* and 4 of the router's own, got 7 and 4"
    ):
        telemetry.update(context(), random_decision(generator, 2, slots=7))
    with pytest.raises(InvalidInputError, match="one number of slots per router, got 2 for 1 routers"):
        Telemetry([context()], [K, K])
    with pytest.raises(InvalidInputError, match="paths must differ, got 2 routers with 1 paths"):
        Telemetry([context(), context()], [K, K])
    assert telemetry.total_forward_passes == 0


# Where it runs: without synchronisation, compiled, in inference mode, under gradient checkpointing


class NoSync(TorchDispatchMode):
    """Fails on whatever makes the host wait for a device, or gives a shape that depends on values."""

    forbidden = ("_local_scalar_dense", "nonzero", "item", "equal", "bincount", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen.append(name)
        assert name not in self.forbidden
        assert name != "index" or all(i is None or i.dtype == torch.int64 for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [True, False])
def test_no_host_synchronisation(generator, masked):
    telemetry, calls = Telemetry([context()], [K]), random_calls(generator, masked=masked)
    with NoSync() as mode:
        run(telemetry, calls, context())
        telemetry._layers[context().path].catch_up()
    assert mode.seen.count("index_add_") >= 2
    assert_same(telemetry.to_dict()["layers"][0], loop(calls))
    with pytest.raises(AssertionError), NoSync():  # the mode does notice a read
        telemetry.to_dict()


def test_small_calls_wait_and_are_counted_when_somebody_reads(generator):
    telemetry, calls = Telemetry([context()], [K]), []
    layer = telemetry._layers[context().path]
    for tokens in [1] * 150 + [600, 1, 63, 64, 2]:
        mask = torch.rand(tokens, generator=generator) < 0.5 if tokens % 2 else None
        calls.append((random_decision(generator, tokens, fallback=tokens != 2), mask))
        telemetry.update(replace(context(), mask_T=mask), calls[-1][0])
        assert len(layer.waiting) < CALLS
        assert telemetry.silent_layers() == []
    assert len(layer.waiting) == 150 % CALLS + 4
    for tokens in (200, 300):  # by now 152 + 200 wait, and then too many
        calls.append((random_decision(generator, tokens), None))
        telemetry.update(context(), calls[-1][0])
        assert layer.waiting_tokens < TOKENS
    assert layer.waiting == []
    telemetry.update(context(), calls[0][0])
    calls.append(calls[0])
    assert_same(telemetry.to_dict()["layers"][0], loop(calls))
    assert layer.waiting == []
    assert telemetry.total_forward_passes == len(calls)
    telemetry.update(context(), calls[0][0])
    telemetry.reset()
    assert telemetry.total_forward_passes == 0


def test_waiting_calls_hold_no_graph_and_no_memory_of_the_model(generator):
    telemetry = Telemetry([context()], [K])
    decision = random_decision(generator, 3, fallback=False)
    expected = loop([(decision, None)])
    weights = decision.weights_TK.clone().requires_grad_() * 1.0
    telemetry.update(context(), replace(decision, weights_TK=weights))
    ((waiting, copied, _, _, _),) = telemetry._layers[context().path].waiting
    assert not waiting.weights_TK.requires_grad
    assert not copied.requires_grad
    weights.detach().zero_()  # as a block does that scales its weights in place
    assert_same(telemetry.to_dict()["layers"][0], expected)


def test_waiting_calls_are_merged_copied_and_pickled(generator):
    telemetry, decision = Telemetry([context()], [K]), random_decision(generator, 3)
    telemetry.update(context(), decision)
    for other in (copy.deepcopy(telemetry), pickle.loads(pickle.dumps(telemetry))):
        assert other.num_tokens == 3
        telemetry.merge(other)
    assert telemetry.num_tokens == 9


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("masked", [True, False])
def test_compiles_once_and_in_one_graph(generator, masked, backend):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    contexts = [context(f"layers.{i}.gate", i) for i in range(2)]
    telemetry = Telemetry(contexts, [K, K])
    torch._dynamo.reset()

    @partial(torch.compile, fullgraph=True, backend=counting, dynamic=False)
    def step(decision, mask):
        for ctx in contexts:
            telemetry.update(replace(ctx, mask_T=mask), decision)

    calls = []
    for _ in range(6):
        mask = torch.rand(8, generator=generator) < 0.5 if masked else None
        calls.append((random_decision(generator, 8), mask))
        step(*calls[-1])
    telemetry.reset()
    for call in calls:
        step(*call)
    torch._dynamo.reset()
    assert len(graphs) == 1
    for layer in telemetry.to_dict()["layers"]:
        assert_same(layer, loop(calls))


def test_compiled_for_any_number_of_tokens(generator):
    graphs = []
    telemetry, ctx = Telemetry([context()], [K]), context()
    torch._dynamo.reset()

    @partial(
        torch.compile,
        fullgraph=True,
        dynamic=True,
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
    )
    def step(decision):
        telemetry.update(ctx, decision)

    calls = [(random_decision(generator, n), None) for n in (5, 9, 31)]
    for decision, _ in calls:
        step(decision)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert_same(telemetry.to_dict()["layers"][0], loop(calls))


def test_made_in_inference_mode_used_outside(generator):
    with torch.inference_mode():
        telemetry = Telemetry([context()], [K])
    calls = random_calls(generator)
    run(telemetry, calls[:1], context())
    with torch.inference_mode():
        run(telemetry, calls[1:], context())
    telemetry.merge(Telemetry([context()], [K]))
    assert_same(telemetry.to_dict()["layers"][0], loop(calls))


class Block(nn.Module):
    """A router with telemetry in the smallest module that trains."""

    def __init__(self, telemetry, ctx):
        super().__init__()
        self.gate, self.out = nn.Linear(8, E), nn.Linear(E, 8)
        self.telemetry, self.ctx, self.runs = telemetry, ctx, 0

    def forward(self, hidden):
        self.runs += 1
        logits = self.gate(hidden)
        weights, experts = logits.softmax(-1).topk(K)
        decision = TopKPolicy(2).decide(logits, weights, experts, self.ctx)
        self.telemetry.update(self.ctx, decision, logits)
        sparse = torch.zeros_like(logits).scatter(-1, decision.own_experts_TK, decision.weights_TK)
        return hidden + self.out(sparse)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_forwards_are_not_counted_again(generator, use_reentrant):
    telemetry, ctx = Telemetry([context()], [K]), context()
    block = Block(telemetry, ctx)
    hidden = torch.randn(6, 8, generator=generator, requires_grad=True)
    for _ in range(2):
        checkpoint(block, hidden, use_reentrant=use_reentrant).sum().backward()
    assert block.runs == 4
    assert telemetry.total_forward_passes == 2
    assert telemetry.num_tokens == 12
    block(hidden)  # after the backward pass it counts again
    assert telemetry.total_forward_passes == 3


def test_gradients_are_those_without_telemetry(generator):
    telemetry, ctx = Telemetry([context()], [K]), context()
    block = Block(telemetry, ctx)
    hidden = torch.randn(6, 8, generator=generator)
    gradients = []
    for update in (telemetry.update, lambda *_: None):
        block.zero_grad()
        block.telemetry = type("Stub", (), {"update": staticmethod(update)})
        block(hidden).square().sum().backward()
        gradients.append(block.gate.weight.grad.clone())
    assert telemetry.total_forward_passes == 1
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
    assert not any(v.requires_grad for v in vars(telemetry._layers[ctx.path]).values() if torch.is_tensor(v))
