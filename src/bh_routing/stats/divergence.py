"""The Kullback-Leibler divergence between two predictions of the next token.

Shape legend: ... anything (windows, tokens), V vocabulary.
"""

from __future__ import annotations

from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum over V of p (log p - log q), in nats, [...]: what q loses in log likelihood on what p predicts.

    Parameters
    ----------
    log_p, log_q : Tensor
        Log probabilities [..., V], normalised, of one floating dtype (float32 at least).

    Examples
    --------
    >>> import torch
    >>> kl_divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor([0.1438])
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_of_logits(own_V: Tensor, other_V: Tensor) -> Tensor:
    """`kl_divergence` of two models' logits of any dtype, [..., V] each, in float32."""
    return kl_divergence(own_V.float().log_softmax(-1), other_V.float().log_softmax(-1))
