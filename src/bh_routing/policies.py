"""What decides which experts run: the policy contract, BH from a table or from p-values, top-k.

Shape legend: T tokens, E experts, K slots of the router's own choice.

The model's own router always runs first. A policy sees its logits and its own choice and says which of the
slots to keep: ``policy.decide(logits_TE, own_weights_TK, own_experts_TK, context) -> RoutingDecision``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .errors import InvalidParameterError
from .kernels import Backend, check_backend, decision_function
from .kernels.decide import (
    HostRow,
    Kept,
    decide_by_table,
    decide_one_token,
    keep_by_p_values,
    keep_by_table,
    keep_own,
)
from .procedures import Procedure, check_alpha, get_procedure
from .pvalues import P_VALUES, at_least_float32
from .routing import (
    Clamp,
    Convention,
    RoutingDecision,
    WeightRule,
    apply_weight_rule,
    check_clamp,
    check_k,
    check_temperature,
    not_finite,
    plain_rule,
)
from .statistic import LOG_SCORES, DecisionTable, affine_statistic, base_statistic


@dataclass(frozen=True, kw_only=True)
class RoutingContext:
    """What a policy may know beside the logits. One per patched router; the call-specific part is replaced.

    Attributes
    ----------
    path : str
        The router's module path.
    index : int
        Its position among the patched routers, 0..L-1.
    num_experts : int
        E, the width of the logits.
    empty : int
        The index an empty slot carries (``experts.num_experts``).
    top_k : int
        K, the router's own number of slots.
    convention : "raw", "renormalised" or "unknown"
        What the model does with the selected scores.
    score : str
        A key of `bh_routing.statistic.LOG_SCORES`.
    scale : float
        A raw weight is the score times this.
    can_widen : bool
        Whether scores of experts beyond the router's own choice are known (plain softmax or sigmoid).
    device : torch.device
        Where the router's weights are.
    shape : (B, S) or None
        The batch's shape, where the model's forward told it.
    mask_T : Tensor or None
        bool [T], False for padding tokens, where known.
    phase : "prefill", "decode" or None
    """

    path: str
    index: int
    num_experts: int
    empty: int
    top_k: int
    convention: Convention = "unknown"
    score: str = "softmax"
    scale: float = 1.0
    can_widen: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shape: tuple[int, int] | None = None
    mask_T: Tensor | None = None
    phase: Literal["prefill", "decode"] | None = None


class RoutingPolicy(ABC):
    """Decides, for every token of a layer, which experts run.

    A policy is bound to the routers of one model with `bind`, which allocates what it needs on their devices;
    `decide` then must not synchronise with a GPU.

    Class attributes
    ----------------
    causal : bool
        False if the decision for a token looks at other tokens of its sequence (refused by ``generate``).
    """

    name: ClassVar[str] = "policy"
    causal: ClassVar[bool] = True

    def __init__(self, *, weights: WeightRule = "model") -> None:
        if weights not in ("model", "preserve", "sum"):
            raise InvalidParameterError(f"weights must be 'model', 'preserve' or 'sum', got {weights!r}.")
        self.weights: WeightRule = weights

    def bind(self, contexts: Iterable[RoutingContext]) -> None:  # noqa: B027 - most policies hold nothing
        """Check that the policy fits these routers and allocate its buffers. Raises; changes no model."""

    def slots(self, context: RoutingContext) -> int:
        """Slots per token in the decision, K' (more than the router's own K only when widening)."""
        return context.top_k

    @abstractmethod
    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        """Decide for one call of one router.

        Parameters
        ----------
        logits_TE : Tensor
            Router logits in the model's dtype.
        own_weights_TK, own_experts_TK : Tensor
            The router's own choice, float and int64.
        """

    def describe(self) -> dict[str, Any]:
        """The policy's settings, for records and for people."""
        return {"policy": self.name, "weights": self.weights}

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.describe().items() if k != "policy")
        return f"{type(self).__name__}({settings})"

    def shrink(
        self,
        kept: Kept,
        logits_TE: Tensor,
        own_weights_TK: Tensor,
        own_experts_TK: Tensor,
        context: RoutingContext,
    ) -> RoutingDecision:
        """Make the decision that keeps these of the router's own slots, in the router's own order.

        Tokens with non-finite logits keep the router's own choice.
        """
        return keep_own(
            kept,
            not_finite(logits_TE),
            own_weights_TK,
            own_experts_TK,
            weights=plain_rule(self.weights, context.convention),
            empty=context.empty,
        )

    def widen(
        self,
        kept: Kept,
        scores_TC: Tensor,
        experts_TC: Tensor,
        own_weights_TK: Tensor,
        own_experts_TK: Tensor,
        context: RoutingContext,
        finite_T: Tensor,
    ) -> RoutingDecision:
        """Make the decision over C candidates that are not the router's own slots (C >= K).

        Tokens with non-finite logits keep the router's own choice.
        """
        pad = scores_TC.shape[-1] - own_weights_TK.shape[-1]
        weights_TC = apply_weight_rule(
            own_weights_TK,
            kept.keep_TK,
            self.weights,
            context.convention,
            scores_TC.to(own_weights_TK.dtype),
        )
        experts_TC = experts_TC.masked_fill(~kept.keep_TK, context.empty)
        own_weights_TC = torch.nn.functional.pad(own_weights_TK, (0, pad))
        own_experts_TC = torch.nn.functional.pad(own_experts_TK, (0, pad), value=context.empty)
        finite_T1 = finite_T.unsqueeze(-1)
        experts_TC = torch.where(finite_T1, experts_TC, own_experts_TC)
        still_TK = (own_experts_TK.unsqueeze(-1) == experts_TC.unsqueeze(-2)).any(-1)
        return RoutingDecision(
            weights_TK=torch.where(finite_T1, weights_TC, own_weights_TC),
            experts_TK=experts_TC,
            counts_T=torch.where(finite_T, kept.counts_T, own_experts_TK.shape[-1]),
            raw_counts_T=kept.raw_counts_T,
            dropped_TK=~still_TK,
            own_weights_TK=own_weights_TK,
            own_experts_TK=own_experts_TK,
            empty=context.empty,
            fallback_T=~finite_T,
        )


