"""What the demo shows and how it is measured: the texts, the routings that are compared, and the parts of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._words import Mode

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration.calibration import Calibration
    from ..evaluation import Measured
    from ..evaluation.layer_speed import LayerTime
    from ..integration import RoutingIntegration

BUDGETS = (6.0, 4.0, 3.0, 2.0)
ALPHAS = (0.6, 0.4, 0.2)
CUTS = (6, 4, 3, 2)  # of the model's own top-k, beside uncalibrated levels
USUAL_ALPHA = 0.05  # the level of the original design, routed by and only watched
USUAL: dict[str, Mode] = {f"alpha={USUAL_ALPHA:g}": "patch", f"alpha={USUAL_ALPHA:g}, analyze": "analyze"}
WINDOW = 512  # tokens
BATCH = 16  # sequences that are decoded together, in the time of a layer
STRIP = 160  # tokens of each kind of text that are shown one by one, at most
# Of the kinds of text that the embedded model was trained on, such that what it says does not go in circles.
PROMPTS = (
    "The old man walked to the",
    "To install the package, run",
    "def read_file(path):\n    ",
    "User: Can you find me a restaurant?\nAssistant:",
)
LOSSES = (0.01, 0.02, 0.05)  # nats per token: the least that is certified is said


# -------------------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times of a real-sized layer, one token at a time and for a batch, and the size that it had."""

    experts: int
    megabytes_each: float
    rows: list[LayerTime]
    batch: list[LayerTime]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured on the text: budgets (or levels) and cut top-k; the two rows of the original design; the row
    that is nearest to half of the experts, and what it comes to."""

    source: str
    tokens: int
    units: int
    measured: list[Measured]
    usual: list[Measured]
    half: Measured
    verdict: str
    certified: str | None

    def pairs(self) -> list[tuple[Measured, Measured]]:
        """Every budget beside the model's own top-k at the same number."""
        rows = {row.label: row for row in self.measured}
        named = {row.label: f"top-{row.label[4:].removesuffix(' experts')}" for row in self.measured}
        return [(rows[a], rows[b]) for a, b in named.items() if a.endswith(" experts") and b in rows]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The first tokens of one kind of text with their experts (mean over layers), and each layer's mean over more."""

    domain: str
    tokens: list[str]
    experts: list[float]
    layers: list[float]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A prompt and its continuations, by the label of the routing."""

    prompt: str
    texts: dict[str, str]


# ------------------------------------------------------------------------------------------------------ the inputs


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A window of tokens, of which document and which kind of text."""

    domain: str
    unit: int
    window_1S: Tensor


def read_documents(path: str | None, *, quick: bool) -> tuple[str, Mapping[str, Sequence[str]]]:
    """What to call the text, and its documents by kind."""
    from ..data import sample_documents
    from ..text import TextFile

    if path is not None:
        return path, {Path(path).name: list(TextFile(path))}
    documents = sample_documents()
    return "the bundled text", {domain: texts[: 2 if quick else None] for domain, texts in documents.items()}


