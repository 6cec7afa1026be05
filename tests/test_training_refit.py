"""The null follows the router: refits, the Trainer's callback, several processes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from bh_routing import BHRoutingIntegration, Calibration, is_patched
from bh_routing.calibration.passes import calibrate
from bh_routing.errors import (
    CalibrationError,
    CalibrationMismatchError,
    InvalidParameterError,
    InvalidTypeError,
)
from bh_routing.training import AdaptiveRoutingCallback, AdaptiveRoutingLoss, refit
from bh_routing.training.refitting import RecentChoices, recalibrate

DOCUMENTS = torch.randint(3, 256, (120, 64), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def model(tiny_olmoe):
    return tiny_olmoe().train()


@pytest.fixture
def calibration(model):
    return calibrate(model, None, DOCUMENTS, progress=False)


def adaptive(model, calibration, experts=3.0, **options):
    return BHRoutingIntegration(model, calibration=calibration, experts_per_token=experts, **options)


OTHER_ROUTERS = pytest.mark.filterwarnings(
    "ignore:the router weights of layer:bh_routing.errors.CalibrationWarning"
)


def change_routers(model, factor):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(factor)


def tokens(seed, rows=24, length=48):
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


class Rows(Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {
            "input_ids": self.ids[index],
            "labels": self.ids[index],
            "attention_mask": torch.ones_like(self.ids[index]),
        }


# ------------------------------------------------------------------------------------------------- refits


@OTHER_ROUTERS
def test_a_refit_brings_the_budget_back(model, calibration):
    change_routers(model, 1.6)  # sharper routers: more experts pass the old thresholds, or fewer
    ids = tokens(3)
    means = []
    with adaptive(model, calibration, strict=False) as integrator:
        recent = RecentChoices(4096)
        integrator.watchers.append(recent)
        for step in range(2):
            integrator.reset_stats()
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
            means.append(integrator.get_routing_stats()["mean_experts_per_token"])
            if step == 0:
                new = refit(integrator, recent)
    assert abs(means[0] - 3.0) > 0.25
    assert means[1] == pytest.approx(
        3.0, abs=0.1
    )  # the first layer's new choice changes what the second sees
    assert new.tokens == ids.numel()
    assert new.moments is calibration.moments
    assert integrator.calibration is new
    new.check(integrator.plan)  # the fingerprint is that of the routers as they are
    with pytest.raises(CalibrationMismatchError, match="the router weights of layer"):
        calibration.check(integrator.plan)


def test_a_refit_on_the_calibration_text_is_the_calibration(model, calibration):
    with adaptive(model, calibration) as integrator:
        recent = RecentChoices(10**6)
        table = integrator.policy.table.thresholds_LE.clone()
        integrator.policy.set_table(
            integrator.policy.table.with_thresholds(torch.full_like(table, float("-inf")))
        )  # the routers see what they saw while calibrating
        integrator.watchers.append(recent)
        with torch.no_grad():
            model(input_ids=torch.tensor(DOCUMENTS), use_cache=False)
        new = refit(integrator, recent)
        again = integrator.policy.table.thresholds_LE
    assert new.tokens == calibration.tokens
    # logits held in float16 fall into a neighbouring bin of 1/64 now and then, and the reservoir holds other tokens
    finite = torch.isfinite(table) & torch.isfinite(again)
    torch.testing.assert_close(again[finite], table[finite], rtol=0, atol=0.1)


def test_the_table_changes_in_place_also_when_compiled(model, calibration):
    model.eval()
    ids = tokens(4, rows=2)
    with adaptive(model, calibration, collect_stats=False) as integrator:
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            before = compiled(input_ids=ids, use_cache=False).logits
            other = calibrate_scaled(calibration)
            with torch._dynamo.config.patch(error_on_recompile=True):
                integrator.set_calibration(other)
                after = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(
                after, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5
            )
    assert (before - after).abs().max() > 1e-4
    torch._dynamo.reset()


def calibrate_scaled(calibration):
    """The same calibration with other mean outputs."""
    from dataclasses import replace

    moments = replace(calibration.moments, mean_LEH=calibration.moments.mean_LEH * 2)
    return replace(calibration, moments=moments)


def test_padding_and_evaluation_are_not_held(model, calibration):
    ids = tokens(5, rows=2)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with adaptive(model, calibration) as integrator:
        recent = RecentChoices(10**6)
        integrator.watchers.append(recent)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        model.eval()
        model(input_ids=ids, use_cache=False)
    path = calibration.paths[0]
    assert len(recent.joined(path).real_N) == 20 + 48
    assert len(recent.held[path]) == 1
    small = RecentChoices(50)
    small.held = {path: [recent.held[path][0]] * 3}
    small.trim()
    assert len(small.held[path]) == 1
    assert len(small.joined(path).real_N) == 50


@OTHER_ROUTERS
def test_recalibrating_is_complete_and_patches_again(model, calibration):
    change_routers(model, 1.6)
    with adaptive(model, calibration, strict=False) as integrator:
        new = recalibrate(integrator, lambda m: calibrate(m, None, DOCUMENTS, progress=False))
        assert integrator.is_patched
        assert integrator.calibration is new
        assert not torch.equal(new.moments.square_LE, calibration.moments.square_LE)
        expected = new.compensations()
        for piece in integrator._patch._pieces:
            if getattr(piece, "compensation", None) is not None:
                torch.testing.assert_close(piece.compensation.vectors_JH, expected[piece.path].vectors_JH)
    assert not is_patched(model)


def test_what_cannot_be_refitted(model, calibration):
    with (
        adaptive(model, calibration) as integrator,
        pytest.raises(
            CalibrationError, match=r"router model\.layers\.0\.mlp\.gate saw no token since training began"
        ),
    ):
        refit(integrator, RecentChoices(10))
    plain = BHRoutingIntegration(model, alpha=0.3)
    with pytest.raises(CalibrationError, match="refit needs an integration with a calibration"):
        refit(plain, RecentChoices(10))
    with pytest.raises(
        InvalidParameterError, match="expected an integration that was made with a calibration"
    ):
        plain.set_calibration(calibration)
    integrator = adaptive(model, calibration)
    with pytest.raises(InvalidParameterError, match="with mean outputs of the same form as the one in use"):
        integrator.set_calibration(calibration.without_means())
    with pytest.raises(
        InvalidTypeError, match="integrator must be a BHRoutingIntegration, got OlmoeForCausalLM"
    ):
        AdaptiveRoutingCallback(model)
    with pytest.raises(InvalidParameterError, match="expected an integration with a calibration"):
        AdaptiveRoutingCallback(plain)
    with pytest.raises(InvalidParameterError, match="refit_every must be an integer of at least 1, got 0"):
        AdaptiveRoutingCallback(integrator, refit_every=0)


# -------------------------------------------------------------------------------------------- the Trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory:UserWarning",
    "ignore:`(is_)?gradient_checkpointing:FutureWarning",
    "ignore:.*lr_scheduler.step:UserWarning",
)


def make_trainer(model, folder, callbacks=(), loss=None, ids=None, **arguments):
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model,
        TrainingArguments(**(settings | arguments)),
        train_dataset=Rows(tokens(6) if ids is None else ids),
        compute_loss_func=loss,
        callbacks=list(callbacks),
    )


def test_in_the_trainer(model, calibration, tmp_path):
    before = model.model.layers[0].mlp.gate.weight.detach().clone()
    integrator = adaptive(model, calibration)
    loss = AdaptiveRoutingLoss(integrator)
    callback = AdaptiveRoutingCallback(integrator, refit_every=3, loss=loss)
    trainer = make_trainer(model, tmp_path, [callback], loss)
    callback.attach(trainer)
    assert trainer.callback_handler.callbacks[0] is callback
    trainer.train()
    assert not torch.equal(model.model.layers[0].mlp.gate.weight, before)
    assert [entry["step"] for entry in callback.history] == [2, 4]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        assert 2.0 < entry["routing/experts_per_token"] < 4.0
        assert entry["routing/budget"] == 3.0
        assert 0 < entry["routing/alpha"] < 1
        assert entry["routing/load_imbalance/layer_1"] >= 1
        assert {"routing/loss_balance", "routing/loss_z", "routing/loss_budget"} <= entry.keys()
        layers = [entry[f"routing/experts_per_token/layer_{i}"] for i in (0, 1)]
        assert sum(layers) / 2 == pytest.approx(entry["routing/experts_per_token"])
    # every checkpoint has the calibration that fits its routers
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        other = type(model).from_pretrained(folder)
        with (
            BHRoutingIntegration(
                other, calibration=folder / "calibration.safetensors", experts_per_token=3.0
            ) as check,
            torch.no_grad(),
        ):
            other.eval()(input_ids=tokens(8))
            assert check.get_routing_stats()["mean_experts_per_token"] == pytest.approx(3.0, abs=0.4)
    assert integrator.is_patched
    assert loss._tape in integrator.watchers
    assert len(integrator.watchers) == 1
    integrator.unpatch_model()


def test_resuming_takes_up_the_calibration_of_the_checkpoint(model, calibration, tmp_path):
    callback = AdaptiveRoutingCallback(adaptive(model, calibration), refit_every=None)
    trainer = make_trainer(model, tmp_path, [callback], max_steps=2)
    trainer.train()
    callback.integrator.unpatch_model()
    saved = Calibration.load(tmp_path / "checkpoint-2" / "calibration.safetensors")
    integrator = adaptive(model, calibration, strict=False)
    before = integrator.policy.table.thresholds_LE.clone()
    again = AdaptiveRoutingCallback(integrator)
    again.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert torch.equal(
        integrator.policy.table.thresholds_LE, saved.solve(3.0, compensated=True).table.thresholds_LE
    )
    assert not torch.equal(integrator.policy.table.thresholds_LE, before)
    assert len(integrator.watchers) == 2
    integrator.unpatch_model()


def test_recalibrating_in_the_trainer(model, calibration, tmp_path):
    made = []

    def make(m):
        made.append(calibrate(m, None, DOCUMENTS, progress=False))
        return made[-1]

    integrator = adaptive(model, calibration)
    callback = AdaptiveRoutingCallback(integrator, refit_every=3, recalibrate=make)
    make_trainer(model, tmp_path, [callback], AdaptiveRoutingLoss(integrator), save_strategy="no").train()
    assert len(made) == 2  # after step 3, and at the end
    assert integrator.calibration is made[-1]
    assert model.training
    integrator.unpatch_model()


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_ways_to_train(model, calibration, tmp_path, arguments):
    integrator = adaptive(model, calibration)
    loss = AdaptiveRoutingLoss(integrator)
    callback = AdaptiveRoutingCallback(integrator, refit_every=2, loss=loss)
    trainer = make_trainer(model, tmp_path, [callback], loss, save_strategy="no", **arguments)
    before = model.model.layers[0].mlp.gate.weight.detach().clone()
    trainer.train()
    assert (model.model.layers[0].mlp.gate.weight - before).abs().max() > 1e-5
    last = callback.history[-1]
    assert 2.0 < last["routing/experts_per_token"] < 4.0
    integrator.unpatch_model()
    torch._dynamo.reset()


def test_gradient_accumulation_is_the_large_batch(model, calibration):
    ids = tokens(9, rows=8)
    labels = ids.clone()
    items = ids[:, 1:].numel()
    gradients = []
    for parts in (1, 2):
        model.zero_grad()
        with adaptive(model, calibration) as integrator:
            loss = AdaptiveRoutingLoss(integrator, balance=0.0, budget=0.0, z=0.1)  # linear in the tokens
            for part in range(parts):
                rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
                out = model(input_ids=ids[rows], use_cache=False)
                loss(out, labels[rows], num_items_in_batch=items).backward()
        gradients.append(model.model.layers[0].mlp.gate.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [None, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, calibration, reentrant):
    ids = tokens(10, rows=3)
    plain, other = [], []
    for found, kind in ((plain, None), (other, reentrant)):
        model.zero_grad()
        if kind is not None:
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": kind})
        with adaptive(model, calibration) as integrator:
            loss = AdaptiveRoutingLoss(integrator)
            (loss(model(input_ids=ids, labels=ids, use_cache=False))).backward()
            assert integrator.telemetry.num_tokens == ids.numel()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for one, two in zip(plain, other, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "experts"])
def test_lora_in_the_trainer(model, calibration, tmp_path, targets):
    from peft import LoraConfig, get_peft_model

    integrator = adaptive(model, calibration)  # before PEFT: the calibration knows the model's own paths
    loss = AdaptiveRoutingLoss(integrator)
    callback = AdaptiveRoutingCallback(integrator, refit_every=2, loss=loss)
    if targets == "experts":
        options = {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        }
    else:
        options = {"target_modules": targets}
    wrapped = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    frozen = model.model.layers[0].mlp.gate.weight.detach().clone()
    trainer = make_trainer(wrapped, tmp_path, [callback], loss, learning_rate=0.05)
    trainer.train()
    moved = {n: p for n, p in wrapped.named_parameters() if "lora_B" in n}
    assert moved
    assert all(p.abs().max() > 1e-4 for p in moved.values()), {
        n: float(p.abs().max()) for n, p in moved.items()
    }
    assert torch.equal(model.model.layers[0].mlp.gate.weight, frozen)
    assert 2.0 < callback.history[-1]["routing/experts_per_token"] < 4.0
    assert (tmp_path / "checkpoint-4" / "calibration.safetensors").is_file()
    integrator.unpatch_model()


def test_compiled_gradients_are_the_eager_ones(model, calibration):
    ids = tokens(11, rows=2)
    found = []
    for compiled in (False, True):
        model.zero_grad()
        with adaptive(model, calibration) as integrator:
            loss = AdaptiveRoutingLoss(integrator)
            runner = torch.compile(model, backend="aot_eager") if compiled else model
            loss(runner(input_ids=ids, labels=ids, use_cache=False)).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch._dynamo.reset()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# --------------------------------------------------------------------------------------- several processes


def test_two_processes_give_the_result_of_one(model, calibration, tmp_path):
    model.save_pretrained(tmp_path / "model")
    calibration.save(tmp_path / "calibration.safetensors")
    torch.save(tokens(12, rows=8), tmp_path / "ids.pt")
    script = Path(__file__).with_name("training_processes.py")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20_000 + os.getpid() % 20_000),
    }
    results = []
    for world in (1, 2):
        running = [
            subprocess.Popen(
                [sys.executable, str(script), str(tmp_path), str(rank), str(world)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        errors = [process.communicate(timeout=240)[1] for process in running]
        assert not any(process.returncode for process in running), errors
        results.append(json.loads((tmp_path / f"result-{world}.json").read_text()))
    one, two = results
    for name in ("weights", "parts", "thresholds"):
        assert len(one[name]) == len(two[name])
        assert one[name] == pytest.approx(two[name], rel=1e-4, abs=2e-5), (
            name
        )  # float32 sums in another order
    assert one["moved"] > 1e-3
    logging.getLogger(__name__).debug("%s", two["parts"])
