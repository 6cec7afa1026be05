"""What is said about a trained olmoe-nano: perplexity, load of the experts, a sample, and the model card.

Every figure of the card is read from the run's record (``training.json``) or from the model's configuration.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nano_forward import Fused, forward
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

PROMPTS = (
    "The old man looked at the sea and said",
    "It was a dark night, and the",
    "She opened the letter, and",
)


@torch.no_grad()
def evaluate(
    model: OlmoeForCausalLM, ids: np.ndarray, window: int, batch: int = 16, progress: bool = False
) -> dict[str, Any]:
    """Perplexity over whole windows (each predicts all but its first token), in float32 arithmetic on the model's
    weights, and the share of the top-k load of each expert in each layer, as a multiple of uniform."""
    was_fused = Fused.on
    windows = torch.from_numpy(ids[: len(ids) // window * window].astype(np.int64)).view(-1, window)
    E = model.config.num_experts
    load_LE = torch.zeros(model.config.num_hidden_layers, E)
    total = 0.0
    for rows in tqdm(windows.split(batch), desc="evaluate", disable=not progress, mininterval=5):
        Fused.on = was_fused and len(rows) == batch  # a last, smaller batch is not worth compiling for
        hidden, _, _, experts = forward(model, rows, torch.float32)
        for layer, experts_TK in enumerate(experts):
            load_LE[layer] += experts_TK.flatten().bincount(minlength=E)
        embedding = model.model.embed_tokens.weight
        for x, targets in zip(hidden[:, :-1], rows[:, 1:], strict=True):
            total += F.cross_entropy(x @ embedding.t(), targets, reduction="sum").item()
    Fused.on = was_fused
    predicted = windows.shape[0] * (window - 1)
    relative = load_LE / load_LE.mean(dim=1, keepdim=True)
    return {
        "tokens": windows.numel(),
        "window": window,
        "loss": total / predicted,
        "perplexity": math.exp(total / predicted),
        "load": [[round(x, 4) for x in row] for row in relative.tolist()],
        "load_min": [round(x, 4) for x in relative.amin(dim=1).tolist()],
        "load_max": [round(x, 4) for x in relative.amax(dim=1).tolist()],
        "dead_experts": (load_LE == 0).sum(dim=1).tolist(),
    }


@torch.no_grad()
def sample(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int = 40) -> dict[str, str]:
    """What the model's own ``generate`` makes of each prompt, greedily."""
    found = {}
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**encoded, max_new_tokens=tokens, do_sample=False)
        found[prompt] = tokenizer.decode(ids[0], skip_special_tokens=True)[len(prompt) :]
    return found


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of_perplexities(evaluation: dict[str, dict[str, dict[str, Any]]]) -> str:
    texts = next(iter(evaluation.values()))
    rows = [
        [text, *(f"{by_text[text]['perplexity']:.2f}" for by_text in evaluation.values())] for text in texts
    ]
    return markdown_table(["text", *evaluation], rows)


def table_of_load(by_text: dict[str, dict[str, Any]]) -> str:
    """Smallest and largest share of the top-k load in each layer, as multiples of uniform."""
    rows = []
    for text, found in by_text.items():
        spans = [
            f"{low:.2f} to {high:.2f}" for low, high in zip(found["load_min"], found["load_max"], strict=True)
        ]
        rows.append([text, *spans, str(sum(found["dead_experts"]))])
    layers = [f"layer {i}" for i in range(len(rows[0]) - 2)]
    return markdown_table(["text", *layers, "dead experts"], rows)


def table_of_curve(curve: list[dict[str, float]], rows: int = 12) -> str:
    validated = [point for point in curve if "valid_loss" in point] or curve
    keep = sorted({round(i * (len(validated) - 1) / max(rows - 1, 1)) for i in range(rows)})
    lines = []
    for p in (validated[i] for i in keep):
        numbers = [f"{p[name]:.3f}" if name in p else "" for name in ("loss", "valid_loss", "balance")]
        load = f"{p['load_min']:.2f} to {p['load_max']:.2f}"
        lines.append([f"{p['step']:,}", f"{p['tokens'] / 1e6:.1f} M", *numbers, load])
    head = ["step", "tokens", "training loss", "validation loss", "balancing loss", "load, least to most"]
    return markdown_table(head, lines)