class _CountPolicy(RoutingPolicy):
    """Shared by the policies that decide a count between min_k and max_k in order of a statistic."""

    def __init__(
        self,
        *,
        min_k: int = 1,
        max_k: int | None = None,
        clamp: Clamp = "after",
        weights: WeightRule = "model",
    ) -> None:
        super().__init__(weights=weights)
        check_k(min_k, max_k)
        check_clamp(clamp)
        self.min_k, self.max_k, self.clamp = min_k, max_k, clamp

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        for context in contexts:
            check_k(self.min_k, self.max_k, context.num_experts)
            if self.max_k is None and self.min_k > context.top_k:
                raise InvalidParameterError(
                    f"min_k={self.min_k} is more than the {context.top_k} experts that router {context.path} "
                    "selects; lower min_k, or give max_k to widen the choice."
                )
            if self.max_k is not None and self.max_k > context.top_k and not context.can_widen:
                raise InvalidParameterError(
                    f"max_k={self.max_k} asks router {context.path} for more than the {context.top_k} experts "
                    "that it selects itself, and this family does not tell the scores of the others; "
                    f"use max_k <= {context.top_k}."
                )

    def slots(self, context: RoutingContext) -> int:
        return self.max_k if self._widens(context) else context.top_k  # type: ignore[return-value]

    def _widens(self, context: RoutingContext) -> bool:
        return self.max_k is not None and self.max_k > context.top_k

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"min_k": self.min_k, "max_k": self.max_k, "clamp": self.clamp}

    def _widened(
        self,
        kept_TE: Kept,
        statistic_TE: Tensor,
        logits_TE: Tensor,
        own_weights_TK: Tensor,
        own_experts_TK: Tensor,
        context: RoutingContext,
    ) -> RoutingDecision:
        """Turn a decision over all E experts into one over the max_k most significant."""
        assert self.max_k is not None
        experts_TC = statistic_TE.argsort(dim=-1, descending=True, stable=True)[:, : self.max_k]
        scores_TE = LOG_SCORES[context.score](at_least_float32(logits_TE)).exp() * context.scale
        return self.widen(
            Kept(kept_TE.keep_TK.gather(-1, experts_TC), kept_TE.counts_T, kept_TE.raw_counts_T),
            scores_TE.gather(-1, experts_TC),
            experts_TC,
            own_weights_TK,
            own_experts_TK,
            context,
            torch.isfinite(at_least_float32(logits_TE).sum(-1)),
        )


