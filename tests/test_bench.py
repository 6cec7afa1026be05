"""`bh-routing bench`: the counts it prints are exact, whatever the times are."""

from __future__ import annotations

import json

import pytest
import torch

from bh_routing import RoutingIntegration, TopKPolicy, is_patched
from bh_routing.cli import main
from bh_routing.errors import InvalidInputError, InvalidParameterError
from bh_routing.evaluation.bench import CONTEXT, measure, paired_ratio, threshold_for, threshold_variants
from bh_routing.patching.instance import find_patch


@pytest.fixture
def loaded(monkeypatch, nano_model, nano_tokenizer):
    """The embedded model, loaded once for all tests."""
    monkeypatch.setattr("bh_routing.models.loading.load_model", lambda *_, **__: (nano_model, nano_tokenizer))
    return nano_model


def test_threshold_for_a_budget():
    scores_TK = torch.tensor([[3.0, 1.0, 2.0], [9.0, 8.0, 0.0]])
    for budget, kept in ((1, 1.0), (1.5, 1.5), (2, 2.0), (2.5, 2.5), (3, 3.0)):
        keep_TK = scores_TK >= threshold_for(scores_TK, budget)
        assert keep_TK.sum(-1).clamp_min(1).float().mean() == kept
    with pytest.raises(
        InvalidParameterError, match="a budget must lie between 1 and the router's 3 slots, got 4"
    ):
        threshold_for(scores_TK, 4)


def test_paired_ratio_is_taken_within_rounds():
    assert paired_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 3.0]) == 0.5


def test_counts_of_a_random_model(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    ids = token_ids.reshape(1, -1)
    config = model.config
    variants = threshold_variants(model, ids, [2.0])
    results = measure(model, variants, ids, [1, ids.shape[1]], rounds=2, steps=3)
    assert not is_patched(model)
    assert [(r.variant, r.tokens) for r in results] == [
        (name, tokens) for tokens in (1, ids.shape[1]) for name in ("stock", "2 experts")
    ]
    for result in results:
        assert len(result.seconds) == (6 if result.tokens == 1 else 2)
        assert len(result.layer_seconds) == 2
        assert all(s > 0 for s in result.layer_seconds)
    stock, fewer = results[2:]
    assert stock.experts == config.num_experts_per_tok
    # exact in the first layer; the second sees other hidden states than when the thresholds were found
    assert fewer.experts == pytest.approx(2.0, abs=0.15)
    assert stock.decision_seconds == [0.0, 0.0]
    assert all(0 < d < s for d, s in zip(fewer.decision_seconds, fewer.layer_seconds, strict=True))
    weights = 3 * config.hidden_size * config.intermediate_size
    for result in results:
        assert result.megabytes == pytest.approx(result.distinct * weights * 4 / 1e6)
        assert result.megaflops == pytest.approx(2 * result.experts * result.tokens * weights / 1e6)
    figures = fewer.figures(stock)
    assert figures["operations_ratio"] == pytest.approx(fewer.experts / stock.experts)
    assert 0 < figures["decision_share"] < 1


def test_a_patch_is_clocked_from_outside(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    with RoutingIntegration(model, TopKPolicy(2)) as integration, torch.no_grad():
        patch = find_patch(integration.plan.layers[0].router)
        before = model(input_ids=token_ids).logits
        ticks = iter(range(100))
        with patch.clocked(lambda: next(ticks)) as seconds:
            assert torch.equal(model(input_ids=token_ids).logits, before)
        # run begins at 0, what it replaced takes 1 to 2, run ends at 3
        assert seconds == {"run": 3.0, "inner": 1.0}
        assert not {"run", "inner"} & set(patch.__dict__)


def test_a_text_that_is_too_short(tiny_olmoe):
    with pytest.raises(InvalidInputError, match=f"bench needs a text of at least {CONTEXT} tokens, got 4"):
        measure(tiny_olmoe(), {}, torch.ones(1, 4, dtype=torch.int64), [2])


@pytest.mark.parametrize("calibration", [[], ["--calibration", "none"]])
def test_command(capsys, loaded, calibration):
    options = ["--tokens", "1", "--tokens", "16", "--experts", "4", "--rounds", "1", "--json", *calibration]
    assert main(["bench", "olmoe-nano", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["calibrated"] is (not calibration)
    assert [(f["variant"], f["tokens"]) for f in printed["figures"]] == [
        ("stock", 1), ("4 experts", 1), ("stock", 16), ("4 experts", 16)
    ]  # fmt: skip
    stock, fewer = printed["figures"][2:]
    assert (stock["experts_per_token"], stock["layer_ratio"], stock["decision_share"]) == (8.0, 1.0, 0.0)
    assert 3.0 < fewer["experts_per_token"] < 5.0


def test_command_prints_a_table_for_each_number_of_tokens(capsys, loaded):
    assert main(["bench", "olmoe-nano", "--tokens", "8", "--tokens", "1", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [
        line for line in lines if line.split() == ["stock", "6", "experts", "4", "experts", "2", "experts"]
    ]
    assert len(headings) == 2
    assert [line for line in lines if line.startswith(("Decoding", "8 tokens"))] == [
        "Decoding, one token at a time",
        "8 tokens per forward",
    ]
    assert max(map(len, lines)) <= 88


def test_command_refuses_no_rounds(capsys):
    assert main(["bench", "olmoe-nano", "--rounds", "0"]) == 2
    assert "argument --rounds: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
