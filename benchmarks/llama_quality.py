"""What fewer experts cost in llama.cpp: KL to the model itself at equal numbers of experts, which is what time follows there.

    .venv-llama/bin/python scripts/to_gguf.py build/nano.gguf
    .venv-llama/bin/python benchmarks/llama_quality.py build/nano.gguf --data DIR [--write docs/llama_cpp.md]

Sixteen windows of 512 tokens, evenly over equal parts of DIR's mixed test files and over WikiText-2's test text. min-p on the router's scores
is what `-ser` of ik_llama.cpp does, without its floor; its p is solved on mixed valid text at each budget. `expert_used_count` is llama.cpp's own
top-k. The calibration is the one that comes with olmoe-nano.
"""

from __future__ import annotations

from typing import Any

import torch
from llama_cpp import Llama
from machine import describe_machine
from pages import WINDOW, arguments, markdown_table, named_text, publish

from bh_routing.engines.llama_cpp import route
from bh_routing.engines.llama_cpp.loading import load
from bh_routing.engines.llama_cpp.watching import Reader, Watch
from bh_routing.evaluation.baselines.tokenwise import MinPPolicy
from bh_routing.models import bundled_calibration

WINDOWS = 16
SOLVED_ON, TEXTS = "mixed-valid", ("mixed-test", "wikitext2-test")
PLAIN = {
    "n_ctx": WINDOW,
    "n_batch": WINDOW,
    "n_ubatch": WINDOW,
    "type_k": 0,
    "type_v": 0,
    "n_threads": 1,
    "n_threads_batch": 1,
}


def windows(llm: Any, text: str) -> list[torch.Tensor]:
    ids = llm.tokenize(text.encode(), add_bos=False)
    step = len(ids) // WINDOWS
    return [torch.tensor(ids[i * step : i * step + WINDOW]) for i in range(WINDOWS)]


def predictions(llm: Any, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    found = []
    for ids in texts:
        llm.reset()
        llm._ctx.kv_cache_clear()
        llm.eval(ids.tolist())
        found.append(torch.from_numpy(llm.scores[: len(ids)].copy()).log_softmax(-1))
    return found


def millinats(own: list[torch.Tensor], routed: list[torch.Tensor]) -> float:
    each = [(a.exp() * (a - b)).sum(-1).mean() for a, b in zip(own, routed, strict=True)]
    return 1e3 * float(torch.stack(each).mean())


class Counted(MinPPolicy):
    """min-p that counts."""

    kept = tokens = 0

    def decide(self, *call: Any) -> Any:
        decision = super().decide(*call)
        self.kept += int(decision.counts_T.sum())
        self.tokens += decision.counts_T.numel()
        return decision


def main() -> None:
    parser = arguments(__doc__, threads=False, data=True)
    parser.add_argument("model", help="olmoe-nano as a GGUF file")
    args = parser.parse_args()
    llm, hook, s, _ = load(Llama, args.model, dict(PLAIN))
    read = Reader(llm, hook)

    def by_min_p(p: float, texts: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        policy = Counted(p)
        found = [read(ids, Watch(s, policy=policy)).log_softmax(-1) for ids in texts]
        return policy.kept / policy.tokens, found

    solved_on = windows(llm, named_text(args.data, SOLVED_ON))[:6]
    texts = {name: windows(llm, named_text(args.data, name)) for name in TEXTS}
    own = {name: [read(ids).log_softmax(-1) for ids in held] for name, held in texts.items()}
    rows: dict[str, list[str]] = {}

    def tell(routing: str, text: str, experts: float, found: list[torch.Tensor]) -> None:
        cells = [f"{experts:.2f}", f"{millinats(own[text], found):.1f}"]
        print(text, routing, *cells, flush=True)
        rows.setdefault(routing, []).extend(cells)

    for budget in (4, 2):
        low, high = 0.01, 0.95
        for _ in range(9):
            p = (low + high) / 2
            low, high = (p, high) if by_min_p(p, solved_on)[0] > budget else (low, p)
        for name, held in texts.items():
            tell(f"min-p {p:.3f}", name, *by_min_p(p, held))
            given = PLAIN | {"verbose": False, "logits_all": True}
            top = Llama(model_path=args.model, kv_overrides={"olmoe.expert_used_count": budget}, **given)
            tell(f"`expert_used_count={budget}`", name, budget, predictions(top, held))
            for form in ("none", "mean", "linear"):
                ours = route(
                    Llama,
                    model_path=args.model,
                    calibration=bundled_calibration(),
                    experts_per_token=budget,
                    compensation=form,
                    **given,
                )
                found = predictions(ours, held)
                experts = ours.routing.get_routing_stats()["mean_experts_per_token"]
                tell(f"BH, budget {budget}, compensation {form}", name, experts, found)
    header = ["routing", "six domains, test: experts", "KL", "WikiText-2 test: experts", "KL"]
    table = markdown_table(header, [[routing, *cells] for routing, cells in rows.items()])
    note = f"{WINDOWS} windows of {WINDOW} tokens of each text; KL in millinats"
    publish(args.write, "llama-quality", f"{table}\n\n{note}; {describe_machine(1)}.")


if __name__ == "__main__":
    main()
