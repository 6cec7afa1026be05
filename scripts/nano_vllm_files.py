"""Write what vLLM needs beside olmoe-nano's own files: its output layer, and the index of its weights.

    python scripts/nano_vllm_files.py

The model's output layer is its embedding (``tie_word_embeddings``), which vLLM's OLMoE does not know: it expects
``lm_head.weight`` in the files. And vLLM reads every .safetensors file of a folder as weights, the calibration too, unless
an index names them. transformers looks at neither file, because there is a model.safetensors.
"""

from __future__ import annotations

import json

from safetensors.torch import load_file, save_file

from bh_routing.models import bundled_path

WEIGHTS, HEAD, INDEX = "model.safetensors", "vllm-lm-head.safetensors", "model.safetensors.index.json"


def main() -> None:
    folder = bundled_path("olmoe-nano")
    weights = load_file(folder / WEIGHTS)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(head, folder / HEAD, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in (*weights.values(), *head.values()))
    where = dict.fromkeys(sorted(weights), WEIGHTS) | dict.fromkeys(head, HEAD)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
