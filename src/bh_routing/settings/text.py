"""The settings that text can say: on the command line, in a YAML file, in a policy as text."""

from __future__ import annotations

from .._words import Option
from .levels import read_phases


def compensation(text: str) -> bool | float | str:
    """``true``, ``false``, a scale, a form, or both with a colon, as people type it."""
    words = {"true": True, "yes": True, "false": False, "no": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text)
    except ValueError:
        return text


def number_or_name(text: str) -> float | str:
    """A number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


# The fields that text can say, by the name that people type.
TEXT_OPTIONS: dict[str, Option] = {
    "alpha": Option("level, 0 < alpha < 1 (default 0.05)", float),
    "experts": Option(
        "a budget: mean number of experts per token (needs a calibration)", float, "experts_per_token"
    ),
    "max_kl": Option(
        "the loss that is accepted: KL to the model itself, nats per token (needs a certificate)", float
    ),
    "agreement": Option("or the share of next words that must stay the same (needs a certificate)", float),
    "phases": Option("two budgets, as in 8/3: while a prompt is read, and while it is answered", read_phases),
    "temperature": Option("divides the router logits (default 1)", float),
    "min_k": Option(
        "at least so many experts (default 1; 0 with a linear compensation and a small budget)", int
    ),
    "max_k": Option("at most so many experts (default: the model's own top-k)", int),
    "mode": Option("patch: BH routing decides; analyze: the model routes as always, BH is counted"),
    "weights": Option("model, preserve or sum: what kept experts weigh (default model)"),
    "procedure": Option("multiple-testing procedure (default bh)"),
    "pvalues": Option("robust, softmax or batch: without a calibration"),
    "clamp": Option("after or inside: when min_k and max_k bind"),
    "statistic": Option("contribution, logprob or logit"),
    "size": Option("sensitivity, deviation, output or token: of the contribution"),
    "null": Option("unselected, all or trimmed: what the null is made of"),
    "scope": Option("model or layer: what has a null of its own"),
    "estimator": Option("empirical, kde or normal"),
    "kernel": Option("of the kde"),
    "bandwidth": Option("of the kde: silverman or a number", number_or_name),
    "compensation": Option(
        "what stands in for dropped experts: none, mean or linear, a scale from 0 to 1, or both, as in linear:0.9",
        compensation,
    ),
    "skip": Option("auto, compact or zero: how dropped experts are kept out"),
    "backend": Option("auto, torch or triton: what computes decisions"),
    "loads": Option(
        "a budget: mean number of experts that a layer reads in a decoding step of several sequences (needs a calibration)",
        float,
        "distinct_experts",
    ),
    "price": Option(
        "the price of such a load, in squared units of the loss; 0 changes nothing", float, "price_load"
    ),
}
