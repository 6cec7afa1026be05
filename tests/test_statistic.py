"""The statistic with a size that follows the token, against its plain definition."""

import math

import pytest
import torch

from bh_routing.stats.statistic import full_statistic, token_size

EXPERTS, TOKENS = 7, 33


@pytest.fixture
def made():
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return 3.0 * normal(TOKENS, EXPERTS), normal(EXPERTS), 0.3 * normal(EXPERTS, EXPERTS), normal(EXPERTS)


def plain(logits_TE, offset_E, slope_DE, center_D):
    """log w + a + clamp((z - c) . v, -2, 2), in Python's floats."""
    rows = []
    for logits in logits_TE.tolist():
        top = max(logits)
        total = top + math.log(sum(math.exp(x - top) for x in logits))
        row = []
        for expert, x in enumerate(logits):
            told = sum(
                (z - c) * v
                for z, c, v in zip(logits, center_D.tolist(), slope_DE[:, expert].tolist(), strict=True)
            )
            row.append(x - total + float(offset_E[expert]) + min(max(told, -2.0), 2.0))
        rows.append(row)
    return torch.tensor(rows)


def test_it_is_the_plain_definition(made):
    logits_TE, offset_E, slope_DE, center_D = made
    found_TE = full_statistic(
        logits_TE, offset_E, "contribution", "softmax", slope_DE=slope_DE, center_D=center_D
    )
    assert found_TE.dtype == torch.float32
    torch.testing.assert_close(found_TE, plain(*made), atol=4e-6, rtol=0)  # float32 on sums of about 20
    inner_TE = token_size(logits_TE, slope_DE, center_D).abs()
    assert 0 < (inner_TE == 2.0).sum() < inner_TE.numel(), "the clamp should act on some, not on all"


def test_the_token_is_read_before_the_temperature(made):
    logits_TE, offset_E, slope_DE, center_D = made
    names = {"slope_DE": slope_DE, "center_D": center_D}
    for temperature in (0.5, 3.0):
        with_TE = full_statistic(logits_TE, offset_E, "logprob", "softmax", temperature, **names)
        without_TE = full_statistic(logits_TE, offset_E, "logprob", "softmax", temperature)
        expected_TE = without_TE + token_size(logits_TE, slope_DE, center_D).float()
        assert torch.equal(with_TE, expected_TE)


def test_without_slopes_it_is_bit_for_bit_what_it_was(made):
    logits_TE, offset_E, slope_DE, _ = made
    expected_TE = torch.log_softmax(logits_TE, -1) + offset_E
    assert torch.equal(full_statistic(logits_TE, offset_E, "logprob", "softmax"), expected_TE)
    zero_TE = full_statistic(
        logits_TE,
        offset_E,
        "logprob",
        "softmax",
        slope_DE=torch.zeros_like(slope_DE),
        center_D=torch.zeros(EXPERTS),
    )
    assert torch.equal(zero_TE, expected_TE)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_a_logit_that_is_not_finite_counts_as_the_center(made, value):
    logits_TE, _, slope_DE, center_D = made
    logits_TE[3, 2] = value
    found_TE = token_size(logits_TE, slope_DE, center_D)
    logits_TE[3, 2] = center_D[2]
    assert torch.equal(found_TE, token_size(logits_TE, slope_DE, center_D))


def test_gradients_are_finite(made):
    logits_TE, _, slope_DE, center_D = made
    logits_TE[0, 0] = -math.inf
    logits_TE.requires_grad_()
    token_size(logits_TE, slope_DE, center_D).sum().backward()
    assert bool(torch.isfinite(logits_TE.grad).all())
    assert float(logits_TE.grad[0, 0]) == 0.0
    assert float(logits_TE.grad.abs().sum()) > 0


def test_autocast_does_not_shorten_it(made):
    logits_TE, offset_E, slope_DE, center_D = made
    names = {"slope_DE": slope_DE, "center_D": center_D}
    expected_TE = full_statistic(logits_TE, offset_E, "logit", "softmax", **names)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full_statistic(logits_TE, offset_E, "logit", "softmax", **names), expected_TE)
