"""Every Mixture-of-Experts family of the installed transformers against the library's contract.

One case per family and check, on a tiny model built from the family's config classes. Families that are not in
`expected_contracts` (a newer transformers) are found and run all the same, and reported.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from typing import Any

import pytest
import torch
from expected_contracts import CONTRACTS, REFUSED, ROUTES_INSIDE_BEFORE, SAMPLE
from families_table import scan
from tiny_models import build
from torch import Tensor, nn

from bh_routing import BHRoutingIntegration, RoutingIntegration
from bh_routing.calibration.passes import calibrate
from bh_routing.decision.select import Kept
from bh_routing.decision.table import DecisionTable
from bh_routing.decision.types import RoutingDecision
from bh_routing.errors import CalibrationWarning, InvalidParameterError, UnsupportedModelError
from bh_routing.models.families import version_key
from bh_routing.patching import PatchPlan, make_plan
from bh_routing.patching import experts as skip_aware
from bh_routing.patching.expert_math import grouped_forward
from bh_routing.patching.experts import uses_registry
from bh_routing.policies import RoutingContext, RoutingPolicy, TablePolicy, TopKPolicy

FOUND = sorted(scan())
VERSION = version_key(metadata.version("transformers"))
OLD = {family for family, version in ROUTES_INSIDE_BEFORE.items() if version > VERSION}


def cases(found: Iterable[str]) -> list[Any]:
    """One case per family that is to be served: slow outside the sample; a new family is reported, not required."""
    return [
        pytest.param(
            family,
            id=family,
            marks=[
                *([] if family in SAMPLE else [pytest.mark.slow]),
                *([] if family in CONTRACTS else [pytest.mark.xfail(strict=False, reason="new family")]),
            ],
        )
        for family in found
        if family not in REFUSED and family not in OLD
    ]


FAMILIES = cases(FOUND)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_implementation = pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])

# Experts summed in another order, float32: the survey's relative tolerance. Dropping slots moves the output by
# more than POWER, so that a drop that does nothing cannot pass.
TOLERANCE = 1e-4
POWER = 1e-3

# Two routers per layer; the vision one sees no token of a text.
SILENT = {"ernie4_5_vl_moe": "vision_moe"}

# Another number of selected experts is no configuration of these families, or not the same model.
NOT_NATIVE = {
    "phimoe": "sparsemixer always selects two experts",
    "zaya": "selects one expert, by its configuration's validation",
    "inkling": "normalises over the selected and the shared experts jointly: dropped ones are only masked",
}


def ids(family: str) -> Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=input_ids, use_cache=False)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def set_implementation(model: nn.Module, name: str) -> None:
    """Choose the experts implementation, or skip where the family has only its own."""
    if not any(
        uses_registry(layer.experts) for layer in make_plan(model).layers if layer.experts is not None
    ):
        if name != "eager":
            pytest.skip("experts outside transformers' registry: eager only")
        return
    model.set_experts_implementation(name)


class EvenExperts(RoutingPolicy):
    """Keeps the experts with an even index: decided by the token alone, and some tokens keep none."""

    name = "even"

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        keep_TK = own_experts_TK % 2 == 0
        counts_T = keep_TK.sum(-1)
        return self.shrink(
            Kept(keep_TK, counts_T, counts_T), logits_TE, own_weights_TK, own_experts_TK, context
        )


def patched(model: nn.Module, policy: RoutingPolicy, input_ids: Tensor, skip: Any = "auto") -> Tensor:
    with RoutingIntegration(model, policy, skip=skip):
        return run(model, input_ids)


@every_family
def test_contract(family: str, record_property: Callable[[str, Any], None]) -> None:
    """Score function, normalisation and selection are those of the source; every router is found and called."""
    model = build(family)
    plan = make_plan(model)
    layer = plan.layers[-1]
    reading, context = layer.reading, layer.context
    shown = "other" if reading.route_norm == "unknown" else reading.score_func
    if reading.per_expert:
        weights = "renormalised, factor per expert"
    elif reading.joint:
        weights = "joint with shared experts"
    elif isinstance(getattr(layer.router, "norm_topk_prob", None), bool):
        weights = "by norm_topk_prob"
    else:
        weights = context.route_norm
    record_property("router", type(layer.router).__name__)
    record_property("scoring", shown + ("" if reading.plain else "*"))
    record_property("weights", weights)
    record_property("widen", "yes" if context.can_widen else "no")
    record_property("skip", "yes" if layer.ids.can_compact else "no")
    if family in CONTRACTS:
        score_func, norm, selection = CONTRACTS[family]
        stated = getattr(layer.router, "norm_topk_prob", None)
        expected = {
            "always": "renormalised",
            "never": "none",
            "joint": "none",
            "other": "none",
            "stated": "renormalised" if stated else "none",
        }[norm]
        for layer in plan.layers:
            assert (layer.reading.score_func, layer.context.route_norm) == (score_func, expected), layer
            assert layer.context.can_widen == (selection == "plain"), layer
            assert layer.probed, layer
    called: dict[str, int] = {}
    hooks = [
        layer.call.module.register_forward_hook(
            lambda *_, p=layer.path: called.update({p: called.get(p, 0) + 1})
        )
        for layer in plan.layers
    ]
    run(model, ids(family))
    for hook in hooks:
        hook.remove()
    silent = [layer.path for layer in plan.layers if layer.path not in called]
    assert all(SILENT.get(family, "?") in path for path in silent), silent


@every_implementation
@every_family
def test_keep_all(family: str, implementation: str) -> None:
    """A policy that keeps the model's own choice is the unpatched model, bit for bit."""
    model, input_ids = build(family), ids(family)
    set_implementation(model, implementation)
    before = run(model, input_ids)
    assert torch.equal(patched(model, TopKPolicy(), input_ids), before)
    assert torch.equal(patched(model, TopKPolicy(), input_ids, skip="zero"), before)


