"""The losses as functions of tensors: load balancing for any number of experts, router z-loss, expected experts.

Shape legend: L layers, T tokens, E experts, K slots per token, J columns of a layer's sums.

Every loss is a function of sums over tokens, so that several processes can add them up first
(`bh_routing.training.loss`): `router_sums` makes them for one layer, `balance_of`, `z_of` take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._words import Clamp, Scope, check_word
from ..decision.types import check_k, check_temperature
from ..errors import InvalidInputError
from ..stats.procedures import Rule
from ..stats.pvalues import at_least_float32
from ..stats.statistic import LOG_SCORES


class RouterSums(NamedTuple):
    """Sums over the tokens of one layer, float32 at least; stacked over layers they have a leading L.

    Attributes
    ----------
    load_E : Tensor
        Tokens that each expert got; no gradient.
    probability_E : Tensor
        Routing probabilities, which sum to 1 for each token.
    z : Tensor
        Squared log-partition functions of the logits.
    tokens : Tensor
        Tokens, without padding and without those whose logits are not finite.
    """

    load_E: Tensor
    probability_E: Tensor
    z: Tensor
    tokens: Tensor


def router_sums(
    logits_TE: Tensor, experts_TK: Tensor, real_T: Tensor | None = None, score_func: str = "softmax"
) -> RouterSums:
    """The sums of one layer.

    Parameters
    ----------
    logits_TE : Tensor
        Router logits, floating point.
    experts_TK : Tensor
        int64, the experts that run; a slot with E or more, or with -1, is empty.
    real_T : Tensor, optional
        bool, False for tokens that do not count.
    score_func : str
        A key of `bh_routing.stats.statistic.LOG_SCORES`; scores are normalised to probabilities.
    """
    logits_TE = at_least_float32(logits_TE)
    num_experts = logits_TE.shape[-1]
    if real_T is None:
        real_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool)
    real_T1 = real_T.unsqueeze(-1)
    logits_TE = torch.where(real_T1, logits_TE, 0.0)  # what does not count may be NaN
    probability_TE = logits_TE.softmax(-1)
    if score_func != "softmax":
        scores_TE = LOG_SCORES[score_func](logits_TE).exp()
        probability_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    weight_T = real_T.to(logits_TE.dtype)
    runs_TK = (experts_TK >= 0) & (experts_TK < num_experts) & real_T1
    load_E = torch.zeros(num_experts, dtype=logits_TE.dtype, device=logits_TE.device)
    load_E = load_E.index_add(
        0, experts_TK.clamp(0, num_experts - 1).flatten(), runs_TK.to(logits_TE.dtype).flatten()
    )
    return RouterSums(
        load_E,
        (probability_TE * weight_T.unsqueeze(-1)).sum(0),
        (logits_TE.logsumexp(-1).square() * weight_T).sum(),
        weight_T.sum(),
    )


def balance_of(
    load_LE: Tensor, probability_LE: Tensor, tokens_L: Tensor, slots_L: Tensor, scope: Scope
) -> Tensor:
    """The load-balancing loss of sums over tokens.

    Parameters
    ----------
    load_LE, probability_LE, tokens_L : Tensor
        As in `RouterSums`.
    slots_L : Tensor
        Tokens times the router's own number of slots.
    scope : {"model", "layer"}
        See `load_balancing_loss`.
    """
    if scope == "model":
        load_LE, probability_LE = load_LE.sum(0, keepdim=True), probability_LE.sum(0, keepdim=True)
        slots_L, tokens_L = slots_L.sum(0, keepdim=True), tokens_L.sum(0, keepdim=True)
    tokens_L1 = tokens_L.clamp_min(1.0).unsqueeze(-1)
    per_layer_L = ((load_LE / tokens_L1) * (probability_LE / tokens_L1)).sum(-1) * load_LE.shape[-1]
    # The factor scales the load to K per token: 1 exactly where every token got all its slots.
    return (per_layer_L * (slots_L / load_LE.sum(-1).clamp_min(1.0))).mean()


def load_balancing_loss(
    logits: Sequence[Tensor],
    experts: Sequence[Tensor],
    *,
    top_k: int,
    mask_T: Tensor | None = None,
    score_func: str = "softmax",
    scope: Scope = "model",
) -> Tensor:
    """Load balancing for a variable number of experts per token.

    With f_e the experts' shares of the load, scaled to sum to K, and P_e the mean routing probability, the loss is
    E * sum_e f_e P_e: K where both are uniform, whatever number of experts runs, so that a coefficient means the same
    at every budget. Where every token gets K experts this is eq. (4) of Switch Transformers [1]_ for K slots, and
    transformers' ``load_balancing_loss_func``, which OLMoE and most others are trained with.

    Parameters
    ----------
    logits : sequence of Tensor
        Router logits [T, E], one per layer.
    experts : sequence of Tensor
        int64 [T, K'], the experts that run; empty slots carry -1, or E or more.
    top_k : int
        K, the router's own number of slots.
    mask_T : Tensor, optional
        bool (or 0 and 1), False for padding.
    score_func : str
        As in `router_sums`.
    scope : {"model", "layer"}
        ``"model"`` adds up all layers before it compares load and probability, as transformers does, so that one
        layer may neglect an expert as long as another makes up for it; ``"layer"`` is the mean of one loss per layer.

    Returns
    -------
    Tensor
        A scalar, float32 at least. Gradients flow through P_e only.

    References
    ----------
    .. [1] Fedus, W., Zoph, B. & Shazeer, N. (2022). Switch Transformers. J. Mach. Learn. Res. 23(120).

    Examples
    --------
    >>> import torch
    >>> uniform = torch.zeros(4, 4)
    >>> float(load_balancing_loss([uniform], [torch.tensor([[0, 1], [2, 3], [0, -1], [1, -1]])], top_k=2))
    2.0
    """
    check_word("scope", scope, Scope)
    real_T = None if mask_T is None else mask_T.reshape(-1) != 0
    if not len(logits) or len(logits) != len(experts):
        raise InvalidInputError(
            f"expected logits and experts of the same layers, at least one, got {len(logits)} and {len(experts)}."
        )
    sums = [router_sums(x, e, real_T, score_func) for x, e in zip(logits, experts, strict=True)]
    load_LE, probability_LE, _, tokens_L = (torch.stack(column) for column in zip(*sums, strict=True))
    return balance_of(load_LE, probability_LE, tokens_L, tokens_L * top_k, scope)


def router_z_loss(logits: Sequence[Tensor], *, mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens and layers of the squared log-partition function of the router logits (ST-MoE [1]_, eq. 5).

    Parameters
    ----------
    logits : sequence of Tensor
        [T, E], one per layer.
    mask_T : Tensor, optional
        bool (or 0 and 1), False for padding.

    References
    ----------
    .. [1] Zoph, B. et al. (2022). ST-MoE: designing stable and transferable sparse expert models. arXiv:2202.08906.
    """
    real_T = None if mask_T is None else mask_T.reshape(-1) != 0
    sums = [router_sums(x, x.new_zeros((x.shape[0], 0), dtype=torch.int64), real_T) for x in logits]
    return z_of(torch.stack([s.z for s in sums]), torch.stack([s.tokens for s in sums]))


def z_of(z_L: Tensor, tokens_L: Tensor) -> Tensor:
    """The z-loss of sums over tokens."""
    return (z_L / tokens_L.clamp_min(1.0)).mean()


def expected_experts(
    statistic_TK: Tensor,
    thresholds_E: Tensor,
    *,
    temperature: float = 0.5,
    rule: Rule = "step_up",
    min_k: int = 1,
    max_k: int | None = None,
    clamp: Clamp = "after",
) -> Tensor:
    """A differentiable number of experts per token, [T]: the decision with a sigmoid around its thresholds.

    With the candidates' statistic in descending order s_(1) >= ... >= s_(K), rank j is selected by a step-up rule where
    m_j = max_{i >= j} (s_(i) - t_i) >= 0, by a step-down rule where m_j = min_{i <= j} (s_(i) - t_i) >= 0. The count
    is the number of ranks with m_j >= 0; here every such step is sigmoid(m_j / temperature), and ranks up to
    ``min_k`` count 1, those beyond ``max_k`` 0. As the temperature goes to 0 this is the count of the decision itself
    wherever no statistic lies on its threshold.

    Parameters
    ----------
    statistic_TK : Tensor
        The candidates' statistic (`bh_routing.stats.statistic`), in any order.
    thresholds_E : Tensor
        One row of a decision table; the first K are used.
    temperature : float
        In units of the statistic (nats for ``logprob`` and ``contribution``). The smaller, the nearer to the decision,
        and the fewer the tokens near enough to a threshold to have a gradient.
    rule, min_k, max_k, clamp
        As in `bh_routing.decision.select.rank_by_table`.

    Examples
    --------
    >>> import torch
    >>> s = torch.tensor([[0.0, -1.0, -4.0]])
    >>> t = torch.tensor([-3.0, -2.0, -1.0])
    >>> expected_experts(s, t, temperature=0.01)
    tensor([2.])
    >>> expected_experts(s, t, temperature=1.0)
    tensor([1.7785])
    """
    check_temperature(temperature)
    check_k(min_k, max_k)
    check_word("clamp", clamp, Clamp)
    num = statistic_TK.shape[-1]
    top = num if max_k is None else min(max_k, num)
    sorted_TK = statistic_TK.sort(dim=-1, descending=True, stable=True).values
    within = top if clamp == "inside" else num
    margin_TK = (sorted_TK - thresholds_E[:num])[:, :within]
    if rule == "step_up":
        margin_TK = margin_TK.flip(-1).cummax(-1).values.flip(-1)
    else:
        margin_TK = margin_TK.cummin(-1).values
    steps_TK = torch.sigmoid(margin_TK[:, min_k:top] / temperature)
    return steps_TK.sum(-1) + float(min(min_k, top))
