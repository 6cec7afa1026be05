"""Tables against p-values, budgets, policies and merging, on calibrations of random logits."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch

from bh_routing._words import Estimator, Statistic
from bh_routing.calibration.budget import solve_parameter
from bh_routing.errors import (
    BudgetError,
    CalibrationError,
    CalibrationMismatchError,
    CalibrationWarning,
    InvalidParameterError,
    InvalidTypeError,
)
from bh_routing.policies import PValuePolicy, RoutingContext, TablePolicy
from bh_routing.stats.kde import KERNELS
from bh_routing.stats.procedures import PROCEDURES
from calibration_cases import random_logits

E, K, T = 16, 4, 600
WITH_TABLE = [name for name, p in PROCEDURES.items() if p.has_table]


def context(index: int, **changes) -> RoutingContext:
    settings = {
        "path": f"layers.{index}.gate",
        "index": index,
        "num_experts": E,
        "empty": E,
        "top_k": K,
        "route_norm": "none",
        "can_widen": True,
    }
    return RoutingContext(**(settings | changes))


def decide(policy, logits_TE, ctx):
    weights_TE = torch.softmax(logits_TE, -1)
    weights_TK, experts_TK = weights_TE.topk(K, -1)
    policy.bind([ctx])
    return policy.decide(logits_TE, weights_TK, experts_TK, ctx)


def general(calibration, alpha, procedure, limits, **settings) -> PValuePolicy:
    """The same settings through p-values instead of a table."""

    def p_values(logits_TE, ctx):
        return calibration.p_values(logits_TE, ctx.path, **settings)

    return PValuePolicy(p_values, procedure=procedure, alpha=alpha, **limits)


def assert_same_decision(a, b) -> None:
    assert torch.equal(a.counts_T, b.counts_T)
    assert torch.equal(a.raw_counts_T, b.raw_counts_T)
    assert torch.equal(a.experts_TK, b.experts_TK)
    assert torch.equal(a.weights_TK, b.weights_TK)


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("statistic", get_args(Statistic))
@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_table_decides_as_p_values_do(synthetic_calibration, estimator, statistic, scope):
    calibration = synthetic_calibration()
    settings = {"estimator": estimator, "statistic": statistic, "scope": scope}
    logits_LTE = random_logits(7, T)
    for index in range(2):
        for alpha in (0.02, 0.2):
            fast = decide(calibration.policy(alpha=alpha, **settings), logits_LTE[index], context(index))
            slow = decide(
                general(calibration, alpha, "bh", {}, **settings), logits_LTE[index], context(index)
            )
            assert_same_decision(fast, slow)
            assert len(fast.counts_T.unique()) > 1


@pytest.mark.parametrize("limits", [{"min_k": 2, "max_k": 3}, {"max_k": 7, "clamp": "inside"}, {"max_k": 9}])
@pytest.mark.parametrize("procedure", WITH_TABLE)
def test_procedures_and_limits_agree(synthetic_calibration, procedure, limits):
    calibration = synthetic_calibration()
    logits_TE = random_logits(8, T)[0]
    fast = decide(calibration.policy(alpha=0.3, procedure=procedure, **limits), logits_TE, context(0))
    slow = decide(general(calibration, 0.3, procedure, limits), logits_TE, context(0))
    assert torch.equal(fast.counts_T, slow.counts_T)
    assert torch.equal(fast.experts_TK.sort(-1).values, slow.experts_TK.sort(-1).values)


@pytest.mark.parametrize("null", ["unselected", "all", "trimmed"])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_null_sets_are_those_of_the_raw_logits(synthetic_calibration, null, score_func):
    calibration = synthetic_calibration(score_func=score_func)
    logits_LTE = random_logits(0, 4000)
    for index, x_TE in enumerate(logits_LTE):
        own_TE = torch.zeros_like(x_TE, dtype=torch.bool).scatter(-1, x_TE.topk(K, -1).indices, True)
        order_TE = x_TE.argsort(-1).argsort(-1)
        members = {
            "unselected": ~own_TE,
            "all": torch.ones_like(own_TE),
            "trimmed": (order_TE >= 3) & (order_TE < E - 3),
        }[null]
        base = {"softmax": x_TE.log_softmax(-1), "sigmoid": torch.nn.functional.logsigmoid(x_TE)}[score_func]
        for statistic, value_TE in (("logit", x_TE), ("logprob", base)):
            counts = calibration.null_counts(calibration.settings(statistic=statistic, null=null))
            assert int(counts.counts_LEB[index].sum()) == int(members.sum())
            bins = (value_TE[members] * 64).floor().long() - counts.start
            expected = torch.bincount(bins, minlength=counts.counts_LEB.shape[-1])
            assert torch.equal(counts.counts_LEB[index].sum(0), expected)


def test_contribution_is_score_times_size(synthetic_calibration):
    calibration = synthetic_calibration()
    x_TE = random_logits(3, 5)[1]
    table = calibration.table(0.1, size="output")
    expected = calibration.moments.square_LE[1].sqrt().log().float()
    assert torch.equal(table.offset_LE[1], expected)
    p_TE = calibration.p_values(x_TE, 1, size="output")
    null = calibration.fit(calibration.settings(size="output")).nulls[1]
    assert torch.equal(p_TE, null.p_values(torch.log_softmax(x_TE, -1) + expected))


def test_sizes(synthetic_calibration):
    moments = synthetic_calibration().moments
    output, deviation = moments.size("output"), moments.size("deviation")
    assert bool((deviation < output).all())
    assert torch.allclose(output.square(), deviation.square() + moments.mean_LEH.square().sum(-1))


def test_an_expert_without_tokens_gets_the_median_of_its_layer(synthetic_calibration):
    moments = synthetic_calibration().moments
    moments.tokens_LE[0, 3] = 0
    size_LE = moments.size("output")
    others = torch.cat((moments.square_LE[0, :3], moments.square_LE[0, 4:])).sqrt()
    assert size_LE[0, 3] == others.median()


def test_defaults_follow_what_was_collected(synthetic_calibration):
    def resolved(calibration, **settings):
        chosen = calibration.settings(**settings)
        return chosen.statistic, chosen.size, chosen.scope

    everything = synthetic_calibration()
    assert resolved(everything) == ("contribution", "sensitivity", "model")
    assert resolved(synthetic_calibration(sensitivity=False)) == ("contribution", "deviation", "model")
    assert resolved(everything.without_means()) == ("contribution", "sensitivity", "model")
    without = synthetic_calibration(sensitivity=False).without_means()
    assert resolved(without) == ("contribution", "output", "model")
    assert resolved(synthetic_calibration(moments=False)) == ("logprob", None, "model")
    assert resolved(everything, statistic="logit") == ("logit", None, "layer")


BUDGETS = [(name, budget) for name in PROCEDURES for budget in (1.7, 2.5, 3.4) if name != "higher_criticism"]


@pytest.mark.parametrize(("procedure", "budget"), [*BUDGETS, ("higher_criticism", 3.6)])
def test_budget_is_met_by_the_policy(synthetic_calibration, procedure, budget):
    calibration = synthetic_calibration()
    solved = calibration.solve(budget, procedure)
    assert solved.mean_experts == pytest.approx(budget, rel=0.02)
    policy = calibration.policy(experts_per_token=budget, procedure=procedure)
    counts = []
    for index in range(2):
        logits_NE = calibration.reservoir.logits_NLE[:, index]
        own_NK = calibration.reservoir.experts_NLK[:, index].long()
        policy.bind([context(index)])
        weights = torch.softmax(logits_NE.float(), -1).gather(-1, own_NK)
        counts.append(policy.decide(logits_NE, weights, own_NK, context(index)).counts_T)
    assert float(torch.cat(counts).double().mean()) == pytest.approx(solved.mean_experts, abs=1e-12)
    assert isinstance(policy, TablePolicy) == PROCEDURES[procedure].has_table


def test_budget_holds_on_fresh_tokens(synthetic_calibration):
    calibration = synthetic_calibration()
    policy = calibration.policy(experts_per_token=2.5)
    fresh = random_logits(31, 20_000)
    means = [decide(policy, fresh[i], context(i)).counts_T.double().mean() for i in range(2)]
    # 2 x 2000 reservoir tokens with a standard deviation of about 1 expert: three standard errors are 0.05
    assert float(sum(means)) / 2 == pytest.approx(2.5, abs=0.05)


def test_budget_per_layer(synthetic_calibration):
    calibration = synthetic_calibration()
    budgets = {"layers.0.gate": 1.8, "layers.1.gate": 3.0}
    solved = calibration.solve(budgets)
    assert set(solved.alpha) == set(budgets)
    for path, budget in budgets.items():
        assert calibration.mean_counts(solved.alpha[path])[path] == pytest.approx(budget, rel=0.02)
    assert solved.table.alpha is None
    with pytest.raises(BudgetError, match=r"must name every router: missing layers\.1\.gate"):
        calibration.solve({"layers.0.gate": 2.0})
    with pytest.raises(BudgetError, match=r"must name every router: unknown layers\.9\.gate"):
        calibration.solve(budgets | {"layers.9.gate": 2.0})


@pytest.mark.parametrize("budget", [0.5, 4.5])
def test_impossible_budgets_tell_what_is_possible(synthetic_calibration, budget):
    with pytest.raises(
        BudgetError, match=r"1 to 3\.9 are reachable with min_k=1 and max_k=4, and all 4; change the budget"
    ):
        synthetic_calibration().solve(budget)


def test_limits_can_make_a_budget_impossible(synthetic_calibration):
    with pytest.raises(BudgetError, match=r"3 to 3\.9\d are reachable with min_k=3 and max_k=4"):
        synthetic_calibration().solve(2.0, min_k=3)
    with pytest.raises(BudgetError, match=r"1 to 1\.99 are reachable with min_k=1 and max_k=2"):
        synthetic_calibration().solve(3.0, max_k=2)


def test_budget_beyond_top_k_needs_widening(synthetic_calibration):
    solved = synthetic_calibration().solve(6.0, max_k=10)
    assert solved.mean_experts == pytest.approx(6.0, rel=0.02)


def test_budget_between_two_steps(synthetic_calibration):
    with pytest.raises(
        BudgetError, match=r"no level comes within 2 % of 2\.5 experts per token in the model: the mean jumps"
    ):
        synthetic_calibration(reservoir=1, layers=1).solve(2.5)


def test_budget_needs_a_reservoir(synthetic_calibration):
    with pytest.raises(CalibrationError, match="a budget is solved on the calibration's tokens"):
        synthetic_calibration(reservoir=0).solve(2.0)


@pytest.mark.parametrize("wrong", ["4", True])
def test_budget_must_be_a_number(synthetic_calibration, wrong):
    with pytest.raises(InvalidTypeError, match="experts_per_token must be a number of experts, got"):
        synthetic_calibration().solve(wrong)


def test_levels_are_nested(synthetic_calibration):
    calibration = synthetic_calibration()
    tables = [calibration.table(alpha).thresholds_LE for alpha in (0.01, 0.1, 0.5)]
    assert bool((tables[0] >= tables[1]).all())
    assert bool((tables[1] >= tables[2]).all())
    assert bool((tables[0] > tables[2]).any())


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_reach_the_table(synthetic_calibration, kernel):
    calibration = synthetic_calibration()
    table = calibration.table(0.1, estimator="kde", kernel=kernel, bandwidth=0.05, scope="layer")
    plain = calibration.table(0.1, scope="layer")
    assert torch.allclose(table.thresholds_LE, plain.thresholds_LE, atol=0.15)
    assert not torch.equal(table.thresholds_LE, plain.thresholds_LE)


def test_policies_without_a_table(synthetic_calibration):
    calibration = synthetic_calibration()
    with pytest.raises(
        InvalidParameterError, match="'storey' adapts to the p-values and has no fixed critical"
    ):
        calibration.table(0.1, "storey")
    policy = calibration.policy(alpha=0.1, procedure="storey")
    assert isinstance(policy, PValuePolicy)
    decision = decide(policy, random_logits(4, T)[1], context(1))
    assert 1.0 < float(decision.counts_T.double().mean()) < K


class Logistic:
    """A null of one's own."""

    num = 0

    def p_values(self, statistic):
        return torch.sigmoid(-statistic.double())


