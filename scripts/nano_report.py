"""Measure a trained olmoe-nano and write its model card.

    python scripts/nano_report.py --model olmoe-nano --data mixed --work nano.work --baseline "earlier model=DIR"

Bits per byte on the validation and test text of each domain, beside other models; the use of the experts, with a
figure; a sample. What was measured is added to the run's record, ``training.json``; the card is in ``nano_card.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nano_card import FIGURE, OURS, model_card, relative_use, table_of_bits, table_of_sources, table_of_use
from nano_data import bytes_of_tokens, cached_ids, text_path
from nano_forward import Fused, forward
from torch import Tensor
from transformers import AutoTokenizer, OlmoeForCausalLM, PreTrainedTokenizerFast

SPLITS = ("valid", "test")
PROMPTS = (
    "The old man looked at the sea and said",
    "The city lies on the river",
    "To install the package, run",
    "def read_file(path):\n",
    "USER: I would like to book a table for two.\nSYSTEM:",
)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def evaluate(
    model: OlmoeForCausalLM, ids: np.ndarray, bytes_V: Tensor, window: int, batch: int = 8
) -> dict[str, Any]:
    """Bits per byte over whole windows, each of which predicts all but its first token, in float32 arithmetic on the
    model's weights; and how many of the top-k slots each expert of each layer got.

    Bytes are those of the predicted tokens; end-of-text, which stands for no byte, is not counted as predicted.
    """
    was_fused = Fused.on
    windows = torch.from_numpy(ids[: len(ids) // window * window].astype(np.int64)).view(-1, window)
    E = model.config.num_experts
    slots_LE = torch.zeros(model.config.num_hidden_layers, E, dtype=torch.long)
    nats, tokens, size = 0.0, 0, 0
    for rows in windows.split(batch):
        Fused.on = was_fused and len(rows) == batch  # a last, smaller batch is not worth compiling for
        hidden, _, _, experts = forward(model, rows, torch.float32)
        for layer, experts_TK in enumerate(experts):
            slots_LE[layer] += experts_TK.flatten().bincount(minlength=E)
        for x, targets in zip(hidden[:, :-1], rows[:, 1:], strict=True):
            size_of_target = bytes_V[targets]
            loss = F.cross_entropy(x @ model.model.embed_tokens.weight.t(), targets, reduction="none")
            nats += loss[size_of_target > 0].sum().item()
            tokens += int((size_of_target > 0).sum())
            size += int(size_of_target.sum())
    Fused.on = was_fused
    return {
        "tokens": tokens,
        "bytes": size,
        "window": window,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / size / math.log(2),
        "slots": slots_LE.tolist(),
    }


def evaluate_texts(
    folder: Path,
    data: Path,
    domains: list[str],
    windows: list[int],
    work: Path,
    splits: tuple[str, ...] = SPLITS,
) -> dict[str, dict[str, dict[str, Any]]]:
    """``evaluate`` by split, domain and window. What was found is kept in ``work``: the same weights are not evaluated
    twice on the same tokens."""
    model = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bytes_V = bytes_of_tokens(tokenizer)
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for split in splits:
        for domain in domains:
            ids = cached_ids(tokenizer, text_path(data, domain, split), work)
            for window in windows:
                digest = hashlib.sha256(weights.digest() + ids.tobytes() + str(window).encode())
                kept = work / f"evaluation-{digest.hexdigest()[:16]}.json"
                if not kept.exists():
                    write_json(kept, evaluate(model, ids, bytes_V, window))
                one = json.loads(kept.read_text(encoding="utf-8"))
                found.setdefault(split, {}).setdefault(domain, {})[str(window)] = one
    return found


@torch.no_grad()
def sample(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int = 40) -> dict[str, str]:
    """What the model's own ``generate`` makes of each prompt, greedily."""
    found = {}
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**encoded, max_new_tokens=tokens, do_sample=False)
        found[prompt] = tokenizer.decode(ids[0], skip_special_tokens=True)[len(prompt) :]
    return found


def draw_use(domains: list[str], use_DLE: np.ndarray, path: Path) -> None:
    """Which expert serves which domain: a panel per layer, experts ordered by the domain that uses them most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layers = use_DLE.shape[1]
    figure, panels = plt.subplots(
        layers, 1, figsize=(10, 1.6 * layers + 0.8), layout="constrained", squeeze=False
    )
    for layer, (panel,) in enumerate(panels):
        use_DE = use_DLE[:, layer]
        order = np.lexsort((-use_DE.max(axis=0), use_DE.argmax(axis=0)))
        logs = np.log2(np.maximum(use_DE[:, order], 2.0**-4))
        image = panel.imshow(logs, cmap="PuOr_r", vmin=-4, vmax=4, aspect="auto", interpolation="nearest")
        panel.set_yticks(range(len(domains)), domains, fontsize=8)
        panel.set_xticks([])
        panel.set_ylabel(f"layer {layer}", fontsize=9)
    panels[-1][0].set_xlabel("experts, ordered by the domain that uses them most")
    bar = figure.colorbar(image, ax=panels[:, 0], shrink=0.6, ticks=[-4, -2, 0, 2, 4])
    bar.ax.set_yticklabels(["1/16 or less", "1/4", "1", "4", "16"])
    bar.set_label("share of the top-k slots, multiple of uniform")
    temporary = path.with_name("tmp-" + path.name)
    figure.savefig(temporary, dpi=110, metadata={"Software": None})
    plt.close(figure)
    os.replace(temporary, path)


def parse_baseline(value: str) -> tuple[str, Path]:
    name, equals, path = value.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, got {value!r}")
    return name, Path(path)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the model; the card is written there")
    add("--data", type=Path, required=True, help="folder of the texts, with README.md")
    add("--work", type=Path, required=True, help="folder for token ids and for what was measured")
    add("--baseline", type=parse_baseline, action="append", default=[], help="NAME=DIR; may be repeated")
    add("--baseline-window", type=int, default=256, help="window of the comparison, in tokens")
    add("--threads", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    record = json.loads((args.model / "training.json").read_text(encoding="utf-8"))
    model = OlmoeForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    domains, context = list(record["tokens_in_text"]), model.config.max_position_embeddings
    windows = sorted({args.baseline_window, context})
    record["evaluation"] = {OURS: evaluate_texts(args.model, args.data, domains, windows, args.work)}
    for name, folder in args.baseline:
        record["evaluation"][name] = evaluate_texts(
            folder, args.data, domains, [args.baseline_window], args.work, ("test",)
        )
    record["samples"] = sample(model, AutoTokenizer.from_pretrained(args.model))
    _, pooled_LE, use_DLE = relative_use(record["evaluation"][OURS]["valid"], context)
    draw_use(domains, use_DLE, args.model / FIGURE)
    write_json(args.model / "training.json", record)
    sources = table_of_sources((args.data / "README.md").read_text(encoding="utf-8"))
    write_text(args.model / "README.md", model_card(record, model.config, sources))
    print(
        table_of_bits(record["evaluation"], "valid"), table_of_bits(record["evaluation"], "test"), sep="\n\n"
    )
    print("\n" + table_of_use(pooled_LE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
