"""Prefill with all experts and decoding with few, against one budget of the same cost: KL of the answers.

    python benchmarks/phases.py --data DIR -o benchmarks/results/phases.json

Prompts and answers are equally long, so that 8 experts for the one and 3 for the other cost what 5.5 cost for both. The
full model answers prompts from the middle of documents of DIR's mixed test files, as many of each, greedily and by sampling;
each routing reads the same prompts, and its predictions along the full model's answers are compared with the full model's.
Prints a Markdown table.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pages import DOMAINS, arguments, domain_file, markdown_table

from bh_routing.calibration.calibration import Calibration
from bh_routing.evaluation.free_running import free_running
from bh_routing.integration import BHRoutingIntegration
from bh_routing.models.loading import default_calibration, load_model
from bh_routing.text import evenly

PHASES = {"prefill": {"experts_per_token": 8}, "decode": {"experts_per_token": 3}}
ROUTINGS = {
    "prefill 8, decode 3": {"phases": PHASES},
    "5.5 for both (the same cost)": {"experts_per_token": 5.5},
    "3 for both": {"experts_per_token": 3},
}


def main() -> None:
    parser = arguments(__doc__, threads=False, write=False, data=True, model="olmoe-nano")
    parser.add_argument("--prompts", type=int, default=4, help="of each of the six kinds of text (default 4)")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, and of an answer")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, device="auto", dtype="auto")
    calibration = Calibration.load(default_calibration(args.model))
    prompts = []
    for domain in DOMAINS:
        every = (
            tokenizer(text, verbose=False)["input_ids"] for text in domain_file(args.data, domain, "test")
        )
        long = [ids for ids in every if len(ids) >= 3 * args.tokens]
        prompts += [ids[len(ids) // 3 :][: 2 * args.tokens] for ids in evenly(long, args.prompts)]
    rows = torch.tensor(prompts)
    routings = [BHRoutingIntegration(model, calibration=calibration, **level) for level in ROUTINGS.values()]
    results = free_running(model, routings, rows[:, : args.tokens], rows[:, args.tokens :])
    found = dict(zip(ROUTINGS, results, strict=True))
    for routing, name in zip(routings, ROUTINGS, strict=True):
        told = routing.telemetry.to_dict()
        found[name]["experts"] = {
            "all": told["total"]["mean_experts"],
            **{phase: part["mean_experts"] for phase, part in told.get("phases", {}).items()},
        }
    args.output.write_text(
        json.dumps({"prompts": len(rows), "tokens": args.tokens, "routings": found}, indent=1) + "\n"
    )
    lines = []
    for name, told in found.items():
        greedy, sampled = told["greedy"], told["sampled"]
        cells = [f"{row['kl']:.4f} ± {2 * row['kl_error']:.4f}" for row in (greedy, sampled)]
        told_of_greedy = [f"{greedy['teacher_forced']:.4f}", f"{greedy['ratio']:.2f}"]
        lines.append([name, f"{told['experts']['all']:.2f}", *cells, *told_of_greedy])
    header = [
        "routing",
        "experts",
        "KL, greedy answers",
        "KL, sampled answers",
        "KL, the text itself",
        "ratio, greedy",
    ]
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()