def test_nulls_of_ones_own(synthetic_calibration, tmp_path):
    own = synthetic_calibration()
    given = own.with_nulls(Logistic(), statistic="logit")
    x_TE = torch.tensor([[0.25] * E])
    assert given.p_values(x_TE, 1)[0, 0].item() == pytest.approx(1 / (1 + math.exp(0.25)))
    table = given.table(0.4)  # p <= 0.4 k / 16
    expected_E = -torch.logit(0.025 * torch.arange(1.0, 17.0))
    torch.testing.assert_close(table.thresholds_LE[0], expected_E, rtol=1e-5, atol=1e-6)
    assert given.solve(2.5).mean_experts == pytest.approx(2.5, rel=0.02)
    assert own.settings().estimator == "empirical"  # the calibration itself is as it was
    per_layer = own.with_nulls(
        {"layers.0.gate": Logistic(), "layers.1.gate": own.fit(own.settings()).nulls[0]}
    )
    assert not torch.equal(*per_layer.table(0.4).thresholds_LE)
    with pytest.raises(CalibrationMismatchError, match=r"there is none for 'layers\.1\.gate'"):
        own.with_nulls({"layers.0.gate": Logistic()})
    with pytest.raises(
        CalibrationMismatchError, match=r"the given nulls hold one distribution per layer .* got null='all'"
    ):
        given.table(0.4, null="all")
    with pytest.raises(CalibrationError, match=r"nulls from outside \(the given nulls\) are not written"):
        given.save(tmp_path / "c.safetensors")


