"""The decision as one operation: hand-computed cases, the host path for one token, and the fused kernel.

Shape legend: T tokens, E experts, K slots of the router's own choice.

Without a GPU the kernel runs in Triton's interpreter (conftest.py asks for it).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bh_routing import BHRoutingIntegration, DecisionTable, RoutingContext, TablePolicy
from bh_routing.decision.backend import decision_function
from bh_routing.decision.select import decide_by_table
from bh_routing.decision.select_one_token import HostRow, decide_one_token
from bh_routing.decision.types import Limits, RoutingDecision, TableSettings
from bh_routing.errors import InvalidInputError, InvalidParameterError, MissingDependencyError
from bh_routing.stats.statistic import full_statistic

INF = float("inf")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = ("experts_TK", "counts_T", "dropped_TK", "fallback_T")


@pytest.fixture
def fused() -> Any:
    """The module of the fused kernel."""
    pytest.importorskip("triton", reason="Triton is not installed; pip install 'bh-routing[triton]'")
    from bh_routing.decision import select_triton as triton_decide

    return triton_decide


@dataclass
class Case:
    """Arguments of one decision."""

    logits_TE: Tensor
    own_weights_TK: Tensor
    own_experts_TK: Tensor
    thresholds_E: Tensor
    offset_E: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    follows: tuple[Tensor, ...] = ()  # slopes and center, where sizes follow the token

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.logits_TE,
            self.own_weights_TK,
            self.own_experts_TK,
            self.thresholds_E,
            self.offset_E,
        )

    def run(self, function: Any = decide_by_table) -> RoutingDecision:
        return function(*self.tensors, self.how, *self.follows)

    @property
    def how(self) -> TableSettings:
        names = ("min_k", "max_k", "clamp")
        limits = Limits(**{name: self.settings[name] for name in names if name in self.settings})
        return TableSettings(limits=limits, **{k: v for k, v in self.settings.items() if k not in names})

    def statistic_TE(self) -> Tensor:
        """What is compared with the thresholds."""
        names = ("statistic", "score_func", "temperature")
        slopes = dict(zip(("slope_DE", "center_D"), self.follows, strict=False))
        return full_statistic(
            self.logits_TE, self.offset_E, *(self.settings[name] for name in names), **slopes
        )

    def margins_TK(self) -> Tensor:
        """Distance of every candidate from every threshold and every other candidate, in units in the last place."""
        s_TK = self.statistic_TE().gather(-1, self.own_experts_TK).double()
        slots = s_TK.shape[-1]
        limits = self.thresholds_E[:slots].double().expand(len(s_TK), 1, slots)
        others = s_TK.unsqueeze(1).expand(-1, slots, -1).clone()
        others.diagonal(dim1=1, dim2=2).fill_(INF)
        distance_TKX = (s_TK.unsqueeze(-1) - torch.cat([limits.expand(-1, slots, -1), others], -1)).abs()
        ulp_TK1 = s_TK.abs().clamp_min(1e-30).log2().floor().exp2().unsqueeze(-1) * 2**-23
        return (distance_TKX / ulp_TK1).amin(-1)


def random_case(
    tokens: int,
    experts: int,
    slots: int,
    dtype: torch.dtype = torch.float32,
    *,
    follows: bool = False,
    **settings: Any,
) -> Case:
    """A case whose thresholds keep about half of the slots."""
    settings = {
        "empty": experts,
        "statistic": "contribution",
        "score_func": "softmax",
        "temperature": 1.0,
        "rule": "step_up",
        "min_k": 1,
        "max_k": None,
        "clamp": "after",
        "weights": "own",
    } | settings
    logits_TE = (torch.randn(tokens, experts) * 2).to(dtype)
    own_weights_TK, own_experts_TK = torch.softmax(logits_TE.float(), -1).topk(slots, -1, sorted=False)
    offset_E = torch.randn(experts) * 0.3
    case = Case(
        logits_TE,
        own_weights_TK.to(dtype),
        own_experts_TK,
        torch.zeros(experts),
        offset_E,
        settings,
        (torch.randn(experts, experts) * 0.5 * experts**-0.5, torch.randn(experts)) if follows else (),
    )
    s_TK = case.statistic_TE().gather(-1, own_experts_TK)
    if tokens:  # at each rank half of the tokens pass; just below the median, so that none of them is on it
        case.thresholds_E[:slots] = s_TK.sort(-1, descending=True).values.median(0).values.float() - 1e-3
    return case


def integer_case(tokens: int, experts: int, slots: int, **settings: Any) -> Case:
    """Small integers everywhere, so that all arithmetic is exact and ties abound."""
    case = random_case(tokens, experts, slots, statistic="logit", **settings)
    case.logits_TE = torch.randint(-3, 4, (tokens, experts)).float()
    case.own_weights_TK, case.own_experts_TK = case.logits_TE.topk(slots, -1)
    case.own_weights_TK = torch.randint(0, 5, (tokens, slots)).float()
    case.offset_E = torch.randint(-2, 3, (experts,)).float()
    case.thresholds_E = torch.randint(-4, 6, (experts,)).float().sort(descending=True).values
    return case


def assert_same(got: RoutingDecision, expected: RoutingDecision, rows: Tensor | None = None) -> None:
    """The same sets and counts (in these rows), and weights within 8 ulp of float32 (2 of a shorter dtype)."""
    rows = torch.ones_like(expected.fallback_T) if rows is None else rows
    judged = rows & ~expected.fallback_T
    for name in EXACT:
        assert torch.equal(getattr(got, name)[rows], getattr(expected, name)[rows]), name
    assert torch.equal(got.raw_counts_T[judged], expected.raw_counts_T[judged])
    dtype = expected.weights_TK.dtype
    assert got.weights_TK.dtype == dtype
    tolerance = 8 * 2**-23 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.weights_TK[rows], expected.weights_TK[rows], rtol=tolerance, atol=0.0, equal_nan=True
    )


HAND = [
    # thresholds by rank, rule, clamp, min_k, max_k -> kept of the statistics [5, 3, 3, 1], raw count
    ([4, 3, 3, 2], "step_up", "after", 1, None, [1, 1, 1, 0], 3),
    ([6, 6, 3, 2], "step_up", "after", 1, None, [1, 1, 1, 0], 3),  # rank 3 passes, ranks 1 and 2 go with it
    ([6, 3, 3, 2], "step_down", "after", 1, None, [1, 0, 0, 0], 0),  # the first fails: min_k
    ([5, 3, 4, 1], "step_down", "after", 1, None, [1, 1, 0, 0], 2),
    ([4, 3, 3, 2], "step_up", "after", 1, 2, [1, 1, 0, 0], 3),  # of two equal ones the first slot
    ([4, 9, 3, 2], "step_up", "inside", 1, 2, [1, 0, 0, 0], 3),
    ([4, 9, 3, 2], "step_up", "after", 1, 2, [1, 1, 0, 0], 3),
    ([9, 9, 9, 9], "step_up", "after", 2, None, [1, 1, 0, 0], 0),
    ([0, 0, 0, 0], "step_up", "after", 1, None, [1, 1, 1, 1], 4),
    ([INF, INF, INF, INF], "step_up", "after", 1, None, [1, 0, 0, 0], 0),
    ([-INF, -INF, INF, INF], "step_up", "after", 1, None, [1, 1, 0, 0], 2),
]


@pytest.mark.parametrize(
    ("backend", "repeat"), [("torch", 1), ("torch", 3), ("triton", 1), ("triton", 3), ("host", 1)]
)
@pytest.mark.parametrize(("thresholds", "rule", "clamp", "min_k", "max_k", "kept", "raw"), HAND)
def test_by_hand(request, thresholds, rule, clamp, min_k, max_k, kept, raw, backend, repeat):
    function = request.getfixturevalue("fused").decide_by_table if backend == "triton" else decide_by_table
    case = Case(
        torch.tensor([[1.0, 5.0, 0.0, 3.0, 3.0]]).repeat(repeat, 1),
        torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(repeat, 1),
        torch.tensor([[1, 3, 4, 0]]).repeat(repeat, 1),
        torch.tensor([*map(float, thresholds), INF]),
        torch.zeros(5),
        {"empty": 7, "statistic": "logit", "rule": rule, "clamp": clamp, "min_k": min_k, "max_k": max_k},
    )
    decision = one_by_one(case)[0] if backend == "host" else case.run(function)
    kept_K = torch.tensor(kept, dtype=torch.bool)
    for row in range(repeat):
        assert torch.equal(decision.dropped_TK[row], ~kept_K)
        assert decision.experts_TK[row].tolist() == [
            e if k else 7 for e, k in zip([1, 3, 4, 0], kept, strict=True)
        ]
        assert torch.equal(decision.weights_TK[row], torch.tensor([0.4, 0.3, 0.2, 0.1]) * kept_K)
    assert decision.counts_T.tolist() == [sum(kept)] * repeat
    assert decision.raw_counts_T.tolist() == [raw] * repeat
    assert decision.fallback_T.tolist() == [False] * repeat


def one_by_one(case: Case) -> list[RoutingDecision]:
    """Every token of a case decided alone, on the host."""
    row = HostRow.of(*case.tensors[3:], *case.follows)
    return [
        decide_one_token(*(x[t : t + 1] for x in case.tensors[:3]), row, case.how)
        for t in range(len(case.logits_TE))
    ]


@pytest.mark.parametrize("weights", ["own", "preserve", "sum"])
@pytest.mark.parametrize("clamp", ["after", "inside"])
@pytest.mark.parametrize("rule", ["step_up", "step_down"])
@pytest.mark.parametrize(("min_k", "max_k"), [(1, None), (2, 4), (1, 1), (3, 6)])
def test_one_token_on_the_host_on_integers(min_k, max_k, rule, clamp, weights):
    settings = {"rule": rule, "clamp": clamp, "weights": weights, "min_k": min_k, "max_k": max_k}
    case = integer_case(60, 16, 6, **settings)
    together = case.run()
    for t, alone in enumerate(one_by_one(case)):
        for name in (*EXACT, "raw_counts_T", "weights_TK"):
            one, among = getattr(alone, name), getattr(together, name)[t : t + 1]
            assert one.dtype == among.dtype
            assert torch.equal(one, among)


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("statistic", "score_func"),
    [
        ("contribution", "softmax"),
        ("logprob", "sigmoid"),
        ("logit", "softmax"),
        ("logprob", "sqrtsoftplus"),
    ],
)
def test_one_token_on_the_host_on_random_logits(statistic, score_func, temperature, dtype, follows):
    names = {"statistic": statistic, "score_func": score_func, "temperature": temperature}
    case = random_case(200, 32, 6, dtype, follows=follows, **names)
    clear_T = (case.margins_TK() > 8).all(-1)
    assert clear_T.float().mean() > 0.5
    together, alone = case.run(), one_by_one(case)
    for name in (*EXACT, "raw_counts_T", "weights_TK"):
        joined = torch.cat([getattr(one, name) for one in alone])
        assert torch.equal(joined[clear_T], getattr(together, name)[clear_T])


def test_one_token_on_the_host_with_logits_that_are_not_finite():
    case = random_case(5, 8, 3)
    for t, value in enumerate((float("nan"), INF, -INF)):
        case.logits_TE[t, 2] = value
    for alone, t in zip(one_by_one(case), range(5), strict=True):
        assert alone.fallback_T.tolist() == [t < 2]  # -inf is a masked expert
        if t < 2:
            assert alone.counts_T.tolist() == [3]
            assert torch.equal(alone.experts_TK, case.own_experts_TK[t : t + 1])
            assert torch.equal(alone.weights_TK, case.own_weights_TK[t : t + 1])
    for alone, t in zip(one_by_one(case), range(5), strict=True):  # and -inf as in the reference
        assert torch.equal(alone.experts_TK, case.run().experts_TK[t : t + 1])


def test_writing_into_a_decision_leaves_the_next_one_alone():
    case = random_case(1, 8, 3)
    names = ("weights_TK", *EXACT, "raw_counts_T")
    expected = case.run()
    for _ in range(2):
        (alone,) = one_by_one(case)
        for name in names:
            assert torch.equal(getattr(alone, name), getattr(expected, name)), name
        for name in names:
            written = getattr(alone, name)
            written.copy_(written.logical_not() if written.dtype == torch.bool else written + 1)
            for other in names:
                if other != name and getattr(alone, other) is not None:
                    assert getattr(alone, other).data_ptr() != written.data_ptr()


def test_a_policy_decides_single_tokens_on_the_host_at_the_level_in_use(monkeypatch):
    case = random_case(1, 16, 4)
    policy, context = policy_with("auto", case)
    calls = []
    monkeypatch.setattr(
        "bh_routing.policies.table.decide_one_token",
        lambda *args, **settings: calls.append(1) or decide_one_token(*args, **settings),
    )
    for level, kept in ((INF, 1), (-INF, 4)):
        policy.set_table(policy.table.with_thresholds(torch.full((1, 16), level)))
        decision = policy.decide(*case.tensors[:3], context)
        assert decision.counts_T.tolist() == [kept]
        own = case.own_weights_TK.requires_grad_()
        assert policy.decide(case.logits_TE, own, case.own_experts_TK, context).weights_TK.requires_grad
    assert len(calls) == 4
    policy.decide(*(x.repeat(2, 1) for x in case.tensors[:3]), context)
    assert len(calls) == 4


def test_tokens_with_logits_that_are_not_finite_keep_their_own_choice():
    case = random_case(5, 8, 3)
    for t, value in enumerate((float("nan"), INF, -INF)):
        case.logits_TE[t, 2] = value
    decision = case.run()
    assert decision.fallback_T.tolist() == [True] * 2 + [False] * 3  # -inf is a masked expert
    assert torch.equal(decision.experts_TK[:2], case.own_experts_TK[:2])
    assert torch.equal(decision.weights_TK[:2], case.own_weights_TK[:2])
    assert decision.counts_T[:2].tolist() == [3, 3]


SIZES = [(37, 64, 8), (5, 1, 1), (6, 5, 5), (3, 100, 6), (2, 512, 8), (4, 33, 12), (0, 64, 8), (1, 64, 8)]


@pytest.mark.parametrize("weights", ["own", "preserve", "sum"])
@pytest.mark.parametrize(
    ("rule", "clamp"), [("step_up", "after"), ("step_up", "inside"), ("step_down", "after")]
)
@pytest.mark.parametrize(("tokens", "experts", "slots"), SIZES)
def test_fused_on_integers(fused, tokens, experts, slots, rule, clamp, weights):
    settings = {"rule": rule, "clamp": clamp, "weights": weights}
    for limits in ({}, {"min_k": min(2, slots), "max_k": max(1, slots - 1)}):
        if limits and limits["min_k"] > limits["max_k"]:
            continue
        case = integer_case(tokens, experts, slots, **settings, **limits)
        assert_same(case.run(fused.decide_by_table), case.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("statistic", "score_func"),
    [("contribution", "softmax"), ("logprob", "sigmoid"), ("logit", "softmax"), ("contribution", "sigmoid")],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("weights", "follows"), [("own", False), ("preserve", False), ("sum", False), ("own", True)]
)
def test_fused_on_random_logits(fused, weights, follows, temperature, statistic, score_func, dtype):
    case = random_case(
        300,
        48,
        7,
        dtype,
        follows=follows,
        statistic=statistic,
        score_func=score_func,
        temperature=temperature,
        weights=weights,
    )
    clear_T = (case.margins_TK() > 8).all(-1)
    assert clear_T.float().mean() > 0.5  # short dtypes have ties, which any rounding may break
    reference = case.run()
    assert_same(case.run(fused.decide_by_table), reference, clear_T)
    assert 1.5 < reference.counts_T.float().mean() < 6.5  # the thresholds do cut


def test_fused_log_sigmoid_is_accurate_where_it_is_tiny(fused):
    logits_TE = torch.linspace(-30, 30, 64).unsqueeze(0)
    own = torch.arange(64).unsqueeze(0)
    expected = torch.nn.functional.logsigmoid(logits_TE.double()).squeeze(0)
    case = Case(
        logits_TE,
        torch.ones(1, 64),
        own,
        torch.zeros(64),
        torch.zeros(64),
        {"empty": 64, "statistic": "logprob", "score_func": "sigmoid"},
    )
    for k in range(64):  # a threshold 8 ulp below each value keeps it, 8 ulp above drops it
        case.own_experts_TK, case.own_weights_TK = own[:, k : k + 1], torch.ones(1, 1)
        for sign, raw in ((1, 1), (-1, 0)):
            case.thresholds_E[0] = expected[k] * (1 + sign * 8 * 2**-23)
            assert case.run(fused.decide_by_table).raw_counts_T.tolist() == [raw]


@pytest.mark.parametrize(("experts", "slots"), [(5, 5), (100, 6), (512, 8), (33, 12)])
def test_fused_sizes_that_follow_the_token(fused, experts, slots):
    case = random_case(6, experts, slots, follows=True)
    assert (case.margins_TK() > 8).all()
    assert_same(case.run(fused.decide_by_table), case.run())
    case.follows = tuple(part * 100 for part in case.follows)  # everything is clamped
    assert_same(case.run(fused.decide_by_table), case.run())


@pytest.mark.parametrize("backend", ["torch", "triton", "host"])
def test_a_size_that_follows_the_token_by_hand(request, backend):
    """Two experts of weight 1/2: the second logit's sign says which of them is large, by up to e^2."""
    function = request.getfixturevalue("fused").decide_by_table if backend == "triton" else decide_by_table
    case = Case(
        torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, -3.0], [0.0, 0.0, 0.0]]),
        torch.full((3, 2), 0.5),
        torch.tensor([[0, 1]] * 3),
        torch.tensor([1.5, 1.5, INF]),
        torch.zeros(3),
        {"empty": 3, "statistic": "logit", "min_k": 0},
        (torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, -1.0, 9.0]]), torch.zeros(3)),
    )
    if backend == "host":
        decisions = one_by_one(case)
        dropped = torch.cat([one.dropped_TK for one in decisions])
        counts = torch.cat([one.counts_T for one in decisions])
    else:
        decision = case.run(function)
        dropped, counts = decision.dropped_TK, decision.counts_T
    assert dropped.tolist() == [[False, True], [True, False], [True, True]]
    assert counts.tolist() == [1, 1, 0]
    case.thresholds_E[:2] = 2.0  # the clamp: 3 counts as 2, which still reaches it
    again = (
        torch.cat([one.dropped_TK for one in one_by_one(case)])
        if backend == "host"
        else case.run(function).dropped_TK
    )
    assert again.tolist() == dropped.tolist()
    case.thresholds_E[:2] = 2.5
    again = (
        torch.cat([one.dropped_TK for one in one_by_one(case)])
        if backend == "host"
        else case.run(function).dropped_TK
    )
    assert again.all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize(
    ("statistic", "follows"), [("logit", False), ("contribution", False), ("contribution", True)]
)
@pytest.mark.parametrize("weights", ["own", "preserve"])
def test_fused_on_logits_that_are_not_finite(fused, weights, statistic, follows):
    case = random_case(9, 24, 4, statistic=statistic, weights=weights, follows=follows)
    for t, value in enumerate((float("nan"), INF, -INF)):
        case.logits_TE[t, 11] = value
        case.logits_TE[t + 3, case.own_experts_TK[t + 3, 1]] = value
    reference = case.run()
    assert reference.fallback_T.tolist() == [True, True, False] * 2 + [False] * 3
    assert_same(case.run(fused.decide_by_table), reference)


