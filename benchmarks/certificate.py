"""The certificate of the calibration; whether certificates hold, and how much they give away: drawn from a pool of
documents whose mean loss is known.

    python benchmarks/certificate.py --data DIR [--losses LOSSES.json] -o benchmarks/results/certificate.json [--write docs/certificate.md]

Every document of DIR's mixed test files is read once by the full model and at each level (LOSSES keeps what it lost, so that
the study can be repeated without the model). Then, 500 times: n documents are drawn from the pool with replacement, and levels are
certified on them. The truth is the pool's own mean, documents counted equally, clipped as they are. What is counted: how
often the level that was certified really loses more than the target (at most 5 % of the draws, if the bounds are right),
and how many experts it keeps more than the level that somebody who knew the pool would take. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from pages import DOMAINS, arguments, domain_file, markdown_table, publish

from bh_routing._words import Bound
from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.certificate import CLIP, Certificate
from bh_routing.calibration.certify import fixed_sequence, simultaneous
from bh_routing.calibration.checkpoint import Checkpoint
from bh_routing.evaluation.document_losses import Documents, losses_of, order_of, read_documents
from bh_routing.integration import BHRoutingIntegration
from bh_routing.models.loading import default_calibration, load_model
from bh_routing.stats.risk import p_value

DRAWS, DELTA = 500, 0.05
SIZES, TARGETS = (100, 500), (0.005, 0.01, 0.03)
BOUNDS: tuple[Bound, ...] = ("betting", "hoeffding-bentkus")


def read_pool(args: argparse.Namespace) -> dict[str, Any]:
    """What each document of the pool loses at each level: ``losses`` [M, N] in [0, 1], ``kinds`` [N], ``levels``, ``experts``."""
    path = args.calibration or default_calibration(args.model)
    calibration = Calibration.load(path)
    kinds, documents = [], []
    for domain in DOMAINS:
        for document in domain_file(args.data, domain, "test").with_named_sources():
            kinds.append(domain)
            documents.append(document)
    read = Documents.read(documents, calibration.seed)
    if len(read) != len(documents):
        raise SystemExit("the documents of a pool must differ, and name no sources")
    model, tokenizer = load_model(args.model, device="auto", dtype="auto")
    made = [BHRoutingIntegration(model, calibration=calibration, experts_per_token=k) for k in args.levels]
    sums = read_documents(
        model,
        tokenizer,
        read,
        calibration,
        made,
        window=args.document_tokens,
        document_tokens=args.document_tokens,
        batch_tokens=2048,
        checkpoint=Checkpoint(args.parts, "pool", 0, {"levels": args.levels}),
    )
    return {
        "losses": losses_of([sums], read, CLIP)["kl"].tolist(),
        "kinds": [kinds[unit] for unit in order_of(read, sums)],
        "levels": args.levels,
        "experts": (sums.experts_M / sums.tokens).tolist(),
        "document_tokens": args.document_tokens,
    }


def last_within(means_M: Any, target: float) -> int:
    """How many levels from the first on lose at most the target."""
    over = np.flatnonzero(np.asarray(means_M) > target)
    return int(over[0]) if len(over) else len(means_M)


def study(pool: dict[str, Any]) -> list[dict[str, Any]]:
    """Fixed-sequence certificates of every size, target and bound."""
    losses_MN, experts = pool["losses"], [8.0, *pool["experts"]]  # nothing certified: the model itself
    truth_M, rows = losses_MN.mean(1), []
    for num in SIZES:
        for target in TARGETS:
            best = last_within(truth_M, target / CLIP)
            for bound in BOUNDS:
                rng = np.random.default_rng(num)
                exceeded, kept = 0, []
                for _ in range(DRAWS):
                    drawn_MN = losses_MN[:, rng.integers(0, losses_MN.shape[1], num)]
                    tests = fixed_sequence(drawn_MN, target / CLIP, DELTA, bound)
                    passed = sum(p <= DELTA for p in tests)
                    exceeded += bool(passed) and bool(truth_M[passed - 1] > target / CLIP)
                    kept.append(experts[passed])
                rows.append(
                    {
                        "documents": num,
                        "max_kl": target,
                        "bound": bound,
                        "exceeded": exceeded / DRAWS,
                        "experts": float(np.mean(kept)),
                        "oracle": experts[best],
                        "nothing": float(np.mean([k == experts[0] for k in kept])),
                    }
                )
    return rows


def study_curve(pool: dict[str, Any]) -> list[dict[str, Any]]:
    """Simultaneous curves: how often any level's bound is below its truth, and how far above it the bounds lie."""
    losses_MN, rows = pool["losses"], []
    truth_M = losses_MN.mean(1)
    each = DELTA / len(losses_MN)
    for num in SIZES:
        for bound in BOUNDS:
            rng = np.random.default_rng(num + 1)
            missed, above = 0, []
            for draw in range(DRAWS):
                drawn_MN = losses_MN[:, rng.integers(0, losses_MN.shape[1], num)]
                # A bound is below the truth exactly where the truth itself is rejected.
                tests = zip(drawn_MN, truth_M, strict=True)
                missed += any(p_value(x, truth, delta=each, bound=bound) <= each for x, truth in tests)
                if draw % 10 == 0:
                    above.append(np.array(simultaneous(drawn_MN, DELTA, bound)) - truth_M)
            rows.append(
                {
                    "documents": num,
                    "bound": bound,
                    "missed": missed / DRAWS,
                    "above": (CLIP * np.mean(above, axis=0)).tolist(),
                }
            )
    return rows


