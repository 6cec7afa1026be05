"""Write the table of model families from results of the conformance suite.

    python scripts/families_table.py build/families-*.json

reads what ``pytest tests/conformance --families-record FILE`` wrote, one file per transformers version, puts it
into src/bh_routing/models/families.json (other versions in there stay) and renders docs/families.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from bh_routing.models.families import COLUMNS, RECORD, cells, record, version_key
from bh_routing.patching.discovery import REFUSED

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- begin families: make conformance -->", "<!-- end families -->"

CHECKS = {
    "contract": "score function, normalisation and selection are those of the family's source; every router is called",
    "keep_all": "keeping the model's own choice is the unpatched model, bit for bit",
    "drop": "dropped slots that are skipped equal slots of weight 0, and a reference made with plain hooks",
    "native_top_k": "k experts per token are what the model computes when its configuration says k",
    "widening_refused_or_done": "more experts than the model's own: done, or refused in a sentence",
    "generate": "greedy generation with a cache",
    "restore": "modules, attributes, hooks, flags, configurations, weights and outputs after unpatching",
    "calibration_and_budget": "calibrate, then meet a budget of experts per token",
    "nan_filled_memory": "fresh memory is NaN: nothing uninitialised reaches the output",
    "grouped_products": "the arithmetic of GPUs, run on the CPU, on memory full of NaN",
    "router_calls": "every router decides once per forward",
}


# A family has a class of experts, or records router logits of one of its classes.
EXPERTS = re.compile(r"^@use_experts_implementation|^class \w*Experts\(", re.MULTILINE)
RECORDER = re.compile(r"[\"']router_logits[\"']: *\[?\s*OutputRecorder\((\w+)")


def scan(root: Path | None = None) -> dict[str, str]:
    """{family: router class, "-" where none is recorded} of every Mixture-of-Experts family in transformers' sources.

    Found by structure, without importing any model; ``root`` is transformers' folder of models (default: the
    installed one).
    """
    if root is None:
        spec = importlib.util.find_spec("transformers")
        assert spec is not None, "transformers is not installed"
        assert spec.origin is not None
        root = Path(spec.origin).parent / "models"
    found: dict[str, str] = {}
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        recorded = RECORDER.search(text)
        if EXPERTS.search(text) or recorded:
            found.setdefault(path.parent.name, recorded.group(1) if recorded else "-")
    return found


def summary(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """One family's record from its results."""
    checks, skipped = found["checks"], found["skipped"]
    if set(checks) & {"refused", "contract_of_older_version"}:
        reason = REFUSED.get(name, REFUSED.get(name.replace("_", "-"), "its experts route by themselves"))
        ok = all(outcome == "passed" for outcome in checks.values())
        status = "refused" if ok else "failed"
        router = found.get("router", "-")
        return {
            "router": router,
            "shrink": "no",
            "widen": "no",
            "skip": "no",
            "status": status,
            "note": reason,
        }
    bad = sorted(label for label, outcome in checks.items() if outcome not in ("passed", "skipped"))
    counts = Counter(checks.values())
    keys = ("router", "scoring", "weights", "widen", "skip")
    return {
        **{key: found.get(key, "-") for key in keys},
        "shrink": "yes" if not bad else "-",
        "status": "failed" if bad else "tested",
        "passed": counts["passed"],
        "skipped": sorted({f"{label}: {why}" for label, why in skipped.items()}),
        "note": f"fails: {', '.join(bad)}" if bad else "",
    }


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def render(recorded: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The generated part of the page."""
    versions = sorted(recorded, key=version_key)
    newest = recorded[versions[-1]]
    names = {name: found for version in versions for name, found in recorded[version].items()}
    lines = []
    for version in versions:
        counts = Counter(found["status"] for found in recorded[version].values())
        cases = sum(found.get("passed", 0) for found in recorded[version].values())
        lines.append(
            f"- transformers {version}: {len(recorded[version])} families; {counts['tested']} pass every check "
            f"({cases} cases), {counts['refused']} are refused, {counts['failed']} fail."
        )
    lines.append("")
    body = []
    for name, found in sorted(names.items()):
        family, router, *others, _ = cells(name, found)
        states = [recorded[version].get(name, {}).get("status", "-") for version in versions]
        body.append([f"`{family}`", f"`{router}`" if router != "-" else "-", *others, *states])
    header = [*COLUMNS[:-1], *versions]
    lines += table(header, body)
    lines += [
        "",
        "\\* Something beside that score takes part in the selection (a bias, groups, a factor per expert).",
        "",
        "Refused (or failing), and why:",
        "",
    ]
    for name in sorted(names):
        notes = {v: recorded[v][name]["note"] for v in versions if recorded[v].get(name, {}).get("note")}
        for note in dict.fromkeys(notes.values()):
            where = [v for v in versions if notes.get(v) == note]
            suffix = "" if len(where) == len(versions) else f" (transformers {', '.join(where)})"
            lines.append(f"- `{name}`{suffix}: {note}.")
    lines += ["", f"Checks that do not apply (transformers {versions[-1]}):", ""]
    reasons: dict[str, list[str]] = {}
    for name, found in sorted(newest.items()):
        for entry in found.get("skipped", []):
            label, _, why = entry.partition(": ")
            reasons.setdefault(f"{label.split(' (')[0].replace('_', ' ')}: {why}", []).append(f"`{name}`")
    for reason, where in sorted(reasons.items()):
        lines.append(f"- {reason}: {', '.join(dict.fromkeys(where))}.")
    lines += ["", "The checks:", ""]
    lines += table(["check", "what is shown"], [[k.replace("_", " "), v] for k, v in CHECKS.items()])
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="FILE")
    args = parser.parse_args()
    recorded = record()
    for path in args.results:
        result = json.loads(path.read_text(encoding="utf-8"))
        if len(result["families"]) < 50:
            raise SystemExit(f"{path} holds {len(result['families'])} families only: run the whole suite.")
        recorded[result["transformers"]] = {
            name: summary(name, found) for name, found in sorted(result["families"].items())
        }
    recorded = dict(sorted(recorded.items(), key=lambda item: version_key(item[0])))
    RECORD.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{render(recorded)}\n{END}{after}", encoding="utf-8")
    print(f"{RECORD.relative_to(ROOT)} and {PAGE.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