def test_what_was_fitted_is_kept_and_a_changed_copy_starts_anew(synthetic_calibration):
    calibration = synthetic_calibration()
    chosen = calibration.settings(statistic="logprob")
    assert calibration.fit(chosen) is calibration.fit(chosen)
    changed = replace(calibration, temperature=2.0)
    assert changed.fit(chosen) is not calibration.fit(chosen)
    assert "memo" not in {field.name for field in fields(calibration)}


@pytest.mark.parametrize(("kept", "found"), [(lambda x: 8 * x, 0.25), (lambda x: 8 * (1 - x), 0.75)])
def test_a_budget_for_any_parameter(kept, found):
    parameter, mean = solve_parameter(kept, 2.0, 0.0, 1.0)
    assert parameter == pytest.approx(found, abs=1e-9)
    assert mean == pytest.approx(2.0, abs=1e-9)
    with pytest.raises(
        BudgetError, match=r"^no share selects 9 experts per token on average: 0 to 8 are reachable; change"
    ):
        solve_parameter(kept, 9.0, 0.0, 1.0, what="share")
    with pytest.raises(
        BudgetError, match=r"no share comes within 2 % of 2\.5 experts per token: the mean jumps from 2 to 3"
    ):
        solve_parameter(lambda x: float(round(kept(x))), 2.5, 0.0, 1.0, what="share")