def off_domain(pool: dict[str, Any], target: float) -> list[dict[str, Any]]:
    """Certified on the documents of one kind (all of them): what the certified level loses on each kind."""
    losses_MN, kinds = pool["losses"], np.array(pool["kinds"])
    names, rows = sorted(set(pool["kinds"])), []
    for name in names:
        tests = fixed_sequence(losses_MN[:, kinds == name], target / CLIP, DELTA)
        passed = sum(p <= DELTA for p in tests)
        on = {
            other: CLIP * float(losses_MN[passed - 1, kinds == other].mean()) if passed else 0.0
            for other in names
        }
        level = pool["levels"][passed - 1] if passed else 8
        rows.append(
            {"certified on": name, "documents": int((kinds == name).sum()), "experts": level, "loses": on}
        )
    return rows


def certified_levels(certificate: Certificate) -> str:
    """A table of a certificate's levels."""
    header = ["budget", "experts", "MB per token", "KL measured", "KL at most", "words changed", "at most"]
    rows = [
        [
            f"{kl.experts_per_token:g}",
            f"{kl.experts:.2f}",
            "" if kl.bytes_per_token is None else f"{kl.bytes_per_token / 1e6:.2f}",
            f"{kl.risk:.4f}",
            f"{kl.bound:.4f}",
            f"{words.risk:.1%}",
            f"{words.bound:.1%}",
        ]
        for kl, words in zip(certificate.kl, certificate.agreement, strict=True)
    ]
    return markdown_table(header, rows)


def main() -> None:
    parser = arguments(__doc__, threads=False, data=True, model="olmoe-nano")
    parser.add_argument("--calibration")
    parser.add_argument("--levels", nargs="+", type=float, default=[6.5, 6, 5.5, 5, 4.5, 4, 3.5, 3, 2.5, 2])
    parser.add_argument("--document-tokens", type=int, default=128)
    parser.add_argument("--losses", type=Path, help="read from there, or written there")
    parser.add_argument("--parts", help="a folder for an interrupted reading")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.losses is not None and args.losses.is_file():
        pool = json.loads(args.losses.read_text(encoding="utf-8"))
    else:
        pool = read_pool(args)
        if args.losses is not None:
            args.losses.write_text(json.dumps(pool) + "\n", encoding="utf-8")
    pool["losses"] = losses_MN = np.array(pool["losses"])
    calibration = Calibration.load(args.calibration or default_calibration(args.model))
    if calibration.certificate is not None:
        publish(args.write, "curve", certified_levels(calibration.certificate))
    found = {
        "documents": losses_MN.shape[1],
        "document_tokens": pool["document_tokens"],
        "levels": pool["levels"],
        "experts": pool["experts"],
        "mean": (CLIP * losses_MN.mean(1)).tolist(),
        "clipped": (losses_MN >= 1.0).mean(1).tolist(),
        "certified": study(pool),
        "curve": study_curve(pool),
        "off_domain": off_domain(pool, 0.01),
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    allowed = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
    print(f"\n{losses_MN.shape[1]} documents; allowed: {allowed:.1%} of {DRAWS} draws\n")
    columns = zip(*(found[name] for name in ("levels", "experts", "mean", "clipped")), strict=True)
    rows = [[f"{b:g}", f"{kept:.2f}", f"{mean:.4f}", f"{clipped:.1%}"] for b, kept, mean, clipped in columns]
    print(markdown_table(["budget", "experts", "mean KL", "clipped"], rows))
    rows = []
    for row in found["certified"]:
        figures = (row["experts"], row["oracle"], row["experts"] - row["oracle"])
        named = [str(row["documents"]), f"{row['max_kl']:g}", row["bound"], f"{row['exceeded']:.1%}"]
        rows.append([*named, *(f"{figure:.2f}" for figure in figures), f"{row['nothing']:.0%}"])
    header = ["documents", "max_kl", "bound", "exceeded", "certified experts", "oracle", "given away"]
    certified = markdown_table([*header, "nothing certified"], rows)
    rows = [
        [str(row["documents"]), row["bound"], f"{row['missed']:.1%}", f"{1000 * np.mean(row['above']):.2f}"]
        for row in found["curve"]
    ]
    header = ["documents", "bound", "curve missed", "mean excess of the bounds, millinats"]
    publish(args.write, "coverage", f"{certified}\n\n{markdown_table(header, rows)}")
    names = list(found["off_domain"][0]["loses"])
    rows = [
        [row["certified on"], str(row["documents"]), f"{row['experts']:g}"]
        + [f"{row['loses'][name]:.4f}" for name in names]
        for row in found["off_domain"]
    ]
    publish(args.write, "domains", markdown_table(["certified on", "documents", "experts", *names], rows))


if __name__ == "__main__":
    main()
