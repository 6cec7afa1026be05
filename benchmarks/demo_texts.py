"""The demo's figures on the bundled text, beside those on held-out text of the same six kinds.

    python benchmarks/demo_texts.py --data DIR [--write docs/demo.md]

DIR holds mixed/, whose test files no part of training or calibration saw; the first 512 tokens of 16 documents of each,
spread evenly over the file. BH at half of the model's own number of experts beside top-k at that number.
"""

from __future__ import annotations

import torch
from pages import arguments, domain_file, markdown_table, publish

from bh_routing import BHRoutingIntegration, Calibration, RoutingIntegration, TopKPolicy
from bh_routing.cli.demo_parts import WINDOW, cut_pieces
from bh_routing.data import sample_documents
from bh_routing.evaluation import Measured, compare
from bh_routing.models import bundled_calibration
from bh_routing.models.loading import load_model
from bh_routing.text import evenly

DOCUMENTS = 16


def main() -> None:
    parser = arguments(__doc__, threads=False, data=True)
    args = parser.parse_args()
    model, tokenizer = load_model("olmoe-nano", device="cpu")
    k = model.config.num_experts_per_tok // 2
    calibration = Calibration.load(bundled_calibration())

    def measured(texts: list[str], first: bool) -> tuple[Measured, Measured]:
        pieces = cut_pieces(tokenizer, {"": texts}, False)
        if first:
            pieces = [
                p
                for p, before in zip(pieces, [None, *pieces], strict=False)
                if before is None or p.unit != before.unit
            ]
        routings = {
            "own": None,
            "bh": BHRoutingIntegration(model, calibration=calibration, experts_per_token=float(k)),
            "top": RoutingIntegration(model, TopKPolicy(k)),
        }
        _, bh, top = compare(model, [p.window_1S for p in pieces], routings, units=[p.unit for p in pieces])
        return bh, top

    rows = []
    for domain, texts in sample_documents().items():
        held_out = list(domain_file(args.data, domain, "test"))
        row = [domain]
        for bh, top in (measured(texts, False), measured(list(evenly(held_out, DOCUMENTS)), True)):
            less = bh.kl(top)
            interval = f" [{-1e3 * less.high:.1f}, {-1e3 * less.low:.1f}]" if less.known else ""
            row += [
                f"{bh.mean_experts:.2f}",
                f"{bh.agreement().value:.1%} / {top.agreement().value:.1%}",
                f"{1e3 * bh.kl().value:.1f} / {1e3 * top.kl().value:.1f}",
                f"{-1e3 * less.value:.1f}{interval}",
            ]
        rows.append(row)
        print(row, flush=True)
    said = ("experts of BH", "agrees, BH / top-k", "KL, BH / top-k", "KL less by")
    header = ("text", *said, *(f"{name} " for name in said))
    note = (
        f"A budget of {k} experts beside top-{k}; KL in thousandths of a nat; paired 95 % intervals. First four columns: the bundled text, by "
        f"windows (its documents of one kind are fewer than ten). Last four: {DOCUMENTS} documents of the test file of the same kind, at most "
        f"{WINDOW} tokens of each."
    )
    publish(args.write, "demo-texts", f"{markdown_table(header, rows)}\n\n{note}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
