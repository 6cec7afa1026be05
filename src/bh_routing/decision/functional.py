"""The pure functions: logits in, routing out. No model, no state.

Shape legend: T tokens, E experts, K slots per token. A leading [B, S] stands for T = B * S.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._words import Clamp, check_word
from ..errors import InvalidInputError, InvalidParameterError, InvalidTypeError
from ..stats.procedures import Procedure, check_alpha, get_procedure
from ..stats.pvalues import PValues, at_least_float32, resolve_p_values
from .select import Ranking, not_finite, rank_by_p_values, rank_top
from .types import PAD, Limits, check_k, check_temperature


def _looks(validate: bool | None, router_logits: Tensor) -> bool:
    """Whether values are looked at: where nothing else is said, on CPU, where it synchronises nothing."""
    if validate is None:
        return router_logits.device.type == "cpu" and not torch.compiler.is_compiling()
    return validate


def _check_logits(router_logits: Tensor, validate: bool | None) -> Tensor:
    """Flatten [T, E] or [B, S, E] to [T, E] in float32 at least, or say what is wrong with it."""
    if not isinstance(router_logits, Tensor):
        raise InvalidTypeError(f"router_logits must be a torch.Tensor, got {type(router_logits).__name__}.")
    if not router_logits.is_floating_point():
        raise InvalidTypeError(
            f"router_logits must be floating point, got {router_logits.dtype}; convert with .float()."
        )
    if router_logits.dim() not in (2, 3) or router_logits.shape[-1] == 0:
        raise InvalidInputError(
            "router_logits must have shape [tokens, experts] or [batch, sequence, experts] with at least one "
            f"expert, got {tuple(router_logits.shape)}."
        )
    if _looks(validate, router_logits) and bool((bad := not_finite(router_logits)).any()):
        raise InvalidInputError(
            f"router_logits must be finite (or -inf, a masked expert), got NaN or infinity in {int(bad.sum())} token(s); "
            "find where they come from (validate=False skips this check)."
        )
    return at_least_float32(router_logits).reshape(-1, router_logits.shape[-1])


Routing = tuple[Tensor, Tensor, Tensor]  # weights, experts, counts


@overload
def benjamini_hochberg_routing(
    router_logits: Tensor,
    alpha: float = ...,
    temperature: float = ...,
    min_k: int = ...,
    max_k: int = ...,
    *,
    pvalues: PValues = ...,
    clamp: Clamp = ...,
    return_stats: Literal[False] = ...,
    validate: bool | None = ...,
    procedure: str | Procedure = ...,
) -> Routing: ...


@overload
def benjamini_hochberg_routing(
    router_logits: Tensor,
    alpha: float = ...,
    temperature: float = ...,
    min_k: int = ...,
    max_k: int = ...,
    *,
    pvalues: PValues = ...,
    clamp: Clamp = ...,
    return_stats: Literal[True],
    validate: bool | None = ...,
    procedure: str | Procedure = ...,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None]]: ...


def benjamini_hochberg_routing(
    router_logits: Tensor,
    alpha: float = 0.05,
    temperature: float = 1.0,
    min_k: int = 1,
    max_k: int = 8,
    *,
    pvalues: PValues = "robust",
    clamp: Clamp = "after",
    return_stats: bool = False,
    validate: bool | None = None,
    procedure: str | Procedure = "bh",
) -> Routing | tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None]]:
    """Select experts per token by the Benjamini-Hochberg procedure.

    For each token, "expert e is not called for" is a null hypothesis, one per expert, E in all. With the
    p-values in ascending order p_(1) <= ... <= p_(E), the procedure rejects the k hypotheses with the
    smallest p-values, k = max{i : p_(i) <= alpha * i / E}; the count is then clamped to [min_k, max_k].

    Parameters
    ----------
    router_logits : Tensor
        [T, E] or [B, S, E], any floating dtype; computed in float32 at least, in float64 if given so.
    alpha : float
        Level, 0 < alpha < 1.
    temperature : float
        Divides the logits first. It changes the weights, and the p-values ``"softmax"``; it cannot change the
        p-values ``"robust"`` and ``"batch"``, which do not depend on scale.
    min_k, max_k : int
        At least and at most so many experts, 1 <= min_k <= max_k <= E.
    pvalues : {"robust", "softmax", "batch"}, Tensor or callable
        ``"robust"``: the token's own median and MAD as the null (`bh_routing.stats.pvalues.robust_p_values`).
        ``"softmax"``: 1 - probability, as in the original design; selects min_k on real routers.
        ``"batch"``: ranks within the batch, per expert; depends on the batch.
        A tensor of the logits' shape, or a callable that maps logits [T, E] to such a tensor.
    clamp : {"after", "inside"}
        ``"after"``: the procedure runs over all E and its count is clamped. ``"inside"``: the largest passing
        rank within max_k.
    return_stats : bool
        Also return a dictionary (below).
    validate : bool, optional
        Raise on NaN or +inf among the logits (-inf: a masked expert, p = 1), and on p-values of yours outside [0, 1]. Default: on CPU yes, elsewhere no (it would synchronise the device).
    procedure : str or Procedure
        A key of `bh_routing.PROCEDURES`, or your own.

    Returns
    -------
    weights : Tensor
        [..., E], the logits' dtype, non-negative, each row sums to 1: softmax over the selected experts.
    experts : Tensor
        int64 [..., max_k], by significance (p-value, then larger logit, then lower index), padded with -1.
    counts : Tensor
        int64 [...], experts selected.
    stats : dict
        Only with ``return_stats``: ``p_values`` [..., E]; ``thresholds`` float64 [E], the critical values
        (None for a procedure without fixed ones); ``raw_counts`` int64 [...], before the clamp.

    Raises
    ------
    InvalidParameterError, InvalidInputError, InvalidTypeError
        See `bh_routing.errors`; all are ValueError or TypeError too.

    Notes
    -----
    If the p-values of true nulls are uniform (or larger) and independent, or positively regression dependent
    on that subset (PRDS), the expected share of true nulls among the rejected is at most
    alpha * (number of true nulls) / E [1]_ [2]_. Where min_k or max_k changes the count this does not hold.
    The logits of one token are dependent, and ``"robust"`` estimates its null from a sample that contains the
    signals: in everyday use alpha is a principled knob, not a certified rate.

    The decision equals ``scipy.stats.false_discovery_control(p) <= alpha`` up to the rounding of the adjusted
    p-values there; here p_(i) <= alpha * i / E is evaluated in float64.

    References
    ----------
    .. [1] Benjamini, Y. & Hochberg, Y. (1995). J. R. Stat. Soc. B 57, 289-300, eq. (1).
    .. [2] Benjamini, Y. & Yekutieli, D. (2001). Ann. Stat. 29, 1165-1188, theorem 1.2.

    Examples
    --------
    >>> import torch
    >>> p = torch.tensor([[0.001, 0.9, 0.02, 0.6]])
    >>> weights, experts, counts = benjamini_hochberg_routing(
    ...     torch.tensor([[2.0, 0.0, 2.0, 0.0]]), alpha=0.05, max_k=4, pvalues=p)
    >>> weights, experts, counts
    (tensor([[0.5000, 0.0000, 0.5000, 0.0000]]), tensor([[ 0,  2, -1, -1]]), tensor([2]))
    """
    alpha = check_alpha(alpha)
    temperature = check_temperature(temperature, coldest=0.0)
    check_word("clamp", clamp, Clamp)
    rule = get_procedure(procedure)
    raw_TE = _check_logits(router_logits, validate)
    x_TE = _tempered(raw_TE, temperature)
    num_experts = x_TE.shape[-1]
    check_k(min_k, max_k, num_experts)

    without_scale = isinstance(pvalues, str) and pvalues != "softmax"
    p_TE = resolve_p_values(
        pvalues, raw_TE if without_scale else x_TE, values=_looks(validate, router_logits)
    )
    ranking = rank_by_p_values(
        p_TE, rule, alpha, num_experts, ties_TK=raw_TE, limits=Limits(min_k, max_k, clamp)
    )
    weights_TE, experts_TK = _fill(x_TE, ranking, max_k, router_logits.dtype)

    lead = router_logits.shape[:-1]
    result = (
        weights_TE.reshape(*lead, num_experts),
        experts_TK.reshape(*lead, max_k),
        ranking.counts_T.reshape(lead),
    )
    if not return_stats:
        return result
    stats = {
        "p_values": p_TE.reshape(*lead, num_experts),
        "thresholds": rule.critical_values(alpha, num_experts).to(x_TE.device) if rule.has_table else None,
        "raw_counts": ranking.raw_counts_T.reshape(lead),
    }
    return (*result, stats)


def _tempered(x_TE: Tensor, temperature: float) -> Tensor:
    """Logits / temperature; where that would be no numbers, what their softmax tends to."""
    if temperature >= 1e-30:
        return x_TE / temperature
    behind_TE = (x_TE - x_TE.amax(-1, keepdim=True)).double() / temperature
    least = torch.finfo(x_TE.dtype).min / 4
    return behind_TE.clamp_min(least).to(x_TE.dtype).masked_fill(x_TE == float("-inf"), float("-inf"))


def _fill(x_TE: Tensor, ranking: Ranking, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sparse weights [T, E] (softmax over what the ranking keeps) and padded indices [T, K]."""
    order_TK, kept_TK = ranking.order_TK[:, :slots], ranking.first_TK[:, :slots]
    chosen_TK = x_TE.gather(-1, order_TK).masked_fill(~kept_TK, float("-inf"))
    weights_TK = torch.softmax(chosen_TK, dim=-1)
    weights_TE = torch.zeros_like(x_TE).scatter_(-1, order_TK, weights_TK)
    return weights_TE.to(dtype), order_TK.masked_fill(~kept_TK, PAD)


