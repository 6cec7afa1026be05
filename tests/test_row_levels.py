"""A level for each row of a batch: each row's tokens get what they would get alone."""

from __future__ import annotations

import pytest
import torch

from bh_routing import BHRoutingIntegration
from bh_routing.errors import BudgetError, InvalidInputError, InvalidParameterError
from bh_routing.models import bundled_calibration

LEVELS = [{"experts_per_token": 8}, {"experts_per_token": 3}, {"alpha": 1e-4}, {"experts_per_token": 2}]


@pytest.fixture(scope="module")
def calibration():
    from bh_routing import Calibration

    return Calibration.load(bundled_calibration())


@pytest.fixture(scope="module")
def batch():
    """Four prompts of 2 to 9 tokens, padded at the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 4000, (4, 9), generator=generator)
    mask = (torch.arange(9) >= torch.tensor([0, 7, 2, 4]).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def histograms(integrator):
    return [layer["count_histogram"] for layer in integrator.telemetry.to_dict()["layers"]]


@pytest.fixture
def alone(nano_model, calibration, batch):
    """Of each row: its continuation, the logits of its prompt, and the histograms of both."""
    found = []
    with torch.inference_mode():
        for row, level in enumerate(LEVELS):
            real = batch["attention_mask"][row].bool()
            ids = batch["input_ids"][row][real].unsqueeze(0)
            with BHRoutingIntegration(nano_model, calibration=calibration, **level) as integrator:
                logits = nano_model(ids).logits[0]
                new = nano_model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
                found.append((new[0, ids.shape[1] :].tolist(), logits, histograms(integrator)))
    return found


def test_each_row_gets_what_it_gets_alone(nano_model, calibration, batch, alone):
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with (
        torch.inference_mode(),
        BHRoutingIntegration(nano_model, calibration=calibration, alpha=0.1) as integrator,
    ):
        integrator.set_level(per_row=LEVELS)
        assert integrator.alpha is None
        mask = batch["attention_mask"]
        logits = nano_model(**batch, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        new = nano_model.generate(**batch, **asked)
        together = histograms(integrator)
        integrator.set_level(alpha=0.1)
        assert integrator.alpha == 0.1
        plain = nano_model(**batch).logits
    for row, (tokens, expected, _) in enumerate(alone):
        assert new[row, 9:].tolist() == tokens
        own = logits[row][mask[row].bool()]
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)  # other sums of attention
    assert together == [
        [sum(x) for x in zip(*layers, strict=True)] for layers in zip(*(a[2] for a in alone), strict=True)
    ]
    with torch.inference_mode(), BHRoutingIntegration(nano_model, calibration=calibration, alpha=0.1):
        assert torch.equal(nano_model(**batch).logits, plain)


def test_a_beam_is_a_row(nano_model, calibration, batch):
    asked = {"max_new_tokens": 2, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    with (
        torch.inference_mode(),
        BHRoutingIntegration(nano_model, calibration=calibration, alpha=0.1) as integrator,
    ):
        integrator.set_level(per_row=LEVELS)
        with pytest.raises(
            InvalidInputError,
            match=r"gave 4 levels, one for each row of the batch, but this forward's batch has 8 ",
        ):
            nano_model.generate(**batch, **asked)
        integrator.set_level(per_row=[level for level in LEVELS for _ in range(2)])
        assert nano_model.generate(**batch, **asked).shape == (4, 11)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"per_row": [{"experts": 3}]}, InvalidParameterError, r"^a level has no 'experts'; did you mean 'experts_per_token'\?"),
        ({"per_row": [{"experts_per_token": 9}]}, BudgetError, r"^no level selects 9 experts"),
        ({"per_row": [{"alpha": 0.1, "experts_per_token": 3}]}, InvalidParameterError, "exactly one|both"),
        ({"per_row": []}, InvalidParameterError, r"^per_row must name at least one level"),
        ({"per_row": [{"alpha": 0.1}], "alpha": 0.1}, InvalidParameterError, r"^expected one level for all or per_row"),
    ],
)  # fmt: skip
def test_levels_that_cannot_be_served(nano_model, calibration, given, error, sentence):
    integrator = BHRoutingIntegration(nano_model, calibration=calibration, alpha=0.1)
    with pytest.raises(error, match=sentence):
        integrator.set_level(**given)
    assert integrator.alpha == 0.1


def test_levels_of_rows_need_a_calibration(nano_model):
    with pytest.raises(InvalidParameterError, match=r"^levels of their own need a calibration"):
        BHRoutingIntegration(nano_model, alpha=0.1).set_level(per_row=[{"alpha": 0.2}])