@every_implementation
@every_family
def test_drop(family: str, implementation: str) -> None:
    """Dropped slots that are skipped give what slots of weight 0 give, which the model's own experts computed."""
    model, input_ids = build(family), ids(family)
    set_implementation(model, implementation)
    before = run(model, input_ids)
    reference = patched(model, EvenExperts(), input_ids, skip="zero")
    assert distance(reference, before) > POWER
    skipped = patched(model, EvenExperts(), input_ids)
    assert distance(skipped, reference) < TOLERANCE
    if implementation == "eager":
        assert distance(masked_by_hooks(model, input_ids), reference) < TOLERANCE


def masked_by_hooks(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The same drops by plain forward pre-hooks on the experts: an index of weight 0, the row rescaled."""
    plan, hooks = make_plan(model), []
    for layer in plan.layers:

        def hook(module: Any, args: Any, kwargs: Any, layer: Any = layer) -> Any:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            hidden, index, weights = (dict(zip(names, args, strict=False)) | kwargs)[names[0]], None, None
            call = dict(zip(names, args, strict=False)) | kwargs
            hidden, index, weights = (call[name] for name in names)
            factors = 1.0
            if layer.reading.per_expert:
                factors = layer.router.get_parameter(layer.reading.per_expert).detach()[index]
            base = weights / factors
            kept = base * (index % 2 == 0)
            if layer.context.route_norm == "renormalised":
                total = kept.sum(-1, keepdim=True)
                kept = torch.where(total > 0, kept * base.sum(-1, keepdim=True) / total, kept)
            return (hidden, index, kept * factors), {}

        hooks.append(layer.experts.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        return run(model, input_ids)
    finally:
        for handle in hooks:
            handle.remove()


@every_family
def test_native_top_k(family: str) -> None:
    """Fewer (and, where that is possible, more) experts are what the model computes with that top_k itself."""
    if family in NOT_NATIVE:
        pytest.skip(NOT_NATIVE[family])
    input_ids = ids(family)
    stated = CONTRACTS.get(family, ("", "", ""))[1] == "stated"
    for norm in (True, False) if stated else (None,):
        # Without biases and groups, the model's own selection goes by the weights.
        settings: dict[str, Any] = {"biased": False, "norm_topk_prob": norm}
        model = build(family, top_k=3, **settings)
        contexts = make_plan(model).contexts
        if norm is not None:
            assert {context.route_norm for context in contexts} == {"renormalised" if norm else "none"}
        for k in (2, 4):
            native = build(family, top_k=k, **settings)
            state = native.state_dict()
            state |= {key: v for key, v in model.state_dict().items() if v.shape == state[key].shape}
            native.load_state_dict(state)  # all but tables of token ids, whose width is top_k
            wanted = run(native, input_ids)
            assert distance(run(model, input_ids), wanted) > POWER
            if k == 2:
                got = patched(model, TopKPolicy(2), input_ids)
            elif all(context.can_widen for context in contexts):
                table = DecisionTable.top_k(4, len(contexts), contexts[0].num_experts)
                got = patched(model, TablePolicy(table, min_k=4, max_k=4), input_ids)
            else:
                continue
            assert distance(got, wanted) < TOLERANCE


@every_family
def test_widening_refused_or_done(family: str) -> None:
    """max_k above the model's own is served where scores exist, and refused in one sentence elsewhere."""
    model, input_ids = build(family), ids(family)
    contexts = make_plan(model).contexts
    wide = contexts[0].top_k + 1
    if all(context.can_widen for context in contexts):
        with BHRoutingIntegration(model, alpha=0.5, min_k=wide, max_k=wide) as integrator:
            run(model, input_ids)
            assert integrator.get_routing_stats()["mean_experts_per_token"] == wide
    else:
        with pytest.raises(InvalidParameterError, match="this family does not tell the scores of the others"):
            BHRoutingIntegration(model, alpha=0.5, max_k=wide)


@every_family
def test_generate(family: str) -> None:
    """Greedy generation with a cache: dropped slots skipped, and of weight 0, give the same tokens."""
    model, input_ids = build(family), ids(family)[:, :4]
    if not model.can_generate():
        pytest.skip("a backbone without generate()")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        own = model.generate(input_ids, **options)
        with RoutingIntegration(model, TopKPolicy()):
            assert torch.equal(model.generate(input_ids, **options), own)
        scores = []
        for skip in ("auto", "zero"):
            with RoutingIntegration(model, EvenExperts(), skip=skip) as integrator:  # type: ignore[arg-type]
                out = model.generate(input_ids, output_logits=True, return_dict_in_generate=True, **options)
                scores.append((out.sequences, torch.stack(out.logits)))
                assert integrator.telemetry.num_tokens >= input_ids.numel()
    assert torch.equal(scores[0][0], scores[1][0])
    assert distance(scores[0][1], scores[1][1]) < TOLERANCE


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a patch could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "keys": {name: list(module.__dict__) for name, module in model.named_modules()},
        "hooks": {
            name: [list(getattr(module, kind).items()) for kind in hooks]
            for name, module in model.named_modules()
        },
        "flags": {name: module.training for name, module in model.named_modules()},
        "gradients": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "configs": {
            name: (id(module.config), copy.deepcopy(getattr(module.config, "__dict__", None)))
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
    }


@every_family
def test_restore(family: str) -> None:
    """After unpatching, nothing of the model has changed."""
    model, input_ids = build(family), ids(family)
    before = run(model, input_ids)
    kept, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    integrator = RoutingIntegration(model, EvenExperts())
    integrator.patch_model()
    assert not torch.equal(run(model, input_ids), before)
    integrator.unpatch_model()
    assert snapshot(model) == kept
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(run(model, input_ids), before)


@every_family
def test_calibration_and_budget(family: str) -> None:
    """The model can be calibrated, a budget is met on the same text, and only own candidates are chosen."""
    model = build(family)
    texts = torch.randint(3, 90, (12, 32), generator=torch.Generator().manual_seed(2)).tolist()
    expected = (
        pytest.warns(CalibrationWarning, match="see no token of a text")
        if family in SILENT
        else nullcontext()
    )
    with expected:
        calibration = calibrate(model, None, texts, progress=False)
    assert calibration.tokens == 12 * 32
    with BHRoutingIntegration(model, calibration=calibration, alpha=0.5) as integrator:
        run(model, torch.tensor(texts))
        budget = integrator.telemetry.mean_experts_per_token  # one that is in reach
        integrator.set_level(experts_per_token=budget)
        integrator.reset_stats()
        run(model, torch.tensor(texts))
        figures = integrator.telemetry.to_dict()
    total = figures["total"]
    # What earlier layers drop changes what deeper ones see, so that the mean is not exactly the reservoir's.
    assert total["mean_experts"] == pytest.approx(budget, abs=0.1)
    assert total["decided_own_share"] == 1.0
    for layer in figures["layers"]:
        if layer["router_calls"]:
            assert layer["router_calls"] == 1
            assert layer["tokens"] == 12 * 32


@contextmanager
def dirty_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that reading what nobody wrote shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators without a deterministic form only warn
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@every_implementation
@every_family
def test_nan_filled_memory(family: str, implementation: str) -> None:
    """No empty slot lets uninitialised memory into the result."""
    model, input_ids = build(family), ids(family)
    set_implementation(model, implementation)
    with dirty_memory():
        assert torch.isnan(torch.empty(4)).all()
        reference = patched(model, EvenExperts(), input_ids, skip="zero")
        skipped = patched(model, EvenExperts(), input_ids)
    assert torch.isfinite(skipped).all()
    assert distance(skipped, reference) < TOLERANCE


@every_family
def test_grouped_products(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of GPUs (sorted pairs, grouped products), run here on the CPU, on memory full of NaN."""
    model, input_ids = build(family), ids(family)
    if not any(
        uses_registry(layer.experts) for layer in make_plan(model).layers if layer.experts is not None
    ):
        pytest.skip("experts outside transformers' registry: their own forward on every device")
    reference = patched(model, EvenExperts(), input_ids, skip="zero")
    calls = []

    def grouped(*args: Any) -> Tensor:
        calls.append(1)
        return grouped_forward(*args)

    monkeypatch.setattr(skip_aware, "loop_forward", grouped)
    with dirty_memory():
        skipped = patched(model, EvenExperts(), input_ids)
    assert calls
    assert distance(skipped, reference) < TOLERANCE


@every_family
def test_router_calls(family: str) -> None:
    """Every router is patched once and decides once per forward."""
    model, input_ids = build(family), ids(family)
    with RoutingIntegration(model, EvenExperts()) as integrator:
        for _ in range(3):
            run(model, input_ids)
        layers = integrator.telemetry.to_dict()["layers"]
        silent = integrator.telemetry.silent_layers()
    assert layers
    assert all(SILENT.get(family, "?") in path for path in silent), silent
    for layer in layers:
        if layer["path"] not in silent:
            assert (layer["router_calls"], layer["tokens"]) == (3, 3 * input_ids.numel())


@pytest.mark.parametrize("family", [f for f in REFUSED if f in FOUND])
def test_refused(family: str, record_property: Callable[[str, Any], None]) -> None:
    """A family that cannot be served is refused by name, with the reason, and left untouched."""
    record_property("router", scan()[family])
    model = build(family)
    kept = snapshot(model)
    with pytest.raises(
        UnsupportedModelError, match=r"models cannot be routed by this library: (its|it) .*\."
    ):
        RoutingIntegration(model, TopKPolicy())
    assert snapshot(model) == kept


@pytest.mark.parametrize("family", sorted(OLD & set(FOUND)))
def test_contract_of_older_version(family: str) -> None:
    """A family whose contract was another one in this transformers: what was expected, and what was found."""
    with pytest.raises(
        UnsupportedModelError, match=r"must return router logits .*, got \(one tensor .* Routers found in"
    ):
        RoutingIntegration(build(family), TopKPolicy())


def test_sample_covers_contracts() -> None:
    """The sample that every test run takes has at least twelve families and every kind of contract."""
    assert len(set(SAMPLE) & set(FOUND)) >= 12
    scores: Iterable[str] = {CONTRACTS[family][0] for family in SAMPLE}
    weights = {CONTRACTS[family][1] for family in SAMPLE}
    assert {"softmax", "sigmoid", "probability"} <= set(scores)
    assert weights == {"always", "never", "stated", "joint", "other"}


def test_new_families_are_run_and_reported() -> None:
    """A family that only a newer transformers has is a case too; it may fail without failing the suite."""
    known, new = cases(["olmoe", "brand_new"])
    assert [mark.name for mark in known.marks] == []
    assert [mark.name for mark in new.marks] == ["slow", "xfail"]
    assert new.marks[1].kwargs == {"strict": False, "reason": "new family"}


def test_plan_is_readable() -> None:
    """The printed plan is a table with one line per router."""
    plan: PatchPlan = make_plan(build("olmoe"))
    lines = repr(plan).splitlines()
    assert lines[0] == "PatchPlan(OlmoeForCausalLM, 3 routers)"
    assert len(lines) == 2 + len(plan.layers)
