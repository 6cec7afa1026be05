"""A calibration, as people use it: what a model's routers do on a text, and every null, table and level that follows.

Shape legend: L routed layers, E experts, T tokens.

`bh_routing.calibration.passes.calibrate` makes one from a model and text. Nothing here needs the model. The fields are
those of `bh_routing.calibration.data`; everything is computed by functions of them: `fit` (nulls, p-values, tables),
`budget`, `file`, `fingerprint`, `summary`, `kde_pickles`.

Over 350 lines: the one class that people hold, and most of it says what they may ask; what computes is elsewhere.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._words import Clamp, CompensationForm, WeightRule, check_word
from ..decision.compensation import Compensation
from ..decision.table import DecisionTable
from ..decision.types import Limits, check_k
from ..errors import CalibrationMismatchError, CalibrationWarning, InvalidParameterError
from ..patching import PatchPlan
from ..policies import PValuePolicy, RoutingContext, TablePolicy
from ..stats.histogram import Histogram
from ..stats.nulls import Null
from ..stats.procedures import Procedure, check_alpha, get_procedure
from . import budget, file, fingerprint, fit, kde_pickles, summary
from .data import CalibrationData, GivenNulls
from .fit import Fitted
from .null_settings import NullSettings, resolve


class _PValues:
    """A calibration's p-values of a router's logits; an object, so that a patched model can be pickled."""

    def __init__(self, calibration: Calibration, settings: Any) -> None:
        self.calibration, self.settings = calibration, settings

    def __call__(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        layer = fit.layer_index(self.calibration, context.path)
        return fit.p_values(self.calibration, logits_TE, layer, self.settings)


class Calibration(CalibrationData):
    """What a model's routers do on a calibration text.

    Make one with `bh_routing.calibrate`, or load one with `Calibration.load`. It knows, without the model,
    every null distribution, decision table, level and budget. Its attributes are those of
    `bh_routing.calibration.data.CalibrationData`.
    """

    # -- what it holds -----------------------------------------------------------------------------------

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of compensation that it holds, the best one last."""
        held = ["none"]
        held += ["mean"] if self.moments is not None and self.moments.mean_LEH is not None else []
        held += ["linear"] if self.linear is not None else []
        return tuple(held)

    def compensation(self, form: str | None = None, scale: float | None = None) -> dict[str, Compensation]:
        """What stands in for dropped experts, by router path; empty where nothing does.

        Parameters
        ----------
        form : {"none", "mean", "linear"}, optional
            ``mean``: fixed vectors, float32. ``linear``: linear in the router logits; a layer where that did not pay has
            the fixed vectors at their own scale. Default: the last of `forms`.
        scale : float, optional
            0 to 1. Default: the one that was measured for the form (``compensation_scale``, ``linear_scale``).

        Raises
        ------
        CalibrationMismatchError
            For a form that it does not hold.
        InvalidParameterError
            For an unknown one.
        """
        form = self.forms[-1] if form is None else form
        check_word("compensation", form, CompensationForm)
        if form not in self.forms:
            raise CalibrationMismatchError(
                f"compensation={form!r} needs a calibration that holds it, this one holds {', '.join(self.forms)}; "
                "calibrate again, with --sensitivity for the linear one and without --no-means for either."
            )
        if form == "none" or scale == 0.0:
            return {}
        if form == "linear":
            assert self.linear is not None
            own = self.linear_scale if scale is None else scale
            ranks = self.linear.rank_L.tolist()
            found = self.compensation("mean", scale) if 0 in ranks else {}
            return found | {
                path: self.linear.compensation(index, own)
                for index, (path, rank) in enumerate(zip(self.paths, ranks, strict=True))
                if rank and own
            }
        assert self.moments is not None
        layers = self.moments.compensation()
        assert layers is not None
        scale = self.compensation_scale if scale is None else scale
        if scale == 0.0:
            return {}
        return {p: c.scaled(scale).to(dtype=torch.float32) for p, c in zip(self.paths, layers, strict=True)}

    def compensations(self, scale: float | None = None) -> dict[str, Compensation]:
        """`compensation` by fixed vectors, at this scale; empty where it holds none."""
        return self.compensation("mean", scale) if "mean" in self.forms else {}

    def without_means(self) -> Calibration:
        """The same calibration without the mean outputs (no compensation, a smaller file)."""
        if self.moments is None:
            return self
        moments = replace(self.moments, mean_LEH=None, gram_LJJ=None, cross_LJH=None)
        return replace(self.uncertified(), moments=moments, linear=None, token_sizes=None)

    def uncertified(self) -> Calibration:
        """The same calibration without a certificate, for a copy whose levels are other ones."""
        return self if self.certificate is None else replace(self, certificate=None, text_profile=None)

    # -- nulls -------------------------------------------------------------------------------------------

    def with_nulls(
        self, nulls: Mapping[str, Null] | Null, *, statistic: str = "logprob", size: str | None = None
    ) -> Calibration:
        """The same calibration with other null distributions: tables, p-values and budgets follow them.

        Parameters
        ----------
        nulls : mapping of router path to Null, or one Null for all layers
            Anything with ``num`` (samples; 0: unknown) and ``p_values(statistic) -> float64``, non-increasing.
        statistic, size : str
            Of what they are the null, as in `settings`.

        Raises
        ------
        CalibrationMismatchError
            If a router has none.
        """
        by_path = nulls if isinstance(nulls, Mapping) else dict.fromkeys(self.paths, nulls)
        if missing := [path for path in self.paths if path not in by_path]:
            raise CalibrationMismatchError(
                f"expected a null for every router, or one for all; there is none for {missing[0]!r}."
            )
        each = tuple(by_path[path] for path in self.paths)
        return replace(self.uncertified(), given=GivenNulls(nulls=each, statistic=statistic, size=size))

    def settings(self, **settings: Any) -> NullSettings:
        """Statistic and null with their defaults resolved (`bh_routing.calibration.null_settings.resolve`)."""
        return resolve(self, **settings)

    def fit(self, settings: NullSettings) -> Fitted:
        """Null distributions per layer and the statistic's offsets (`bh_routing.calibration.fit.fit`)."""
        return fit.fit(self, settings)

    def null_counts(self, settings: NullSettings) -> Histogram:
        """Binned counts of the base statistic over the null set."""
        return fit.null_counts(self, settings)

    def p_values(
        self, logits_TE: Tensor, layer: str | int, *, temperature: float | None = None, **settings: Any
    ) -> Tensor:
        """Calibrated p-values of every expert, float64 [T, E].

        Parameters
        ----------
        logits_TE : Tensor
            Router logits of one layer.
        layer : str or int
            The router's module path, or its index.
        temperature : float, optional
            Checked against the calibration's.
        **settings
            As in `settings`.
        """
        fit.check_temperature(self, temperature)
        return fit.p_values(self, logits_TE, fit.layer_index(self, layer), resolve(self, **settings))

    # -- tables, levels, budgets -------------------------------------------------------------------------

    def table(
        self,
        alpha: float = 0.05,
        procedure: str | Procedure = "bh",
        *,
        temperature: float | None = None,
        **settings: Any,
    ) -> DecisionTable:
        """The decision table of a procedure at a level.

        Parameters
        ----------
        alpha : float
            0 < alpha < 1.
        procedure : str
            One with fixed critical values: bh, by, bonferroni, holm, hochberg.
        temperature : float, optional
            Checked against the calibration's.
        **settings
            As in `settings`: statistic, size, null, scope, estimator, kernel, bandwidth.

        Raises
        ------
        InvalidParameterError
            For an unknown setting, and for ``storey`` and ``higher_criticism``, which have no table.
        CalibrationError
            If no threshold that the model's own choice could reach is finite: the text was too short.
        """
        fit.check_temperature(self, temperature)
        return fit.table(self, alpha, get_procedure(procedure), resolve(self, **settings))

    def solve(
        self,
        experts_per_token: float | Mapping[str, float],
        procedure: str | Procedure = "bh",
        *,
        min_k: int = 1,
        max_k: int | None = None,
        clamp: Clamp = "after",
        temperature: float | None = None,
        **settings: Any,
    ) -> budget.Solution:
        """Find the level at which the mean number of experts over the whole model meets a budget.

        The mean is taken over the reservoir's tokens and all layers, after min_k, max_k and clamp. It is a
        step function of the level; the nearest step is taken. Statistics beyond every null sample share the
        p-value 1 / (n + 1); where a budget has to tell them apart, the null is extended by an exponential tail
        (``extended=True`` in the settings that are returned), and the level is an ordering, not a rate.

        Parameters
        ----------
        experts_per_token : float or mapping of router path to float
            One budget for the model's mean, or one for each layer.
        procedure, temperature, **settings
            As in `table`.
        min_k, max_k, clamp
            As in the policy that will be used.

        Raises
        ------
        BudgetError
            If no level in (0, 1) meets the budget within 2 %; it tells the reachable range.
        CalibrationError
            If the calibration holds no reservoir.
        """
        fit.check_temperature(self, temperature)
        check_k(min_k, max_k, self.num_experts, least=0)
        check_word("clamp", clamp, Clamp)
        limits = Limits(min_k, max_k, clamp)
        chosen = resolve(self, **settings)
        return budget.solve(self, experts_per_token, get_procedure(procedure), chosen, limits)

    def mean_counts(
        self,
        alpha: float,
        procedure: str | Procedure = "bh",
        *,
        min_k: int = 1,
        max_k: int | None = None,
        clamp: Clamp = "after",
        **settings: Any,
    ) -> dict[str, float]:
        """Mean number of experts per token that a level selects, per layer, on the reservoir."""
        check_alpha(alpha)
        limits, chosen = Limits(min_k, max_k, clamp), resolve(self, **settings)
        counters = budget.counters(self, get_procedure(procedure), chosen, limits)
        return {path: counter.mean(alpha) for path, counter in zip(self.paths, counters, strict=True)}

    def policy(
        self,
        *,
        alpha: float | None = None,
        experts_per_token: float | Mapping[str, float] | None = None,
        procedure: str | Procedure = "bh",
        temperature: float | None = None,
        min_k: int = 1,
        max_k: int | None = None,
        clamp: Clamp = "after",
        weights: WeightRule = "model",
        **settings: Any,
    ) -> TablePolicy | PValuePolicy:
        """A policy at a level or a budget: from a table where the procedure has one, else from p-values.

        Parameters
        ----------
        alpha, experts_per_token
            One of the two; neither means alpha = 0.05.
        procedure, temperature, min_k, max_k, clamp, **settings
            As in `table` and `solve`.
        weights : {"model", "preserve", "sum"}
        """
        if alpha is not None and experts_per_token is not None:
            raise InvalidParameterError(
                f"expected a level or a budget, got both alpha={alpha!r} and "
                f"experts_per_token={experts_per_token!r}; give one of them."
            )
        rule = get_procedure(procedure)
        limits: dict[str, Any] = {"min_k": min_k, "max_k": max_k, "clamp": clamp}
        table: DecisionTable | None = None
        chosen = resolve(self, **settings)
        if experts_per_token is not None:
            level, _, table, chosen = self.solve(
                experts_per_token, rule, temperature=temperature, **limits, **settings
            )
        else:
            level = 0.05 if alpha is None else check_alpha(alpha)
            if rule.has_table:
                table = self.table(level, rule, temperature=temperature, **settings)
        if table is not None:
            return TablePolicy(table, weights=weights, **limits)
        fit.check_temperature(self, temperature)

        assert isinstance(level, float)
        return PValuePolicy(
            _PValues(self, chosen),
            procedure=rule,
            alpha=level,
            temperature=self.temperature,
            weights=weights,
            **limits,
        )

    # -- file, model, other calibrations -----------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration, to a temporary name first (`bh_routing.calibration.file`)."""
        file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a calibration; raises `CalibrationFileError` for a damaged or foreign file."""
        return file.load(path, cls)

    @classmethod
    def from_kde_pickles(
        cls, folder: str | os.PathLike[str], num_experts: int = 64, variant: str = ""
    ) -> Calibration:
        """Load ``distribution_model_layer_{i}[variant].pkl`` files (`bh_routing.calibration.kde_pickles`)."""
        return cls(**kde_pickles.read_folder(folder, num_experts, variant))

    def check(self, plan: PatchPlan, *, strict: bool = True) -> None:
        """Check that the calibration was made for the model that a plan was made for.

        Parameters
        ----------
        plan : PatchPlan
            From `bh_routing.patching.make_plan`.
        strict : bool
            False: other router weights only warn.

        Raises
        ------
        CalibrationMismatchError
            Naming the layer and the field that do not fit.
        """
        fingerprint.check_model(self, plan, strict=strict)

    def merge(self, *others: Calibration) -> Calibration:
        """One calibration from several of the same model on different texts.

        Counts add up exactly, moments in float64; the reservoir keeps the tokens with the smallest hashes. The linear
        compensation and the sizes that follow the token are left out, with a `CalibrationWarning`: they are solutions of sums
        that were taken under one calibration and are in no file. Processes of one run (``torchrun``) add up those sums exactly.

        Raises
        ------
        CalibrationMismatchError
            If they differ in model, layers, temperature, trim, seed or window.
        """
        if any(one.linear is not None or one.token_sizes is not None for one in (self, *others)):
            warnings.warn(
                "a linear compensation and sizes that follow the token cannot be merged from files, which hold their "
                "solutions and not the sums: the merged calibration is without them; calibrate on all of the text at once "
                "(several processes, under torchrun, add up the sums exactly).",
                CalibrationWarning,
                stacklevel=2,
            )
        merged = self
        for other in others:
            merged = merged + other
        return merged

    def summary(self) -> list[dict[str, Any]]:
        """One plain dictionary per layer: what was seen there, for tables and for people."""
        return summary.summary_rows(self)

    def __repr__(self) -> str:
        return summary.describe(self)
