"""A price on loads in vLLM's plugin, without vLLM: which tokens of a step share, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bh_routing.decision.price import Step as SharedLoads
from bh_routing.engines.vllm.checks import check_price
from bh_routing.engines.vllm.routing import EngineRouting, LayerFacts
from bh_routing.engines.vllm.settings import Settings
from bh_routing.engines.vllm.step import Step
from bh_routing.errors import InvalidParameterError, UnsupportedModelError
from bh_routing.models import bundled_calibration

CALIBRATION = str(bundled_calibration())


def bound(**settings) -> EngineRouting:
    engine = EngineRouting(Settings(calibration=CALIBRATION, compensation=False, **settings))
    for index in range(4):
        name = f"model.layers.{index}.mlp.experts"
        engine.add(
            LayerFacts(
                name=name,
                router="CPURouter",
                num_experts=64,
                top_k=8,
                score_func="softmax",
                renormalize=False,
            )
        )
    engine.bind(torch.device("cpu"), requests=8)
    engine.step = Step(64, torch.device("cpu"))
    return engine


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = 2.0 * torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    weights, experts = logits.softmax(-1).topk(8, -1)
    return logits, weights, experts.int()


def kept(weights: torch.Tensor) -> list[list[bool]]:
    return (weights != 0).tolist()


def test_the_decode_tokens_of_a_step_share_and_pieces_of_prompts_do_not():
    """Five sequences decode, two prompts are computed in part, and two rows are padding."""
    engine = bound(distinct_experts=14)
    layer, logits = engine.layers[1], routed(14)
    engine.step.write(list("abcdefg"), [1, 4, 1, 1, 3, 1, 1], [9, 0, 8, 12, 5, 6, 7], [5, 30, 8, 4, 20, 6, 5])
    assert (engine.step.tokens, engine.step.decoding) == (12, 5)
    decode = torch.tensor([0, 5, 6, 10, 11])
    weights, _ = layer.route(*logits, count=True)
    context = replace(layer.context, step=SharedLoads(shape=(5, 1), tokens=5))
    alone = engine.policy.decide(*(x[decode] for x in logits[:2]), logits[2][decode].long(), context)
    assert kept(weights[decode]) == (~alone.dropped_TK).tolist()
    assert alone.shared_TK.any()
    prompt = torch.tensor([1, 2, 3, 4, 7, 8, 9])
    assert kept(weights[prompt]) == [[True] * 8] * 7  # the model's own choice is what the table keeps here
    read = set(alone.experts_TK.flatten().tolist())
    for t in (12, 13):  # padding: served by what is loaded
        assert {int(e) for e, w in zip(logits[2][t], weights[t], strict=True) if w} <= read
    told = engine.telemetry.to_dict()["layers"][1]
    assert told["load_histogram"][len(read - {64})] == told["steps"] == 1
    assert told["padding_tokens"] == 2


def test_a_prompt_alone_has_no_price():
    engine = bound(distinct_experts=3, experts_per_token=4)
    plain = bound(experts_per_token=4)
    logits = routed(6)
    for one in (engine, plain):
        one.step.write(["a"], [6], [0], [9])
    assert torch.equal(
        engine.layers[0].route(*logits, count=True)[0], plain.layers[0].route(*logits, count=True)[0]
    )
    assert engine.telemetry.to_dict()["total"]["steps"] == 0


def test_the_price_changes_while_it_runs():
    engine, logits = bound(distinct_experts=14), routed(6)
    engine.step.write(list("abcdef"), [1] * 6, [9] * 6, [5] * 6)
    few = engine.layers[0].route(*logits, count=True)[0]
    engine.set_level(price_load=0.0)
    assert torch.equal(engine.layers[0].route(*logits, count=True)[0], logits[1])
    engine.set_level(distinct_experts="14")
    assert torch.equal(engine.layers[0].route(*logits, count=True)[0], few)
    assert engine.stats()["stats"]["distinct_experts"] == 14
    engine.step.write(list("abc"), [1] * 3, [9] * 3, [5] * 3)  # another number of sequences: another price
    engine.layers[0].route(*(x[:3] for x in logits), count=True)
    three, six = (engine.policy.price_of(engine.layers[0].context, n) for n in (3, 6))
    assert three < six


def test_what_is_refused(monkeypatch):
    with pytest.raises(
        InvalidParameterError, match="needs a calibration's drop losses, which top_k=4 does not look at"
    ):
        Settings(calibration=CALIBRATION, distinct_experts=14, top_k=4)
    with pytest.raises(InvalidParameterError, match="resident has no meaning in vLLM"):
        Settings(calibration=CALIBRATION, distinct_experts=14, resident={})
    with pytest.raises(
        InvalidParameterError, match="levels of their own and a price on loads exclude each other"
    ):
        Settings(calibration=CALIBRATION, distinct_experts=14).level_policy({"alpha": 0.1}, None)

    envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)
    vllm = ModuleType("vllm")
    vllm.envs = envs
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    parallel = SimpleNamespace(
        data_parallel_size=1,
        prefill_context_parallel_size=1,
        use_sequence_parallel_moe=False,
        use_ubatching=False,
    )
    config = SimpleNamespace(
        parallel_config=parallel,
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=SimpleNamespace(enforce_eager=False),
    )
    check_price(config)
    config.device_config.device_type = "cuda"
    with pytest.raises(
        UnsupportedModelError, match="captured on cuda does not know; start with --enforce-eager"
    ):
        check_price(config)
    config.model_config.enforce_eager = envs.VLLM_BATCH_INVARIANT = True
    with pytest.raises(UnsupportedModelError, match="batch-invariant mode"):
        check_price(config)
    parallel.data_parallel_size = 2
    with pytest.raises(
        UnsupportedModelError, match="a price on loads needs to know each token's request, but here"
    ):
        check_price(config)
