"""A tiny model of every Mixture-of-Experts family in the installed transformers, from its config classes.

Names shared by the families' configurations get a small value each (`TINY`); what else a family needs stands
in `RECIPES`. A family that is not listed there is built by the general rule alone.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCAB = 96

TINY: dict[str, Any] = {
    # text
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 24,
    "ffn_hidden_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "n_layers": 3,
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "max_seq_len": 64,
    "sliding_window": 8,
    "attention_dropout": 0.0,
    # experts: 8, of which 3; two groups where there are groups, of which one
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_topk": 3,
    "moe_top_k": 3,
    "moe_k": 3,
    "top_k_experts": 3,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_mtp_layers": 0,
    # attention variants
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # vision
    "depth": 1,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "downsample_hidden_size": 8,
    "num_heads": 4,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
    # special tokens
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

HYBRID = ["linear_attention", "full_attention", "linear_attention"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a family needs beyond the general rule.

    Attributes
    ----------
    model : str
        Class to build; default: the first ...ForCausalLM or ...ForConditionalGeneration.
    config : mapping
        Configuration fields; a mapping under a sub-configuration's name overrides fields in there.
    keep : tuple of str
        Names that stay at the configuration's own default.
    """

    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    keep: tuple[str, ...] = ()


MLP_TYPES = ["dense", "sparse", "sparse"]
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_d_conv": 2, "mamba_chunk_size": 8}
VISION = {"num_hidden_layers": 1, "num_channels": 3}
SAM = {"sam_config": {"downsample_channels": [16, 16], "output_channels": 8}}
AXIAL_TEXT = {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    },
}