@pytest.mark.parametrize("weights", ["own", "preserve", "sum"])
def test_fused_gradients(fused, weights):
    case = random_case(12, 16, 5, weights=weights)
    case.own_weights_TK[5] = 0.0  # a row that cannot be rescaled
    case.thresholds_E[:] = -INF if weights == "own" else case.thresholds_E
    pull_TK = torch.randn(12, 5)
    gradients = []
    for function in (decide_by_table, fused.decide_by_table):
        own = case.own_weights_TK = case.own_weights_TK.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((case.run(function).weights_TK * pull_TK).sum(), own)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)  # sums of 5 terms


@pytest.mark.parametrize("weights", ["own", "preserve", "sum"])
@pytest.mark.parametrize("sizes", ["constant", "token"])
def test_fused_is_a_well_formed_operation(fused, weights, sizes):
    follows = () if sizes == "constant" else (torch.randn(16, 16), torch.randn(16))
    case = random_case(7, 16, 5)
    own = case.own_weights_TK.requires_grad_()
    arguments = (
        case.logits_TE,
        own,
        *case.tensors[2:],
        16,
        "softmax",
        1.0,
        "step_up",
        1,
        5,
        "after",
        weights,
        *follows,
    )
    torch.library.opcheck(torch.ops.bh_routing.decide_by_table.default, arguments)


