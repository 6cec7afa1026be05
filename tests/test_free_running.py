"""Both models continue the same prompts: figures against the same computed in another way."""

from __future__ import annotations

import json

import pytest
import torch

from bh_routing.cli import main
from bh_routing.errors import InvalidInputError
from bh_routing.evaluation.free_running import free_running, prompts_of
from bh_routing.integration import RoutingIntegration
from bh_routing.policies import TopKPolicy

NEW = 6


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(5, 4000, (3, 8 + NEW), generator=torch.Generator().manual_seed(3))
    return rows[:, :8], rows[:, 8:]


@torch.no_grad()
def kl_along(model, prompts, path, routing):
    """Without a cache, in one forward: the mean over rows and new tokens, and per row."""
    both = torch.cat([prompts, path], dim=1)
    own = model(input_ids=both, use_cache=False).logits[:, 7:-1].double().log_softmax(-1)
    with routing:
        routed = model(input_ids=both, use_cache=False).logits[:, 7:-1].double().log_softmax(-1)
    return (own.exp() * (own - routed)).sum(-1).mean(-1)


def test_a_routing_that_keeps_everything_costs_nothing(nano_model, prompts):
    found = free_running(nano_model, [RoutingIntegration(nano_model, TopKPolicy())], *prompts)[0]
    for kind in ("greedy", "sampled"):
        assert found[kind]["kl"] == found[kind]["teacher_forced"] == 0.0
        assert (found[kind]["agreed"], found[kind]["same"]) == (NEW, 1.0)


def test_figures_are_those_of_generate_and_of_one_forward(nano_model, prompts):
    routing = RoutingIntegration(nano_model, TopKPolicy(2))
    found = free_running(nano_model, [routing], *prompts, seeds=())[0]
    assert set(found) == {"greedy"}

    def written():
        grown = nano_model.generate(
            prompts[0],
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
        )
        return grown[:, 8:]

    own = written()
    with routing:
        routed = written()
    each = kl_along(nano_model, prompts[0], own, routing)
    assert found["greedy"]["kl"] == pytest.approx(float(each.mean()), rel=1e-3)
    assert found["greedy"]["kl_error"] == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-3)
    teacher = float(kl_along(nano_model, *prompts, routing).mean())
    assert found["greedy"]["teacher_forced"] == pytest.approx(teacher, rel=1e-3)
    assert found["greedy"]["ratio"] == pytest.approx(float(each.mean()) / teacher, rel=2e-3)
    agreed = (own == routed).long().cumprod(-1).sum(-1)
    assert agreed.min() < NEW
    assert found["greedy"]["agreed"] == float(agreed.median())
    assert found["greedy"]["same"] == pytest.approx(float((agreed == NEW).double().mean()))


def test_sampling_is_seeded_and_follows_the_distribution(nano_model, prompts):
    routing = [RoutingIntegration(nano_model, TopKPolicy(4))]
    first, second = (free_running(nano_model, routing, *prompts, seeds=(5,))[0]["sampled"] for _ in range(2))
    assert first == second
    assert first != free_running(nano_model, routing, *prompts, seeds=(6,))[0]["sampled"]
    from bh_routing.evaluation.free_running import _picker

    logs = torch.tensor([0.5, 0.3, 0.2]).log()[None]
    counts = torch.cat([_picker(1, 0, 1.0)(i, logs) for i in range(3000)]).bincount(minlength=3)
    assert torch.allclose(counts / 3000, logs.exp()[0], atol=4 * (0.25 / 3000) ** 0.5)


def test_prompts_lie_evenly(nano_tokenizer):
    ids = nano_tokenizer("a b c d e f g " * 20, add_special_tokens=False)["input_ids"]
    prompts, onward = prompts_of(nano_tokenizer, "a b c d e f g " * 20, 3, 4, 2)
    assert prompts[0].tolist() + onward[0].tolist() == ids[:6]
    assert prompts[2].tolist() + onward[2].tolist() == ids[-6:]
    with pytest.raises(InvalidInputError, match="expected a text of at least 6,000 tokens for 1000 prompts"):
        prompts_of(nano_tokenizer, "a b c " * 20, 1000, 4, 2)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bh_routing.evaluation.free_running.PROMPTS", 2)
    monkeypatch.setattr("bh_routing.evaluation.free_running.PROMPT_TOKENS", 6)
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and the wind blew hard over the hills. " * 12)
    asked = [
        "evaluate",
        "olmoe-nano",
        "--policy",
        "topk:k=4",
        "--text",
        str(text),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main([*asked, "--max-tokens", "40", "--calibration", "none", "--free-running", "3"]) == 0
    kept = json.loads((tmp_path / "out" / "free_running.json").read_text())
    assert set(kept["text"]["topk:k=4"]) == {"greedy", "sampled"}
    assert "KL, own text" in capsys.readouterr().out
