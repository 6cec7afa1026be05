"""Multiple-testing procedures: critical values, and how many hypotheses they reject.

Shape legend: T tokens, E hypotheses (experts).

A procedure with fixed critical values c_1 <= ... <= c_E is described completely by those values and its rule:

* ``step_up``: reject the k hypotheses with the smallest p-values, k = max{i : p_(i) <= c_i};
* ``step_down``: k = max{i : p_(j) <= c_j for every j <= i}.

Such a procedure collapses, with a null distribution, into a table of thresholds on the statistic (see
`bh_routing.decision.table.DecisionTable`). Storey's adaptive procedure and higher criticism look at the p-values
themselves before they decide; they have no table and always take the general path, `rejection_counts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .._words import check_word
from ..errors import InvalidParameterError

Rule = Literal["step_up", "step_down"]


def check_alpha(alpha: float) -> float:
    """Return ``alpha`` as a float, or raise `InvalidParameterError` unless 0 < alpha < 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0.0 < float(alpha) < 1.0:
        raise InvalidParameterError(
            f"alpha must be a number strictly between 0 and 1, got {alpha!r}; "
            "0.05 is the usual starting point."
        )
    return float(alpha)


def check_one_level(alpha: object, experts_per_token: object) -> None:
    """Raise `InvalidParameterError` unless exactly one of a level and a budget is given."""
    if (alpha is None) == (experts_per_token is None):
        raise InvalidParameterError(
            f"expected exactly one of alpha and experts_per_token, got alpha={alpha!r} and "
            f"experts_per_token={experts_per_token!r}."
        )


class Procedure:
    """A multiple-testing procedure: what it guarantees, and how it decides. Pass your own wherever a name goes.

    Parameters
    ----------
    name : str
        For people; the key in `PROCEDURES` of those that are there.
    critical_values : callable
        ``f(alpha, E)`` -> the E critical values c_1 <= ... <= c_E, a tensor or a sequence of numbers.
    count : callable
        In place of critical values, for a procedure that adapts to the p-values: ``f(p_TE, alpha)`` -> int64 [T],
        how many hypotheses it rejects, from p-values float64 [T, E] sorted ascending.
    rule : "step_up" or "step_down"
        What passing critical values mean (None for a procedure that adapts).
    guarantee, source : str
        The error rate that is controlled, under which assumptions, and who proved it.

    Examples
    --------
    Stricter than Benjamini-Hochberg on the first ranks, the same on the last:

    >>> squares = Procedure(name="squares", critical_values=lambda alpha, E: [alpha * (k / E) ** 2 for k in range(1, E + 1)])
    >>> squares.critical_values(0.08, 4).tolist()
    [0.005, 0.02, 0.045, 0.08]
    """

    def __init__(
        self,
        *,
        name: str,
        critical_values: Callable[[float, int], Tensor | Sequence[float]] | None = None,
        count: Callable[[Tensor, float], Tensor] | None = None,
        rule: Rule = "step_up",
        guarantee: str = "",
        source: str = "",
    ) -> None:
        if (critical_values is None) == (count is None):
            raise InvalidParameterError(
                f"procedure {name!r} must be given exactly one of critical_values and count, got "
                f"{'neither' if count is None else 'both'}."
            )
        check_word("rule", rule, Rule)
        self.name, self.guarantee, self.source = name, guarantee, source
        self.rule: Rule | None = rule if count is None else None
        self._critical, self._count = critical_values, count

    @property
    def has_table(self) -> bool:
        """Whether the procedure has fixed critical values, hence a decision table."""
        return self._critical is not None

    def critical_values(self, alpha: float, num_hypotheses: int) -> Tensor:
        """Critical values c_1..c_E, float64 [E].

        Raises
        ------
        InvalidParameterError
            If alpha is outside (0, 1), the procedure has no fixed critical values, or its function gives
            something else.
        """
        alpha = check_alpha(alpha)
        if self._critical is None:
            raise InvalidParameterError(
                f"procedure {self.name!r} adapts to the p-values and has no fixed critical values, hence no "
                "decision table; use rejection_counts(p_values, ...) or one of "
                f"{', '.join(n for n, p in PROCEDURES.items() if p.has_table)}."
            )
        critical_E = torch.as_tensor(self._critical(alpha, num_hypotheses), dtype=torch.float64)
        # A shape can be judged while compiling, values cannot.
        if tuple(critical_E.shape) != (num_hypotheses,) or (
            not torch.compiler.is_compiling() and not bool((critical_E.diff() >= 0).all())
        ):
            raise InvalidParameterError(
                f"the critical values of procedure {self.name!r} must be {num_hypotheses} numbers that do not "
                f"decrease, got {critical_E.tolist()}."
            )
        return critical_E

    def rejection_counts(self, sorted_p_TE: Tensor, alpha: float) -> Tensor:
        """How many hypotheses are rejected per token, int64 [T], from p-values sorted ascending [T, E].

        The comparison is p_(i) <= c_i in float64, whatever the dtype of the p-values.
        """
        p_TE = sorted_p_TE.to(torch.float64)
        if self._count is not None:
            return self._count(p_TE, check_alpha(alpha))
        critical_E = self.critical_values(alpha, p_TE.shape[-1]).to(p_TE.device)
        return count_passing(p_TE <= critical_E, self.rule or "step_up")

    def __repr__(self) -> str:
        return f"Procedure({self.name!r}, {self.rule or 'adaptive'})"


