"""Skip-aware experts against the definition, a plain loop over tokens and slots, for every kind of experts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.moe import use_experts_implementation

from bh_routing import RoutingIntegration, TopKPolicy
from bh_routing.errors import UnsupportedModelError
from bh_routing.patching import expert_math
from bh_routing.patching import experts as skip_aware
from bh_routing.patching.adapters import ExpertIds
from bh_routing.patching.apply import ImplementationPatch
from bh_routing.patching.expert_math import grouped_forward, loop_forward

E, H, I, K = 5, 16, 8, 3  # experts, hidden and intermediate size (multiples of 16 bytes), slots per token
FLAVOURS: dict[str, dict[str, bool]] = {
    "plain": {},
    "biased": {"has_bias": True},
    "transposed": {"is_transposed": True},
    "transposed, biased": {"is_transposed": True, "has_bias": True},
    "interleaved": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
    "ungated": {"has_gate": False},
    "ungated, biased": {"has_gate": False, "has_bias": True},
    "normed": {"has_post_expert_norm": True},
}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def make_experts(dtype: torch.dtype = torch.float32, implementation: str = "eager", **flags: bool) -> Any:
    """A random experts module of transformers' registry; its eager forward is the definition."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = E
            gated, transposed = flags.get("has_gate", True), flags.get("is_transposed", False)
            shapes = {
                "gate_up_proj" if gated else "up_proj": (2 * I if gated else I, H),
                "down_proj": (H, I),
            }
            for name, (rows, columns) in shapes.items():
                shape = (columns, rows) if transposed else (rows, columns)
                self.register_parameter(name, nn.Parameter(torch.randn(E, *shape, dtype=dtype) / 2))
                if flags.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, rows, dtype=dtype)))
            self.act_fn = nn.SiLU()
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.RMSNorm(H, eps=1e-6, dtype=dtype)

        def forward(self, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
            return definition(self, hidden_TH, experts_TK, weights_TK)

    if not flags.get("is_concatenated", True):
        Experts._apply_gate = _interleaved_gate  # type: ignore[attr-defined]
    config = PretrainedConfig()
    config._experts_implementation = implementation
    return use_experts_implementation(Experts, **flags)(config)


def _interleaved_gate(self: Any, gate_up: Tensor) -> Tensor:
    return (gate_up[..., 1::2] + 1) * torch.sigmoid(gate_up[..., ::2])


def definition(self: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Token by token, slot by slot; an empty slot adds nothing. Sums in float32 at least."""
    out = []
    for t in range(hidden_TH.shape[0]):
        total_H = torch.zeros(H, dtype=torch.promote_types(hidden_TH.dtype, torch.float32))
        for k in range(experts_TK.shape[1]):
            e = int(experts_TK[t, k])
            if e < self.num_experts:
                total_H = total_H + one_expert(self, hidden_TH[t], e) * weights_TK[t, k].to(total_H.dtype)
        out.append(total_H)
    return torch.stack(out).to(hidden_TH.dtype) if out else hidden_TH * 1


def one_expert(self: Any, x_H: Tensor, e: int) -> Tensor:
    def project(x: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)[e]
        y = x @ weight if self.is_transposed else weight @ x
        return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

    if self.has_gate:
        hidden = self._apply_gate(project(x_H, "gate_up_proj"))
    else:
        hidden = self.act_fn(project(x_H, "up_proj"))
    y_H = project(hidden, "down_proj")
    return self.post_expert_norm(y_H) if self.has_post_expert_norm else y_H


def routing(
    tokens: int, empty: float = 0.5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_TH, experts_TK and weights_TK with this share of the slots empty (weight 0, index E)."""
    hidden_TH = torch.randn(tokens, H, dtype=dtype)
    experts_TK = torch.rand(tokens, E).topk(K, -1).indices
    empty_TK = torch.rand(tokens, K) < empty
    weights_TK = torch.rand(tokens, K, dtype=dtype).masked_fill(empty_TK, 0.0)
    return hidden_TH, experts_TK.masked_fill(empty_TK, E), weights_TK


def skipping(module: Any) -> Callable[..., Tensor]:
    """The module's forward with the skip-aware implementation installed."""
    ImplementationPatch(module).install()
    return module


PATHS: dict[str, Callable[..., Any]] = {"loop": loop_forward, "grouped": grouped_forward}


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN, so that whatever reads it shows."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_values_and_gradients_are_those_of_the_definition(flavour, tokens, path, monkeypatch):
    experts = make_experts(**FLAVOURS[flavour])
    hidden_TH, experts_TK, weights_TK = routing(tokens)
    experts_TK[0, 0], weights_TK[0, 0] = E, 0.0  # at least one slot is empty ...
    experts_TK[0, 1], weights_TK[0, 1] = 2, 0.7  # ... and one is not
    pull_TH = torch.randn(tokens, H)

    def run(forward: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        inputs = [hidden_TH.clone().requires_grad_(), weights_TK.clone().requires_grad_()]
        out_TH = forward(experts, inputs[0], experts_TK, inputs[1])
        grads = torch.autograd.grad((out_TH * pull_TH).sum(), [*inputs, *experts.parameters()])
        grads[1].masked_fill_(experts_TK == E, 0.0)  # the weight of an empty slot is a constant
        return out_TH, list(grads)

    expected, expected_grads = run(definition)
    got, grads = run(PATHS[path])
    # float32 sums of at most H * K terms of order 1 in another order
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(PATHS[path](experts, hidden_TH, experts_TK, weights_TK), got)
        experts.eval()
        monkeypatch.setattr(expert_math, "LARGE", 1)  # on CPU the products are now another library's
        torch.testing.assert_close(
            PATHS[path](experts, hidden_TH, experts_TK, weights_TK), got, rtol=1e-5, atol=1e-5
        )


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_half_precision(tokens, dtype, epsilon, path):
    experts = make_experts(dtype=dtype)
    hidden_TH, experts_TK, weights_TK = routing(tokens, dtype=dtype)
    experts_TK[0] = torch.tensor([E, 1, 3])
    with torch.no_grad():
        got = PATHS[path](experts, hidden_TH, experts_TK, weights_TK)
        expected = definition(experts.double(), hidden_TH.double(), experts_TK, weights_TK.double())
    assert got.dtype == dtype
    # four roundings to the dtype on the way (two products, gate, result), each of the size of the largest term
    assert (got - expected).abs().max() <= 8 * epsilon * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_nothing_empty_is_the_stock_implementation_bit_for_bit(tokens, implementation, dtype):
    experts = make_experts(dtype=dtype, implementation=implementation, has_bias=True)
    inputs = routing(tokens, empty=0.0, dtype=dtype)
    stock = experts(*inputs)
    assert torch.equal(skipping(experts)(*inputs), stock)
    assert experts.config._experts_implementation == skip_aware.IMPLEMENTATION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_grouped_products_without_empty_slots_are_those_of_grouped_mm_bit_for_bit(flavour, dtype):
    experts = make_experts(dtype=dtype, implementation="grouped_mm", **FLAVOURS[flavour])
    inputs = routing(9, empty=0.0, dtype=dtype)
    assert torch.equal(grouped_forward(experts, *inputs), experts(*inputs))


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_all_slots_empty_gives_zeros(tokens, path):
    experts = make_experts(has_bias=True)
    hidden_TH, experts_TK, weights_TK = routing(tokens, empty=1.0)
    assert torch.equal(PATHS[path](experts, hidden_TH, experts_TK, weights_TK), torch.zeros(tokens, H))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_experts_without_tokens_are_not_touched(tokens, path):
    experts = make_experts()
    hidden_TH, experts_TK, weights_TK = routing(tokens)
    experts_TK[experts_TK == 3] = E
    experts_TK[0, 0] = E
    with torch.no_grad():
        experts.gate_up_proj[3] = torch.nan
        experts.down_proj[3] = torch.nan
    assert PATHS[path](experts, hidden_TH, experts_TK, weights_TK).isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 2])
def test_half_precision_sums_are_accumulated_in_float32(tokens, path):
    experts = make_experts(dtype=torch.bfloat16, has_bias=True)
    with torch.no_grad():
        experts.down_proj.zero_()
        experts.down_proj_bias.fill_(1.0)
    slots = 513  # a bfloat16 accumulator would stop at 256
    experts_TK = torch.full((tokens, slots), 2)
    experts_TK[:, 0] = E
    weights_TK = torch.ones(tokens, slots, dtype=torch.bfloat16)
    weights_TK[:, 0] = 0
    hidden_TH = torch.randn(tokens, H, dtype=torch.bfloat16)
    out_TH = PATHS[path](experts, hidden_TH, experts_TK, weights_TK)
    assert torch.equal(out_TH, torch.full((tokens, H), 512.0, dtype=torch.bfloat16))


def test_weights_that_are_computed_are_computed_once():
    fetched = []

    class Counting(type(make_experts())):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            fetched.append(name)
            return super().__getattr__(name)

    experts = make_experts()
    experts.__class__ = Counting
    loop_forward(experts, *routing(40))
    assert fetched.count("gate_up_proj") == fetched.count("down_proj") == 1


def test_a_slot_keeps_its_value_whatever_the_other_tokens_keep():
    experts = make_experts()
    hidden_TH, experts_TK, weights_TK = routing(12)
    together = loop_forward(experts, hidden_TH, experts_TK, weights_TK)
    for t in range(12):
        alone = loop_forward(experts, hidden_TH[t : t + 1], experts_TK[t : t + 1], weights_TK[t : t + 1])
        if alone is not None:
            torch.testing.assert_close(alone[0], together[t], rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")  # in transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_in_one_graph_for_any_number_of_kept_slots(dtype):
    torch._dynamo.reset()
    experts = skipping(make_experts(dtype=dtype))
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for share in (0.5, 0.0, 0.9, 1.0):
            inputs = routing(7, empty=share, dtype=dtype)
            tolerance = 1e-5 if dtype == torch.float32 else 2**-6  # rounded at other places
            torch.testing.assert_close(compiled(*inputs), experts(*inputs), rtol=tolerance, atol=tolerance)
    torch._dynamo.reset()


def test_compaction_in_front_of_any_experts():
    experts = make_experts()
    inputs = routing(9)
    got = skip_aware.compacted(experts.forward, ExpertIds(empty=E), *inputs)
    torch.testing.assert_close(got, definition(experts, *inputs), rtol=1e-5, atol=1e-5)


def _patched(model: Any, **settings: Any) -> RoutingIntegration:
    return RoutingIntegration(model, TopKPolicy(2), **settings)


def _make_expert_parallel(experts: Any) -> None:
    experts._is_expert_parallel = True


def _make_int8(experts: Any) -> None:
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.int8), requires_grad=False)