RECIPES: dict[str, Recipe] = {
    "bailing_hybrid": Recipe(config={"layer_types": HYBRID, "qk_head_dim": 16, "short_conv_kernel_size": 2}),
    "beam": Recipe(config={"mlp_layer_types": MLP_TYPES}),
    "dbrx": Recipe(config={"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}),
    "deepseek_ocr2": Recipe(config={"text_config": {"mlp_layer_types": MLP_TYPES}, "vision_config": SAM}),
    "deepseek_v2": Recipe(config={"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0}),
    "deepseek_v4": Recipe(
        config={"mlp_layer_types": ["hash_moe", "moe", "moe"], "o_lora_rank": 8, "o_groups": 2}
    ),
    "diffusion_gemma": Recipe(
        model="DiffusionGemmaEncoderTextModel",
        config={"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "dots3_note": Recipe(config={"mlp_layer_types": MLP_TYPES, "layer_types": ["full_attention"] * 3}),
    "ernie4_5_vl_moe": Recipe(
        config={
            "text_config": {
                "moe_intermediate_size": [16, 8],
                "mlp_layer_types": MLP_TYPES,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                },
            },
            "vision_config": {"in_channels": 3},
        }
    ),
    "gemma4": Recipe(
        config={
            "enable_moe_block": True,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        }
    ),
    "glm4v_moe": Recipe(config={"text_config": AXIAL_TEXT}),
    "glm5_next": Recipe(
        config={
            "text_config": {
                "qk_rope_head_dim": 0,
                "index_kpool": 2,
                "hc_mult": 2,
                "num_hidden_layers": 4,
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
                "layer_types": None,
            },
            "vision_config": {"projection_intermediate_size": 16},
        },
    ),
    "granitemoehybrid": Recipe(config=MAMBA | {"layer_types": HYBRID}),
    "hy_v4_vl": Recipe(
        config={
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                }
            }
        }
    ),
    "jamba": Recipe(
        config={
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "num_hidden_layers": 4,
            "expert_layer_period": 2,
        }
    ),
    "lfm2_moe": Recipe(config={"layer_types": ["conv", "full_attention", "conv"]}),
    "longcat_flash": Recipe(
        config={
            "num_layers": 2,
            "zero_expert_num": 4,
            "expert_ffn_hidden_size": 16,
            "routed_scaling_factor": 2.0,
        }
    ),
    "mistral_large4": Recipe(config={"vision_config": VISION}),
    "muse_spark": Recipe(
        config={
            "text_config": {"moe_hidden_size": 24, "mlp_layer_types": MLP_TYPES},
            "audio_config": {
                "patch_sizes": [4],
                "hidden_sizes": [8],
                "depths": [1],
                "num_hidden_layers": 1,
            },
            "projector_hidden_size": 16,
        }
    ),
    "nemotron_h": Recipe(
        config={
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "conv_kernel": 2,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
            "moe_latent_size": 24,
        }
    ),
    "phimoe": Recipe(config={"num_experts_per_tok": 2}),
    "qwen3_omni_moe": Recipe(
        model="Qwen3OmniMoeThinkerForConditionalGeneration", config={"vision_start_token_id": 90}
    ),
    "qwen4_exp": Recipe(
        config={
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
            "hc_count": 2,
            "hc_lowrank": 8,
        }
    ),
    "step3p7": Recipe(
        config={"text_config": {"mlp_layer_types": MLP_TYPES, "share_expert_dim": 16}},
        keep=("pad_token_id",),
    ),
    "unlimited_ocr": Recipe(config={"vision_config": SAM}),
    "zaya": Recipe(config={"num_experts_per_tok": 1, "router_hidden_size": 16}),
}


def modules(family: str) -> tuple[ModuleType, ModuleType]:
    """(configuration, modeling) of a family."""
    base = f"transformers.models.{family}"
    return (
        importlib.import_module(f"{base}.configuration_{family}"),
        importlib.import_module(f"{base}.modeling_{family}"),
    )


def model_class(family: str) -> type[PreTrainedModel]:
    """The class to build: the recipe's, else the family's first generating class, else its first model."""
    _, modeling = modules(family)
    if name := RECIPES.get(family, Recipe()).model:
        return getattr(modeling, name)
    classes = [
        c
        for c in vars(modeling).values()
        if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.__module__ == modeling.__name__
    ]
    for ending in ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification", "Model"):
        for cls in classes:
            if cls.__name__.endswith(ending) and not cls.__name__.endswith("PreTrainedModel"):
                return cls
    raise LookupError(f"{family} has no model class")


def tiny_config(
    cls: type[PreTrainedConfig],
    changes: Mapping[str, Any],
    keep: tuple[str, ...] = (),
    everywhere: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """A small configuration: `TINY` where the class has such a field, then `changes`; recursive.

    ``everywhere``: values for fields of that name in whatever sub-configuration has them.
    """
    names = {f.name for f in dataclasses.fields(cls)} | set(getattr(cls, "attribute_map", {}))
    names &= {f.name for f in dataclasses.fields(cls)}
    values = {k: v for k, v in TINY.items() if k in names and k not in keep}
    if "kv_lora_rank" in names:  # latent attention has as many key heads as heads
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)
    if "layer_types" in names and any(n.startswith("linear_") for n in names):
        values["layer_types"] = HYBRID
    for name, sub in sub_configs(cls).items():
        wanted = changes.get(name, {})
        if name in names and wanted is not None:
            values[name] = tiny_config(sub, wanted, keep, everywhere)
    values |= {k: v for k, v in changes.items() if not isinstance(v, Mapping) or k not in values}
    values |= {k: v for k, v in (everywhere or {}).items() if k in names}
    return cls(**values)


def sub_configs(cls: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """Sub-configuration classes by field, where they are known without loading a checkpoint."""
    declared = dict(getattr(cls, "sub_configs", None) or {}) | dict(
        getattr(cls, "sub_configs_defaults", None) or {}
    )
    found = {}
    for name, sub in declared.items():
        if not isinstance(sub, type):  # a specification: its class, or a model type for the automatic one
            named = getattr(sub, "config_class", None)
            sub = (
                named
                if dataclasses.is_dataclass(named)
                else CONFIG_MAPPING.get(getattr(sub, "model_type", ""))
            )
        if isinstance(sub, type) and dataclasses.is_dataclass(sub):
            found[name] = sub
    return found


TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
BIASES = ("correction_bias", "expert_bias", "balancing_bias", "moe_statics")


def build(
    family: str,
    *,
    seed: int = 0,
    top_k: int | None = None,
    biased: bool = True,
    norm_topk_prob: bool | None = None,
) -> PreTrainedModel:
    """The tiny model, seeded, in eval mode, with lively routers.

    Parameters
    ----------
    top_k : int, optional
        Experts per token; default: what `TINY` and the recipe say.
    biased : bool
        False: no bias and no group takes part in the selection.
    norm_topk_prob : bool, optional
        Default: what the configuration says.
    """
    cls, recipe = model_class(family), RECIPES.get(family, Recipe())
    changes: dict[str, Any] = {} if top_k is None else dict.fromkeys(TOP_K, top_k)
    if norm_topk_prob is not None:
        changes["norm_topk_prob"] = norm_topk_prob
    if not biased:
        changes |= {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(tiny_config(cls.config_class, recipe.config, recipe.keep, changes)).eval()
        enliven(model, biased=biased)
    return model


def enliven(model: nn.Module, *, biased: bool = True) -> None:
    """Make the routers' logits spread and the experts, selection biases and factors per expert count."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        *path, leaf = name.split(".")
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            if any(word in name for word in BIASES):
                tensor.normal_(0.0, 0.2) if biased else tensor.zero_()
            elif leaf == "per_expert_scale":
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 2 and any(part in ("gate", "router") for part in path):
                tensor.normal_(0.0, 0.5)
            elif tensor.dim() > 1 and any(part == "experts" for part in path):
                tensor.normal_(0.0, 0.2)
