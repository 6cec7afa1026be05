"""The pure functions: against scipy, against hand-computed values, and their properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bh_routing import benjamini_hochberg_routing, compute_routing_statistics, topk_routing
from bh_routing.errors import InvalidInputError, InvalidParameterError, InvalidTypeError
from bh_routing.stats.pvalues import robust_p_values, robust_z, softmax_p_values

finite = {"allow_nan": False, "allow_infinity": False}
ALPHAS = st.floats(0.001, 0.999)


def p_matrices(max_experts: int = 12):
    shape = st.tuples(st.integers(1, 5), st.integers(1, max_experts))
    # few distinct values: ties and values right on a boundary are common
    values = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.01, 0.0125, 0.025, 0.05, 0.1, 0.5, 1.0]))
    return shape.flatmap(lambda s: hnp.arrays(np.float64, s, elements=values))


def test_a_published_example():
    # Benjamini & Hochberg 1995, section 4.1: 15 p-values, FDR 0.05 rejects the first four.
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    logits = torch.zeros(1, 15)
    _, experts, counts = benjamini_hochberg_routing(
        logits, alpha=0.05, max_k=15, pvalues=torch.tensor([p], dtype=torch.float64)
    )
    assert counts.tolist() == [4]
    assert experts[0, :4].tolist() == [0, 1, 2, 3]
    assert (experts[0, 4:] == -1).all()


@settings(max_examples=300, deadline=None)
@given(p=p_matrices(), alpha=ALPHAS)
def test_equals_the_definition_in_float64(p, alpha):
    p = torch.from_numpy(p)
    num = p.shape[-1]
    _, experts, counts, stats = benjamini_hochberg_routing(
        torch.zeros_like(p), alpha=alpha, min_k=1, max_k=num, pvalues=p, return_stats=True
    )
    for token, row in enumerate(p.tolist()):
        ranked = sorted(row)
        passing = [i for i in range(1, num + 1) if ranked[i - 1] <= alpha * i / num]
        expected = max(passing, default=0)
        assert int(stats["raw_counts"][token]) == expected
        assert int(counts[token]) == max(1, expected)
        chosen = experts[token, : int(counts[token])].tolist()
        assert sorted(row[e] for e in chosen) == ranked[: len(chosen)]


@settings(max_examples=300, deadline=None)
@given(p=p_matrices(), alpha=ALPHAS)
def test_equals_scipy_away_from_rounding(p, alpha):
    num = p.shape[-1]
    stats = benjamini_hochberg_routing(
        torch.zeros(p.shape), alpha=alpha, max_k=num, pvalues=torch.from_numpy(p), return_stats=True
    )[3]
    for token, row in enumerate(p):
        adjusted = scipy.stats.false_discovery_control(row, method="bh")
        # scipy compares p * E / i with alpha: within 1e-12 its rounding may differ from p <= alpha * i / E
        surely, possibly = (adjusted <= alpha - 1e-12).sum(), (adjusted <= alpha + 1e-12).sum()
        assert surely <= int(stats["raw_counts"][token]) <= possibly


@settings(max_examples=100, deadline=None)
@given(
    logits=hnp.arrays(np.float64, (4, 16), elements=st.floats(-8, 8, **finite), unique=True),
    low=st.floats(0.001, 0.5),
    high=st.floats(0.5, 0.999),
)
def test_selections_are_nested_in_alpha(logits, low, high):
    x = torch.from_numpy(logits)
    strict, loose = (benjamini_hochberg_routing(x, alpha=a, max_k=16)[0] > 0 for a in (low, high))
    assert bool((~strict | loose).all())


@pytest.mark.parametrize("pvalues", ["robust", "softmax", "batch"])
def test_expert_order_does_not_matter(pvalues):
    x = torch.randn(32, 64, dtype=torch.float64)
    order = torch.randperm(64)
    weights, _, counts = benjamini_hochberg_routing(x, alpha=0.2, pvalues=pvalues)
    shuffled, _, shuffled_counts = benjamini_hochberg_routing(x[:, order], alpha=0.2, pvalues=pvalues)
    assert torch.equal(counts, shuffled_counts)
    # equal selections; the softmax adds in another order, so that the last bit may differ
    torch.testing.assert_close(weights[:, order], shuffled, rtol=1e-14, atol=0)


@pytest.mark.parametrize("pvalues", ["robust", "softmax", "batch"])
def test_temperature_is_a_division_of_the_logits(pvalues):
    x = torch.randn(32, 64, dtype=torch.float64)
    for left, right in zip(
        benjamini_hochberg_routing(x * 4.0, alpha=0.2, temperature=4.0, pvalues=pvalues),
        benjamini_hochberg_routing(x, alpha=0.2, pvalues=pvalues),
        strict=True,
    ):
        assert torch.equal(left, right)  # 4 is a power of two: the division is exact


def test_robust_does_not_depend_on_scale_or_on_the_batch():
    x = torch.randn(32, 64, dtype=torch.float64)
    together = benjamini_hochberg_routing(x, alpha=0.3)[1]
    assert torch.equal(together, benjamini_hochberg_routing(x * 0.25, alpha=0.3)[1])
    alone = torch.cat([benjamini_hochberg_routing(row.unsqueeze(0), alpha=0.3)[1] for row in x])
    assert torch.equal(together, alone)
    assert int((together >= 0).sum(-1).max()) > 1  # the comparison is about something


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(10, 64), (2, 5, 64)])
def test_shapes_and_dtypes(dtype, shape):
    x = torch.randn(shape).to(dtype)
    weights, experts, counts, stats = benjamini_hochberg_routing(
        x, alpha=0.4, max_k=6, min_k=2, return_stats=True
    )
    assert weights.shape == shape
    assert weights.dtype == dtype
    assert experts.shape == (*shape[:-1], 6)
    assert experts.dtype == torch.int64
    assert counts.shape == shape[:-1]
    assert stats["p_values"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((weights >= 0).all())
    # half precision: each of at most 6 weights is rounded to half a unit in the last place
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    torch.testing.assert_close(
        weights.double().sum(-1), torch.ones(shape[:-1], dtype=torch.float64), rtol=0, atol=tolerance
    )
    assert torch.equal((experts >= 0).sum(-1), counts)
    assert int(counts.min()) >= 2
    assert int(counts.max()) <= 6


def test_padding_and_order_by_significance():
    p = torch.tensor([[0.04, 0.001, 0.03, 0.002]], dtype=torch.float64)
    _, experts, counts = benjamini_hochberg_routing(torch.zeros(1, 4), max_k=4, alpha=0.04, pvalues=p)
    assert counts.tolist() == [4]  # p_(4) = 0.04 <= 0.04: equality passes, and step-up takes all
    assert experts.tolist() == [[1, 3, 2, 0]]
    _, experts, counts = benjamini_hochberg_routing(torch.zeros(1, 4), max_k=4, alpha=0.03, pvalues=p)
    assert counts.tolist() == [2]  # 0.03 > 0.0225 and 0.04 > 0.03
    assert experts.tolist() == [[1, 3, -1, -1]]


def test_ties_go_to_the_larger_logit_then_the_lower_index():
    p = torch.full((1, 4), 0.01)
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    _, experts, _ = benjamini_hochberg_routing(logits, max_k=3, pvalues=p)
    assert experts.tolist() == [[1, 3, 2]]


@pytest.mark.parametrize(("clamp", "expected"), [("after", 2), ("inside", 1)])
def test_clamp(clamp, expected):
    # ranks 1 and 4 pass, 2 and 3 do not: the procedure takes 4; within max_k = 2 only rank 1 passes
    p = torch.tensor([[0.01, 0.04, 0.0401, 0.0402]], dtype=torch.float64)
    alpha = 0.0402
    stats = benjamini_hochberg_routing(torch.zeros(1, 4), alpha, max_k=4, pvalues=p, return_stats=True)[3]
    assert stats["raw_counts"].tolist() == [4]
    counts = benjamini_hochberg_routing(torch.zeros(1, 4), alpha, max_k=2, pvalues=p, clamp=clamp)[2]
    assert counts.tolist() == [expected]


def test_robust_against_numpy():
    x = np.random.default_rng(3).normal(size=(8, 10)) * 3
    median = np.median(x, axis=-1, keepdims=True)
    mad = scipy.stats.median_abs_deviation(x, axis=-1, keepdims=True) * 1.4826
    expected = scipy.stats.norm.sf((x - median) / mad)
    # torch's and scipy's normal tails agree to a few units in the last place
    np.testing.assert_allclose(robust_p_values(torch.from_numpy(x)).numpy(), expected, rtol=1e-11)


def test_robust_when_more_than_half_of_the_logits_tie():
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 6.0]])
    mean_deviation = 5.0 / 6.0 * math.sqrt(math.pi / 2)
    assert robust_z(x)[0, 5].item() == pytest.approx(5.0 / mean_deviation, rel=1e-6)
    assert torch.equal(robust_p_values(torch.ones(3, 8)), torch.ones(3, 8))
    assert benjamini_hochberg_routing(torch.ones(3, 8))[2].tolist() == [1, 1, 1]
    assert benjamini_hochberg_routing(torch.ones(3, 1), max_k=1)[1].tolist() == [[0], [0], [0]]


def test_softmax_pseudo_p_values_select_the_minimum_on_a_real_scale():
    x = torch.randn(256, 64) * 1.5  # router logits of a real model have this spread
    assert float(softmax_p_values(x).min()) > 0.05
    assert benjamini_hochberg_routing(x, pvalues="softmax", min_k=2)[2].unique().tolist() == [2]


def test_a_callable_sees_the_scaled_logits():
    seen = []

    def p_values(x):
        seen.append(x)
        return softmax_p_values(x)

    x = torch.randn(4, 8)
    benjamini_hochberg_routing(x, temperature=2.0, pvalues=p_values)
    assert torch.equal(seen[0], x / 2.0)


def test_no_tokens():
    weights, experts, counts = benjamini_hochberg_routing(torch.zeros(0, 64))
    assert weights.shape == (0, 64)
    assert experts.shape == (0, 8)
    assert counts.shape == (0,)
    assert compute_routing_statistics(weights, experts, counts)["num_tokens"] == 0
    assert benjamini_hochberg_routing(torch.zeros(2, 0, 64))[1].shape == (2, 0, 8)


@pytest.mark.parametrize("fullgraph", [True])
def test_compiles(fullgraph):
    x = torch.randn(16, 32)
    compiled = torch.compile(benjamini_hochberg_routing, fullgraph=fullgraph, backend="aot_eager")
    for left, right in zip(compiled(x, 0.2), benjamini_hochberg_routing(x, 0.2), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_topk():
    x = torch.randn(6, 5, 16)
    weights, experts, counts = topk_routing(x, k=3)
    assert torch.equal(experts, x.topk(3).indices)
    assert bool((counts == 3).all())
    torch.testing.assert_close(
        weights.gather(-1, experts), torch.softmax(x.topk(3).values, -1), rtol=1e-6, atol=0
    )
    raw, _, _ = topk_routing(x, k=3, normalize=False)
    assert torch.equal(raw.gather(-1, experts), torch.softmax(x, -1).gather(-1, experts))
    assert bool(((raw > 0).sum(-1) == 3).all())


def test_statistics():
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    experts = torch.tensor([[0, 1], [0, -1]])
    stats = compute_routing_statistics(weights, experts, torch.tensor([2, 1]))
    assert stats["mean_experts"] == 1.5
    assert stats["std_experts"] == 0.5
    assert stats["count_histogram"].tolist() == [0, 1, 1]
    assert stats["expert_load"].tolist() == [2, 1, 0]
    assert stats["load_imbalance"] == 2.0
    assert stats["unused_experts"] == 1
    assert stats["mean_entropy"] == pytest.approx(math.log(2) / 2)


X = torch.zeros(2, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: benjamini_hochberg_routing(X, alpha=0.0),
            InvalidParameterError,
            "alpha must be a number strictly between 0 and 1, got 0.0; 0.05 is the usual starting point.",
        ),
        (
            lambda: benjamini_hochberg_routing(X, alpha="a"),
            InvalidParameterError,
            "alpha must be a number strictly between 0 and 1, got 'a'; 0.05 is the usual starting point.",
        ),
        (
            lambda: benjamini_hochberg_routing(X, temperature=0),
            InvalidParameterError,
            "temperature must be a finite number above 0, got 0; 1.0 leaves the logits alone.",
        ),
        (
            lambda: benjamini_hochberg_routing(X, min_k=0),
            InvalidParameterError,
            "min_k must be at least 1, got 0; every token needs an expert.",
        ),
        (
            lambda: benjamini_hochberg_routing(X, min_k=5, max_k=4),
            InvalidParameterError,
            "max_k must be at least min_k=5, got 4.",
        ),
        (
            lambda: benjamini_hochberg_routing(X, max_k=17),
            InvalidParameterError,
            "max_k must not exceed the number of experts, 16, got 17; lower max_k.",
        ),
        (
            lambda: benjamini_hochberg_routing(X, max_k=2.5),
            InvalidTypeError,
            "max_k must be an integer, got 2.5.",
        ),
        (
            lambda: benjamini_hochberg_routing(X.long()),
            InvalidTypeError,
            "router_logits must be floating point, got torch.int64; convert with .float().",
        ),
        (
            lambda: benjamini_hochberg_routing([[1.0]]),
            InvalidTypeError,
            "router_logits must be a torch.Tensor, got list.",
        ),
        (
            lambda: benjamini_hochberg_routing(torch.zeros(16)),
            InvalidInputError,
            "router_logits must have shape [tokens, experts] or [batch, sequence, experts] with at least one "
            "expert, got (16,).",
        ),
        (
            lambda: benjamini_hochberg_routing(torch.full((2, 16), float("nan"))),
            InvalidInputError,
            "router_logits must be finite (or -inf, a masked expert), got NaN or infinity in 2 token(s); find where they come from "
            "(validate=False skips this check).",
        ),
        (
            lambda: benjamini_hochberg_routing(X, clamp="before"),
            InvalidParameterError,
            "clamp must be 'after' or 'inside', got 'before'.",
        ),
        (
            lambda: benjamini_hochberg_routing(X, pvalues="kde"),
            InvalidParameterError,
            "unknown pvalues='kde'; expected one of 'robust', 'softmax', 'batch', a tensor of p-values, or a "
            "callable.",
        ),
        (
            lambda: benjamini_hochberg_routing(X, pvalues=torch.zeros(2, 15)),
            InvalidInputError,
            "pvalues must have the shape of the logits, (2, 16) up to leading dimensions, got (2, 15).",
        ),
        (
            lambda: benjamini_hochberg_routing(X, pvalues=torch.zeros(2, 16, dtype=torch.int64)),
            InvalidTypeError,
            "pvalues must give a floating-point tensor like the logits, got torch.int64.",
        ),
        (
            lambda: benjamini_hochberg_routing(X, procedure="bonferoni"),
            InvalidParameterError,
            "unknown procedure 'bonferoni'; expected one of bh, by, bonferroni, holm, hochberg, storey, "
            "higher_criticism.",
        ),
        (
            lambda: topk_routing(X, k=17),
            InvalidParameterError,
            "k must be an integer from 1 to the number of experts, 16, got 17.",
        ),
    ],
)
def test_errors_say_what_was_expected(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_validation_can_be_skipped():
    x = torch.randn(3, 16)
    x[1, 4] = float("nan")
    counts = benjamini_hochberg_routing(x, validate=False)[2]
    assert counts.shape == (3,)
    assert int(counts.min()) >= 1