def _make_float8(experts: Any) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_make_expert_parallel, "is expert-parallel, where dropped pairs cannot be taken out"),
        (_make_int8, "has quantised weights, which only its own implementation can multiply with"),
        (_make_float8, "has quantised weights, which only its own implementation can multiply with"),
    ],
)
def test_where_pairs_cannot_be_taken_out_weight_zero_is_used_and_said(tiny_olmoe, caplog, change, reason):
    model = tiny_olmoe()
    layers = model.model.layers
    change(layers[0].mlp.experts)
    with caplog.at_level(logging.WARNING, "bh_routing"), _patched(model):
        first = layers[0].mlp.experts
        assert first.config._experts_implementation != skip_aware.IMPLEMENTATION
        assert layers[1].mlp.experts.config._experts_implementation == skip_aware.IMPLEMENTATION
        hidden = torch.randn(1, 3, model.config.hidden_size)
        _, weights_TK, experts_TK = layers[0].mlp.gate(hidden)
        assert int((weights_TK == 0).sum()) > 0
        assert int(experts_TK.max()) < first.num_experts
    said = (
        f"model.layers.0.mlp.experts (OlmoeExperts) {reason}: dropped experts keep their index and get weight 0 "
        "there (skip='zero'), which saves no time."
    )
    assert said in caplog.messages
    with pytest.raises(UnsupportedModelError, match=f"{reason}: expected skip='auto' or 'zero'"):
        _patched(model, skip="compact").patch_model()


