"""Situations that people report: code that sees indices, copies by PEFT, masks of every shape, repetition, pickles, devices."""

from __future__ import annotations

import io
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from bh_routing import BHRoutingIntegration, RoutingIntegration, TopKPolicy, calibrate, is_patched
from bh_routing.errors import PatchError, UnsupportedModelError
from bh_routing.evaluation.lm_eval import real_length
from bh_routing.models import bundled_calibration, bundled_path
from bh_routing.policies import RoutingPolicy
from bh_routing.training import AdaptiveRoutingLoss
from caches import after

# PEFT, and every release of transformers but the newest, name checkpointing as they always did.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture
def nano():
    return AutoModelForCausalLM.from_pretrained(bundled_path("olmoe-nano"), dtype=torch.float32).eval()


def calibrated(model, **settings):
    return BHRoutingIntegration(
        model, calibration=bundled_calibration(), **({"experts_per_token": 3.0} | settings)
    )


def logits_of(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


# -- the empty index stays inside --------------------------------------------------------------------------


@pytest.mark.parametrize("skip", ["auto", "compact", "zero"])
def test_hooks_on_a_router_see_experts_that_exist(tiny_olmoe, token_ids, skip):
    model = tiny_olmoe()
    gate = model.model.layers[0].mlp.gate
    seen = []
    gate.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
    with BHRoutingIntegration(model, alpha=0.05, skip=skip) as integrator:
        logits_of(model, token_ids)
        dropped = integrator.telemetry.to_dict()["layers"][0]["dropped_load"]
    _, weights_TK, experts_TK = seen[-1]
    assert int(experts_TK.max()) < model.config.num_experts
    assert int((weights_TK == 0).sum()) == sum(dropped) > 0


def gathering(self, hidden_states, top_k_index, top_k_weights):
    """What a fused kernel does: weights by index, every pair."""
    x = hidden_states[:, None, None, :]
    gate, up = (x @ self.gate_up_proj[top_k_index].transpose(-1, -2)).chunk(2, -1)
    y = (nn.functional.silu(gate) * up) @ self.down_proj[top_k_index].transpose(-1, -2)
    return (y.squeeze(-2) * top_k_weights.unsqueeze(-1)).sum(1)


def by_itself(self, hidden_states):
    """A block that reads the experts' weights."""
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, weights_TK, experts_TK = self.gate(flat)
    return gathering(self.experts, flat, experts_TK, weights_TK).view(hidden_states.shape)


def replace_experts(model):
    for layer in model.model.layers:
        layer.mlp.experts.forward = types.MethodType(gathering, layer.mlp.experts)


def replace_blocks(model):
    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(by_itself, layer.mlp)


@pytest.mark.parametrize("replaced", [replace_experts, replace_blocks])
def test_replaced_code_gets_weight_zero(tiny_olmoe, token_ids, replaced, caplog):
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.05, skip="zero"):
        wanted = logits_of(model, token_ids)
    replaced(model)
    before = logits_of(model, token_ids)
    caplog.clear()
    with BHRoutingIntegration(model, alpha=0.05):
        torch.testing.assert_close(logits_of(model, token_ids), wanted, rtol=1e-4, atol=1e-5)
    assert sum("keep their index and get weight 0" in record.message for record in caplog.records) == 1
    with pytest.raises(UnsupportedModelError, match="expected skip='auto' or 'zero'"):
        BHRoutingIntegration(model, alpha=0.05, skip="compact").patch_model()
    assert not is_patched(model)
    assert torch.equal(logits_of(model, token_ids), before)


def test_compensation_that_could_not_be_added_is_refused(nano):
    replace_blocks(nano)
    with pytest.raises(UnsupportedModelError, match="nothing can stand in for dropped experts there"):
        calibrated(nano).patch_model()
    assert not is_patched(nano)
    with calibrated(nano, compensation=False):
        assert is_patched(nano)


def test_a_wrapper_that_passes_on_keeps_the_saving(tiny_olmoe, token_ids):
    """Somebody's timing around the experts' forward: what it calls still leaves pairs out."""
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.05, skip="compact"):
        wanted = logits_of(model, token_ids)
    experts = model.model.layers[0].mlp.experts
    inner = experts.forward
    experts.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with BHRoutingIntegration(model, alpha=0.05, skip="compact"):
        assert torch.equal(logits_of(model, token_ids), wanted)


# -- adapters and copies -----------------------------------------------------------------------------------


def with_peft(model, **settings):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **settings)).eval()


