"""Policies as people type them: parsing, errors with the nearest name, building every one, budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bh_routing.calibration.passes import calibrate
from bh_routing.errors import BudgetError, InvalidParameterError, UnknownPolicyError
from bh_routing.evaluation.baselines import OpportunisticPolicy, mean_loads
from bh_routing.evaluation.entries import POLICIES
from bh_routing.evaluation.specs import make_routing, parse_policy
from bh_routing.evaluation.workbench import Workbench
from bh_routing.patching.calls import as_steps


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 250, (12, 64), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def bench(tiny_olmoe: Any, ids: torch.Tensor) -> Workbench:
    model = tiny_olmoe()
    calibration = calibrate(model, None, [row.tolist() for row in ids], window=64, progress=False)
    return Workbench(model, calibration, list(ids.split(1)))


def test_canonical_text() -> None:
    spec = parse_policy(" bh : experts=4.0, statistic=logprob,compensation=no ")
    assert spec.text == "bh:experts=4,statistic=logprob,compensation=false"
    assert parse_policy(spec.text) == spec
    assert spec.budget == 4.0
    assert parse_policy("perlayer:k=6/3").parameters == {"k": [6, 3]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topq:p=0.3", r"policy must be one of full, topk, .*, got 'topq'; did you mean 'topp'\?"),
        ("topp:q=0.3", r"parameter of topp must be one of experts, weights, compensation, p, got 'q'\."),
        ("bh:alhpa=0.1", r"got 'alhpa'; did you mean 'alpha'\?"),
    ],
)
def test_unknown_names(text: str, message: str) -> None:
    with pytest.raises(UnknownPolicyError, match=message):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topp:p", "expected key=value in policy 'topp:p', got 'p'"),
        ("topp:p=abc", "cannot read p='abc' of policy topp: 0 to 1"),
        ("topp:p=0.1,p=0.2", "gives p twice"),
        ("topp", "policy topp needs exactly one of p and experts, got none of them"),
        ("lexi", "policy lexi needs experts, got none of them"),
        ("bh:alpha=0.1,experts=4", "gives alpha and a budget"),
        ("naee:q=0.1,experts=4", "gives q and a budget"),
    ],
)
def test_unreadable(text: str, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        parse_policy(text)


# the parameter that each needs where it is not a budget
GIVEN = {
    "topk": "k=3",
    "topp": "p=0.4",
    "minp": "p=0.4",
    "threshold": "t=0.1",
    "entropy": "ks=1/3,thresholds=0.7",
    "random": "k=3",
    "seqtopk": "k=2.5",
    "perlayer": "k=2/4",
    "lexi": "experts=3",
    "allocmoe": "experts=3",
    "regular": "k=3",
    "normalised": "k=3",
    "uniform": "k=3",
    "oea": "k0=2",
    "xshare": "loads=9",
    "batchtopk": "loads=9",
} | dict.fromkeys(["bh", "by", "bonferroni", "holm", "hochberg", "storey", "higher_criticism"], "alpha=0.2")


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.filterwarnings("ignore::bh_routing.errors.CalibrationWarning")
def test_every_policy_routes(name: str, bench: Workbench, token_ids: torch.Tensor) -> None:
    with make_routing(f"{name}:{GIVEN.get(name, '')}", bench) as routing, torch.no_grad():
        assert torch.isfinite(bench.model(token_ids).logits).all()
        assert 1 <= routing.telemetry.mean_experts_per_token <= 6


# At any level the one selects nothing but min_k, the other nearly all: the error tells what is reachable.
SHARING = ("oea", "xshare", "batchtopk")  # these have a budget of loads
UNMET = ("original", "higher_criticism")


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"full", "perlayer", "adaptive", *SHARING, *UNMET}))
def test_every_budget_is_met(name: str, bench: Workbench, ids: torch.Tensor) -> None:
    """On the text that it was solved on, within the solver's 2 %."""
    with make_routing(f"{name}:experts=3", bench) as routing, torch.no_grad():
        bench.model(ids)
        assert routing.telemetry.mean_experts_per_token == pytest.approx(3.0, rel=0.025)


@pytest.mark.parametrize("name", UNMET)
def test_a_budget_out_of_reach(name: str, bench: Workbench) -> None:
    with pytest.raises(BudgetError, match=r"3 experts per token .* are reachable"):
        make_routing(f"{name}:experts=3", bench)


@pytest.mark.parametrize("name", [*SHARING, "bh"])
def test_every_budget_of_loads_is_met(name: str, bench: Workbench, ids: torch.Tensor) -> None:
    """In steps of twelve sequences of the text that it was solved on, in which tokens of one document are often together."""
    bench.streams = len(ids)
    loads = mean_loads(OpportunisticPolicy(2), bench.log, len(ids)) if name == "oea" else 9.0
    with make_routing(f"{name}:loads={loads:g}", bench) as routing, torch.no_grad(), as_steps():
        bench.model(ids)
        assert routing.telemetry.to_dict()["total"]["mean_loads"] == pytest.approx(loads, rel=0.1)
    if name == "oea":
        with pytest.raises(
            BudgetError,
            match=r"oea reads as many experts as its whole number k0 says, for 12 sequences .* at k0=2",
        ):
            make_routing("oea:loads=99", bench)


def test_budgets_without_a_calibration(tiny_olmoe: Any, ids: torch.Tensor) -> None:
    model = tiny_olmoe()
    with pytest.raises(InvalidParameterError, match="a budget is solved on calibration text"):
        make_routing("topp:experts=3", Workbench(model))
    bench = Workbench(model, None, list(ids.split(1)))
    for text in ("topp:experts=3", "bh:experts=3"):
        with make_routing(text, bench) as routing, torch.no_grad():
            model(ids)
            assert routing.telemetry.mean_experts_per_token == pytest.approx(3.0, rel=0.025)
    with pytest.raises(InvalidParameterError, match="statistic='logprob' needs a calibration"):
        make_routing("bh:experts=3,statistic=logprob", bench)


def test_compensation_of_any_policy(bench: Workbench, token_ids: torch.Tensor) -> None:
    outputs = []
    for text in ("topk:k=2", "topk:k=2,compensation=true"):
        with make_routing(text, bench), torch.no_grad():
            outputs.append(bench.model(token_ids).logits)
    assert not torch.allclose(*outputs, atol=1e-3)
    with pytest.raises(InvalidParameterError, match="compensation=True needs a calibration: "):
        make_routing("topk:k=2,compensation=true", Workbench(bench.model))


def test_unmeetable_budgets(bench: Workbench) -> None:
    with pytest.raises(BudgetError, match=r"lexi gives each of 2 layers a whole number .* use 2 or 2.5"):
        make_routing("lexi:experts=2.2", bench)
    with pytest.raises(BudgetError, match="allocmoe can keep 1 to 6 experts per token on average"):
        make_routing("allocmoe:experts=9", bench)


def test_what_is_inspired_says_so() -> None:
    inspired = {name for name, entry in POLICIES.items() if entry.inspired}
    assert inspired == {
        "topp",
        "minp",
        "entropy",
        "adaptive",
        "naee",
        "seqtopk",
        "lexi",
        "allocmoe",
        "xshare",
        "batchtopk",
    }
