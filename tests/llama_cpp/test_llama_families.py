"""Every architecture of the table, tiny and random, against the same model under the same routing in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, VOCABULARY, make, writers

from bh_routing import BHRoutingIntegration, calibrate
from bh_routing.engines.llama_cpp.structure import ARCHITECTURES, check_architecture
from bh_routing.errors import UnsupportedModelError
from bh_routing.patching import make_plan

IDS = [(37 * i + 11 * (i // 7)) % (VOCABULARY - 5) + 3 for i in range(90)]


@pytest.fixture(scope="session")
def tiny(to_gguf: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``tiny("mixtral")``: the model, its GGUF file, its calibration."""
    folder, held = tmp_path_factory.mktemp("tiny"), {}
    to_gguf.WRITERS.update(writers(to_gguf))

    def get(model_type: str) -> Any:
        if model_type not in held:
            model = make(model_type)
            path = folder / f"{model_type}.gguf"
            to_gguf.write(model, path)
            g = torch.Generator().manual_seed(1)
            documents = [torch.randint(3, VOCABULARY, (64,), generator=g) for _ in range(24)]
            held[model_type] = (model, str(path), calibrate(model, None, documents, progress=False))
        return held[model_type]

    return get


def test_the_table_is_what_is_tested():
    assert {one.model_type for one in ARCHITECTURES.values()} == set(CONFIGS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_and_logits_are_those_of_transformers(tiny, make_llama, logits_of, architecture):
    """The model as it is; then routed, with and without compensation, many tokens at once and one by one."""
    about = ARCHITECTURES[architecture]
    model, path, calibration = tiny(about.model_type)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        plain = model(ids).logits[0]
    stock = logits_of(make_llama(path=path, n_ctx=128), IDS)
    near = 2e-5 * float(plain.std())
    assert float((stock - plain).abs().max()) < near
    budget = 0.5 * calibration.layers[0].top_k
    for compensation in (False, True):
        settings = {"experts_per_token": budget, "compensation": compensation}
        integrator = BHRoutingIntegration(model, calibration=calibration, **settings)
        with integrator, torch.no_grad():
            expected = model(ids).logits[0]
        assert float((expected - plain).abs().max()) > 100 * near
        for skip, step in (("auto", 128), ("auto", 1), ("zero", 128)):
            llm = make_llama(calibration, path=path, n_ctx=128, skip=skip, **settings)
            found = logits_of(llm, IDS, step)
            assert float((found - expected).abs().max()) < near
            mine, theirs = (x.to_dict()["layers"] for x in (llm.routing.telemetry, integrator.telemetry))
            for name in (
                "path",
                "count_histogram",
                "raw_count_histogram",
                "expert_load",
                "dropped_load",
                "top_k",
            ):
                assert [layer[name] for layer in mine] == [layer[name] for layer in theirs], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paths_and_contract_are_those_of_transformers(tiny, make_llama, architecture):
    """What a calibration made in llama.cpp says of a layer is what transformers asks for."""
    model, path, calibration = tiny(ARCHITECTURES[architecture].model_type)
    structure = make_llama(calibration, path=path, n_ctx=128, alpha=0.1).routing.structure
    plan = make_plan(model)
    assert [structure.path(i) for i in structure.blocks] == [layer.path for layer in plan.layers]
    assert [structure.experts_path(i) for i in structure.blocks] == [
        layer.experts_path for layer in plan.layers
    ]
    for layer in plan.layers:
        context = layer.context
        assert (structure.experts, structure.slots) == (context.num_experts, context.top_k)
        assert (structure.score_func, structure.route_norm) == (context.score_func, context.route_norm)
        assert (
            structure.expert_numbers
            == sum(p.numel() for n, p in layer.experts.named_parameters() if "bias" not in n)
            // context.num_experts
        )


@pytest.mark.parametrize("name", ["llama4", "grovemoe", "bailingmoe2", "dots1", ""])
def test_others_are_refused_by_name(name):
    with pytest.raises(
        UnsupportedModelError, match=f"architecture {name!r} have not been compared with transformers"
    ):
        check_architecture(name)


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "llama_cpp.md").read_text("utf-8")
    for architecture, about in ARCHITECTURES.items():
        assert f"| `{architecture}` | `{about.model_type}` |" in page