def test_routers_that_peft_copies_are_followed_or_refused(nano, token_ids):
    plain = logits_of(nano, token_ids)
    integrator = calibrated(nano)
    with integrator:
        wanted = logits_of(nano, token_ids)
    adapted = with_peft(nano, modules_to_save=["gate"])
    with integrator:  # made before, patched after: the copies run, and are routed and counted
        integrator.reset_stats()
        assert torch.equal(logits_of(adapted, token_ids), wanted)
        assert integrator.telemetry.num_tokens == token_ids.numel()
        integrator.set_level(experts_per_token=5.0)
        assert not torch.equal(logits_of(adapted, token_ids), wanted)
        adapted = adapted.merge_and_unload()
        with pytest.raises(PatchError, match="was replaced by OlmoeTopKRouter"):
            logits_of(adapted, token_ids)
    assert not is_patched(adapted)
    assert torch.equal(logits_of(adapted, token_ids), plain)


@pytest.mark.parametrize("what", ["gate", "experts"])
def test_copies_of_patched_modules_are_refused_and_restored(nano, token_ids, what):
    plain = logits_of(nano, token_ids)
    integrator = calibrated(nano)
    integrator.patch_model()
    adapted = with_peft(nano, modules_to_save=[what])
    with pytest.raises(PatchError, match=rf"{what} \(.*\) was replaced by ModulesToSaveWrapper"):
        logits_of(adapted, token_ids)
    integrator.unpatch_model()
    assert not is_patched(adapted)
    assert torch.equal(logits_of(adapted, token_ids), plain)


@pytest.mark.parametrize("when", ["before", "between", "patched"])
def test_adapters_on_the_routers_weights(nano, token_ids, when):
    """PEFT's target_parameters parametrises the router while it runs: routed as it is, and restored."""
    peft = pytest.importorskip("peft")
    plain = logits_of(nano, token_ids)
    with calibrated(nano) as integrator:
        wanted = logits_of(nano, token_ids)
    if when == "patched":
        integrator.patch_model()
    adapted = peft.get_peft_model(
        nano, peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"])
    ).eval()
    if when == "before":
        integrator = BHRoutingIntegration(adapted, alpha=0.2)
        with integrator:
            wanted = logits_of(adapted, token_ids)
        assert not torch.equal(wanted, plain)
    if when != "patched":
        integrator.patch_model()
    integrator.reset_stats()
    assert torch.equal(logits_of(adapted, token_ids), wanted)
    assert integrator.telemetry.num_tokens == token_ids.numel()
    with torch.no_grad():  # an adapter that says something is part of the router's own choice
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(logits_of(adapted, token_ids), wanted)
    integrator.unpatch_model()
    assert not is_patched(adapted)
    with adapted.disable_adapter():
        assert torch.allclose(logits_of(adapted, token_ids), plain, atol=1e-5)


def test_a_router_that_runs_several_times_per_forward(tiny_olmoe, token_ids):
    """Shared layers: calibrated, counted and routed at each of their calls."""
    model = tiny_olmoe(num_hidden_layers=3)
    model.config.use_cache = False
    model.model.layers[1] = model.model.layers[0]
    found = calibrate(model, None, [token_ids.flatten().tolist()], window=token_ids.numel())
    assert len(found.layers) == 2
    tokens_seen, slots = token_ids.numel(), found.layers[0].top_k
    chosen = found.histograms["logit"]["selected"].counts_LEB.sum((1, 2))
    assert chosen.tolist() == [2 * tokens_seen * slots, tokens_seen * slots]
    assert found.moments.tokens_LE.sum(-1).tolist() == chosen.tolist()
    with BHRoutingIntegration(model, calibration=found, experts_per_token=2.0) as integrator:
        logits_of(model, token_ids)
        assert [part["router_calls"] for part in integrator.telemetry.to_dict()["layers"]] == [2, 1]
        assert integrator.telemetry.to_dict()["total"]["decisions"] == 3 * tokens_seen
        assert integrator.telemetry.mean_experts_per_token == pytest.approx(2.0, abs=0.3)


def test_adapters_elsewhere_change_nothing(nano, token_ids):
    with calibrated(nano) as integrator:
        wanted = logits_of(nano, token_ids)
        adapted = with_peft(nano)
        assert torch.equal(logits_of(adapted, token_ids), wanted)
        assert integrator.telemetry.num_tokens == 2 * token_ids.numel()


def test_replicas_of_dataparallel_are_refused(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.05), torch.no_grad():
        replica = model.model._replicate_for_data_parallel()
        with pytest.raises(PatchError, match=r"replicated by torch\.nn\.DataParallel"):
            replica(input_ids=token_ids)


def test_top_k_changed_is_refused_at_the_next_forward(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.05, collect_stats=False):
        logits_of(model, token_ids)
        for layer in model.model.layers:
            layer.mlp.gate.top_k = 3
        with pytest.raises(PatchError, match="selects 3 experts now, 6 when it was planned"):
            logits_of(model, token_ids)


