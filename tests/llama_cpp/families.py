"""Tiny models of the other architectures in transformers, and how they are written as GGUF files.

Each writer is the smallest that makes llama.cpp's logits equal to transformers'; llama.cpp's own converter does more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 256
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# model_type: class, what its configuration has beside `COMMON`
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"num_experts": 16, "num_key_value_heads": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 16, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 16, "head_dim": 16, "intermediate_size": 32, "sliding_window": 24},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "head_dim": 16, "num_experts_per_tok": 3}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 16,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
        },
    ),
}


def make(model_type: str) -> Any:
    """A model with random weights, float32, whose routers have opinions."""
    import transformers

    name, more = CONFIGS[model_type]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(COMMON | more))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                is_router = key.endswith(("mlp.gate.weight", "router.weight"))
                parameter.normal_(0.0, 0.3 if is_router else 0.1)
    return model


def writers(to_gguf: Any) -> dict[str, tuple[str, Callable[[Any], None]]]:
    """model_type -> llama.cpp's architecture and a writer for `scripts/to_gguf.py`."""
    t = to_gguf

    def heads(file: Any) -> int:
        return int(
            getattr(file.config, "head_dim", None)
            or file.config.hidden_size // file.config.num_attention_heads
        )

    def attention_biases(file: Any, i: int, names: str) -> None:
        file.block(i, {f"attn_{n}.bias": f"self_attn.{n}_proj.bias" for n in names}, small=True)

    def dense(file: Any, i: int, where: str, suffix: str) -> None:
        file.block(
            i, {f"ffn_{n}{suffix}.weight": f"mlp.{where}{n}_proj.weight" for n in ("gate", "up", "down")}
        )

    def qwen3_moe(file: Any) -> None:
        file.header(head_dim=heads(file))
        file.writer.add_expert_count(file.config.num_experts)
        file.writer.add_expert_feed_forward_length(file.config.moe_intermediate_size)
        file.embeddings()
        for i in range(file.config.num_hidden_layers):
            file.block(i, t.NORMS | t.QK_NORMS | t.ROUTER, small=True)
            file.block(i, t.ATTENTION)
            file.experts(i)

    def gpt_oss(file: Any) -> None:
        c, w = file.config, file.writer
        file.header(head_dim=heads(file))
        w.add_expert_count(c.num_local_experts)
        w.add_expert_feed_forward_length(c.intermediate_size)
        w.add_sliding_window(c.sliding_window)
        file.embeddings()
        for i in range(c.num_hidden_layers):
            p, q = f"model.layers.{i}.", f"blk.{i}."
            names = {
                "attn_norm.weight": "input_layernorm.weight",
                "post_attention_norm.weight": "post_attention_layernorm.weight",
                "attn_sinks.weight": "self_attn.sinks",
                "attn_output.bias": "self_attn.o_proj.bias",
                "ffn_gate_inp.weight": "mlp.router.weight",
                "ffn_gate_inp.bias": "mlp.router.bias",
                "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
            }
            file.block(i, names, small=True)
            attention_biases(file, i, "qkv")
            file.block(i, t.ATTENTION)
            both, bias = (
                file.get(f"{p}mlp.experts.gate_up_proj{end}") for end in ("", "_bias")
            )  # [E, H, 2I], [E, 2I]
            for start, name in enumerate(("gate", "up")):
                file.add(f"{q}ffn_{name}_exps.weight", both[..., start::2].transpose(1, 2))
                file.add(f"{q}ffn_{name}_exps.bias", bias[..., start::2], small=True)
            file.add(f"{q}ffn_down_exps.weight", file.get(f"{p}mlp.experts.down_proj").transpose(1, 2))

    def mixtral(file: Any) -> None:
        c = file.config
        file.header(head_dim=heads(file))
        file.writer.add_rope_dimension_count(heads(file))
        file.writer.add_expert_count(c.num_local_experts)
        file.embeddings()
        for i in range(c.num_hidden_layers):
            file.block(i, t.NORMS | t.ROUTER, small=True)
            file.block(i, {n: o for n, o in t.ATTENTION.items() if n[5] in "vo"})
            for name, num in (("q", c.num_attention_heads), ("k", c.num_key_value_heads)):
                weight = file.get(
                    f"model.layers.{i}.self_attn.{name}_proj.weight"
                )  # pairs of the rotation side by side
                halves = weight.view(num, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
                file.add(f"blk.{i}.attn_{name}.weight", halves)
            file.experts(i)

    def qwen2_moe(file: Any) -> None:
        c, w = file.config, file.writer
        file.header()
        w.add_expert_count(c.num_experts)
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
        w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
        file.embeddings()
        for i in range(c.num_hidden_layers):
            file.block(i, t.NORMS | t.ROUTER, small=True)
            attention_biases(file, i, "qkv")
            file.block(i, t.ATTENTION)
            file.experts(i)
            dense(file, i, "shared_expert.", "_shexp")
            gate = file.get(f"model.layers.{i}.mlp.shared_expert_gate.weight")
            file.add(f"blk.{i}.ffn_gate_inp_shexp.weight", gate.flatten(), small=True)

    def deepseek_v2(file: Any) -> None:
        c, w = file.config, file.writer
        file.header()
        w.add_key_length(c.qk_nope_head_dim + c.qk_rope_head_dim)
        w.add_value_length(c.v_head_dim)
        w.add_rope_dimension_count(c.qk_rope_head_dim)
        w.add_q_lora_rank(c.q_lora_rank)
        w.add_kv_lora_rank(c.kv_lora_rank)
        w.add_expert_count(c.n_routed_experts)
        w.add_expert_shared_count(c.n_shared_experts)
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
        w.add_expert_weights_scale(c.routed_scaling_factor)
        w.add_expert_weights_norm(c.norm_topk_prob)
        w.add_leading_dense_block_count(c.first_k_dense_replace)
        file.embeddings()
        for i in range(c.num_hidden_layers):
            norms = {
                "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
                "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
            }
            file.block(i, t.NORMS | norms, small=True)
            names = {
                "attn_q_a.weight": "q_a_proj",
                "attn_q_b.weight": "q_b_proj",
                "attn_kv_a_mqa.weight": "kv_a_proj_with_mqa",
                "attn_kv_b.weight": "kv_b_proj",
                "attn_output.weight": "o_proj",
            }
            file.block(i, {theirs: f"self_attn.{ours}.weight" for theirs, ours in names.items()})
            if i < c.first_k_dense_replace:
                dense(file, i, "", "")
                continue
            file.block(i, t.ROUTER, small=True)
            file.experts(i)
            dense(file, i, "shared_experts.", "_shexp")

    return {
        "qwen3_moe": ("qwen3moe", qwen3_moe),
        "gpt_oss": ("gpt-oss", gpt_oss),
        "mixtral": ("llama", mixtral),
        "qwen2_moe": ("qwen2moe", qwen2_moe),
        "deepseek_v2": ("deepseek2", deepseek_v2),
    }
