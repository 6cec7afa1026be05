"""Time an OLMoE-1B-7B-shaped model (random bfloat16 weights, 16 layers, 14 GB) with a mean of 4.0 experts.

    python benchmarks/whole_model.py [--layers 16] [--rounds N] [--write docs/performance.md]

Greedy decoding with a cache, and a prefill, by `bh_routing.evaluation.bench`: the stock model and ours take turns in one run. A
threshold per layer on the log score drives the counts; the realised mean is printed and must lie within 0.1 of 4.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from pages import arguments, markdown_table, publish
from transformers import OlmoeConfig, OlmoeForCausalLM

from bh_routing.evaluation.bench import measure, threshold_variants

BUDGET = 4.0


def free_gigabytes() -> float:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1e6
    return float("inf")


def make_model(layers: int) -> Any:
    """OLMoE-1B-7B's shape; router logits with a standard deviation of about 1.5."""
    config = OlmoeConfig(num_hidden_layers=layers, intermediate_size=1024)
    config.eos_token_id = None
    with torch.device("meta"):
        model = OlmoeForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name.endswith("gate.weight"):
                parameter.normal_(0.0, 1.5 * config.hidden_size**-0.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval()


def matched_variants(model: Any, ids: torch.Tensor, tokens: int, args: Any) -> dict[str, Any]:
    """Thresholds with which what is timed runs the budget: decoded tokens are others than those of the prompt."""
    budget = BUDGET
    for _ in range(4):
        (variant,) = threshold_variants(model, ids, [budget]).values()
        found = measure(
            model, {"": variant}, ids, [tokens], rounds=args.rounds if tokens == 1 else 1, steps=args.steps
        )
        experts = found[-1].experts
        if abs(experts - BUDGET) < 0.05:
            break
        budget += BUDGET - experts
    return {f"{BUDGET:g} experts": variant}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded per round (default 16)")
    parser.add_argument("--tokens", type=int, action="append", help="1 is decoding; default 1 and 256")
    args = parser.parse_args()
    needed = 0.9 * args.layers + 2.0
    if free_gigabytes() < needed:
        raise SystemExit(
            f"needs {needed:.0f} GB of free memory, got {free_gigabytes():.0f}; give --layers a smaller number."
        )
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = make_model(args.layers)
    tokens = args.tokens or [1, 256]
    ids = torch.randint(0, model.config.vocab_size, (1, max(256, *tokens)))
    results = []
    for count in tokens:
        variants = matched_variants(model, ids, count, args)
        results += measure(model, variants, ids, [count], rounds=args.rounds, steps=args.steps)
    stock = {r.tokens: r for r in results if r.variant == "stock"}
    rows = []
    for result in results:
        f = result.figures(stock[result.tokens])
        work = "greedy decode" if result.tokens == 1 else f"prefill, {result.tokens} tokens"
        rows.append(
            [
                f"{work}, {f['variant']}",
                f"{f['experts_per_token']:.2f}",
                f"{f['tokens_per_second']:.3g}",
                f"{f['forward_ratio']:.3f}",
                f"{f['layer_ms']:.3g}",
                f"{f['layer_ratio']:.3f}",
                f"{f['decision_share']:.1%}",
                f"{f['megabytes']:.0f}",
                f"{f['bytes_ratio']:.2f}",
                f"{f['operations_ratio']:.2f}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
        if result.variant != "stock":
            assert abs(result.experts - BUDGET) < 0.1, result.experts
    header = (
        "work", "experts per token", "tokens/s", "time ratio", "ms per MoE layer", "layer ratio",
        "decision and statistics", "MB per layer", "bytes ratio", "operations ratio",
    )  # fmt: skip
    text = (
        f"{markdown_table(header, rows)}\n\n{args.layers} layers, {args.rounds} rounds; "
        f"{describe_machine(args.threads)}."
    )
    publish(args.write, "whole-model", text)


if __name__ == "__main__":
    main()