def test_quantised_experts_outside_the_registry_get_weight_zero():
    """Whatever they compute with: single pairs were never seen to come out right there."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 2))

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return hidden_states

    experts = Experts()
    assert skip_aware.why_not_compact(experts, ExpertIds(empty=2), "mlp") is None
    experts.w = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert skip_aware.why_not_compact(experts, ExpertIds(empty=2), "mlp") == (
        "mlp (Experts) has quantised weights, whose kernels were not seen to run single pairs"
    )


def test_an_unknown_implementation_is_kept_and_said(tiny_olmoe, token_ids, caplog):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls = []

    def own(self: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        calls.append(experts_TK.shape)
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, hidden_TH, experts_TK, weights_TK)

    ALL_EXPERTS_FUNCTIONS.register("somebody_elses", own)
    try:
        model = tiny_olmoe()
        with torch.no_grad(), _patched(model, skip="zero"):
            expected = model(input_ids=token_ids).logits
        model.set_experts_implementation("somebody_elses")
        with torch.no_grad(), caplog.at_level(logging.WARNING, "bh_routing"), _patched(model):
            torch.testing.assert_close(model(input_ids=token_ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert any(
            "runs the experts implementation 'somebody_elses', which cannot" in m for m in caplog.messages
        )
        slots = token_ids.numel() * model.config.num_experts_per_tok
        assert calls
        assert all(shape.numel() == slots for shape in calls)
        calls.clear()
        with torch.no_grad(), _patched(model, skip="compact"):
            torch.testing.assert_close(model(input_ids=token_ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert all(shape == (token_ids.numel() * 2, 1) for shape in calls)
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["somebody_elses"]


def test_experts_called_otherwise_keep_their_index(tiny_olmoe):
    class Packed(nn.Module):
        def forward(self, hidden: Tensor, packed: Any) -> Tensor:
            return hidden

    reason = skip_aware.why_not_compact(Packed(), ExpertIds(empty=4), "mlp.experts")
    assert reason == "mlp.experts (Packed) is not called with hidden states, indices and weights"


@pytest.mark.skipif(not expert_math._ONEDNN, reason="this torch was built without oneDNN")
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_large_float32_products_are_onednns(rows, bias):
    size = 512  # 2 ** 18 elements
    weight_ENI, bias_EN = torch.randn(2, size, size), torch.randn(2, size)
    x_PI = torch.randn(rows + 3, size)[1 : rows + 1]
    expected = x_PI.double() @ weight_ENI[1].double().T + (bias_EN[1].double() if bias else 0.0)
    called: list[str] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    weight_NI, bias_N = weight_ENI[1], bias_EN[1] if bias else None
    with Calls():
        got = expert_math._product(x_PI, weight_NI, bias_N, onednn=True)
    assert called == ["mkldnn._linear_pointwise.default"]
    # sums of 512 products of order 1 in float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)