def test_fused_compiles_in_one_graph(fused):
    torch._dynamo.reset()
    case = random_case(6, 16, 4)

    def step(logits_TE, own_weights_TK, own_experts_TK):
        decision = fused.decide_by_table(
            logits_TE, own_weights_TK, own_experts_TK, *case.tensors[3:], case.how
        )
        return decision.weights_TK * 2, decision.experts_TK

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(*case.tensors[:3]), step(*case.tensors[:3]), strict=True):
        assert torch.equal(got, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("experts", "settings", "dtype"),
    [(513, {}, torch.float32), (16, {"score_func": "sqrtsoftplus"}, torch.float32), (16, {}, torch.float64)],
)
def test_fused_refuses_what_it_does_not_compute(fused, experts, settings, dtype):
    case = random_case(2, experts, 4, **settings)
    case.logits_TE = case.logits_TE.to(dtype)
    with pytest.raises(
        InvalidInputError, match=r"^the fused decision serves at most 512 experts, .* Use backend='torch'\.$"
    ):
        case.run(fused.decide_by_table)


def chosen(backend: str = "auto", device: str = "cpu", **changes: Any) -> Any:
    known = {"num_experts": 64, "statistic": "logprob", "score_func": "softmax"} | changes
    return decision_function(backend, torch.device(device), **known)  # type: ignore[arg-type]


