"""Models that are more than one family's tiny model, and models that cannot be served."""

from __future__ import annotations

import logging
import types
from typing import Any

import pytest
import torch
from families_table import scan
from test_conformance import EvenExperts, distance, ids, masked_by_hooks, patched, run, snapshot
from tiny_models import RECIPES, build, enliven, modules, tiny_config
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from bh_routing import BHRoutingIntegration, RoutingIntegration
from bh_routing.errors import NoRoutersError, UnsupportedModelError
from bh_routing.patching import make_plan
from bh_routing.patching.apply import skip_mode
from bh_routing.policies import TopKPolicy

# ------------------------------------------------------------------------------------------ composite models


def test_thinker_and_talker():
    """Routers of all submodels are found and keyed by their paths, though layer numbers repeat."""
    _, modeling = modules("qwen3_omni_moe")
    model = nn.Module()
    extra = {
        "shared_expert_intermediate_size": 16
    }  # the talker's checkpoint has it, its configuration class not
    for name, cls, config in (
        ("thinker", modeling.Qwen3OmniMoeThinkerTextModel, {}),
        ("talker", modeling.Qwen3OmniMoeTalkerModel, extra),
    ):
        setattr(model, name, cls(tiny_config(cls.config_class, config)).eval())
    enliven(model)
    plan = make_plan(model)
    paths = [layer.path for layer in plan.layers]
    assert len(paths) == len(set(paths)) == 6
    assert [path.split(".")[0] for path in paths] == ["thinker"] * 3 + ["talker"] * 3
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), RoutingIntegration(model, EvenExperts()) as integrator:
        model.thinker(inputs_embeds=embeds)
        assert integrator.telemetry.silent_layers() == paths[3:]
        model.talker(inputs_embeds=embeds)
        assert integrator.telemetry.silent_layers() == []


@pytest.mark.skipif("dots3_note" not in scan(), reason="not in this transformers")
def test_routers_of_a_vision_tower():
    """Dots: they are not recorded as router logits, and their bias is an argument; found by structure."""
    _, modeling = modules("dots3_note")
    cls = modeling.Dots3NoteVisionModel
    sparse = {"num_local_experts": 8, "num_experts_per_tok": 3, "router_scaling_factor": 2.0}
    config = {
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "per_layer_config": {
            1: {**sparse, "moe_intermediate_size": 8},
            2: {**sparse, "moe_intermediate_size": 8},
        },
    }
    model = cls(tiny_config(cls.config_class, config)).eval()
    enliven(model)
    plan = make_plan(model)
    assert [layer.path for layer in plan.layers] == ["blocks.1.mlp.gate", "blocks.2.mlp.gate"]
    assert all(
        layer.probed and layer.reading.route_scale == pytest.approx(2.0, rel=1e-3) for layer in plan.layers
    )
    assert [layer.context.route_norm for layer in plan.layers] == ["renormalised"] * 2


def test_text_and_image_tokens_of_one_layer(caplog):
    """ERNIE VL: text tokens go through one router, image tokens through another of the same layer."""
    model, input_ids = build("ernie4_5_vl_moe"), ids("ernie4_5_vl_moe")
    blocks = [m for m in model.modules() if hasattr(m, "text_moe")]
    types_BS = torch.zeros(2, 9, dtype=torch.int)
    types_BS[:, 3:6] = 1
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = blocks[0](hidden, types_BS)[0]
        outputs = []
        for skip in ("auto", "zero"):
            with RoutingIntegration(model, EvenExperts(), skip=skip) as integrator:
                outputs.append(blocks[0](hidden, types_BS)[0])
                layers = integrator.telemetry.to_dict()["layers"]
        assert [layer["tokens"] for layer in layers[:2]] == [12, 6]
        assert distance(outputs[0], own) > 1e-3
        assert distance(outputs[0], outputs[1]) < 1e-4
    with RoutingIntegration(model, EvenExperts()) as integrator, caplog.at_level(logging.WARNING):
        run(model, input_ids)
        integrator.get_routing_stats()
    assert "2 of 4 patched routers were never called" in caplog.text


def test_hybrid_stack_has_gaps():
    """Layer numbers of routers need not be consecutive."""
    paths = [layer.path for layer in make_plan(build("nemotron_h")).layers]
    assert paths == ["model.layers.1.mixer.gate", "model.layers.3.mixer.gate"]