# -- padding -----------------------------------------------------------------------------------------------


def tokens(integrator):
    total = integrator.telemetry.to_dict()["total"]
    integrator.reset_stats()
    return total["tokens"], total["padding_tokens"]


@pytest.mark.parametrize("kind", ["two", "bool", "float"])
@pytest.mark.parametrize("room", [0, 9])
def test_chunks_after_a_cache(tiny_olmoe, token_ids, kind, room):
    model = tiny_olmoe()
    first = torch.ones(2, 8, dtype=torch.long)
    first[0, :3] = 0
    with RoutingIntegration(model, TopKPolicy(2)) as integrator, torch.no_grad():
        cache = (
            StaticCache(config=model.config, max_cache_len=14 + room)
            if room
            else DynamicCache(config=model.config)
        )
        model(input_ids=token_ids[:, :8], attention_mask=first, **after(model, cache))
        assert tokens(integrator) == (13, 3)
        mask = torch.cat([first, torch.ones(2, 6 + room, dtype=torch.long)], 1)
        if kind == "two":
            mask = mask[:, :14]
        else:
            causal_SC = torch.arange(8, 14)[:, None] >= torch.arange(14 + room)
            mask = causal_SC[None, None] & mask.bool()[:, None, None, :]
            if kind == "float":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        model(input_ids=token_ids[:, 8:14], attention_mask=mask, **after(model, cache))
        assert tokens(integrator) == (12, 0)


@pytest.mark.parametrize(
    "stopping", [{"early_stopping": True}, {"early_stopping": False, "length_penalty": 0.0}]
)
def test_beams_of_a_sequence_that_has_ended_are_not_counted(nano, stopping):
    """Beam search runs all beams of a batch until its last sequence is done: what is counted is what each takes alone."""
    prompts = torch.randint(3, 4000, (3, 6), generator=torch.Generator().manual_seed(4))
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"eos_token_id": list(range(0, 4096, 5))} | stopping
    alone = []
    with BHRoutingIntegration(nano, alpha=0.3) as integrator:
        for row in prompts:
            integrator.reset_stats()
            nano.generate(row.unsqueeze(0), **settings)
            alone.append(integrator.telemetry.num_tokens)
        integrator.reset_stats()
        nano.generate(prompts, **settings)
        together, calls = (
            integrator.telemetry.num_tokens,
            integrator.get_routing_stats()["total_forward_passes"],
        )
    assert together == sum(alone)
    assert len(set(alone)) > 1
    # there was something not to count: forwards of nine rows while a sequence had ended
    layers = len(integrator.plan.layers)
    assert together < prompts.numel() * 3 + 9 * (calls // layers - 1)


def test_rows_that_have_ended_are_not_counted(nano):
    """A batch counts what its rows count alone."""
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(5, 4000, (4, 7), generator=generator)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with calibrated(nano) as integrator:
        said = nano.generate(prompts, eos_token_id=None, **settings)
        ends = said[:, [9, 11]].flatten().unique().tolist()  # some rows end early
        integrator.reset_stats()
        for row in prompts:
            nano.generate(row.unsqueeze(0), eos_token_id=ends, **settings)
        alone = integrator.telemetry.to_dict()["total"]
        integrator.reset_stats()
        nano.generate(prompts, eos_token_id=ends, **settings)
        batch = integrator.telemetry.to_dict()["total"]
        assert (batch["decisions"], batch["count_histogram"]) == (
            alone["decisions"],
            alone["count_histogram"],
        )
        assert batch["padding_tokens"] > 0
        integrator.reset_stats()
        logits_of(nano, prompts[:, :1])  # nothing is remembered
        assert tokens(integrator) == (4, 0)


def test_filled_up_rows():
    known = {(1, 2), (1, 2, 0), (3,), (4, 5, 6, 7)}
    assert real_length([1, 2, 0, 0], known) == 2
    assert real_length([3, 0, 0, 0], known) == 1
    assert real_length([4, 5, 6, 7], known) == 4
    assert real_length([9, 0, 0], known) == 3  # unknown: all of it


# -- repetition, several forwards --------------------------------------------------------------------------


class LargestOfTheBatch(RoutingPolicy):
    """Keeps what the first sequence's real tokens keep: it needs shape and mask."""

    name = "batch"
    causal = False

    def decide(self, logits_TE, own_weights_TK, own_experts_TK, context):
        assert context.shape is not None
        assert context.mask_T is not None
        keep = 2 + int(context.mask_T.sum()) % 3
        policy = TopKPolicy(keep)
        return policy.decide(logits_TE, own_weights_TK, own_experts_TK, context)


@pytest.mark.parametrize("reentrant", [False, True])
def test_repetition_decides_as_the_first_pass(tiny_olmoe, token_ids, reentrant):
    masks = [torch.ones_like(token_ids), torch.ones_like(token_ids)]
    masks[1][0, :4] = 0
    gradients = []
    for checkpointing in (False, True):
        model = tiny_olmoe().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with RoutingIntegration(model, LargestOfTheBatch()):
            losses = [model(input_ids=token_ids, attention_mask=m, use_cache=False).logits for m in masks]
            sum(x.square().mean() for x in losses).backward()  # two forwards, then both repeated
        gradients.append([p.grad for p in model.parameters()])
        assert not is_patched(model)
        assert not any(
            "Carried" in repr(m.__dict__.get("_gradient_checkpointing_func")) for m in model.modules()
        )
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, repeated, rtol=1e-4, atol=1e-6)