def test_level_and_budget_exclude_each_other(synthetic_calibration):
    with pytest.raises(InvalidParameterError, match=r"got both alpha=0\.1 and experts_per_token=2\.0"):
        synthetic_calibration().policy(alpha=0.1, experts_per_token=2.0)


def test_set_level_in_place(synthetic_calibration):
    calibration = synthetic_calibration()
    policy = calibration.policy(alpha=0.01)
    logits_TE = random_logits(4, T)[0]
    before = decide(policy, logits_TE, context(0)).counts_T
    policy.set_table(calibration.policy(experts_per_token=3.5).table)
    after = policy.decide(logits_TE, *torch.softmax(logits_TE, -1).topk(K, -1), context(0)).counts_T
    fresh = decide(calibration.policy(experts_per_token=3.5), logits_TE, context(0)).counts_T
    assert torch.equal(after, fresh)
    assert float(after.double().mean()) > float(before.double().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_p_values_in_every_dtype(synthetic_calibration, dtype):
    calibration = synthetic_calibration()
    logits_TE = random_logits(4, T)[0].to(dtype)
    p_TE = calibration.p_values(logits_TE, "layers.0.gate")
    assert p_TE.dtype == torch.float64
    assert torch.equal(p_TE, calibration.p_values(logits_TE.float(), 0))


def test_counts_merge_exactly(synthetic_calibration):
    a, b = synthetic_calibration(seed=1), synthetic_calibration(seed=2, tokens=1500)
    merged = a.merge(b)
    for kind in ("logit", "logprob"):
        for name in ("unselected", "selected", "trimmed"):
            total = a.histograms[kind][name].counts_LEB.sum(-1) + b.histograms[kind][name].counts_LEB.sum(-1)
            assert torch.equal(merged.histograms[kind][name].counts_LEB.sum(-1), total)
    assert (merged.tokens, merged.documents, merged.text_digest) == (5500, 2, f"{3:032x}")
    assert merged.reservoir.num == 2000
    hashes = torch.cat((a.reservoir.hash_N, b.reservoir.hash_N)).sort().values[:2000]
    assert torch.equal(merged.reservoir.hash_N, hashes)
    other = b.merge(a)
    for mine, theirs in (
        (merged.moments.mean_LEH, other.moments.mean_LEH),
        (merged.moments.sensitivity_LE, other.moments.sensitivity_LE),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        merged.table(0.1).thresholds_LE, other.table(0.1).thresholds_LE, atol=1e-6, rtol=0
    )


def test_moments_merge_to_those_of_all_tokens(synthetic_calibration):
    a, b = synthetic_calibration(seed=1).moments, synthetic_calibration(seed=2, tokens=1500).moments
    merged = a + b
    tokens = a.tokens_LE + b.tokens_LE
    for name in ("mean_LEH", "square_LE"):
        weight = [
            m.tokens_LE.double().reshape(m.tokens_LE.shape + (1,) * (getattr(m, name).dim() - 2))
            for m in (a, b)
        ]
        total = getattr(a, name) * weight[0] + getattr(b, name) * weight[1]
        torch.testing.assert_close(
            getattr(merged, name), total / (weight[0] + weight[1]), rtol=1e-10, atol=1e-12
        )
    assert torch.equal(merged.tokens_LE, tokens)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"temperature": 2.0}, "temperature"), ({"model_id": "other"}, "model_id"), ({"seed": 5}, "seed")],
)
def test_only_like_merges_with_like(synthetic_calibration, changes, name):
    other = synthetic_calibration(**({"seed": 2} | {k: v for k, v in changes.items() if k != "seed"}))
    if name == "seed":
        other = replace(other, seed=5)
    with pytest.raises(CalibrationMismatchError, match=f"can be merged, but {name} differs"):
        synthetic_calibration().merge(other)


