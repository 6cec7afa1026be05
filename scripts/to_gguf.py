"""A transformers model as a GGUF file for llama.cpp: python scripts/to_gguf.py OUT.gguf [--model olmoe-nano] [--type q8_0]

For olmoe-nano, and for the tiny models of tests/llama_cpp, whose families it knows; of a real model llama.cpp's own
convert_hf_to_gguf.py makes one, and llama-quantize the smaller ones. Needs the packages gguf and transformers.

Shape legend: V vocabulary, H hidden size, E experts, I their intermediate size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}


class File:
    """A GGUF file being written: what differs between families is said in terms of this."""

    def __init__(self, path: Path, architecture: str, model: Any, kind: str) -> None:
        self.writer = gguf.GGUFWriter(str(path), architecture)
        self.config, self.kind = model.config, TYPES[kind]
        self.state = {name: tensor.float() for name, tensor in model.state_dict().items()}

    def get(self, name: str) -> torch.Tensor:
        """A tensor of the model, float32."""
        return self.state[name]

    def add(self, name: str, tensor: torch.Tensor, *, small: bool = False) -> None:
        """Write one: small ones and rows that are no multiple of 32 stay float32."""
        array = np.ascontiguousarray(tensor.numpy(), dtype=np.float32)
        plain = small or self.kind == TYPES["f32"] or array.ndim == 1 or array.shape[-1] % 32
        if plain:
            self.writer.add_tensor(name, array)
        else:
            self.writer.add_tensor(name, gguf.quants.quantize(array, self.kind), raw_dtype=self.kind)

    def header(self, *, head_dim: int | None = None, feed_forward: int | None = None) -> None:
        """What every family says."""
        c, w = self.config, self.writer
        w.add_context_length(c.max_position_embeddings)
        w.add_embedding_length(c.hidden_size)
        w.add_block_count(c.num_hidden_layers)
        w.add_feed_forward_length(feed_forward or c.intermediate_size)
        w.add_head_count(c.num_attention_heads)
        w.add_head_count_kv(c.num_key_value_heads)
        w.add_rope_freq_base(c.rope_parameters["rope_theta"])
        w.add_layer_norm_rms_eps(c.rms_norm_eps)
        w.add_vocab_size(c.vocab_size)
        w.add_expert_used_count(c.num_experts_per_tok)
        if head_dim is not None:
            w.add_key_length(head_dim)
            w.add_value_length(head_dim)

    def embeddings(self) -> None:
        """Input and output embeddings: `output.weight` has to be there also where they are tied."""
        self.add("token_embd.weight", self.get("model.embed_tokens.weight"))
        tied = "lm_head.weight" not in self.state or self.config.tie_word_embeddings
        self.add("output.weight", self.get("model.embed_tokens.weight" if tied else "lm_head.weight"))
        self.add("output_norm.weight", self.get("model.norm.weight"), small=True)

    def block(self, i: int, names: dict[str, str], *, small: bool = False) -> None:
        """Tensors of one block, by llama.cpp's name."""
        for theirs, ours in names.items():
            self.add(f"blk.{i}.{theirs}", self.get(f"model.layers.{i}.{ours}"), small=small)

    def experts(self, i: int, where: str = "mlp.experts") -> None:
        """gate and up are one tensor [E, 2I, H] in transformers, two in llama.cpp."""
        both = self.get(f"model.layers.{i}.{where}.gate_up_proj")
        gate, up = both.chunk(2, 1)
        self.add(f"blk.{i}.ffn_gate_exps.weight", gate)
        self.add(f"blk.{i}.ffn_up_exps.weight", up)
        self.add(f"blk.{i}.ffn_down_exps.weight", self.get(f"model.layers.{i}.{where}.down_proj"))

    def tokenizer(self, folder: Path | None) -> None:
        """Byte-level BPE as in tokenizer.json, or none."""
        w = self.writer
        if folder is None:
            w.add_tokenizer_model("none")
            return
        held = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        words = sorted(held["model"]["vocab"], key=held["model"]["vocab"].get)
        special = {token["id"] for token in held["added_tokens"]}
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        w.add_token_list(words)
        w.add_token_types(
            [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(words))]
        )
        w.add_token_merges([" ".join(pair) for pair in held["model"]["merges"]])
        w.add_bos_token_id(self.config.bos_token_id)
        w.add_eos_token_id(self.config.eos_token_id)
        w.add_pad_token_id(self.config.pad_token_id)
        w.add_add_bos_token(False)

    def close(self) -> None:
        """Write it."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


NORMS = {"attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}
ATTENTION = {
    f"attn_{theirs}.weight": f"self_attn.{ours}_proj.weight"
    for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))
}
QK_NORMS = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
ROUTER = {"ffn_gate_inp.weight": "mlp.gate.weight"}


def _olmoe(file: File) -> None:
    file.header()
    file.writer.add_expert_count(file.config.num_experts)
    file.embeddings()
    for i in range(file.config.num_hidden_layers):
        file.block(i, NORMS | QK_NORMS | ROUTER, small=True)
        file.block(i, ATTENTION)
        file.experts(i)


WRITERS: dict[str, tuple[str, Callable[[File], None]]] = {"olmoe": ("olmoe", _olmoe)}


def write(
    model: Any, path: Path, kind: str = "f32", *, tokenizer: Path | None = None, name: str = ""
) -> None:
    """Write a transformers model (`WRITERS`: by its model_type) as a GGUF file."""
    architecture, writer = WRITERS[model.config.model_type]
    file = File(path, architecture, model, kind)
    file.writer.add_name(name or model.config.model_type)
    file.tokenizer(tokenizer)
    writer(file)
    file.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="olmoe-nano", help="olmoe-nano, or a folder of an OLMoE model")
    parser.add_argument("--type", default="f32", choices=TYPES, help="of the matrices (default f32)")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    from bh_routing.models.loading import resolve

    _, folder = resolve(args.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model.config.model_type not in WRITERS:
        parser.error(
            f"expected an OLMoE model, got {model.config.model_type}; llama.cpp's convert_hf_to_gguf.py writes others"
        )
    write(model, args.out, args.type, tokenizer=Path(folder), name=args.model)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
