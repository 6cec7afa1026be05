"""The model card of olmoe-nano: every number is read from the run's record (``training.json``) or from the model's
configuration, and the sources from the README of the texts."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from transformers import OlmoeConfig

OURS, FIGURE = "this model", "experts-by-domain.png"


def relative_use(
    by_domain: dict[str, dict[str, Any]], window: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Domains; each expert's share of the top-k slots as a multiple of uniform, for the domains pooled (``[L, E]``) and
    for each domain (``[domains, L, E]``)."""
    slots = np.array([found[str(window)]["slots"] for found in by_domain.values()], dtype=float)
    pooled = slots.sum(axis=0)
    return (
        list(by_domain),
        pooled / pooled.mean(axis=-1, keepdims=True),
        slots / slots.mean(axis=-1, keepdims=True),
    )


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of_bits(evaluation: dict[str, Any], split: str) -> str:
    """Bits per byte of each domain by model and window; the change is against each other model at its window."""
    ours = evaluation[OURS][split]
    others = {name: found[split] for name, found in evaluation.items() if name != OURS and split in found}
    windows = list(next(iter(ours.values())))
    head = ["domain", *(f"{OURS}, windows of {w}" for w in windows)]
    for name, by_domain in others.items():
        head += [f"{name}, windows of {next(iter(next(iter(by_domain.values()))))}", "change"]
    rows = []
    for domain, by_window in ours.items():
        row = [domain, *(f"{by_window[w]['bits_per_byte']:.3f}" for w in windows)]
        for by_domain in others.values():
            ((window, found),) = by_domain[domain].items()
            change = by_window[window]["bits_per_byte"] / found["bits_per_byte"] - 1
            row += [f"{found['bits_per_byte']:.3f}", f"{100 * change:+.1f} %"]
        rows.append(row)
    return markdown_table(head, rows)


def table_of_use(pooled_LE: np.ndarray) -> str:
    rows = [
        [str(layer), f"{use_E.min():.2f}", f"{use_E.max():.2f}", str(int(((use_E < 1 / 3) | (use_E > 3)).sum())), str(int((use_E == 0).sum()))]
        for layer, use_E in enumerate(pooled_LE)
    ]  # fmt: skip
    return markdown_table(["layer", "least used", "most used", "outside 1/3 to 3", "unused"], rows)


def table_of_curve(curve: list[dict[str, Any]], rows: int = 12) -> str:
    measured = [point for point in curve if "valid" in point]
    keep = (
        sorted({round(i * (len(measured) - 1) / max(rows - 1, 1)) for i in range(rows)}) if measured else []
    )
    domains = list(measured[0]["valid"]) if measured else []
    lines = [
        [
            f"{p['step']:,}",
            f"{p['tokens'] / 1e6:.1f} M",
            f"{p['lr_factor']:.2g}",
            f"{p['loss']:.3f}",
            *(f"{p['valid'][domain]:.2f}" for domain in domains),
            f"{p['load_min']:.2f} to {p['load_max']:.2f}",
        ]
        for p in (measured[i] for i in keep)
    ]
    head = ["step", "tokens", "learning rate", "training loss", *domains, "load, least to most"]
    return markdown_table(head, lines)


def table_of_sources(readme: str) -> str:
    """From the README of the texts, whose section "Sources" has a table (source, licence, train, ...) per domain: the
    sources by domain and licence."""
    by_group: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    domain = ""
    for line in readme.partition("\n## Sources")[2].splitlines():
        if line.startswith("### "):
            domain = line[4:].strip()
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0] == "source" or set(cells[0]) <= {"-"}:
            continue
        source = re.sub(r"^existing \S+ \((.*)\)$", r"\1", cells[0])
        trained, held_out = by_group.setdefault((domain, cells[1]), ([], []))
        column = trained if cells[2] else held_out
        if source not in column:
            column.append(source)
    rows = [
        [domain, licence, ", ".join(trained), ", ".join(held_out)]
        for (domain, licence), (trained, held_out) in by_group.items()
    ]
    return markdown_table(["domain", "licence", "trained on", "measured or calibrated on only"], rows)


def describe_stage(number: int, stage: dict[str, Any]) -> str:
    s, first, decay = stage["settings"], stage["first"], stage["decay"]
    windows = sum(s["mixture"].values())
    start = f"From the model after step {first:,}" if first else f"From scratch, seed {s['seed']}"
    arithmetic = "bfloat16 matmuls on float32 weights" if s["bf16"] else "float32"
    fall = f", then linear to zero over the last {decay[1]:,} steps" if decay else ""
    return f"""### Stage {number}

{start}, to step {stage["done"]:,}: {windows} windows of {s["window"]} tokens a step; {arithmetic}.
Muon (momentum 0.95), learning rate {s["muon_lr"]:g}, weight decay {s["weight_decay"]:g}, for attention and experts; AdamW (0.9, 0.95),
learning rate {s["lr"]:g}, no decay, for embedding, router and norms. {s["warmup"]} warm-up steps, then constant{fall};
gradients clipped at {s["clip"]:g}. Balancing loss with coefficient {s["balance"]:g}; z-loss {s["z"]:g}.

{table_of_curve(stage["curve"])}"""