def test_layers_with_different_numbers_of_slots():
    """Hunyuan: top-k may be given per layer."""
    _, modeling = modules("hunyuan_v1_moe")
    cls = modeling.HunYuanMoEV1ForCausalLM
    model = cls(tiny_config(cls.config_class, {"moe_topk": [2, 3, 4]})).eval()
    enliven(model)
    plan = make_plan(model)
    assert [layer.context.top_k for layer in plan.layers] == [2, 3, 4]
    input_ids = ids("hunyuan_v1_moe")
    before = run(model, input_ids)
    assert torch.equal(patched(model, TopKPolicy(), input_ids), before)
    skipped = patched(model, EvenExperts(), input_ids)
    assert distance(skipped, patched(model, EvenExperts(), input_ids, skip="zero")) < 1e-4


# ---------------------------------------------------------------------------------------- kinds of contract


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "gemma4", "minimax_m2", "phimoe"])
def test_contract_in_bfloat16(family):
    """Score function, normalisation and selection are read in low precision too."""
    model = build(family)
    expected = [layer.reading[:2] for layer in make_plan(model).layers]
    plain = [layer.context.can_widen for layer in make_plan(model).layers]
    plan = make_plan(model.to(torch.bfloat16))
    assert [layer.reading[:2] for layer in plan.layers] == expected
    assert [layer.context.can_widen for layer in plan.layers] == plain


def test_longcat_without_identity_experts(caplog):
    """Without an expert that costs nothing, dropped slots keep their index and get weight 0, and it is said."""
    _, modeling = modules("longcat_flash")
    cls = modeling.LongcatFlashForCausalLM
    config = {**RECIPES["longcat_flash"].config, "zero_expert_num": 0}
    model = cls(tiny_config(cls.config_class, config)).eval()
    enliven(model)
    layer = make_plan(model).layers[0]
    assert skip_mode(layer, "auto")[0] == "zero"
    with pytest.raises(UnsupportedModelError, match=r"expected skip='auto' or 'zero' .*, got skip='compact'"):
        skip_mode(layer, "compact")
    input_ids = ids("longcat_flash")
    with caplog.at_level(logging.WARNING):
        result = patched(model, EvenExperts(), input_ids)
    assert "which saves no time" in caplog.text
    assert distance(result, masked_by_hooks(model, input_ids)) < 1e-4


def test_probabilities_become_logits():
    """Gemma 4 returns probabilities for logits: a policy sees their logarithms, a recorder the router's own."""
    model, input_ids = build("gemma4"), ids("gemma4")
    seen = []

    class Spy(EvenExperts):
        def decide(self, logits_TE: Tensor, *rest: Any) -> Any:
            seen.append(logits_TE)
            return super().decide(logits_TE, *rest)

    layer = make_plan(model).layers[0]
    assert (layer.reading.score_func, layer.context.score_func) == ("probability", "softmax")
    returned = []
    with torch.no_grad(), RoutingIntegration(model, Spy()):
        handle = layer.router.register_forward_hook(lambda module, args, output: returned.append(output[0]))
        run(model, input_ids)
        handle.remove()
    assert torch.allclose(returned[0].sum(-1), torch.ones(18))
    assert torch.allclose(seen[0].softmax(-1), returned[0], atol=1e-6)


def test_hash_layers_are_left_alone():
    """DeepSeek V4's first layers route by token id: there is nothing to test, and they are not patched."""
    model = build("deepseek_v4")
    gates = [name for name, module in model.named_modules() if name.endswith(".gate")]
    assert len(gates) == 3
    assert [layer.path for layer in make_plan(model).layers] == gates[1:]


def test_recorded_logits_stay_the_routers_own():
    """The auxiliary loss and whoever records router logits see the model's own."""
    model, input_ids = build("mixtral"), ids("mixtral")
    with torch.no_grad():
        own = model(input_ids=input_ids, output_router_logits=True).router_logits
        with RoutingIntegration(model, EvenExperts()):
            seen = model(input_ids=input_ids, output_router_logits=True).router_logits
    assert torch.equal(own[0], seen[0])


# ------------------------------------------------------------------------------------- already patched, kernels


class WholeBlockKernel(nn.Module):
    """What a hub kernel for a whole block does: it routes by itself."""

    def forward(self, hidden_states: Tensor) -> Any:
        return hidden_states, None


