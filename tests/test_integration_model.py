"""The integration on real OLMoE models: it changes what it should, and restores everything else bit for bit."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

from bh_routing import (
    BHRoutingIntegration,
    NoRoutersError,
    RoutingIntegration,
    TopKPolicy,
    is_patched,
    unpatch,
)
from bh_routing.errors import InvalidParameterError, InvalidTypeError, PatchError, UnsupportedModelError
from bh_routing.patching.calls import token_mask
from bh_routing.policies import RoutingPolicy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


class Snapshot:
    """Everything of a model that a patch must give back."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids
        self.modules = {path: id(m) for path, m in model.named_modules()}
        self.attributes = {path: self._attributes(m) for path, m in model.named_modules()}
        self.state = {name: t.clone() for name, t in model.state_dict().items()}
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.config = model.config.to_dict()
        self.implementation = model.config._experts_implementation
        self.logits = logits_of(model, ids)

    @staticmethod
    def _attributes(module):
        hooks = {
            key: len(value)
            for key, value in module.__dict__.items()
            if key.endswith("hooks") and isinstance(value, dict)
        }
        rest = {key: id(value) for key, value in module.__dict__.items() if key not in hooks}
        return hooks, rest, module.training

    def assert_restored(self):
        assert {path: id(m) for path, m in self.model.named_modules()} == self.modules
        for path, module in self.model.named_modules():
            assert self._attributes(module) == self.attributes[path], path
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(state[name], tensor) for name, tensor in self.state.items())
        assert {name: p.requires_grad for name, p in self.model.named_parameters()} == self.flags
        assert self.model.config.to_dict() == self.config
        assert self.model.config._experts_implementation == self.implementation
        assert torch.equal(logits_of(self.model, self.ids), self.logits)
        assert not is_patched(self.model)


def strict(model, **settings):
    return BHRoutingIntegration(model, **({"alpha": 0.05} | settings))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_everything_is_bit_identical(tiny_olmoe, token_ids, dtype, implementation):
    model = tiny_olmoe(dtype=dtype)
    model.set_experts_implementation(implementation)
    before = logits_of(model, token_ids)
    with RoutingIntegration(model, TopKPolicy()) as integrator:
        assert integrator.is_patched
        assert torch.equal(logits_of(model, token_ids), before)
        assert integrator.telemetry.mean_experts_per_token == 6.0
    # in training mode too: gradients are the unpatched model's
    model.train()
    model(input_ids=token_ids).logits.float().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with RoutingIntegration(model, TopKPolicy()):
        model(input_ids=token_ids).logits.float().sum().backward()
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_skipping_equals_zero_weights(tiny_olmoe, token_ids, implementation, norm):
    model = tiny_olmoe(norm_topk_prob=norm)
    model.set_experts_implementation(implementation)
    before = logits_of(model, token_ids)
    results = {}
    for skip in ("zero", "compact"):
        with strict(model, skip=skip):
            results[skip] = logits_of(model, token_ids)
    assert (results["zero"] - before).abs().max() > 1e-2  # the patch changed something
    # the same numbers added in another order, in float32
    torch.testing.assert_close(results["compact"], results["zero"], rtol=1e-4, atol=1e-5)