def test_repetition_after_unpatching_is_refused(tiny_olmoe, token_ids):
    model = tiny_olmoe().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with BHRoutingIntegration(model, alpha=0.05):
        loss = model(input_ids=token_ids, use_cache=False).logits.square().mean()
    with pytest.raises(PatchError, match="run the backward pass before unpatching"):
        loss.backward()


def test_the_loss_is_of_all_forwards_since_the_last(nano, token_ids):
    nano.train()
    with calibrated(nano) as integrator:
        loss = AdaptiveRoutingLoss(integrator)
        weights = [layer.router.weight for layer in integrator.plan.layers]

        def gradients():
            return torch.autograd.grad(loss.auxiliary(), weights)

        nano(input_ids=token_ids)
        alone = gradients()
        logits_of(nano, token_ids + 1)
        nano(input_ids=token_ids)
        logits_of(nano, token_ids + 2)
        for one, other in zip(alone, gradients(), strict=True):
            torch.testing.assert_close(one, other)
        nano(input_ids=torch.cat([token_ids, token_ids + 1]))
        together = gradients()
        nano(input_ids=token_ids)
        nano(input_ids=token_ids + 1)
        for one, other in zip(together, gradients(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


# -- pickles and devices -----------------------------------------------------------------------------------


FRESH = """
import sys, torch, bh_routing
model, ids = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    routed = model(input_ids=ids).logits
    bh_routing.unpatch(model)
    torch.save((routed, model(input_ids=ids).logits), sys.argv[2])
"""


@pytest.mark.parametrize("procedure", ["bh", "storey"])
def test_a_patched_model_in_a_fresh_process(nano, token_ids, tmp_path, procedure):
    plain = logits_of(nano, token_ids)
    with calibrated(nano, experts_per_token=None, alpha=0.2, procedure=procedure):
        wanted = logits_of(nano, token_ids)
        torch.save((nano, token_ids), tmp_path / "model.pt")
    subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "model.pt", tmp_path / "logits.pt"], check=True, timeout=120
    )
    routed, restored = torch.load(tmp_path / "logits.pt")
    # another process may run with another number of threads
    torch.testing.assert_close(routed, wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(restored, plain, rtol=1e-5, atol=1e-4)


class Answers(torch.utils.data.Dataset):
    """Rows that a patched model has answered, in whatever process reads them."""

    def __init__(self, model, rows):
        self.model, self.rows = model, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return logits_of(self.model, self.rows[index : index + 1])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_patched_model_in_workers(nano, token_ids, start):
    rows = token_ids.reshape(-1)[:32].reshape(2, 16)
    with calibrated(nano):
        wanted = Answers(nano, rows)
        expected = torch.stack([wanted[0], wanted[1]])
        loader = torch.utils.data.DataLoader(
            wanted, batch_size=2, num_workers=1, multiprocessing_context=start
        )
        (found,) = list(loader)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_module_copied_by_itself_does_not_take_its_model_along(nano):
    gate = nano.model.layers[0].mlp.gate
    with calibrated(nano):
        buffer = io.BytesIO()
        torch.save(gate, buffer)
    weights = sum(p.numel() * p.element_size() for p in nano.model.embed_tokens.parameters())
    assert buffer.getbuffer().nbytes < weights


@pytest.mark.parametrize(
    "settings", [{"experts_per_token": 3.0}, {"experts_per_token": None, "alpha": 0.3, "procedure": "storey"}]
)
def test_a_default_device_leaves_no_trace(nano, token_ids, settings):
    calls = [token_ids, token_ids[:1, :1]]
    with calibrated(nano, **settings):
        wanted = [logits_of(nano, ids) for ids in calls]
    with torch.device("meta"):
        integrator = calibrated(nano, **settings)
        integrator.patch_model()
        inside = [logits_of(nano, ids) for ids in calls]
    outside = [logits_of(nano, ids) for ids in calls]
    assert integrator.telemetry.num_tokens == 2 * (token_ids.numel() + 1)
    integrator.unpatch_model()
    for found in (inside, outside):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
