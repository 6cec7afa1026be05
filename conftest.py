"""Fixtures for the tests and for the examples in docstrings."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before Triton is imported: kernels run in its interpreter

# Where Triton does not exist (not Linux), the module that needs it on import has no examples to run.
collect_ignore = [] if find_spec("triton") else ["src/bh_routing/decision/select_triton.py"]
# The same for vLLM, which has an environment of its own (make test-vllm).
collect_ignore += [] if find_spec("vllm") else ["src/bh_routing/engines/vllm/ops.py"]

NANO = Path(__file__).parent / "src" / "bh_routing" / "models" / "olmoe-nano"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20261123)


@pytest.fixture(scope="session")
def _nano_once() -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32).eval()


@pytest.fixture
def nano_model(_nano_once: Any) -> Iterator[Any]:
    """The embedded olmoe-nano in float32; a test must leave it unpatched."""
    from bh_routing import is_patched

    yield _nano_once
    assert not is_patched(_nano_once), "the test left the shared model patched"


@pytest.fixture(scope="session")
def nano_tokenizer() -> Any:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Fixed token ids, int64 [2, 24], valid for olmoe-nano and for the tiny models."""
    return torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def tiny_olmoe() -> Callable[..., Any]:
    """Factory of small random OLMoE models with a router that has opinions."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        from transformers import OlmoeConfig, OlmoeForCausalLM

        settings: dict[str, Any] = {
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 6,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        model = OlmoeForCausalLM(OlmoeConfig(**(settings | changes))).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(0.0, 0.3 if "gate.weight" in name else 0.15)
        return model.to(dtype)

    return make