def test_blocks_that_bypass_their_router_are_refused():
    model = build("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(WholeBlockKernel.forward, layer.mlp)
    kept = snapshot(model)
    with pytest.raises(UnsupportedModelError) as caught:
        BHRoutingIntegration(model)
    message = str(caught.value)
    assert "router model.layers.0.mlp.router (GptOssTopKRouter) is never called" in message
    assert "its block GptOssMLP was replaced by test_models.WholeBlockKernel.forward" in message
    assert "3 of 3 routers are bypassed" in message
    assert "use_kernels=False" in message
    assert snapshot(model) == kept


def test_a_replaced_block_that_calls_its_router_is_served():
    model, input_ids = build("mixtral"), ids("mixtral")
    before = run(model, input_ids)
    calls = []

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        calls.append(len(hidden_states))
        return type(self).forward(self, hidden_states)

    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(forward, layer.mlp)
    skipped = patched(model, EvenExperts(), input_ids)
    assert distance(skipped, before) > 1e-3
    assert calls


def test_a_router_patched_by_somebody_else_is_kept_and_put_back(caplog):
    model, input_ids = build("mixtral"), ids("mixtral")
    before = run(model, input_ids)
    calls = []

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(self).forward(self, *args, **kwargs)

    for layer in model.model.layers:
        layer.mlp.gate.forward = types.MethodType(forward, layer.mlp.gate)
    kept = snapshot(model)
    with caplog.at_level(logging.INFO), RoutingIntegration(model, EvenExperts()):
        calls.clear()
        assert distance(run(model, input_ids), before) > 1e-3
        assert len(calls) == 3
    assert "its forward was replaced by" in caplog.text
    assert snapshot(model) == kept
    assert torch.equal(run(model, input_ids), before)


def test_a_router_patched_to_return_something_else_is_refused():
    model = build("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.forward = lambda hidden: hidden
    with pytest.raises(UnsupportedModelError) as caught:
        RoutingIntegration(model, TopKPolicy())
    message = str(caught.value)
    assert "must return router logits [T, E], weights [T, K] and integer expert indices [T, K]" in message
    assert "got (one tensor torch.float32 (128, 32))" in message
    assert "Routers found in MixtralForCausalLM: model.layers.0.mlp.gate (MixtralTopKRouter), " in message


def test_a_family_whose_contract_changed(monkeypatch):
    """The message says what was expected, what came, and which routers the model has."""
    model = build("olmoe")
    gate = type(model.model.layers[0].mlp.gate)
    stock = gate.forward
    monkeypatch.setattr(gate, "forward", lambda self, hidden: stock(self, hidden)[:2])
    with pytest.raises(UnsupportedModelError) as caught:
        BHRoutingIntegration(model)
    message = str(caught.value)
    assert "got (torch.float32 (128, 8), torch.float32 (128, 3)); this contract is not supported." in message
    assert message.endswith("model.layers.2.mlp.gate (OlmoeTopKRouter); each must keep that contract.")


# --------------------------------------------------------------------------------------------- other bad input


@pytest.mark.parametrize(
    ("cls", "config"),
    [(BertModel, BertConfig), (LlamaForCausalLM, LlamaConfig)],
    ids=["encoder-only", "dense"],
)
def test_models_without_routers(cls, config):
    model = cls(tiny_config(config, {})).eval()
    kept = snapshot(model)
    with pytest.raises(NoRoutersError) as caught:
        BHRoutingIntegration(model)
    message = str(caught.value)
    assert message.startswith(
        "No OlmoeTopKRouter modules found, nor any other router: expected a Mixture-of-"
    )
    assert f"got {cls.__name__} of type {model.config.model_type!r}" in message
    assert "`bh-routing families` lists what is supported." in message
    assert snapshot(model) == kept


@pytest.mark.parametrize("family", ["olmoe", "afmoe", "dbrx"])
def test_meta_device(family):
    with pytest.raises(UnsupportedModelError, match=r"on the meta device: load the model's weights"):
        BHRoutingIntegration(build(family).to("meta"))


@pytest.mark.parametrize("family", ["olmoe", "afmoe", "deepseek_v3"])
def test_offloaded_weights(family):
    """Routers whose weights accelerate moves in are planned, also where they are in a child of the router."""
    from accelerate import cpu_offload

    model, input_ids = build(family), ids(family)
    expected = patched(model, EvenExperts(), input_ids)
    contexts = make_plan(model).contexts
    offloaded = cpu_offload(build(family), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    assert [(c.score_func, c.route_norm, c.top_k) for c in make_plan(offloaded).contexts] == [
        (c.score_func, c.route_norm, c.top_k) for c in contexts
    ]
    assert distance(patched(offloaded, EvenExperts(), input_ids), expected) < 1e-5


def test_refused_inside_a_composite():
    """The text model of a composite is refused as the family itself is."""
    model = nn.Module()
    model.language_model = build("jetmoe")
    with pytest.raises(
        UnsupportedModelError, match=r"^jetmoe models cannot be routed by this library: its router"
    ):
        make_plan(model)