def test_merging_after_the_means_were_dropped(synthetic_calibration):
    bare = synthetic_calibration().without_means()
    with pytest.raises(CalibrationError, match="merge first, then drop the means"):
        bare.merge(bare)


def test_temperature_is_checked(synthetic_calibration):
    calibration = synthetic_calibration(temperature=2.0)
    with pytest.raises(
        CalibrationMismatchError, match="made at temperature 2, got temperature=1; calibrate again"
    ):
        calibration.table(0.1, temperature=1.0)
    with pytest.warns(CalibrationWarning, match="changes no decision with statistic='logit'"):
        cooled = calibration.table(0.1, statistic="logit")
    plain = synthetic_calibration().table(0.1, statistic="logit")
    # bins are 1/64 wide in logit / 2, that is 1/32 in the logit
    torch.testing.assert_close(cooled.thresholds_LE * 2, plain.thresholds_LE, atol=1 / 32, rtol=0)


def test_text_too_short_for_the_level(synthetic_calibration):
    calibration = synthetic_calibration(tokens=40, reservoir=40)
    with pytest.raises(
        CalibrationError,
        match=r"no threshold is finite: bh at alpha=0\.0001 asks for p-values down "
        r"to 2\.5e-05 .* calibrate on about \d+ tokens or more \(this calibration saw 40\)",
    ):
        calibration.table(0.0001, scope="layer")
    with pytest.warns(CalibrationWarning, match="some thresholds are out of reach: bh at alpha=0.01"):
        table = calibration.table(0.01, scope="layer")
    assert bool(torch.isinf(table.thresholds_LE[:, 0]).all())
    assert bool(torch.isfinite(table.thresholds_LE[:, K - 1]).all())