def cut_pieces(tokenizer: Any, documents: Mapping[str, Sequence[str]], quick: bool) -> list[Piece]:
    """Windows; where documents are too few to draw from, each window counts as one."""
    from ..errors import InvalidInputError
    from ..evaluation.paired import FEWEST
    from ..text import evenly, iter_windows

    few = sum(map(len, documents.values())) < FEWEST
    pieces: list[Piece] = []
    unit = 0
    for domain, texts in documents.items():
        for text in texts:
            windows = [w for w in iter_windows(tokenizer, [text], WINDOW) if len(w) > 1]
            for window in windows[:1] if quick and not few else windows:
                pieces.append(Piece(domain=domain, unit=unit, window_1S=window[None]))
                unit += few
            unit += not few
    if not pieces:
        raise InvalidInputError("expected a text of at least two tokens, got fewer.")
    return list(evenly(pieces, max(3, len(pieces) // 10))) if quick and few else pieces


def make_routings(
    model: Any,
    calibration: Calibration | None,
    alphas: list[float] | None,
    budgets: list[float] | None,
    *,
    quick: bool = False,
    **settings: Any,
) -> dict[str, RoutingIntegration | None]:
    """The rows: the model itself, BH at every level or budget, the cut top-k at the same number, the usual level.

    ``settings``: more of them, for every BH row.
    """
    from ..integration import BHRoutingIntegration, RoutingIntegration
    from ..patching import make_plan
    from ..policies import TopKPolicy

    top_k = min(context.top_k for context in make_plan(model).contexts)
    rows: dict[str, RoutingIntegration | None] = {f"own top-{top_k}": None}

    def cut(k: float) -> None:
        if k == int(k) and 1 <= k < top_k:
            rows[f"top-{k:g}"] = RoutingIntegration(model, TopKPolicy(int(k)))

    if budgets is None and alphas is None and calibration is not None:
        budgets = [b for b in BUDGETS if b < top_k]
    if budgets is not None:
        for budget in budgets[1:3] if quick and len(budgets) > 2 else budgets:
            rows[f"BH, {budget:g} experts"] = BHRoutingIntegration(
                model, experts_per_token=budget, calibration=calibration, **settings
            )
            cut(budget)
    else:
        alphas = list(ALPHAS) if alphas is None else alphas
        for alpha in alphas[1:3] if quick and len(alphas) > 2 else alphas:
            rows[f"BH, alpha {alpha:g}"] = BHRoutingIntegration(
                model, alpha=alpha, calibration=calibration, **settings
            )
        for k in CUTS[1:3] if quick else CUTS:
            cut(k)
    for label, mode in USUAL.items():
        rows[label] = BHRoutingIntegration(
            model, alpha=USUAL_ALPHA, calibration=calibration, mode=mode, **settings
        )
    return rows


# ------------------------------------------------------------------------------------------------------- measuring


def measure_speed(*, quick: bool = False) -> Speed:
    """A layer of OLMoE-1B-7B's shape; of fewer experts where memory is short, and for a quick look."""
    from ..evaluation import layer_speed

    experts = layer_speed.FEWER_EXPERTS if quick else layer_speed.experts_that_fit()
    layer = layer_speed.make_layer(experts)
    each = 3 * layer_speed.HIDDEN * layer_speed.INTERMEDIATE * layer.gate.weight.element_size()
    seconds = 1.0 if quick else 6.0
    return Speed(
        experts=experts,
        megabytes_each=each / 1e6,
        rows=layer_speed.measure_layer(layer, seconds=seconds),
        batch=layer_speed.measure_layer(layer, (4.0,), tokens=BATCH, share_loaded=0.5, seconds=seconds),
    )


def nearest_to_half(measured: Sequence[Measured]) -> Measured:
    """The BH row whose number of experts is nearest to half of the model's own."""
    rows = [row for row in measured if row.label.startswith("BH, ")]
    return min(rows, key=lambda row: abs(row.mean_experts - measured[0].mean_experts / 2))


def verdict(measured: Sequence[Measured], half: Measured, speed: Speed | None) -> str:
    """One sentence of measured numbers."""
    own = measured[0].mean_experts
    share = half.mean_experts / own
    what = "half the experts" if abs(share - 0.5) < 0.03 else f"{half.mean_experts:.1f} of {own:g} experts"
    said = f"{what}, same next word as the full model in {half.agreement().value:.1%}"
    cuts = [row for row in measured if row.label.startswith("top-")]
    cut = min(cuts, key=lambda row: abs(row.mean_experts - half.mean_experts), default=None)
    if cut is not None:
        said += f" ({cut.label}: {cut.agreement().value:.1%})"
    timed = (
        []
        if speed is None
        else [row for row in speed.rows if abs(row.experts / speed.rows[0].experts - share) < 0.1]
    )
    if timed:
        said += f", a real-sized MoE layer in {timed[0].ratio:.2f} of the time"
        if abs(timed[0].experts - half.mean_experts) >= 0.25:
            said += f" at {timed[0].experts:.1f}"
    return f"{said[0].upper()}{said[1:]}."


def certified(calibration: Calibration | None) -> str | None:
    """What the calibration's certificate says, if it has one, of the first of `LOSSES` that is certified."""
    from ..errors import CertificateError

    held = None if calibration is None else calibration.certificate
    for loss in LOSSES if held is not None and held.kl else ():
        assert held is not None
        try:
            level = held.level(max_kl=loss)
        except CertificateError:
            continue
        return (
            f"at most {loss:g} nats from the model itself with {held.confidence:.0%} confidence: "
            f"{level.experts:.1f} experts (on text like the {held.documents:,} documents that were read for it)."
        )
    return None


def strips_of(
    model: Any, tokenizer: Any, integration: RoutingIntegration | None, pieces: Sequence[Piece]
) -> list[Strip]:
    """The experts of every token of the first window of each kind of text; means by layer over its first four windows."""
    import torch

    assert integration is not None
    counts: list[Tensor] = []
    strips = []

    def watch(router: Any, context: Any, decision: Any, logits_TE: Tensor) -> None:
        counts.append(decision.counts_T)

    integration.watchers.append(watch)
    try:
        with integration, torch.no_grad():
            for domain in dict.fromkeys(piece.domain for piece in pieces):
                held = []
                windows = [piece.window_1S for piece in pieces if piece.domain == domain][:4]
                for window_1S in windows:
                    counts.clear()
                    model(input_ids=window_1S.to(model.device), use_cache=False)
                    held.append(torch.stack([count_T.float().cpu() for count_T in counts]))
                shown = [tokenizer.decode([i]) for i in windows[0][0, :STRIP].tolist()]
                strips.append(
                    Strip(
                        domain=domain,
                        tokens=shown,
                        experts=held[0].mean(0)[:STRIP].tolist(),
                        layers=torch.cat(held, -1).mean(-1).tolist(),
                    )
                )
    finally:
        integration.watchers.remove(watch)
    return strips


def continued(
    model: Any, tokenizer: Any, prompt: str, integration: RoutingIntegration | None, max_new_tokens: int
) -> str:
    from contextlib import nullcontext

    from .generate import generate

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with integration or nullcontext():
        tokens = generate(model, tokenizer, inputs, max_new_tokens)
    return str(tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