class TablePolicy(_CountPolicy):
    """Any procedure with fixed critical values, from its decision table: order, compare, count.

    Parameters
    ----------
    table : DecisionTable
    min_k, max_k, clamp, weights
        As in `bh_routing.BHRoutingIntegration`.
    backend : "auto", "torch" or "triton"
        What computes the decision (`bh_routing.kernels.decision_function`). A widened choice (max_k above the
        router's own number of slots) is always computed in PyTorch.
    """

    name = "table"

    def __init__(
        self,
        table: DecisionTable,
        *,
        min_k: int = 1,
        max_k: int | None = None,
        clamp: Clamp = "after",
        weights: WeightRule = "model",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(min_k=min_k, max_k=max_k, clamp=clamp, weights=weights)
        check_backend(backend)
        self.table = table
        self.backend = backend
        self._rows: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._functions: dict[str, Callable[..., RoutingDecision]] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        self._host: dict[str, Callable[..., RoutingDecision]] = {}

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        super().bind(contexts)
        functions = {
            c.path: decision_function(
                self.backend,
                c.device,
                num_experts=c.num_experts,
                statistic=self.table.statistic,
                score=c.score,
            )
            for c in contexts
        }
        self._rows = {c.path: self._row(self.table, c) for c in contexts}
        self._functions = functions
        self._settings = {c.path: self._settings_for(c) for c in contexts}
        self._read_rows()

    def _settings_for(self, context: RoutingContext) -> dict[str, Any]:
        return {
            "empty": context.empty,
            "statistic": self.table.statistic,
            "score": context.score,
            "temperature": self.table.temperature,
            "rule": self.table.rule,
            "min_k": self.min_k,
            "max_k": self.max_k,
            "clamp": self.clamp,
            "weights": plain_rule(self.weights, context.convention),
        }

    def _read_rows(self) -> None:
        """What decides a single token on the host, where rows and router live there: all but the token bound."""
        self._host = {
            path: partial(
                decide_one_token, row=HostRow(*(buffer.tolist() for buffer in row)), **self._settings[path]
            )
            for path, row in self._rows.items()
            if self._functions[path] is decide_by_table and row[0].device.type == "cpu"
        }

    def _row(self, table: DecisionTable, context: RoutingContext) -> tuple[Tensor, Tensor, Tensor]:
        row = table.row(context.path, context.index)
        if table.num_experts != context.num_experts:
            raise InvalidParameterError(
                f"the table has {table.num_experts} experts, router {context.path} has {context.num_experts}; "
                "calibrate this model itself."
            )
        return tuple(
            getattr(table, name)[row].clone().to(context.device)
            for name in ("thresholds_LE", "scale_LE", "offset_LE")
        )

    def row_of(self, context: RoutingContext) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds, scale and offset of a router, float32 [E] each: the buffers in use, on its device."""
        return self._rows[context.path]

    def set_table(self, table: DecisionTable) -> None:
        """Write another table's thresholds into the same buffers: no re-patching, no recompiling.

        Raises
        ------
        InvalidParameterError
            If the new table has another rule, statistic, temperature or shape: that needs a new policy.
        """
        for name in ("rule", "statistic", "temperature", "num_layers", "num_experts", "paths"):
            old, new = getattr(self.table, name), getattr(table, name)
            if old != new:
                raise InvalidParameterError(
                    f"the new table has {name}={new!r}, the one in use {old!r}; unpatch and patch anew for that."
                )
        for index, (path, buffers) in enumerate(self._rows.items()):
            row = table.row(path, index)
            for buffer, name in zip(buffers, ("thresholds_LE", "scale_LE", "offset_LE"), strict=True):
                buffer.copy_(getattr(table, name)[row])
        self.table = table
        self._read_rows()

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        path = context.path
        if self._widens(context):
            return self._decide_widened(logits_TE, own_weights_TK, own_experts_TK, context)
        if logits_TE.shape[0] == 1 and path in self._host and not torch.compiler.is_compiling():
            return self._host[path](logits_TE, own_weights_TK, own_experts_TK)
        function = self._functions[path]
        return function(logits_TE, own_weights_TK, own_experts_TK, *self._rows[path], **self._settings[path])

    def _decide_widened(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        table = self.table
        thresholds_E, scale_E, offset_E = self._rows[context.path]
        base_TE = base_statistic(logits_TE, table.statistic, context.score, table.temperature)
        statistic_TE = affine_statistic(base_TE, scale_E, offset_E)
        kept = keep_by_table(
            statistic_TE,
            thresholds_E,
            rule=table.rule,
            min_k=self.min_k,
            max_k=self.max_k,
            clamp=self.clamp,
        )
        return self._widened(kept, statistic_TE, logits_TE, own_weights_TK, own_experts_TK, context)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"table": repr(self.table), "alpha": self.table.alpha}


class PValuePolicy(_CountPolicy):
    """Any procedure on p-values computed for every token: the general path.

    Parameters
    ----------
    pvalues : str or callable
        ``"robust"``, ``"softmax"``, ``"batch"``, or ``f(logits_TE, context) -> p_TE`` (calibrated p-values).
    procedure : str
        A key of `bh_routing.procedures.PROCEDURES`.
    alpha : float
    temperature : float
        Divides the logits first. Warned about where it cannot change a decision.
    """

    name = "p-values"

    def __init__(
        self,
        pvalues: str | Callable[[Tensor, RoutingContext], Tensor] = "robust",
        *,
        procedure: str | Procedure = "bh",
        alpha: float = 0.05,
        temperature: float = 1.0,
        min_k: int = 1,
        max_k: int | None = None,
        clamp: Clamp = "after",
        weights: WeightRule = "model",
    ) -> None:
        super().__init__(min_k=min_k, max_k=max_k, clamp=clamp, weights=weights)
        if isinstance(pvalues, str) and pvalues not in P_VALUES:
            raise InvalidParameterError(
                f"unknown pvalues={pvalues!r}; expected one of {', '.join(map(repr, P_VALUES))} or a callable."
            )
        self.pvalues = pvalues
        self.procedure = get_procedure(procedure)
        self.alpha = check_alpha(alpha)
        self.temperature = check_temperature(temperature)
        self._critical: dict[str, Tensor] = {}

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        contexts = list(contexts)
        super().bind(contexts)
        if self.procedure.has_table:
            self._critical = {
                c.path: self.procedure.critical_values(self.alpha, c.num_experts).to(c.device)
                for c in contexts
            }

    def set_alpha(self, alpha: float) -> None:
        """Change the level while patched, in the same buffers."""
        self.alpha = check_alpha(alpha)
        for critical_E in self._critical.values():
            critical_E.copy_(self.procedure.critical_values(self.alpha, critical_E.numel()))

    def p_values(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        """p-values of all E experts, [T, E]."""
        if not isinstance(self.pvalues, str):
            return self.pvalues(logits_TE, context)
        x_TE = at_least_float32(logits_TE)
        return P_VALUES[self.pvalues](x_TE if self.temperature == 1.0 else x_TE / self.temperature)

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        p_TE = self.p_values(logits_TE, context)
        if self._widens(context):
            # Order by logit first, so that equal p-values keep the order of the statistic.
            order_TE = logits_TE.argsort(dim=-1, descending=True, stable=True)
            kept = self._keep(p_TE.gather(-1, order_TE), context)
            keep_TE = torch.zeros_like(kept.keep_TK).scatter(-1, order_TE, kept.keep_TK)
            by_p_TE = order_TE.gather(-1, p_TE.gather(-1, order_TE).argsort(dim=-1, stable=True))
            # a statistic whose order is that of by_p_TE
            place_TE = torch.zeros_like(by_p_TE).scatter(
                -1, by_p_TE, torch.arange(by_p_TE.shape[-1], 0, -1, device=p_TE.device).expand_as(by_p_TE)
            )
            return self._widened(
                Kept(keep_TE, kept.counts_T, kept.raw_counts_T),
                place_TE,
                logits_TE,
                own_weights_TK,
                own_experts_TK,
                context,
            )
        if not self.procedure.has_table:
            # Adaptive procedures estimate from all E p-values; the experts that are no candidates count as 1.
            p_TE = torch.ones_like(p_TE).scatter(-1, own_experts_TK, p_TE.gather(-1, own_experts_TK))
        kept = self._keep(p_TE.gather(-1, own_experts_TK), context, p_TE)
        return self.shrink(kept, logits_TE, own_weights_TK, own_experts_TK, context)

    def _keep(self, p_TK: Tensor, context: RoutingContext, p_TE: Tensor | None = None) -> Kept:
        p_TK = p_TK.nan_to_num(1.0)
        if self.procedure.has_table:
            return keep_by_p_values(
                p_TK,
                self._critical[context.path],
                rule=self.procedure.rule or "step_up",
                min_k=self.min_k,
                max_k=self.max_k,
                clamp=self.clamp,
            )
        everything_TE = (p_TK if p_TE is None else p_TE).nan_to_num(1.0)
        raw_T = self.procedure.rejection_counts(everything_TE.double().sort(-1).values, self.alpha)
        num = p_TK.shape[-1]
        counts_T = raw_T.clamp(self.min_k, num if self.max_k is None else min(self.max_k, num))
        order_TK = p_TK.argsort(dim=-1, stable=True)
        first_TK = torch.arange(num, device=p_TK.device) < counts_T.unsqueeze(-1)
        return Kept(torch.zeros_like(first_TK).scatter(-1, order_TK, first_TK), counts_T, raw_T)

    def describe(self) -> dict[str, Any]:
        how = self.pvalues if isinstance(self.pvalues, str) else "calibrated"
        return super().describe() | {
            "pvalues": how,
            "procedure": self.procedure.name,
            "alpha": self.alpha,
            "temperature": self.temperature,
        }


class TopKPolicy(RoutingPolicy):
    """The k experts with the largest own weight, k at most the router's own (Shazeer et al. 2017).

    ``k=None`` keeps everything: the unpatched model, bit for bit.
    """

    name = "topk"

    def __init__(self, k: int | None = None, *, weights: WeightRule = "model") -> None:
        super().__init__(weights=weights)
        if k is not None:
            check_k(1, k)
        self.k = k

    def bind(self, contexts: Iterable[RoutingContext]) -> None:
        for context in contexts:
            if self.k is not None and self.k > context.top_k:
                raise InvalidParameterError(
                    f"k={self.k} is more than the {context.top_k} experts that router {context.path} selects."
                )

    def decide(
        self, logits_TE: Tensor, own_weights_TK: Tensor, own_experts_TK: Tensor, context: RoutingContext
    ) -> RoutingDecision:
        num = own_experts_TK.shape[-1]
        k = num if self.k is None else self.k
        order_TK = own_weights_TK.argsort(dim=-1, descending=True, stable=True)
        keep_TK = torch.zeros_like(own_experts_TK, dtype=torch.bool).scatter(-1, order_TK[:, :k], True)
        counts_T = torch.full_like(own_experts_TK[:, 0], k)
        return self.shrink(
            Kept(keep_TK, counts_T, counts_T), logits_TE, own_weights_TK, own_experts_TK, context
        )

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"k": self.k}


POLICIES: dict[str, type[RoutingPolicy]] = {p.name: p for p in (TablePolicy, PValuePolicy, TopKPolicy)}


__all__ = [
    "POLICIES",
    "PValuePolicy",
    "RoutingContext",
    "RoutingPolicy",
    "TablePolicy",
    "TopKPolicy",
]