def count_passing(passes_TE: Tensor, rule: Rule) -> Tensor:
    """Turn per-rank comparisons, bool [..., E] in order of significance, into a count, int64 [...]."""
    if rule == "step_down":
        return passes_TE.long().cumprod(-1).sum(-1)
    ranks_E = torch.arange(1, passes_TE.shape[-1] + 1, device=passes_TE.device)
    return (passes_TE * ranks_E).amax(-1)


def _ranks(num: int) -> Tensor:
    return torch.arange(1, num + 1, dtype=torch.float64)


def _bh(alpha: float, num: int) -> Tensor:
    return alpha * _ranks(num) / num


def _by(alpha: float, num: int) -> Tensor:
    return alpha * _ranks(num) / (num * (1.0 / _ranks(num)).sum())


def _bonferroni(alpha: float, num: int) -> Tensor:
    return torch.full((num,), alpha / num, dtype=torch.float64)


def _holm(alpha: float, num: int) -> Tensor:
    return alpha / (num - _ranks(num) + 1)


def _storey_count(p_TE: Tensor, alpha: float, tuning: float = 0.5) -> Tensor:
    num = p_TE.shape[-1]
    null_share_T = ((p_TE > tuning).sum(-1) + 1.0) / ((1.0 - tuning) * num)
    ranks = torch.arange(1, num + 1, dtype=p_TE.dtype, device=p_TE.device)
    level_T1 = (alpha / null_share_T).unsqueeze(-1)
    # p <= tuning bounds the rejections (Storey, Taylor & Siegmund 2004, eq. 5).
    return count_passing((p_TE <= level_T1 * ranks / num) & (p_TE <= tuning), "step_up")


def _higher_criticism_count(p_TE: Tensor, alpha: float) -> Tensor:
    num = p_TE.shape[-1]
    ranks = torch.arange(1, num + 1, dtype=p_TE.dtype, device=p_TE.device)
    share = ranks / num
    # Only the ranks up to alpha * E are searched, and never a p-value below 1/E ("HC+", Donoho & Jin 2004).
    spread = (p_TE * (1.0 - p_TE)).clamp_min(torch.finfo(p_TE.dtype).tiny).sqrt()
    score_TE = num**0.5 * (share - p_TE) / spread
    searched_TE = (ranks <= max(1.0, alpha * num)) & (p_TE >= 1.0 / num)
    score_TE = score_TE.masked_fill(~searched_TE, float("-inf"))
    best_T = score_TE.argmax(-1)
    positive_T = score_TE.amax(-1) > 0
    cut_T1 = p_TE.gather(-1, best_T.unsqueeze(-1))
    below_T = (p_TE < 1.0 / num).sum(-1)  # more significant than anything that was searched: always kept
    return torch.where(positive_T, (p_TE <= cut_T1).sum(-1), below_T)


PROCEDURES: dict[str, Procedure] = {
    p.name: p
    for p in (
        Procedure(
            name="bh",
            guarantee="FDR <= alpha * (share of true nulls), under independence or PRDS of the p-values",
            source="Benjamini & Hochberg 1995; PRDS: Benjamini & Yekutieli 2001",
            critical_values=_bh,
        ),
        Procedure(
            name="by",
            guarantee="FDR <= alpha * (share of true nulls), under any dependence",
            source="Benjamini & Yekutieli 2001",
            critical_values=_by,
        ),
        Procedure(
            name="bonferroni",
            guarantee="FWER <= alpha, under any dependence",
            source="Bonferroni 1936",
            critical_values=_bonferroni,
        ),
        Procedure(
            name="holm",
            rule="step_down",
            guarantee="FWER <= alpha, under any dependence",
            source="Holm 1979",
            critical_values=_holm,
        ),
        Procedure(
            name="hochberg",
            guarantee="FWER <= alpha, under independence or positive dependence (MTP2)",
            source="Hochberg 1988",
            critical_values=_holm,
        ),
        Procedure(
            name="storey",
            guarantee="FDR <= alpha under independence; BH at alpha / (estimated share of true nulls)",
            source="Storey, Taylor & Siegmund 2004, with lambda = 1/2",
            count=_storey_count,
        ),
        Procedure(
            name="higher_criticism",
            guarantee="none on the error rate; optimal detection boundary for rare, weak signals. alpha is "
            "the share of the ranks that is searched",
            source="Donoho & Jin 2004 (HC+); thresholding: Donoho & Jin 2008",
            count=_higher_criticism_count,
        ),
    )
}


ALIASES = {"benjamini_hochberg": "bh", "benjamini_yekutieli": "by"}  # other names of procedures


def get_procedure(name: str | Procedure) -> Procedure:
    """Look a procedure up by name; an unknown name raises `InvalidParameterError` with those that exist.

    >>> get_procedure("bh").critical_values(0.05, 4).tolist()
    [0.0125, 0.025, 0.037500000000000006, 0.05]
    """
    if isinstance(name, Procedure):
        return name
    try:
        return PROCEDURES[ALIASES.get(name, name)]
    except (KeyError, TypeError):
        raise InvalidParameterError(
            f"unknown procedure {name!r}; expected one of {', '.join(PROCEDURES)}."
        ) from None
