"""From what each document loses at each level to what may be said of the levels, with a confidence.

Documents are exchangeable draws; a document's loss is a mean over its tokens, divided by the most that it may count, so
that it lies in [0, 1]. Levels stand from most experts to fewest.

Shape legend: M levels, U documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._words import Bound
from ..stats.risk import p_value, upper_bound

MOST_DOCUMENTS = 1 << 17  # beyond which nobody is told how many it would take


def fixed_sequence(losses_MU: Any, target: float, delta: float, bound: Bound = "betting") -> list[float]:
    """p-values of "this level loses more than the target", level by level, up to the first that is above delta.

    Every level before that one is certified, all of them together with probability 1 - delta: each is tested only if those
    with more experts have been rejected, so that there is no price for their number. (Fixed-sequence testing; Angelopoulos
    et al. 2021, "Learn then test", section 2.3.) The order must be fixed before the losses are known, as that of the
    levels is.

    Examples
    --------
    >>> losses = np.stack([np.full(200, loss) for loss in (0.01, 0.05, 0.3, 0.02)])
    >>> [p <= 0.05 for p in fixed_sequence(losses, 0.1, 0.05)]
    [True, True, False]
    """
    found: list[float] = []
    for losses_U in losses_MU:
        found.append(p_value(losses_U, target, delta=delta, bound=bound))
        if found[-1] > delta:
            break
    return found


def simultaneous(losses_MU: Any, delta: float, bound: Bound = "betting") -> list[float]:
    """A bound for every level, all of which hold together with probability 1 - delta: each at delta / M (Bonferroni)."""
    return [upper_bound(losses_U, delta=delta / len(losses_MU), bound=bound) for losses_U in losses_MU]


def documents_needed(losses_U: Any, target: float, delta: float, bound: Bound = "betting") -> int | None:
    """About how many documents like these would certify the target; None where no number of them would.

    The documents are taken again and again, in their order.
    """
    losses = np.asarray(losses_U, dtype=np.float64)
    if losses.mean() >= target:
        return None

    def enough(num: int) -> bool:
        return p_value(np.resize(losses, num), target, delta=delta, bound=bound) <= delta

    high = len(losses)
    while not enough(high):
        high *= 2
        if high > MOST_DOCUMENTS:
            return None
    low = high // 2
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