def test_auto_is_fused_on_a_gpu_and_plain_elsewhere(fused):
    assert chosen() is decide_by_table
    assert chosen("torch", "cuda") is decide_by_table
    assert chosen("auto", "cuda") is fused.decide_by_table
    assert chosen("triton", "cuda") is fused.decide_by_table
    assert chosen("auto", "cuda", score_func="probability") is decide_by_table
    assert chosen("auto", "cuda", num_experts=513) is decide_by_table
    assert chosen("auto", "cuda", score_func="probability", statistic="logit") is fused.decide_by_table


def test_where_the_fused_one_cannot_run_it_is_refused(fused, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = "backend='triton' serves routers on a GPU .*, got the device cpu; use backend='auto'"
    with pytest.raises(InvalidParameterError, match=message):
        chosen("triton")
    with pytest.raises(
        InvalidParameterError, match="got 513 experts and the statistic 'logprob' of 'softmax'"
    ):
        chosen("triton", "cuda", num_experts=513)


def test_without_triton_auto_is_plain_and_asking_for_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bh_routing.decision.select_triton", None)
    monkeypatch.delattr("bh_routing.decision.select_triton", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'bh-routing\[triton\]'"):
        chosen("triton", "cuda")
    monkeypatch.setattr("bh_routing.decision.backend.find_spec", lambda name: None)
    assert chosen("auto", "cuda") is decide_by_table


def test_an_unknown_backend_is_refused():
    with pytest.raises(
        InvalidParameterError, match="backend must be 'auto', 'torch' or 'triton', got 'cuda'"
    ):
        chosen("cuda")


def policy_with(backend: str, case: Case) -> tuple[TablePolicy, RoutingContext]:
    context = RoutingContext(
        path="gate", index=0, num_experts=16, empty=16, top_k=4, route_norm="renormalised"
    )
    table = DecisionTable(
        thresholds_LE=case.thresholds_E.unsqueeze(0),
        statistic="contribution",
        offset_LE=case.offset_E.unsqueeze(0),
    )
    policy = TablePolicy(table, backend=backend)  # type: ignore[arg-type]
    policy.bind([context])
    return policy, context


def test_a_table_policy_takes_the_backend(fused):
    case = random_case(40, 16, 4)
    decisions = []
    for backend in ("torch", "triton"):
        policy, context = policy_with(backend, case)
        decisions.append(policy.decide(*case.tensors[:3], context))
    assert_same(decisions[1], decisions[0])


def test_an_integration_without_a_table_says_that_the_backend_is_not_used(tiny_olmoe, caplog):
    BHRoutingIntegration(tiny_olmoe(), alpha=0.05, backend="torch")
    assert caplog.messages == [
        "backend='torch' has no effect: without a calibration p-values are computed in PyTorch."
    ]
