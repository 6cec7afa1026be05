"""The C file without llama.cpp: its decision against the reference, how it is compiled, what it refuses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.decision.select_one_token import HostRow, decide_one_token
from bh_routing.decision.table import DecisionTable
from bh_routing.decision.types import Limits, TableSettings
from bh_routing.engines.llama_cpp import shim
from bh_routing.engines.llama_cpp.compiled import LlamaCppError
from bh_routing.engines.llama_cpp.shim import CRouter, LayerTables
from bh_routing.policies import RoutingContext
from bh_routing.stats.statistic import full_statistic
from bh_routing.telemetry.counters import LayerCounters

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CC") or "cc") is None, reason="there is no C compiler"
)

E, K, ROWS = 16, 4, 12_500  # rows of each of eight cases: 10^5


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("BH_ROUTING_CACHE", str(folder))
    return folder


@pytest.fixture
def router() -> Iterator[Any]:
    made: list[CRouter] = []

    def make(how: TableSettings, row: tuple[torch.Tensor, ...]) -> CRouter:
        lib = shim.library("test")
        tables = {0: LayerTables(row=row, how=how)}
        made.append(
            CRouter(
                lib, tables, experts=E, slots=K, hidden=8, logits="ffn_moe_logits", weights="ffn_moe_weights"
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


CASES = {
    "logprob": {},
    "step-down": {"rule": "step_down"},
    "logit": {"statistic": "logit", "temperature": 0.7},
    "sigmoid": {"score_func": "sigmoid"},
    "clamps": {"limits": Limits(2, 3, "after")},
    "inside": {"limits": Limits(0, 3, "inside"), "temperature": 2.0},
    "token size": {"statistic": "contribution", "follows": True},
    "token size, none": {"statistic": "contribution", "follows": True, "limits": Limits(0, None, "after")},
}


@pytest.mark.parametrize("case", CASES)
def test_decision_is_that_of_one_token(router: Any, case: str) -> None:
    """Counts and sets are equal on 10^5 rows wherever no statistic is within 8 ulp of its threshold."""
    given = dict(CASES[case])
    follows = given.pop("follows", False)
    how = TableSettings(empty=E, **given)
    g = torch.Generator().manual_seed(sorted(CASES).index(case))
    logits_TE = 2 * torch.randn(ROWS, E, generator=g)
    logits_TE[:50, :3] = -torch.inf  # masked experts
    logits_TE[50:60, 5] = torch.nan
    logits_TE[60:70, 5] = torch.inf
    logits_TE[70:80] = -torch.inf
    logits_TE[100:200] = logits_TE[100:200].round()  # ties
    own_TK = logits_TE.topk(K).indices
    spread = 0.8 if how.statistic == "logit" else 1.0
    thresholds_E = (
        torch.linspace(-1.0, -3.0, E) if how.statistic != "logit" else torch.linspace(2.5, 0.5, E)
    ) * spread
    row = (thresholds_E, 0.3 * torch.randn(E, generator=g))
    if follows:
        row += (0.2 * torch.randn(E, E, generator=g), torch.randn(E, generator=g))
    counts_T, raw_T, dropped_TK, lost_T = router(how, row).decide(0, logits_TE, own_TK)
    host = HostRow.of(*row)
    want = [
        decide_one_token(logits_TE[i : i + 1], torch.ones(1, K), own_TK[i : i + 1], host, how)
        for i in range(ROWS)
    ]
    extra = {"slope_DE": row[2], "center_D": row[3]} if follows else {}
    statistic_TE = full_statistic(
        logits_TE.double(), row[1].double(), how.statistic, how.score_func, how.temperature, **extra
    )
    sorted_TK = statistic_TE.gather(1, own_TK).sort(1, descending=True).values.double()
    ulp_K = torch.finfo(torch.float32).eps * thresholds_E[:K].abs().double()
    near_T = ((sorted_TK - thresholds_E[:K].double()).abs() <= 8 * ulp_K).any(1)
    assert int(near_T.sum()) < ROWS / 100
    for name, found in (
        ("counts_T", counts_T),
        ("raw_counts_T", raw_T),
        ("fallback_T", lost_T),
        ("dropped_TK", dropped_TK),
    ):
        expected = torch.cat([getattr(one, name).reshape(1, *found.shape[1:]) for one in want])
        assert torch.equal(found[~near_T], expected[~near_T]), name
    assert len(counts_T.unique()) > 1
    assert int(lost_T.sum()) == 30


def test_thresholds_are_read_where_they_are(router: Any) -> None:
    """A table that is rewritten in place decides differently at once."""
    thresholds_E = torch.full((E,), -torch.inf)
    made = router(TableSettings(empty=E, statistic="logit"), (thresholds_E, torch.zeros(E)))
    logits_TE = torch.randn(5, E, generator=torch.Generator().manual_seed(0))
    own_TK = logits_TE.topk(K).indices
    assert made.decide(0, logits_TE, own_TK)[0].tolist() == [K] * 5
    thresholds_E[2:] = torch.inf
    assert made.decide(0, logits_TE, own_TK)[0].tolist() == [2] * 5


def test_layouts_agree() -> None:
    """ctypes and the C compiler lay the structs out alike."""
    assert shim.layout(shim.library("test")) == shim.own_layout()
    assert DecisionTable.top_k(2, 1, E).num_experts == E


def test_counters_have_the_bins_that_are_written() -> None:
    """route.c counts into E + 1 bins three times, then (K + 1) x (E + 2) cells, then one of padding."""
    context = RoutingContext(path="gate", index=0, num_experts=E, empty=E, top_k=K)
    counters = LayerCounters(context, K)
    assert counters.counts.numel() == counters.sums.numel() == 3 * (E + 1) + (K + 1) * (E + 2) + 1


def test_compiled_once_for_this_user_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is keyed by what it was made from; nothing else is left; nobody else may read the folder."""
    shim.library("one")
    shim.library("two")
    names = sorted(path.name for path in cache.iterdir())
    assert len([name for name in names if name.endswith(".so")]) == len(names) >= 2
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is executed."""
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("BH_ROUTING_CACHE", str(tmp_path / "open"))
    with pytest.raises(LlamaCppError, match=r"must be a folder of this user alone \(mode 0700\)"):
        shim.library("three")


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(LlamaCppError, match="no C compiler: expected one called 'no-such-compiler'"):
        shim.library("four")