def model_card(record: dict[str, Any], config: OlmoeConfig) -> str:
    """The model card; every figure in it is read from the run's record or from the configuration."""
    s, curve, evaluation = record["settings"], record["curve"], record["evaluation"]
    tokens, in_text = s["steps"] * s["batch_tokens"], record["train_tokens_in_text"]
    start = "continued from an earlier checkpoint" if s["init"] else f"from scratch, seed {s['seed']}"
    if s["optimiser"] == "muon":
        optimiser = (
            f"Muon (momentum 0.95, peak learning rate {s['muon_lr']:g}, weight decay {s['weight_decay']:g}) for the "
            f"matrices of attention and experts, AdamW (0.9, 0.95, peak learning rate {s['lr']:g}, no weight decay) "
            "for embedding, router and norms"
        )
    else:
        optimiser = (
            f"AdamW (0.9, 0.95), peak learning rate {s['lr']:g}, weight decay {s['weight_decay']:g} on the matrices of "
            "attention and experts"
        )
    tokenizer = "taken from the earlier checkpoint" if record["tokenizer"] == "given" else record["tokenizer"]
    precision = "bfloat16 matmuls on float32 weights" if s["bf16"] else "float32"
    quotes = "\n".join(
        f"- **{prompt}**{' '.join(text.split(chr(10)))}" for prompt, text in record["samples"].items()
    )
    others = [name for name in evaluation if name != "this model"]
    beside = f" Measured beside it by the same code: {', '.join(others)}." if others else ""
    return f"""---
license: cc0-1.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [olmoe, mixture-of-experts]
---

# olmoe-nano

A small, real `OlmoeForCausalLM` whose router is alive: {config.num_hidden_layers} layers, hidden {config.hidden_size},
{config.num_attention_heads} heads, {config.num_experts} experts of width {config.intermediate_size}, top-{config.num_experts_per_tok},
`norm_topk_prob` false, tied embeddings, byte-level BPE with {config.vocab_size:,} tokens, context
{config.max_position_embeddings} (trained at {s["window"]}), {record["parameters"] / 1e6:.1f} M parameters, stored in bfloat16.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```

## What it is for

Trying, testing and demonstrating routing on a laptop, without a download: it has the structure of OLMoE-1B-7B with
{config.num_experts} experts and top-{config.num_experts_per_tok}, its experts all get work, and routing changes its perplexity in measurable ways.

It is not for use as a language model. It writes grammatical fragments in the manner of old novels, knows nothing
reliable, has seen no modern text and no dialogue format, and has had no safety training; old books carry the prejudices
of their time. Figures measured on it say how a method behaves on *this* model; they do not carry over to large ones.

## How it was trained

- Text: English prose, public-domain books (Project Gutenberg, headers and footers mostly removed), {in_text / 1e6:.1f} M tokens.
  The validation books are by authors who are not in it.
- Tokenizer: byte-level BPE, {tokenizer}.
- Tokens seen: {tokens / 1e6:.1f} M ({tokens / in_text:.2f} epochs), {start}: {s["steps"]:,} steps of {s["batch_tokens"]:,} tokens in
  windows of {s["window"]}; {record["seconds"] / 60:.0f} minutes on one CPU core; {precision}.
- Optimiser: {optimiser}; {s["warmup"]} warm-up steps, then constant, then linear to zero over the last
  {s["decay"]:.0%} of the steps; gradients clipped at {s["clip"]:g}.
- Router: a load-balancing loss *for each layer*, averaged (E * sum of load share * mean probability, which is 1 when
  uniform; coefficient {s["balance"]:g}), and a z-loss ({s["z"]:g}). transformers' own auxiliary loss pools all layers before it
  balances, so that one layer may let experts die.

`scripts/train_olmoe_nano.py` is the whole of it; `training.json` beside this file has all settings, the curve and every
expert's load.

{table_of_curve(curve)}

Validation here is a part of the validation text's first half, on which the settings were chosen.

## Perplexity

Per token, windows of {s["window"]}, float32 arithmetic on the stored weights.{beside} Choices were made on the first half only.

{table_of_perplexities(evaluation)}

## Load

Smallest and largest share of the top-{config.num_experts_per_tok} load that any expert gets, as a multiple of the uniform share 1/{config.num_experts}.

{table_of_load(evaluation["this model"])}

## What it writes

Greedily, 40 tokens after each prompt:

{quotes}

## Licence

The weights and the tokenizer are dedicated to the public domain (CC0 1.0); they were made from public-domain books only.
"""
