"""A family that renormalises its weights: Qwen3-MoE, tiny and random, against the transformers integration."""

from __future__ import annotations

import pytest
import torch
from test_vllm_engine import NEW, STATS, InTransformers, config, histograms, largest_difference, pairs

from bh_routing import calibrate

PROMPTS = [[7 * i % 190 + 5 for i in range(n)] for n in (5, 17, 40)]


@pytest.fixture(scope="module")
def qwen():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    settings = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.3 if "gate.weight" in name else 0.15)
    return model


@pytest.mark.parametrize("compensation", [False, True])
def test_qwen3_moe_equals_transformers(run_engine, qwen, tmp_path, compensation):
    folder, file = tmp_path / "qwen", tmp_path / "calibration.safetensors"
    qwen.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(5, 200, (128,), generator=generator) for _ in range(24)]
    calibration = calibrate(qwen, None, documents, progress=False)
    calibration.save(file)
    settings = {"calibration": str(file), "experts_per_token": 2.5, "compensation": compensation}
    engine = {
        "model": str(folder),
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    asked = ["generate", {"prompts": PROMPTS, "max_tokens": NEW}]
    ours, (worker,) = run_engine(engine | config(**settings), [asked, STATS])
    theirs = InTransformers(qwen, PROMPTS, **settings)
    assert [x["tokens"] for x in ours] == [x["tokens"] for x in theirs.answers]
    assert histograms(worker) == histograms(theirs.worker)
    assert pairs(worker) == worker["pairs_computed"] < 4 * worker["telemetry"]["total"]["decisions"]
    difference = largest_difference(ours, theirs.answers)
    print(f"Qwen3-MoE: largest difference of a log-probability {difference:.1e}")
    assert difference < 1e-5