def topk_routing(
    router_logits: Tensor,
    k: int = 8,
    temperature: float = 1.0,
    *,
    normalize: bool = True,
    validate: bool | None = None,
) -> Routing:
    """Fixed top-k routing in the return form of `benjamini_hochberg_routing`.

    Parameters
    ----------
    router_logits : Tensor
        [T, E] or [B, S, E], floating point.
    k : int
        Experts per token, 1 <= k <= E.
    temperature : float
        Divides the logits.
    normalize : bool
        True: weights sum to 1 over the k selected. False: the softmax probabilities over all E, as in a
        model with ``norm_topk_prob=False``.

    Returns
    -------
    weights [..., E], experts int64 [..., k], counts int64 [...]

    Examples
    --------
    >>> import torch
    >>> topk_routing(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), k=2)
    (tensor([[0.0000, 0.5000, 0.0000, 0.5000]]), tensor([[1, 3]]), tensor([2]))
    """
    x_TE = _tempered(_check_logits(router_logits, validate), check_temperature(temperature, coldest=0.0))
    num_experts = x_TE.shape[-1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= num_experts:
        raise InvalidParameterError(
            f"k must be an integer from 1 to the number of experts, {num_experts}, got {k!r}."
        )
    ranking = rank_top(x_TE, k)
    weights_TE, experts_TK = _fill(x_TE, ranking, k, x_TE.dtype)
    if not normalize:
        weights_TE = torch.softmax(x_TE, -1).masked_fill(weights_TE == 0, 0.0)
    lead = router_logits.shape[:-1]
    return (
        weights_TE.to(router_logits.dtype).reshape(*lead, num_experts),
        experts_TK.reshape(*lead, k),
        ranking.counts_T.reshape(lead),
    )


def compute_routing_statistics(weights: Tensor, experts: Tensor, counts: Tensor) -> dict[str, Any]:
    """Summarise a routing result: counts, load of the experts, concentration of the weights.

    Parameters
    ----------
    weights, experts, counts : Tensor
        As returned by `benjamini_hochberg_routing` or `topk_routing`: [..., E], [..., K], [...].

    Returns
    -------
    dict
        ``num_tokens``, ``num_experts``; ``mean_experts``, ``std_experts`` (population), ``min_experts``,
        ``max_experts``; ``count_histogram`` int64 [K + 1], tokens by number of experts; ``expert_load``
        int64 [E], tokens by expert; ``load_imbalance``, the largest load over the mean load (1 is perfectly
        even); ``unused_experts``; ``mean_entropy`` of the weights, in nats. Means over no tokens are NaN.
    """
    num_experts, slots = weights.shape[-1], experts.shape[-1]
    experts_TK, counts_T = experts.reshape(-1, slots), counts.reshape(-1).long()
    if counts_T.numel() != experts_TK.shape[0] or weights.numel() != counts_T.numel() * num_experts:
        raise InvalidInputError(
            "weights [..., E], experts [..., K] and counts [...] must agree in their leading shape, got "
            f"{tuple(weights.shape)}, {tuple(experts.shape)} and {tuple(counts.shape)}."
        )
    weights_TE = at_least_float32(weights.reshape(-1, num_experts))
    load_E = torch.bincount(experts_TK[experts_TK >= 0].reshape(-1), minlength=num_experts)
    num_tokens = counts_T.numel()
    real_T = counts_T.double()
    nan = float("nan")
    entropy_T = torch.special.entr(weights_TE).sum(-1)
    return {
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "mean_experts": float(real_T.mean()) if num_tokens else nan,
        "std_experts": float(real_T.std(correction=0)) if num_tokens else nan,
        "min_experts": int(counts_T.min()) if num_tokens else 0,
        "max_experts": int(counts_T.max()) if num_tokens else 0,
        "count_histogram": torch.bincount(counts_T, minlength=slots + 1),
        "expert_load": load_E,
        "load_imbalance": float(load_E.max() / load_E.double().mean()) if num_tokens else nan,
        "unused_experts": int((load_E == 0).sum()),
        "mean_entropy": float(entropy_T.mean()) if num_tokens else nan,
    }
