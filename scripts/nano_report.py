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
        low = sum(share < 1 / 3 for layer in found["load"] for share in layer)
        rows.append([text, *spans, str(low), str(sum(found["dead_experts"]))])
    layers = [f"layer {i}" for i in range(len(rows[0]) - 3)]
    return markdown_table(["text", *layers, "below 1/3", "dead"], rows)


def table_of_curve(curve: list[dict[str, float]], rows: int = 9) -> str:
    validated = [point for point in curve if "valid_loss" in point] or curve
    keep = sorted({round(i * (len(validated) - 1) / max(rows - 1, 1)) for i in range(rows)})
    lines = []
    for p in (validated[i] for i in keep):
        numbers = [f"{p[name]:.3f}" if name in p else "" for name in ("loss", "valid_loss", "balance")]
        load = f"{p['load_min']:.2f} to {p['load_max']:.2f}"
        lines.append([f"{p['step']:,}", f"{p['tokens'] / 1e6:.1f} M", *numbers, load])
    head = ["step", "tokens", "training loss", "validation loss", "balancing loss", "load, least to most"]
    return markdown_table(head, lines)


def describe_stage(number: int, stage: dict[str, Any]) -> str:
    s = stage["settings"]
    start = "from the stage before" if s["init"] else "from scratch"
    precision = "bfloat16 matmuls on float32 weights" if s["bf16"] else "float32"
    adamw = f"AdamW (0.9, 0.95), peak learning rate {s['lr']:g}"
    if s["optimiser"] == "muon":
        muon = (
            f"Muon (momentum 0.95), peak learning rate {s['muon_lr']:g}, weight decay {s['weight_decay']:g}"
        )
        optimiser = f"{muon}, for attention and experts; {adamw}, no decay, for embedding, router and norms"
    else:
        optimiser = f"{adamw}, weight decay {s['weight_decay']:g} on attention and experts"
    return f"""### Stage {number}

{start.capitalize()}, seed {s["seed"]}: {s["steps"]:,} steps of {s["batch_tokens"]:,} tokens in windows of {s["window"]}; {precision}.
{optimiser}. {s["warmup"]} warm-up steps, then constant, then linear to zero over the last {s["decay"]:.0%} of the steps;
gradients clipped at {s["clip"]:g}. Balancing loss with coefficient {s["balance"]:g}; z-loss {s["z"]:g}.

    {stage["command"]}

{table_of_curve(stage["curve"])}"""


def model_card(record: dict[str, Any], config: OlmoeConfig) -> str:
    """The model card; every figure in it is read from the run's record or from the configuration."""
    s, evaluation, in_text = record["settings"], record["evaluation"], record["train_tokens_in_text"]
    stages = [*record["earlier_stages"], {k: record[k] for k in ("command", "settings", "seconds", "curve")}]
    tokens = sum(stage["settings"]["steps"] * stage["settings"]["batch_tokens"] for stage in stages)
    minutes = sum(stage["seconds"] for stage in stages) / 60
    described = "\n\n".join(describe_stage(i, stage) for i, stage in enumerate(stages, 1))
    tokenizer = "taken from the earlier checkpoint" if record["tokenizer"] == "given" else record["tokenizer"]
    ours = evaluation["this model"].values()
    dead = max(sum(found["dead_experts"]) for found in ours)
    least, most = min(min(f["load_min"]) for f in ours), max(max(f["load_max"]) for f in ours)
    alive = (
        "No expert is dead on any text below"
        if dead == 0
        else f"Up to {dead} experts are dead on a text below"
    )
    alive += f": their shares of the load are {least:.2f} to {most:.2f} times the uniform share."
    quotes = "\n".join(
        f"- **{prompt}**{' '.join(text.split(chr(10)))}" for prompt, text in record["samples"].items()
    )
    others = [name for name in evaluation if name != "this model"]
    beside = f" Measured beside it by the same code: {', '.join(others)}." if others else ""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [olmoe, mixture-of-experts]
---

# olmoe-nano

A small, real `OlmoeForCausalLM`: {config.num_hidden_layers} layers, hidden {config.hidden_size},
{config.num_attention_heads} heads, {config.num_experts} experts of width {config.intermediate_size}, top-{config.num_experts_per_tok},
`norm_topk_prob` false, tied embeddings, byte-level BPE with {config.vocab_size:,} tokens, context
{config.max_position_embeddings} (trained at {s["window"]}), {record["parameters"] / 1e6:.1f} M parameters, stored in bfloat16.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```

## What it is for

Trying, testing and demonstrating routing on a laptop, without a download: it has the structure of OLMoE-1B-7B with
{config.num_experts} experts and top-{config.num_experts_per_tok}, and routing changes its perplexity in measurable ways.
{alive}

It is not for use as a language model. It writes grammatical fragments in the manner of old novels, knows nothing
reliable, has seen no modern text and no dialogue format, and has had no safety training; old books carry the prejudices
of their time. Figures measured on it say how a method behaves on *this* model; they do not carry over to large ones.

## How it was trained

- Text: English prose, public-domain books (Project Gutenberg, headers and footers mostly removed), {in_text / 1e6:.1f} M tokens.
  The validation books are by authors who are not in it.
- Tokenizer: byte-level BPE, {tokenizer}.
- Tokens seen: {tokens / 1e6:.1f} M ({tokens / in_text:.2f} epochs), in {minutes:.0f} minutes on one CPU core.
- Router: a load-balancing loss *for each layer*, averaged (E * sum of load share * mean probability, which is 1 when
  uniform), and a z-loss. transformers' own auxiliary loss pools all layers before it balances, so that one layer may let
  experts die.

{described}

The validation loss is that of the first {s["valid_tokens"]:,} tokens of the validation text. `training.json` beside this file
has all settings, the whole curve and every expert's load.

## Perplexity

Per token, windows of {s["window"]}, float32 arithmetic on the stored weights.{beside}
Settings were chosen on the first half of the validation text, which contains its first tokens; the second half and the
other texts had no part in them.

{table_of_perplexities(evaluation)}

## Load

Smallest and largest share of the top-{config.num_experts_per_tok} load that any expert gets, as a multiple of the uniform share 1/{config.num_experts}.

{table_of_load(evaluation["this model"])}

"Below 1/3" counts the experts, of all layers, with less than a third of the uniform share. Training balances them on the
training text; a text of another kind needs some of them less.

## What it writes

Greedily, 40 tokens after each prompt:

{quotes}

## Beside the weights

- `calibration.safetensors`: the null distributions of its routers, for `bh-routing` (289,000 tokens, equal parts of other books).
- `vllm-lm-head.safetensors`, `model.safetensors.index.json`: for vLLM, whose OLMoE does not tie embeddings and reads every weight file of a
  folder without an index (`scripts/nano_vllm_files.py` writes them). transformers looks at neither.

## Licence

The training text is in the public domain (Project Gutenberg). The weights are part of this package and under its licence.
"""
