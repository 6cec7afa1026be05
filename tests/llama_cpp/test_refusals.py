"""Graphs that route in another way than the table's models: tiny files with it are written, and refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make, writers

from bh_routing.errors import UnsupportedModelError

gguf = pytest.importorskip("gguf")

HIDDEN, EXPERTS, INNER, RANK = 64, 16, 32, 2


def merged(file: Any) -> None:
    """Gate and up of an expert in one tensor."""

    def experts(i: int, where: str = "mlp.experts") -> None:
        for theirs, ours in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            file.add(f"blk.{i}.ffn_{theirs}_exps.weight", file.get(f"model.layers.{i}.{where}.{ours}"))

    file.experts = experts


def groups(file: Any) -> None:
    """The best two of four groups first, then experts among them."""
    file.writer.add_expert_group_count(4)
    file.writer.add_expert_group_used_count(2)
    file.writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def bias(file: Any) -> None:
    """A bias that chooses and does not weigh."""
    for i in range(1, file.config.num_hidden_layers):
        file.add(f"blk.{i}.exp_probs_b.bias", torch.linspace(0, 1, EXPERTS), small=True)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "merged": (merged, "gate and up of its experts are one tensor"),
    "groups": (groups, "it chooses by something else than its scores (groups of experts, or a bias)"),
    "bias": (bias, "it chooses by something else than its scores (groups of experts, or a bias)"),
}
LORAS = {
    "ffn_up_exps": (
        ((EXPERTS, RANK, HIDDEN), (EXPERTS, INNER, RANK)),
        "there are more products with its experts than up, gate and down (a LoRA of experts)",
    ),
    "ffn_gate_inp": (
        ((RANK, HIDDEN), (EXPERTS, RANK)),
        "its logits are more than a product and a bias (a LoRA of the router)",
    ),
}


def write_model(
    path: Path, to_gguf: Any, model_type: str, differ: Callable[[Any], None] | None = None
) -> str:
    architecture, write = writers(to_gguf)[model_type]
    file = to_gguf.File(path, architecture, make(model_type), "f32")
    file.tokenizer(None)
    if differ is not None:
        differ(file)
    write(file)
    file.close()
    return str(path)


def write_lora(path: Path, name: str, *shapes: tuple[int, ...], kind: str = "qwen3moe") -> str:
    """An adapter of one tensor: A, then B."""
    w, rng = gguf.GGUFWriter(str(path), kind), np.random.default_rng(0)
    w.add_string("general.type", "adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", 4.0)
    for part, shape in zip("ab", shapes, strict=True):
        w.add_tensor(f"{name}.lora_{part}", rng.normal(0, 0.3, shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return str(path)


def refused(make_llama: Any, calibration: Any, block: int, why: str, **arguments: Any) -> None:
    """llama.cpp itself runs it; routing says what is different."""
    make_llama(n_ctx=64, **arguments).eval([3, 4, 5])
    with pytest.raises(UnsupportedModelError) as caught:
        make_llama(calibration, n_ctx=64, experts_per_token=2, **arguments)
    assert str(caught.value) == f"block {block}: {why}; models of this kind are not supported."


@pytest.mark.parametrize("change", CHANGES)
def test_another_choice_is_refused(make_llama, calibration, to_gguf, tmp_path, change):
    differ, why = CHANGES[change]
    path = write_model(tmp_path / "model.gguf", to_gguf, "deepseek_v2", differ)
    refused(make_llama, calibration, 1, why, path=path)


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_of_what_routes_is_refused(make_llama, calibration, to_gguf, tmp_path, name):
    shapes, why = LORAS[name]
    path = write_model(tmp_path / "model.gguf", to_gguf, "qwen3_moe")
    lora = write_lora(tmp_path / "lora.gguf", f"blk.0.{name}.weight", *shapes)
    refused(make_llama, calibration, 0, why, path=path, lora_path=lora)


def test_a_lora_of_attention_is_served(make_llama, calibration, nano, gguf_file, logits_of, ids, tmp_path):
    """It changes no router: what is read of the graph is the same, and the logits are others."""
    hidden = nano[0].config.hidden_size
    lora = write_lora(
        tmp_path / "lora.gguf", "blk.0.attn_q.weight", (RANK, hidden), (hidden, RANK), kind="olmoe"
    )
    found = [
        logits_of(make_llama(calibration, experts_per_token=4, **more), ids[:20])
        for more in ({}, {"lora_path": lora})
    ]
    assert float((found[0] - found[1]).abs().max()) > 0.1
