"""A level per request and figures by phase in vLLM's plugin, without vLLM."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bh_routing.engines.vllm import admission, metrics, plugin
from bh_routing.engines.vllm.levels import Level, LevelBook, Resolver, Shedding, asked_of
from bh_routing.engines.vllm.phases import PhaseCounts, by_phase
from bh_routing.engines.vllm.routing import EngineRouting, LayerFacts
from bh_routing.engines.vllm.settings import Settings
from bh_routing.engines.vllm.step import DECODE, PADDING, PREFILL, REPEATED, Step
from bh_routing.errors import BHRoutingError, InvalidParameterError, MissingDependencyError
from bh_routing.models import bundled_calibration
from bh_routing.policies import RoutingContext, TopKPolicy

CALIBRATION = str(bundled_calibration())
ENGINE = Settings(calibration=CALIBRATION, experts_per_token=4.0)


def level(key: str, why: str = "own") -> Level:
    return Level(key=key, min_k=1, thresholds=[[float(len(key))]], why=why)


# --------------------------------------------------------------------------------------------- resolving


def test_a_level_is_solved_once_and_travels_as_thresholds():
    resolver = Resolver(ENGINE)
    value = resolver.admit({"bh_routing.experts_per_token": "3", "other": 1})
    assert value["other"] == 1
    found = Level.of(value)
    policy = ENGINE.level_policy({"experts_per_token": 3.0}, ENGINE.load_calibration())
    assert (found.key, found.min_k, found.why) == ("experts_per_token=3.0", policy.min_k, "own")
    assert torch.equal(torch.tensor(found.thresholds), policy.table.thresholds_LE[:, :8])
    assert resolver.resolve({"experts_per_token": 3, "alpha": None}) is resolver.resolve(
        {"experts_per_token": 3.0}
    )
    loaded = Settings(calibration=CALIBRATION, experts_per_token=3.0, under_load=2.0)
    assert Resolver(loaded).resolve({"experts_per_token": 2}, "load").why == "load"
    assert EngineRouting(loaded).settings.with_level(experts_per_token=1.5).experts_per_token == 1.5
    assert resolver.admit({"other": 1}) is None
    assert resolver.admit(None) is None


@pytest.mark.parametrize(
    ("settings", "asked", "sentence"),
    [
        (None, {"alpha": 0.1}, r"^this server routes nothing by bh_routing: .*or ask without\.$"),
        (Settings(top_k=4), {"alpha": 0.1}, r"started with a calibration, got no calibration; ask without"),
        (Settings(alpha=0.1), {"alpha": 0.1}, r"started with a calibration, got no calibration; ask without"),
        (Settings(calibration=CALIBRATION, top_k=4), {"alpha": 0.1}, r"got top_k=4; ask without bh_routing\.$"),
        (ENGINE, 3, r'^a level must be a mapping such as \{"experts_per_token": 3\}, got 3\.$'),
        (ENGINE, {}, r"^expected"),
        (ENGINE, {"min_k": 1}, r"^a level has no 'min_k'; "),
        (ENGINE, {"max_kl": 1e-9}, r"1e-09"),
        (ENGINE, {"alpha": 0}, r"^alpha must be a number strictly between 0 and 1, got 0\.0"),
        (ENGINE, {"alpha": True}, r"^alpha must be a number, got True\.$"),
    ],
)  # fmt: skip
def test_levels_that_cannot_be_served(settings, asked, sentence):
    with pytest.raises(BHRoutingError, match=sentence) as caught:
        Resolver(settings).resolve(asked)
    assert "\n" not in str(caught.value)


def test_a_level_is_given_once():
    with pytest.raises(
        InvalidParameterError,
        match=r"^a request's level was given twice, as bh_routing and as bh_routing\.alpha; ",
    ):
        asked_of({"bh_routing": {"alpha": 0.1}, "bh_routing.alpha": 0.1})


# ---------------------------------------------------------------------------------------------- the book


def begins(name: str, own: Level | None = None) -> SimpleNamespace:
    params = SimpleNamespace(extra_args=None if own is None else {"bh_routing": own.to_value()})
    return SimpleNamespace(req_id=name, sampling_params=params)


def step(*new: SimpleNamespace, ended: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(scheduled_new_reqs=list(new), finished_req_ids=set(ended))


def test_rows_are_shared_by_equal_levels_and_given_away_when_all_are_used():
    written: list[tuple[int, float]] = []
    policy = SimpleNamespace(
        rows=2, set_row=lambda row, thresholds, min_k: written.append((row, float(thresholds)))
    )
    book = LevelBook(policy)
    assert book.rows(["a"]) == [0]
    book.follow(step(begins("a", level("x")), begins("b"), begins("c", level("x")), begins("d", level("yy"))))
    assert book.rows(["a", "b", "c"]) == [1, 0, 1]
    assert book.rows(["d", "a"]) == [2, 1]
    assert written == [(1, 1.0), (2, 2.0)]
    book.follow(
        step(begins("e", level("zzz", "load")), begins("a", level("x")), ended=("d",))
    )  # a: after a preemption
    assert book.rows(["a", "e"]) == [1, 2]  # the row that this step does not use
    assert book.rows(["d"]) == [0]
    assert written[2:] == [(2, 3.0)]
    assert book.counts == {"own": {"x": 2, "yy": 1}, "default": {"default": 1}, "load": {"zzz": 1}}
    book.follow(step(ended=("a", "c", "e")))
    assert not book._of  # nothing is kept of what has ended


def test_levels_that_are_counted_do_not_grow_without_end():
    book = LevelBook(SimpleNamespace(rows=1, set_row=None))
    book.follow(step(*(begins(str(i), level(f"alpha={i}")) for i in range(40))))
    assert len(book.counts["own"]) == 33
    assert book.counts["own"]["others"] == 8


# ------------------------------------------------------------------------------------------------- load


def core(waiting: int, under_load: bool = True, queued: int = 0) -> SimpleNamespace:
    levels = [level(key, "load").to_value() for key in "abc"]
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config={"bh_routing_under_load": levels} if under_load else {}
        ),
        scheduler=SimpleNamespace(get_request_counts=lambda: (1, waiting)),
        input_queue=SimpleNamespace(qsize=lambda: queued),
    )


def request(own: Level | None = None, salt: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=begins("a", own).sampling_params, cache_salt=salt)


def admitted(engine: SimpleNamespace, asked: SimpleNamespace) -> tuple[str | None, str | None]:
    (got,) = admission.preprocess_add_request(lambda self, request: (request,), engine, asked)
    found = Level.of(got.sampling_params.extra_args)
    return (None if found is None else found.key), got.cache_salt


def test_requests_without_a_level_get_one_under_load_and_share_a_cache_within_it():
    busy = core(9, queued=8)
    assert admitted(busy, request()) == ("c", "\nbh_routing c")
    assert admitted(busy, request(level("x"), "mine")) == ("x", "mine\nbh_routing x")  # its own wins
    assert admitted(core(1), request()) == (None, None)
    assert admitted(core(99, under_load=False), request()) == (None, None)
    assert (
        admission.preprocess_add_request(
            lambda self, r: r, busy, pooling := SimpleNamespace(sampling_params=None)
        )
        is pooling
    )


def test_after_another_default_the_cache_is_another():
    engine = core(0)
    answers = [{"rank": 0, "alpha": 0.1}]
    rpc = lambda self, method, **kwargs: answers  # noqa: E731
    admission.collective_rpc(rpc, engine, "bh_routing_stats")
    assert admitted(engine, request()) == (None, None)
    assert admission.collective_rpc(rpc, engine, "bh_routing_set", kwargs={}) is answers
    assert admitted(engine, request(salt="mine")) == (None, "mine\nbh_routing change 1")
    answers[0]["error"] = "no"
    admission.collective_rpc(rpc, engine, "bh_routing_set")
    assert admitted(engine, request()) == (None, "\nbh_routing change 1")


def test_budgets_under_load_lie_between_both():
    assert Shedding.budgets(8, 2) == [6, 4, 2]
    for wrong in ({"experts_per_token": 4.0, "under_load": 4.0}, {"alpha": 0.1, "under_load": 2.0}):
        with pytest.raises(
            InvalidParameterError, match=r"^under_load must be a number of experts above 0 and below"
        ):
            Settings(calibration=CALIBRATION, **wrong)


def test_a_vllm_without_the_hooks_is_refused_where_it_is_to_be_routed(monkeypatch):
    for name in (
        "vllm",
        "vllm.v1",
        "vllm.v1.engine",
        "vllm.v1.engine.core",
        "vllm.v1.engine.input_processor",
    ):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.v1.engine.core"].EngineCore = type("EngineCore", (), {})
    sys.modules["vllm.v1.engine.input_processor"].InputProcessor = type("InputProcessor", (), {})
    plugin.hook_requests(SimpleNamespace(additional_config={}))
    with pytest.raises(
        MissingDependencyError,
        match=r"^this vLLM does not have what a request's level is read from: .*process_inputs",
    ):
        plugin.hook_requests(SimpleNamespace(additional_config={"bh_routing": {"alpha": 0.1}}))


# -------------------------------------------------------------------------------------------- together


def test_phases_and_own_levels_in_one_step():
    """Prompt, generated token, and a request of its own level: each token gets what its policy alone decides."""
    phases = {"prefill": {"experts_per_token": 8}, "decode": {"experts_per_token": 3}}
    engine = EngineRouting(Settings(calibration=CALIBRATION, phases=phases, compensation="mean"))
    calibration = engine.calibration
    for record in calibration.layers:
        facts = LayerFacts(
            name=record.path.replace("gate", "experts"), router="R", num_experts=64, top_k=8, score_func="softmax",
            renormalize=False,
        )  # fmt: skip
        engine.add(facts)
    engine.bind(torch.device("cpu"), requests=2)
    engine.step = Step(8, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    logits = 2.0 * torch.randn(6, 64, generator=generator)
    weights, experts = torch.softmax(logits, -1).topk(8, -1)
    layer = engine.layers[1]

    def alone(**given: object) -> torch.Tensor:
        policy = Settings(calibration=CALIBRATION, compensation="mean", **given).policy(calibration)
        policy.bind([layer.context])
        return policy.decide(logits, weights, experts, layer.context).weights_TK

    expected = torch.cat((weights[:3], alone(experts_per_token=3)[3:4], alone(alpha=1e-4)[4:]))
    own = Resolver(engine.settings).resolve({"alpha": 1e-4})
    engine.levels.set_row(2, torch.tensor(own.thresholds), own.min_k)
    engine.step.write(["a", "b", "c"], [3, 1, 2], [0, 9, 1], [3, 9, 3], [0, 0, 2])
    got, _ = layer.route(logits, weights, experts, count=True)
    assert torch.equal(got.abs(), expected.abs())
    engine.step.write(["c"], [1], [3], [3], [2])
    got, _ = layer.route(logits[5:], weights[5:], experts[5:], count=True)  # alone: the path of one token
    torch.testing.assert_close(got.abs(), expected[5:].abs(), rtol=1e-6, atol=0)
    told = engine.metrics()["phases"]
    assert [told[phase]["decisions"] for phase in ("prefill", "decode")] == [5, 2]


# ------------------------------------------------------------------------------------------- by phase


def test_counts_by_phase():
    """Two calls by hand: 4 experts, 2 slots, top-1 keeps the larger weight."""
    context = RoutingContext(path="gate", index=0, num_experts=4, empty=4, top_k=2, route_norm="none")
    counts = PhaseCounts(4, 4, torch.device("cpu"))
    phase_T = torch.tensor([PREFILL, PREFILL, DECODE, PADDING], dtype=torch.int8)
    weights, experts = torch.tensor([[0.6, 0.4]]).expand(4, 2), torch.tensor([[0, 1], [0, 2], [3, 1], [2, 1]])
    for k in (1, 2):
        counts.update(TopKPolicy(k).decide(torch.zeros(4, 4), weights, experts, context), phase_T)
    phase_T.fill_(PADDING)  # the next step's: what waits was copied
    one = TopKPolicy(1).decide(torch.zeros(1, 4), weights[:1], experts[:1], context)
    counts.update(one, torch.tensor([REPEATED], dtype=torch.int8))
    told = by_phase([counts])
    assert told["prefill"] == {
        "decisions": 4, "experts": 6, "floor": 0, "ceiling": 0, "steps": 2, "loads": 1 + 3,
        "mean_experts": 1.5, "mean_loads": 2.0, "share_floor": 0.0, "share_ceiling": 0.0,
    }  # fmt: skip
    decode = told["decode"]
    assert [decode[name] for name in ("decisions", "experts", "steps", "loads")] == [3, 4, 3, 1 + 2 + 1]
    counts.reset()
    assert by_phase([counts])["decode"]["mean_experts"] is None


def answer(layer: str) -> dict[str, object]:
    sums = {"decisions": 4, "experts": 6, "floor": 1, "ceiling": 0, "steps": 2, "loads": 5}
    return {
        "phases": {"prefill": sums, "decode": sums},
        "requests": {"own": {"alpha=0.1": 2}},
        "alpha": 0.1,
        "experts_per_token": None,
        "layers": [layer],
    }


def test_metrics_of_two_ranks_of_one_stage_and_one_of_another():
    prometheus = pytest.importorskip("prometheus_client")
    collector = metrics.Collector()
    registry = prometheus.CollectorRegistry()
    registry.register(collector)
    assert prometheus.generate_latest(registry) == b""
    collector.answers = [answer("a"), answer("a"), answer("b")]
    text = prometheus.generate_latest(registry).decode()
    assert 'bh_routing_experts_total{phase="decode"} 12.0' in text
    assert 'bh_routing_loads_total{phase="prefill"} 10.0' in text
    assert 'bh_routing_requests_total{level="alpha=0.1",why="own"} 2.0' in text
    assert 'bh_routing_level{kind="alpha"} 0.1' in text
    assert "experts_per_token" not in text


def test_only_metrics_asks_the_workers(monkeypatch):
    pytest.importorskip("prometheus_client")
    import prometheus_client

    monkeypatch.setattr(prometheus_client, "REGISTRY", prometheus_client.CollectorRegistry())
    asked, passed = [], []

    async def rpc(method):
        asked.append(method)
        raise RuntimeError("busy")

    async def app(scope, receive, send):
        passed.append(scope["path"])

    held = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(collective_rpc=rpc)))
    middleware = metrics.Metrics(app)
    for path in ("/v1/completions", "/metrics/"):
        asyncio.run(middleware({"type": "http", "path": path, "app": held}, None, None))
    assert (asked, passed) == (
        ["bh_routing_metrics"],
        ["/v1/completions", "/metrics/"],
    )  # answered all the same
