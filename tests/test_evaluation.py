"""Perplexity by windows, and the paired comparison of routings."""

from __future__ import annotations

import math

import pytest
import torch

from bh_routing import RoutingIntegration, TopKPolicy, is_patched
from bh_routing.data import sample_sections, sample_text
from bh_routing.errors import InvalidInputError
from bh_routing.evaluation import Measured, compare, cut_windows, perplexity, window_losses


def test_windows_cover_the_text(nano_tokenizer):
    text = sample_text()
    ids = nano_tokenizer(text, return_tensors="pt", verbose=False).input_ids
    windows = cut_windows(nano_tokenizer, text, 100)
    assert all(window.shape == (1, 100) for window in windows[:-1])
    assert torch.equal(torch.cat(windows, 1), ids[:, : sum(w.shape[1] for w in windows)])
    assert ids.shape[1] - sum(w.shape[1] for w in windows) <= 1  # a last window of one token has no loss


def test_limited_windows_are_spread(nano_tokenizer):
    every = cut_windows(nano_tokenizer, sample_text(), 100)
    some = cut_windows(nano_tokenizer, sample_text(), 100, limit=4)
    assert len(some) == 4
    assert [next(i for i, w in enumerate(every) if torch.equal(w, s)) for s in some] == [
        i * len(every) // 4 for i in range(4)
    ]


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("a", 1)])
def test_text_too_short(nano_tokenizer, text, tokens):
    with pytest.raises(InvalidInputError) as caught:
        cut_windows(nano_tokenizer, text, 100)
    assert str(caught.value) == f"expected a text of at least two tokens, got {tokens}."


def test_losses_are_those_of_transformers(nano_model, token_ids):
    window = token_ids[:1]
    losses = window_losses(nano_model, window)
    with torch.no_grad():
        expected = nano_model(input_ids=window, labels=window, output_router_logits=False).loss
    assert losses.shape == (window.shape[1] - 1,)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-5)


def test_perplexity():
    assert perplexity([torch.tensor([math.log(2.0)]), torch.tensor([math.log(8.0)] * 1)]) == pytest.approx(
        4.0
    )
    assert perplexity([torch.tensor([800.0])]) == math.inf


def test_compare(nano_model, nano_tokenizer):
    windows = cut_windows(nano_tokenizer, sample_sections()["fiction"], 64, limit=3)
    steps = []
    routings = {
        "own": None,
        "all": RoutingIntegration(nano_model, TopKPolicy()),
        "two": RoutingIntegration(nano_model, TopKPolicy(2)),
    }
    own, everything, two = compare(nano_model, windows, routings, step=lambda: steps.append(1))
    assert not is_patched(nano_model)
    assert len(steps) == 9
    assert [m.label for m in (own, everything, two)] == ["own", "all", "two"]
    assert all(torch.equal(a, b) for a, b in zip(own.losses, everything.losses, strict=True))
    assert torch.equal(own.losses[1], window_losses(nano_model, windows[1]))
    assert own.perplexity == everything.perplexity < two.perplexity
    assert (own.mean_experts, own.std_experts, own.share_saved) == (8.0, 0.0, 0.0)
    assert own.layers == everything.layers == ((8.0, 0.0),) * 4
    assert (two.mean_experts, two.share_saved, two.layers) == (2.0, 0.75, ((2.0, 0.0),) * 4)
    assert [len(m.seconds) for m in (own, everything, two)] == [2, 2, 2]  # the first window is warm-up
    assert own.to_dict() == {
        "label": "own",
        "alpha": None,
        "perplexity": own.perplexity,
        "mean_experts": 8.0,
        "std_experts": 0.0,
        "share_saved": 0.0,
        "share_floor": 0.0,
        "share_ceiling": 0.0,
        "would_select": None,
        "arithmetic_per_token": 8.0,
        "bytes_per_token": 4 * 8 * 3 * nano_model.config.hidden_size * 64 * 4.0,
        "kl": {"value": 0.0, "low": None, "high": None},  # three windows are too few for an interval
        "agreement": {"value": 1.0, "low": None, "high": None},
        "layers": [{"mean_experts": 8.0, "std_experts": 0.0}] * 4,
        "median_seconds": own.median_seconds,
    }


def measured(*losses):
    return Measured(
        label="",
        losses=tuple(torch.tensor(loss) for loss in losses),
        mean_experts=8.0,
        std_experts=0.0,
        layers=(),
        share_saved=0.0,
        share_floor=0.0,
        share_ceiling=0.0,
        alpha=None,
        seconds=(),
    )


def test_change_of_the_perplexity():
    own, other = measured([1.0, 2.0], [3.0, 4.0], [5.0]), measured([1.2, 2.2], [3.0, 4.0], [5.1])
    change = other.change_from(own)
    assert change.value == pytest.approx(math.exp(0.1) - 1, rel=1e-6)
    assert change.value == pytest.approx(other.perplexity / own.perplexity - 1, rel=1e-6)
    assert math.isnan(change.low)  # three windows are too few for an interval
    assert math.isnan(change.high)


def test_interval_of_the_change_of_the_perplexity():
    own = measured(*[[1.0, 2.0], [3.0, 4.0]] * 5)
    change = measured(*[[1.2, 2.2], [3.0, 4.0]] * 5).change_from(own)
    assert change.value == pytest.approx(math.exp(0.1) - 1, rel=1e-6)
    assert (
        0.0 <= change.low < change.value < change.high <= math.exp(0.2) - 1
    )  # one kind of window alone: the ends
    assert own.change_from(own) == (0.0, 0.0, 0.0)


def test_compare_with_one_window_has_no_time(nano_model, token_ids):
    (own,) = compare(nano_model, [token_ids[:1]], {"own": None})
    assert math.isnan(own.median_seconds)
    assert own.to_dict()["median_seconds"] is None
