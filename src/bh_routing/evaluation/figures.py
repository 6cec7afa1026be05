"""What a result says beside the names: quality, counts, costs and versions; and results as a table."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from typing import Any

import torch

from .._version import __version__
from ..decision.compensation import Cost
from ..integration import RoutingIntegration
from ..telemetry.figures import to_frame as to_frame
from .paired import BLOCK, block_sums
from .perplexity import perplexity_of
from .scoring import TextScores

_COUNTED = (
    "share_saved",
    "share_floor",
    "share_ceiling",
    "jaccard",
    "count_histogram",
    "steps",
    "mean_loads",
    "own_mean_loads",
    "bytes_saved",
    "shared_pairs",
)


def result_of(
    model: Any, integration: RoutingIntegration, scores: TextScores, words: float
) -> dict[str, Any]:
    """The figures of one policy on one text; the keys are in docs/experiments.md.

    Parameters
    ----------
    integration : RoutingIntegration
        Whose statistics are those of this text.
    words : float
        Of the text that was read, for the perplexity per word: the loss of all its tokens, spread over words.
    """
    losses = scores.losses_C.double()
    loss = float(losses.mean())
    counted = integration.telemetry.to_dict()
    total, layers, policy = counted["total"], counted["layers"], integration.policy
    return {
        "perplexity": perplexity_of(loss),
        "loss": loss,
        "word_perplexity": perplexity_of(loss * scores.num_tokens / max(words, 1.0)),
        "token_accuracy": float(scores.hits_C.double().mean()),
        "kl": None if scores.kl_C is None else float(scores.kl_C.double().mean()),
        "scored_tokens": losses.numel(),
        "block": BLOCK,
        "blocks": block_sums(losses.numpy()),
        "seconds": scores.seconds,
        "mean_experts_per_token": total["mean_experts"],
        "std_experts_per_token": total["std_experts"],
        **{name: total[name] for name in _COUNTED},
        "layers": layers,
        **costs(model, integration, layers),
        "alpha": getattr(integration, "alpha", getattr(policy, "alpha", None)),
        "settings": policy.describe()
        | {
            "compensation": bool(integration.compensations),
            "compensation_forms": sorted({one.form for one in integration.compensations.values()}),
        },
        "causal": policy.causal,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def costs(
    model: Any, integration: RoutingIntegration, layers: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """What a token costs, from the mean counts per layer; None where experts are not found.

    ``active_parameters``: everything but the experts that did not run. ``flops_per_token``: two for each of these that
    multiplies (the input embedding does not, unless it is the output layer too) and for what the compensation
    multiplies; attention scores and the routing are left out. ``arithmetic_per_token``: multiplications of experts and
    compensation, in experts of the same layer, a mean over layers as the number of experts is: kept experts plus
    the compensation's (a linear one of rank r: mainly r / (3 I) for each dropped pair). ``bytes_per_token``: of experts and compensation,
    read for one token alone, in all layers; the experts in the model's dtype, the compensation in its own.
    """
    names = ("active_parameters", "flops_per_token", "arithmetic_per_token", "bytes_per_token")
    active = float(sum(p.numel() for p in model.parameters()))
    multiplied = read = arithmetic = 0.0
    for layer, counted in zip(integration.plan.layers, layers, strict=True):
        if layer.experts is None:
            return dict.fromkeys(names)
        experts, parameters = layer.context.empty, list(layer.experts.parameters())
        each, kept = sum(p.numel() for p in parameters) / experts, counted["mean_experts"] or 0.0
        active -= each * (experts - kept)
        read += kept * sum(p.nbytes for p in parameters) / experts
        compensation = integration.compensations.get(layer.path)
        added = Cost(0.0, 0.0)
        if compensation is not None and counted["decisions"]:
            added = compensation.cost(sum(counted["dropped_load"]) / counted["decisions"])
        multiplied += added.multiplications
        read += added.bytes
        arithmetic += kept + added.multiplications / each
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    flops = 2.0 * (active + multiplied - (0 if tied else embedding.numel()))
    return dict(zip(names, (active, flops, arithmetic / len(integration.plan.layers), read), strict=True))


def versions() -> dict[str, str]:
    """Of what figures depend on."""
    import transformers

    return {
        "bh_routing": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
