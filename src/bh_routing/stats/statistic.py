"""The statistic: how strongly the router calls for an expert, and the table of thresholds on it.

Shape legend: T tokens, E experts, D raw router logits of a token (= E), L routed layers.

The base statistic x is the router logit ("logit") or the log of the routing score ("logprob"), after the
logits were divided by the temperature. The statistic is s = x + offset, one offset per (layer, expert);
"contribution" is the log score plus the log of the expert's calibrated size. Where that size is predicted from the
token, what the raw logits tell of it is added: clamp((z - c) . v_e, -2, 2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softplus

from .pvalues import at_least_float32

# How a family turns router logits into the score that weighs an expert's output; log-scores, [T, E] -> [T, E].
LOG_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: log_softmax(x, -1),
    "sigmoid": logsigmoid,
    "sqrtsoftplus": lambda x: 0.5 * softplus(x).log(),
    "probability": lambda x: x.clamp_min(torch.finfo(x.dtype).tiny).log(),  # what is recorded is a score
}


def base_statistic(logits_TE: Tensor, statistic: str, score_func: str, temperature: float = 1.0) -> Tensor:
    """The statistic before its offset, [T, E], float32 at least.

    ``logit``: logits / temperature. ``logprob`` and ``contribution``: the log of the score (`LOG_SCORES`) of
    logits / temperature.
    """
    x_TE = at_least_float32(logits_TE)
    if temperature != 1.0:
        x_TE = x_TE / temperature
    return x_TE if statistic == "logit" else LOG_SCORES[score_func](x_TE)


def full_statistic(
    logits_TE: Tensor,
    offset_E: Tensor,
    statistic: str,
    score_func: str,
    temperature: float = 1.0,
    slope_DE: Tensor | None = None,
    center_D: Tensor | None = None,
) -> Tensor:
    """`base_statistic` + offset (+ `token_size`) in float32, [T, E]: the one place where it is rounded.

    Thresholds are found for these float32 values, so that comparing with them says what the p-values say.
    """
    statistic_TE = base_statistic(logits_TE, statistic, score_func, temperature).float() + offset_E
    if slope_DE is None or center_D is None:
        return statistic_TE
    return statistic_TE + token_size(logits_TE, slope_DE, center_D).float()


TOKEN_BOUND = 2.0  # a token's part in a log size stays within this


def token_size(logits_TE: Tensor, slope_DE: Tensor, center_D: Tensor) -> Tensor:
    """What a token tells of its experts' log sizes, clamp((z - c) . v_e, -2, 2), float64 [T, E].

    Parameters
    ----------
    logits_TE : Tensor
        z, raw: before the temperature. One that is not finite (a masked expert) counts as its c.
    slope_DE, center_D : Tensor
        v of all E experts by logit (D = E), and c; any floating dtype.
    """
    # In float64, which neither autocast nor TF32 shortens, and in which no order of summing is seen in float32.
    z_TD = (logits_TE - center_D.double()).nan_to_num(0.0, 0.0, 0.0)
    return (z_TD @ slope_DE.double()).clamp(-TOKEN_BOUND, TOKEN_BOUND)