def test_restored_bit_for_bit(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    snapshot = Snapshot(model, token_ids)
    integrator = strict(model)
    integrator.patch_model()
    assert not torch.equal(logits_of(model, token_ids), snapshot.logits)
    integrator.unpatch_model()
    snapshot.assert_restored()
    integrator.unpatch_model()  # a second time does nothing
    snapshot.assert_restored()
    integrator.patch_model()  # and it can be applied again
    assert not torch.equal(logits_of(model, token_ids), snapshot.logits)
    integrator.unpatch_model()
    snapshot.assert_restored()


def test_restored_after_an_exception(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    snapshot = Snapshot(model, token_ids)

    def interrupted():
        with strict(model):
            logits_of(model, token_ids)
            raise ZeroDivisionError("between two forwards")

    with pytest.raises(ZeroDivisionError, match="between two forwards"):
        interrupted()
    snapshot.assert_restored()


class Failing(RoutingPolicy):
    name = "failing"

    def decide(self, logits_TE, own_weights_TK, own_experts_TK, context):
        raise ZeroDivisionError("inside decide")


def test_restored_after_an_exception_inside_forward(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    snapshot = Snapshot(model, token_ids)
    with pytest.raises(ZeroDivisionError, match="inside decide"), RoutingIntegration(model, Failing()):
        logits_of(model, token_ids)
    snapshot.assert_restored()


def test_a_failure_halfway_through_applying_leaves_nothing(tiny_olmoe, token_ids, monkeypatch):
    model = tiny_olmoe()
    snapshot = Snapshot(model, token_ids)
    integrator = strict(model)
    from bh_routing.patching import apply

    installed = []
    original = apply.ImplementationPatch.install

    def install(self):
        if installed:
            raise OSError("the second layer fails")
        installed.append(self)
        original(self)

    monkeypatch.setattr(apply.ImplementationPatch, "install", install)
    with pytest.raises(OSError, match="the second layer fails"):
        integrator.patch_model()
    assert len(installed) == 1
    assert not integrator.is_patched
    snapshot.assert_restored()


def test_double_patching_is_refused(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    snapshot = Snapshot(model, token_ids)
    first = strict(model)
    first.patch_model()
    patched = logits_of(model, token_ids)
    with pytest.raises(PatchError, match="patched by this integration already: call unpatch_model"):
        first.patch_model()
    with pytest.raises(PatchError, match=r"model\.layers\.0\.mlp\.gate is already patched"):
        strict(model, alpha=0.5).patch_model()
    assert torch.equal(logits_of(model, token_ids), patched)
    first.unpatch_model()
    snapshot.assert_restored()


def test_two_models_that_share_a_config(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    other = type(model)(model.config).eval()
    assert other.config is model.config
    before = logits_of(other, token_ids)
    with strict(model):
        assert torch.equal(logits_of(other, token_ids), before)
        assert other.model.layers[0].mlp.experts.config._experts_implementation != "bh_routing"
        assert model.config._experts_implementation != "bh_routing"


def test_a_deep_copy_is_patched_and_uses_its_own_weights(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    plain = logits_of(model, token_ids)
    with strict(model):
        patched = logits_of(model, token_ids)
        twin = copy.deepcopy(model)
    assert torch.equal(logits_of(model, token_ids), plain)
    assert torch.equal(logits_of(twin, token_ids), patched)
    with torch.no_grad():
        twin.model.layers[0].mlp.gate.weight.mul_(-1.0)
    assert not torch.equal(logits_of(twin, token_ids), patched)
    assert torch.equal(logits_of(model, token_ids), plain)
    with torch.no_grad():
        twin.model.layers[0].mlp.gate.weight.mul_(-1.0)
    assert unpatch(twin) > 0
    Snapshot(twin, token_ids).assert_restored()
    assert torch.equal(logits_of(twin, token_ids), plain)


def test_a_patched_model_can_be_pickled(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    with strict(model):
        patched = logits_of(model, token_ids)
        twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(twin, token_ids), patched)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.getbuffer().nbytes > 0


def test_save_pretrained_while_patched(tiny_olmoe, token_ids, tmp_path):
    model = tiny_olmoe()
    plain = logits_of(model, token_ids)
    with strict(model):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path).eval(), token_ids), plain)


@pytest.mark.parametrize("order", ["hook-patch-unpatch-unhook", "hook-patch-unhook-unpatch"])
def test_accelerate_hooks_before_the_patch(tiny_olmoe, token_ids, order):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = tiny_olmoe()
    plain = logits_of(model, token_ids)
    with strict(model):
        patched = logits_of(model, token_ids)
    calls = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    gate, experts = model.model.layers[0].mlp.gate, model.model.layers[0].mlp.experts
    for module in (gate, experts):
        add_hook_to_module(module, Counting())
    integrator = strict(model)
    integrator.patch_model()
    calls.clear()  # the plan's probe ran through the hook
    assert torch.equal(logits_of(model, token_ids), patched)
    assert calls == ["OlmoeTopKRouter", "OlmoeExperts"]
    steps = {"unpatch": integrator.unpatch_model}
    steps["unhook"] = lambda: [remove_hook_from_module(m) for m in (gate, experts)]
    first, second = order.split("-")[2:]
    steps[first]()
    expected = plain if first == "unpatch" else patched
    assert torch.equal(logits_of(model, token_ids), expected)
    steps[second]()
    calls.clear()
    assert torch.equal(logits_of(model, token_ids), plain)
    assert calls == []
    assert not is_patched(model)


@pytest.mark.parametrize("order", ["unpatch-unhook", "unhook-unpatch"])
def test_accelerate_hooks_after_the_patch(tiny_olmoe, token_ids, order):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = tiny_olmoe()
    plain = logits_of(model, token_ids)
    gate = model.model.layers[0].mlp.gate
    integrator = strict(model)
    integrator.patch_model()
    patched = logits_of(model, token_ids)
    add_hook_to_module(gate, ModelHook())
    assert torch.equal(logits_of(model, token_ids), patched)
    steps = {"unpatch": integrator.unpatch_model, "unhook": lambda: remove_hook_from_module(gate)}
    first, second = order.split("-")
    steps[first]()
    assert torch.equal(logits_of(model, token_ids), plain if first == "unpatch" else patched)
    steps[second]()
    assert torch.equal(logits_of(model, token_ids), plain)
    assert not is_patched(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_cpu_offload(tiny_olmoe, token_ids, when):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    model = tiny_olmoe()
    plain = logits_of(model, token_ids)
    with strict(model, skip="zero"):
        patched = logits_of(model, token_ids)
    integrator = strict(model) if when == "after" else None
    if integrator is not None:
        integrator.patch_model()
    cpu_offload(model, execution_device=torch.device("cpu"))
    if integrator is None:
        assert model.model.layers[0].mlp.gate.weight.device.type == "meta"
        integrator = strict(model)
        integrator.patch_model()
    torch.testing.assert_close(logits_of(model, token_ids), patched, rtol=1e-4, atol=1e-5)
    integrator.unpatch_model()
    assert torch.equal(logits_of(model, token_ids), plain)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits_of(model, token_ids), plain)
    assert (plain - patched).abs().max() > 1e-2


def test_device_map_auto(tiny_olmoe, token_ids, tmp_path):
    tiny_olmoe().save_pretrained(tmp_path)
    model = type(tiny_olmoe()).from_pretrained(tmp_path, device_map="auto").eval()
    plain = logits_of(model, token_ids)
    with strict(model) as integrator:
        assert not torch.equal(logits_of(model, token_ids), plain)
        assert integrator.telemetry.num_tokens == 48
    assert torch.equal(logits_of(model, token_ids), plain)


def test_a_model_on_the_meta_device(tiny_olmoe):
    with pytest.raises(
        UnsupportedModelError, match=r"the weights of router model\.layers\.0\.mlp\.gate are on"
    ):
        strict(tiny_olmoe().to("meta"))


def test_a_model_that_moved_after_patching_is_told(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    with strict(model):
        with pytest.raises(PatchError, match="expected router logits on cpu, where it was patched, got meta"):
            model.to("meta")(input_ids=token_ids.to("meta"))
        assert is_patched(model)
    assert not is_patched(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_torch_compile(tiny_olmoe, token_ids, when):
    model = tiny_olmoe()
    plain = logits_of(model, token_ids)
    with strict(model, skip="zero"):
        patched = logits_of(model, token_ids)
    torch._dynamo.reset()
    integrator = strict(model)
    if when == "before":
        integrator.patch_model()
    compiled = torch.compile(model, backend="eager")
    if when == "after":
        torch.testing.assert_close(logits_of(compiled, token_ids), plain, rtol=1e-4, atol=1e-5)
        integrator.patch_model()
    torch.testing.assert_close(logits_of(compiled, token_ids), patched, rtol=1e-4, atol=1e-5)
    integrator.set_level(alpha=0.9)
    with_more = logits_of(compiled, token_ids)
    assert (with_more - patched).abs().max() > 1e-3
    integrator.unpatch_model()
    torch.testing.assert_close(logits_of(compiled, token_ids), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits_of(model, token_ids), plain)


def test_torch_compile_fullgraph_does_not_recompile(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    torch._dynamo.reset()
    with strict(model) as integrator:
        eager = logits_of(model, token_ids)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits_of(compiled, token_ids), eager, rtol=1e-4, atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            integrator.set_level(alpha=0.9)
            changed = logits_of(compiled, token_ids)
            logits_of(compiled, token_ids)
        torch.testing.assert_close(changed, logits_of(model, token_ids), rtol=1e-4, atol=1e-5)
        assert (changed - eager).abs().max() > 1e-3
    torch._dynamo.reset()


def test_gradient_checkpointing_changes_nothing_and_counts_once(tiny_olmoe, token_ids):
    gradients, tokens = [], []
    for reentrant in (None, False, True):
        model = tiny_olmoe().train()
        if reentrant is not None:
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with strict(model) as integrator:
            model(input_ids=token_ids, use_cache=False).logits.square().sum().backward()
            tokens.append(integrator.telemetry.num_tokens)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert tokens == [48, 48, 48]
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_zero_weights(tiny_olmoe, token_ids):
    gradients = []
    for skip in ("zero", "compact"):
        model = tiny_olmoe().train()
        with strict(model, skip=skip):
            model(input_ids=token_ids).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("gate" in name and g.abs().max() > 0 for name, g in gradients[0].items())
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())  # sums of many products in another order
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_peft_wrapped(tiny_olmoe, token_ids):
    from peft import LoraConfig, get_peft_model

    model = tiny_olmoe()
    with strict(model):
        patched = logits_of(model, token_ids)
    plain = logits_of(model, token_ids)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    mask = torch.ones_like(token_ids)
    mask[0, :5] = 0
    with strict(wrapped) as integrator:
        torch.testing.assert_close(logits_of(wrapped, token_ids), patched, rtol=1e-5, atol=1e-5)
        integrator.reset_stats()
        wrapped.generate(input_ids=token_ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
        assert integrator.telemetry.num_tokens == 43
    torch.testing.assert_close(logits_of(wrapped, token_ids), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("installed", ["before", "after"])
def test_recorded_router_logits_are_untouched(tiny_olmoe, token_ids, installed):
    model = tiny_olmoe(num_hidden_layers=1)  # later layers see other hidden states
    reference = model(input_ids=token_ids, output_router_logits=True).router_logits
    model = tiny_olmoe(num_hidden_layers=1)
    if installed == "before":
        model(input_ids=token_ids, output_router_logits=True)
    with strict(model):
        out = model(input_ids=token_ids, output_router_logits=True, labels=token_ids)
    assert torch.equal(out.router_logits[0], reference[0])
    assert torch.isfinite(out.aux_loss)


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("how", list(GENERATION))
def test_generate_with_padding(tiny_olmoe, token_ids, how):
    model = tiny_olmoe()
    mask = torch.ones_like(token_ids)
    mask[0, :7] = 0
    settings = GENERATION[how] | {"max_new_tokens": 6, "min_new_tokens": 6, "disable_compile": True}
    texts = []
    for skip in ("zero", "compact"):
        torch.manual_seed(5)
        with strict(model, skip=skip) as integrator:
            texts.append(model.generate(input_ids=token_ids, attention_mask=mask, **settings))
            telemetry = integrator.telemetry
    assert torch.equal(*texts)
    assert texts[0].shape == (2, 30)
    if how != "beam":
        # 41 tokens of the prompts that are no padding, then five decode steps of two sequences
        assert telemetry.num_tokens == 41 + 5 * 2
    assert not is_patched(model)


def test_padding_is_left_out_of_the_counts(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    mask = torch.ones_like(token_ids)
    mask[1, :10] = 0
    with strict(model) as integrator:
        logits_of(model, token_ids, attention_mask=mask)
        assert integrator.telemetry.num_tokens == 38
        logits_of(model, token_ids)
        assert integrator.telemetry.num_tokens == 38 + 48


def test_token_mask():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert token_mask(mask, 2, 2).tolist() == [True, True, True, True]
    assert token_mask(mask, 2, 3).tolist() == [False, True, True, True, True, True]
    assert token_mask(None, 2, 3) is None
    assert token_mask(mask, 3, 3) is None
    allowed = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    allowed[0, 0, 1, 1] = allowed[0, 0, 2, 2] = True
    allowed[1, 0].fill_diagonal_(True)
    assert token_mask(allowed, 2, 3).tolist() == [False, True, True, True, True, True]
    assert token_mask({"full_attention": allowed}, 2, 3).tolist() == token_mask(allowed, 2, 3).tolist()
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    assert token_mask(added, 2, 3).tolist() == token_mask(allowed, 2, 3).tolist()
    assert token_mask(allowed[:, :, :1], 2, 1) is None


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("skip", ["compact", "zero"])
def test_no_uninitialised_memory_is_read(tiny_olmoe, token_ids, implementation, skip):
    model = tiny_olmoe(dtype=torch.bfloat16)
    model.set_experts_implementation(implementation)
    with strict(model, skip=skip):
        clean = logits_of(model, token_ids)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            dirty = logits_of(model, token_ids)
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.isfinite(dirty).all()
    assert torch.equal(clean, dirty)


def test_a_skipped_expert_is_never_run(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    seen = []
    experts = model.model.layers[0].mlp.experts
    act = experts.act_fn

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.shape[0])
            return act(x)

    experts.act_fn = Spy()
    with strict(model) as integrator:
        logits_of(model, token_ids)
        layer = integrator.telemetry.to_dict()["layers"][0]
    computed = sum(seen)
    assert computed == round(layer["mean_experts"] * 48)
    assert computed < 6 * 48


def test_analyze_changes_nothing_and_counts_what_patching_would(tiny_olmoe, token_ids):
    model = tiny_olmoe(num_hidden_layers=1)
    plain = logits_of(model, token_ids)
    with strict(model, mode="analyze") as watching:
        assert torch.equal(logits_of(model, token_ids), plain)
        stats = watching.get_routing_stats()
    with strict(model) as patching:
        logits_of(model, token_ids)
        expected = patching.get_routing_stats()
    assert stats["mode"] == "analyze"
    assert stats["bh_would_select_mean"] == expected["mean_experts_per_token"]
    assert stats["total_forward_passes"] == 1
    assert 1 < expected["mean_experts_per_token"] < 6


def test_statistics_have_the_original_keys(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    with strict(model, min_k=2, max_k=4, temperature=1.0) as integrator:
        logits_of(model, token_ids)
        stats = integrator.get_routing_stats()
        for key, value in {
            "mode": "patch",
            "alpha": 0.05,
            "temperature": 1.0,
            "min_k": 2,
            "max_k": 4,
            "total_forward_passes": 2,
        }.items():
            assert stats[key] == value
        assert 2 <= stats["mean_experts_per_token"] <= 4
        assert stats["std_experts_per_token"] >= 0
        integrator.reset_stats()
        assert integrator.get_routing_stats()["total_forward_passes"] == 0


def test_set_level_while_patched(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    with strict(model, alpha=0.01) as integrator:
        logits_of(model, token_ids)
        few = integrator.get_routing_stats()["mean_experts_per_token"]
        integrator.reset_stats()
        integrator.set_level(alpha=0.9)
        assert integrator.alpha == 0.9
        changed = logits_of(model, token_ids)
        many = integrator.get_routing_stats()["mean_experts_per_token"]
        with pytest.raises(
            InvalidParameterError, match="expected exactly one of alpha and experts_per_token"
        ):
            integrator.set_level()
        with pytest.raises(InvalidParameterError, match="experts_per_token=4 needs a calibration"):
            integrator.set_level(experts_per_token=4)
    assert many > few + 0.5
    with strict(model, alpha=0.9):
        assert torch.equal(logits_of(model, token_ids), changed)


def test_collect_stats_off(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    with strict(model, collect_stats=False) as integrator:
        logits_of(model, token_ids)
        assert integrator.get_routing_stats()["total_forward_passes"] == 0
        with pytest.raises(PatchError, match="expected collect_stats=True"):
            integrator.telemetry.to_dict()


def test_an_uncalibrated_patch_says_once_what_it_selects(tiny_olmoe, token_ids, caplog):
    model = tiny_olmoe()
    with caplog.at_level(logging.WARNING, "bh_routing"), strict(model) as integrator:
        logits_of(model, token_ids)
        integrator.get_routing_stats()
        integrator.get_routing_stats()
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1
    assert "experts per token at alpha=0.05" in told[0]
    assert "bh-routing calibrate" in told[0]


def test_a_temperature_without_effect_warns(tiny_olmoe, caplog):
    with caplog.at_level(logging.WARNING, "bh_routing"):
        strict(tiny_olmoe(), temperature=2.0)
    assert "temperature=2 has no effect: robust p-values do not depend on the scale" in caplog.text


def test_wider_than_the_own_top_k(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    with strict(model, alpha=0.9, max_k=12) as integrator:
        wide = logits_of(model, token_ids)
        layer = integrator.telemetry.to_dict()["layers"][0]
    assert torch.isfinite(wide).all()
    assert sum(layer["count_histogram"][7:]) > 0


def test_whole_sequence_policies_are_refused_by_generate(tiny_olmoe, token_ids):
    class Whole(TopKPolicy):
        causal = False

    model = tiny_olmoe()
    with RoutingIntegration(model, Whole(2)):
        logits_of(model, token_ids)
        with pytest.raises(PatchError, match="the routing policy looks at a whole sequence"):
            model.generate(input_ids=token_ids, max_new_tokens=2, do_sample=False)
    assert not is_patched(model)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_a_dense_model():
    with pytest.raises(NoRoutersError) as caught:
        BHRoutingIntegration(Dense())
    assert str(caught.value) == (
        "No OlmoeTopKRouter modules found, nor any other router: expected a Mixture-of-Experts model whose "
        "layers have `experts` beside a `gate` or `router`, got Dense with no module that looks like one. "
        "`bh-routing families` lists what is supported."
    )
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mode": "watch"}, InvalidParameterError, "mode must be 'patch' or 'analyze', got 'watch'."),
        ({"alpha": 1.0}, InvalidParameterError, "alpha must be a number strictly between 0 and 1, got 1.0"),
        ({"temperature": -1}, InvalidParameterError, "temperature must be a finite number above 0, got -1"),
        ({"min_k": 0}, InvalidParameterError, "min_k must be at least 1, got 0"),
        ({"min_k": 3, "max_k": 2}, InvalidParameterError, "max_k must be at least min_k=3, got 2."),
        ({"max_k": 17}, InvalidParameterError, "max_k must not exceed the number of experts, 16, got 17"),
        ({"skip": "no"}, InvalidParameterError, "skip must be 'auto', 'compact' or 'zero', got 'no'."),
        ({"weights": "x"}, InvalidParameterError, "weights must be 'model', 'preserve' or 'sum', got 'x'."),
        ({"experts_per_token": 4}, InvalidParameterError, "experts_per_token=4 needs a calibration"),
        ({"statistic": "logit"}, InvalidParameterError, "statistic='logit' needs a calibration"),
        (
            {"alpha": 0.1, "experts_per_token": 4},
            InvalidParameterError,
            "expected a level or a budget, got both alpha=0.1 and experts_per_token=4; give one of them.",
        ),
    ],
)
def test_bad_settings_leave_the_model_alone(tiny_olmoe, token_ids, settings, error, message):
    model = tiny_olmoe()
    snapshot = Snapshot(model, token_ids)
    with pytest.raises(error) as caught:
        BHRoutingIntegration(model, **settings)
    assert message in str(caught.value)
    snapshot.assert_restored()


def test_no_model():
    with pytest.raises(InvalidTypeError, match=r"model must be a torch\.nn\.Module, got str\."):
        BHRoutingIntegration("olmoe")


def test_objects_explain_themselves(tiny_olmoe):
    integrator = strict(tiny_olmoe())
    assert "not patched" in repr(integrator)
    table = repr(integrator.plan).splitlines()
    assert table[0] == "PatchPlan(OlmoeForCausalLM, 2 routers)"
    assert table[2].split() == [
        "model.layers.0.mlp.gate",
        "OlmoeTopKRouter",
        "16",
        "6",
        "softmax",
        "none",
        "yes",
    ]