def model_card(record: dict[str, Any], config: OlmoeConfig, sources: str) -> str:
    """The model card; every number in it is read from the run's record or from the configuration."""
    stages, evaluation, in_text = record["stages"], record["evaluation"], record["tokens_in_text"]
    context = config.max_position_embeddings
    seen = dict.fromkeys(in_text, 0)
    for stage in stages:
        s = stage["settings"]
        for domain, windows in s["mixture"].items():
            seen[domain] += (stage["done"] - stage["first"]) * windows * s["window"]
    total, hours = sum(seen.values()), sum(stage["seconds"] for stage in stages) / 3600
    mixture = markdown_table(
        ["domain", "tokens in the text", "tokens seen", "share", "times over"],
        [
            [domain, f"{in_text[domain] / 1e6:.1f} M", f"{n / 1e6:.1f} M", f"{n / total:.0%}", f"{n / in_text[domain]:.1f}"]
            for domain, n in seen.items()
        ],
    )  # fmt: skip
    described = "\n\n".join(describe_stage(i, stage) for i, stage in enumerate(stages, 1))
    _, pooled_LE, _ = relative_use(evaluation[OURS]["valid"], context)
    quotes = "\n\n".join(f"```text\n{prompt}\n=>{text}\n```" for prompt, text in record["samples"].items())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [olmoe, mixture-of-experts]
---

# olmoe-nano

A small, real `OlmoeForCausalLM`: {config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads, {config.num_experts} experts of width {config.intermediate_size},
top-{config.num_experts_per_tok}, `norm_topk_prob` false, byte-level BPE with {config.vocab_size:,} tokens, context {context}, {record["parameters"] / 1e6:.1f} M
parameters, stored in bfloat16 ({record["parameters"] / 1e6 + config.vocab_size * config.hidden_size / 1e6:.1f} M numbers: the output layer, equal to the embedding, is a tensor of its own, as other engines want it).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```

## What it is for

Trying, testing and demonstrating routing on a laptop, without a download: it has the structure of OLMoE-1B-7B, was
trained on six kinds of English text, and its experts differ in which of them they serve.

It is not for use as a language model. It writes fragments in the manner of its texts, knows nothing reliable, its code
does not run, and it has had no safety training; old books carry the prejudices of their time. Measurements on it say
how a method behaves on *this* model; they do not carry over to large ones.

## How it was trained

{total / 1e6:.1f} M tokens in {hours:.1f} hours on one or two CPU cores. Documents are packed one after the other with end-of-text between them; each
step has a fixed number of windows of each domain:

{mixture}

- Tokenizer: byte-level BPE, trained on training text in the proportions of the first stage.
- Router: a load-balancing loss *for each layer*, averaged (E * sum of load share * mean probability, which is 1 when
  uniform), and a z-loss. transformers' own auxiliary loss pools all layers before it balances, so that one layer may let
  experts die.

{described}

The columns named after domains are bits per byte on the first {stages[-1]["settings"]["valid_tokens"]:,} tokens of their validation texts. `training.json`
beside this file has all settings, the whole curve and every expert's load.

## Bits per byte

Test texts, float32 arithmetic on the stored weights. Settings were chosen on the validation texts; the test texts had
no part in them, and their sources (books, repositories, articles) are in no other part. Wikipedia articles that WikiText-2's valid and test texts hold
are in none at all, so that WikiText-2 is foreign text.

{table_of_bits(evaluation, "test")}

Validation texts:

{table_of_bits(evaluation, "valid")}

## Experts

Each expert's share of the top-{config.num_experts_per_tok} slots on the six validation texts pooled, as a multiple of the uniform share 1/{config.num_experts}:

{table_of_use(pooled_LE)}

Training balances the experts on the mixture; one kind of text needs some of them more than others:

![Use of each expert by domain]({FIGURE})

## What it writes

Greedily, 40 tokens after each prompt:

{quotes}

## Beside the weights

- `calibration.safetensors`, for `bh-routing`: the null distributions of its routers, what stands in for dropped experts, and the sizes that
  follow the token, from equal parts of the six calibration texts (the command is in docs/calibration.md); and a certificate, what each level
  loses at most against the model itself, on held-out documents of the six test texts (docs/certificate.md).
- `model.safetensors.index.json`: for vLLM, which reads every weight file of a folder without an index, the calibration too.

## Sources and licences

The weights are part of this package and under its licence. They were trained on these texts, whose licences oblige
whoever passes the *text* on:

{sources}
"""