def test_the_number_of_tokens_it_asks_for_is_enough(synthetic_calibration):
    with pytest.raises(CalibrationError) as caught:
        synthetic_calibration(tokens=40, reservoir=40).table(0.0001, scope="layer")
    needed = int(str(caught.value).split("about ")[1].split(" ")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        table = synthetic_calibration(tokens=needed + 50).table(0.0001, scope="layer")
    assert bool(torch.isfinite(table.thresholds_LE[:, K - 1]).all())


def test_layer_without_null_samples(synthetic_calibration):
    calibration = synthetic_calibration(experts=4, top_k=4)
    with pytest.raises(
        CalibrationError, match=r"layer layers\.0\.gate has no null samples \(null='unselected'\)"
    ):
        calibration.table(0.1, statistic="logprob", scope="layer")
    with pytest.raises(CalibrationError, match=r"the model has no null samples \(null='trimmed'\)"):
        calibration.table(0.1, statistic="logprob", null="trimmed")
    assert calibration.table(0.5, statistic="logprob", null="all").num_experts == 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"statistic": "rank"},
            InvalidParameterError,
            "statistic must be 'contribution', 'logprob' or 'logit', got 'rank'",
        ),
        (
            {"null": "none"},
            InvalidParameterError,
            "null must be 'unselected', 'all' or 'trimmed', got 'none'",
        ),
        ({"scope": "expert"}, InvalidParameterError, "scope must be 'model' or 'layer', got 'expert'"),
        (
            {"estimator": "exact"},
            InvalidParameterError,
            "estimator must be 'empirical', 'kde', 'normal' or 'given', got",
        ),
        (
            {"kernel": "cosine"},
            InvalidParameterError,
            "kernel must be 'gaussian', .* or 'triangular', got 'cosine'",
        ),
        (
            {"bandwidth": "scott"},
            InvalidParameterError,
            "bandwidth must be 'silverman', got 'scott'",
        ),
        (
            {"size": "large"},
            InvalidParameterError,
            "size must be 'token', 'sensitivity', 'deviation' or 'output', got 'large'",
        ),
        (
            {"statistic": "logit", "size": "output"},
            InvalidParameterError,
            "size='output' belongs to statistic='contribution', got statistic='logit'",
        ),
    ],
)
def test_unknown_settings(synthetic_calibration, settings, error, message):
    with pytest.raises(error, match=message):
        synthetic_calibration().table(0.1, **settings)


def test_what_was_not_collected_is_refused(synthetic_calibration):
    with pytest.raises(
        CalibrationMismatchError, match="needs the loss sensitivities, which this calibration was"
    ):
        synthetic_calibration(sensitivity=False).table(0.1, size="sensitivity")
    with pytest.raises(
        CalibrationMismatchError, match="needs the experts' outputs, which this calibration was"
    ):
        synthetic_calibration(moments=False).table(0.1, statistic="contribution")
    with pytest.raises(
        CalibrationMismatchError, match=r"has no layer 'layers\.7\.gate'; it has layers\.0\.gate"
    ):
        synthetic_calibration().p_values(random_logits(0, 3)[0], "layers.7.gate")


def test_repr_tells_what_it_holds(synthetic_calibration):
    text = repr(synthetic_calibration())
    assert text.startswith("Calibration of synthetic: 4,000 tokens of 1 documents, 2 layers x 16 experts; ")
    assert "reservoir of 2000 tokens, expert sizes, mean outputs, loss sensitivities" in text
    assert len(text.splitlines()) == 4
    assert "no reservoir, no expert outputs" in repr(synthetic_calibration(moments=False, reservoir=0))
