"""What the llama.cpp tests share: GGUF files of olmoe-nano, the same model in transformers, and calibrations of it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.linear_maps import LinearMaps
from bh_routing.calibration.token_sizes import TokenSizes
from bh_routing.models import bundled_calibration, bundled_path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
_SPEC = find_spec("llama_cpp")
# The folder of these tests is found as a package of that name where llama-cpp-python is not installed; it has no file.
HAS_LLAMA = _SPEC is not None and _SPEC.origin is not None and find_spec("gguf") is not None
NEEDS_NO_LLAMA = ("test_shim",)

TEXT = (
    "The old man walked slowly down to the river and sat upon the bank. He had been there every evening of that "
    "summer, he said, and every evening the water had told him the same thing. 'What did it tell you?' asked the boy, who "
    "had followed him with the basket. The old man laughed. 'That it is late,' he answered, 'and that we should go home.' "
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        here = HERE in item.path.parents and item.path.stem not in NEEDS_NO_LLAMA
        if here:  # llama-cpp-python never closes the /dev/null that it opens
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"))
        if here and not HAS_LLAMA:
            item.add_marker(
                pytest.mark.skip(reason="llama-cpp-python is not installed; `make test-llama` installs it")
            )


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of compiled files of these tests' own; built once."""
    before = os.environ.get("BH_ROUTING_CACHE")
    os.environ["BH_ROUTING_CACHE"] = str(tmp_path_factory.getbasetemp() / "compiled")
    yield
    if before is None:
        del os.environ["BH_ROUTING_CACHE"]
    else:
        os.environ["BH_ROUTING_CACHE"] = before


@pytest.fixture(scope="session")
def to_gguf() -> Any:
    """scripts/to_gguf.py as a module."""
    spec = importlib.util.spec_from_file_location("to_gguf", ROOT / "scripts" / "to_gguf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def nano() -> tuple[Any, Any]:
    """olmoe-nano in transformers, float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bundled_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def gguf_file(to_gguf: Any, nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """``gguf_file("q8_0")``: olmoe-nano in this type."""
    folder = tmp_path_factory.mktemp("gguf")

    def path(kind: str = "f32") -> str:
        found = folder / f"nano-{kind}.gguf"
        if not found.exists():
            to_gguf.write(nano[0], found, kind, tokenizer=bundled_path())
        return str(found)

    return path


@pytest.fixture(scope="session")
def ids(nano: Any) -> list[int]:
    """A text of 200 tokens."""
    found: list[int] = nano[1](3 * TEXT)["input_ids"][:200]
    assert len(found) == 200
    return found


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    """The one that comes with olmoe-nano."""
    return Calibration.load(bundled_calibration())


@pytest.fixture(scope="session")
def followed(calibration: Calibration) -> Calibration:
    """The same with a linear compensation and sizes that follow the token, of random maps: that they agree is tested, not that they help."""
    g = torch.Generator().manual_seed(0)
    assert calibration.moments is not None
    mean_LEH = calibration.moments.mean_LEH.float()
    layers, experts, hidden = mean_LEH.shape
    rank = 6

    def normal(*shape: int, by: float) -> torch.Tensor:
        return by * torch.randn(*shape, generator=g)

    center_LD = normal(layers, experts, by=0.5)
    linear = LinearMaps(
        center_LD=center_LD,
        low_LD=center_LD - 3,
        high_LD=center_LD + 3,
        whiten_LDR=normal(layers, experts, rank, by=0.1),
        mean_LEH=mean_LEH,
        slope_LERH=normal(layers, experts, rank, hidden, by=0.3 * float(mean_LEH.std())).to(torch.bfloat16),
        rank_L=torch.full((layers,), rank),
        r2_L=torch.full((layers,), 0.5, dtype=torch.float64),
        mean_r2_L=torch.full((layers,), 0.3, dtype=torch.float64),
        pairs_LE=torch.full((layers, experts), 100),
        expert_numbers_L=torch.full((layers,), 24576),
    )
    sizes = TokenSizes(
        offset_LE=normal(layers, experts, by=0.3),
        slope_LDE=normal(layers, experts, experts, by=0.05),
        center_LD=center_LD,
        r2_L=torch.full((layers,), 0.2, dtype=torch.float64),
        tokens_LE=torch.full((layers, experts), 100),
    )
    return replace(calibration, linear=linear, linear_scale=0.95, token_sizes=sizes)


@pytest.fixture
def make_llama(gguf_file: Callable[[str], str]) -> Iterator[Callable[..., Any]]:
    """``make_llama(calibration, ...)``: a routed `Llama` (None: as the model is), closed after the test."""
    from llama_cpp import Llama

    from bh_routing.engines.llama_cpp import route

    made = []

    def make(calibration: Any = None, *, kind: str = "f32", path: str | None = None, **given: Any) -> Any:
        # Flash attention off and a cache in float32: as transformers computes in float32.
        plain = {
            "n_ctx": 512,
            "n_threads": 1,
            "n_threads_batch": 1,
            "logits_all": True,
            "type_k": 0,
            "type_v": 0,
        }
        arguments = {"model_path": path or gguf_file(kind), "verbose": False, **plain, **given}
        made.append(
            Llama(**arguments) if calibration is None else route(Llama, calibration=calibration, **arguments)
        )
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def logits_of() -> Callable[..., torch.Tensor]:
    """``logits_of(llm, ids, step)``: logits [T, V], of so many tokens at a time, from an empty memory."""

    def run(llm: Any, ids: list[int], step: int = 512) -> torch.Tensor:
        llm.reset()
        llm._ctx.kv_cache_clear()
        for at in range(0, len(ids), step):
            llm.eval(ids[at : at + step])
        return torch.from_numpy(llm.scores[: len(ids)].copy())

    return run
