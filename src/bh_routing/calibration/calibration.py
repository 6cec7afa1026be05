"""A calibration: what a model's routers do on a text, and every null, table and level that follows from it.

Shape legend: L routed layers, E experts, K slots of the router's own choice, H hidden size, N tokens of the
reservoir, T tokens, C candidates (the own slots; all E when widening), B bins.

`bh_routing.calibration.passes.calibrate` makes one from a model and text; `bh_routing.calibration.file` reads and writes
it. Nothing here needs the model.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..decision.table import DecisionTable, smallest_passing
from ..decision.types import Clamp, WeightRule, check_clamp, check_k
from ..errors import CalibrationError, CalibrationMismatchError, InvalidParameterError
from ..policies import PValuePolicy, RoutingContext, TablePolicy
from ..stats.histogram import Histogram, pool_counts
from ..stats.nulls import Null, fit_null
from ..stats.procedures import Procedure, check_alpha, get_procedure
from ..stats.statistic import full_statistic
from .budget import Counter, Limits, Solution, solve
from .data import LayerRecord, Moments, NullSettings, Reservoir, some_of

if TYPE_CHECKING:
    from ..patching import PatchPlan
from ..errors import CalibrationWarning
from .data import Fitted


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What a model's routers do on a calibration text.

    Make one with `bh_routing.calibrate`, or load one with `Calibration.load`. It knows, without the model,
    every null distribution, decision table, level and budget.

    Attributes
    ----------
    model_id : str
        Name or path of the model.
    layers : tuple of LayerRecord
    num_experts : int
        E, the width of the router logits.
    temperature : float
        What divided the logits.
    trim : int
        The trimmed null leaves out this many of the highest and of the lowest logits of each token.
    histograms : dict
        ``histograms["logit" | "logprob"]["unselected" | "selected" | "trimmed"]``: binned counts of the base
        statistic, int64 [L, E, B].
    moments : Moments or None
        Sizes and means of the experts' outputs; None if they were not collected.
    reservoir : Reservoir or None
    reservoir_size : int
        How many tokens the reservoir holds at most.
    fingerprint_LD : Tensor
        float64, projections of each router's weights (`bh_routing.calibration.fingerprint.fingerprint`).
    tokens, documents : int
        How many were seen.
    text_digest : str
        Of the documents, whatever their order.
    seed, window : int
        Seed of the reservoir's hash; the longest run of tokens in one forward.
    compensation_strength : float
        What the compensation is multiplied by, 0 to 1: measured (`bh_routing.calibration.strength`), 1 where it was not.
    left_out : tuple of str
        Paths of routers that no token of a text reaches (of a vision tower, for example): they are not
        calibrated, and an integration leaves them as they are.
    """

    model_id: str
    layers: tuple[LayerRecord, ...]
    num_experts: int
    histograms: dict[str, dict[str, Histogram]]
    moments: Moments | None = None
    reservoir: Reservoir | None = None
    reservoir_size: int = 0
    fingerprint_LD: Tensor
    temperature: float = 1.0
    trim: int = 8
    tokens: int = 0
    documents: int = 0
    text_digest: str = "0" * 32
    seed: int = 0
    window: int = 0
    compensation_strength: float = 1.0
    left_out: tuple[str, ...] = ()
    library_version: str = ""
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    # -- what it holds -----------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Routed layers, L."""
        return len(self.layers)

    @property
    def paths(self) -> tuple[str, ...]:
        """Router module paths, in order."""
        return tuple(layer.path for layer in self.layers)

    def mean_outputs(self, strength: float | None = None) -> dict[str, Tensor]:
        """What compensates dropped experts, by router path; empty if it was not kept, or at strength 0.

        float32 [E, H], the experts' mean outputs times the strength; after a second pass [2, E, H], fitted to what
        was dropped (`Moments.compensation`, `bh_routing.decision.compensation`).

        Parameters
        ----------
        strength : float, optional
            0 to 1. Default: ``compensation_strength``.
        """
        strength = self.compensation_strength if strength is None else strength
        compensation_LEH = None if self.moments is None else self.moments.compensation()
        if compensation_LEH is None or strength == 0.0:
            return {}
        return {p: (strength * m).float() for p, m in zip(self.paths, compensation_LEH, strict=True)}

    def without_means(self) -> Calibration:
        """The same calibration without the mean outputs (no compensation, a smaller file)."""
        if self.moments is None:
            return self
        return replace(
            self, moments=replace(self.moments, mean_LEH=None, gram_LJJ=None, cross_LJH=None), _cache={}
        )

    # -- nulls -------------------------------------------------------------------------------------------

    def settings(
        self,
        *,
        statistic: str | None = None,
        size: str | None = None,
        null: str = "unselected",
        scope: str | None = None,
        estimator: str = "empirical",
        kernel: str = "gaussian",
        bandwidth: str | float = "silverman",
        extended: bool = False,
        compensated: bool | None = None,
    ) -> NullSettings:
        """Resolve defaults to the recommended configuration, as far as this calibration supports it.

        Parameters
        ----------
        statistic : str, optional
            Default: ``contribution`` where the experts' outputs were collected, else ``logprob``.
        size : str, optional
            Default: ``sensitivity`` where it was collected; else ``deviation`` with compensation, ``output``
            without.
        null, estimator, kernel, bandwidth, extended
            As in `NullSettings`.
        scope : str, optional
            Default: ``model`` for ``contribution`` and ``logprob``, whose units compare across layers;
            ``layer`` for ``logit``.
        compensated : bool, optional
            Whether dropped experts' mean outputs will be added back; default: where they are known.
        """
        moments = self.moments
        if statistic is None:
            statistic = "contribution" if moments is not None else "logprob"
        if statistic == "contribution":
            if moments is None:
                raise CalibrationMismatchError(
                    "statistic='contribution' needs the experts' outputs, which this calibration was made "
                    "without; calibrate with outputs, or use statistic='logprob'."
                )
            if size is None:
                if compensated is None:
                    compensated = moments.mean_LEH is not None
                if moments.sensitivity_LE is not None:
                    size = "sensitivity"
                else:
                    size = "deviation" if compensated else "output"
            if size == "sensitivity" and moments.sensitivity_LE is None:
                raise CalibrationMismatchError(
                    "size='sensitivity' needs the loss sensitivities, which this calibration was made "
                    "without; calibrate with --sensitivity, or use size='deviation'."
                )
        elif size is not None:
            raise InvalidParameterError(
                f"size={size!r} belongs to statistic='contribution', got statistic={statistic!r}; leave it out."
            )
        return NullSettings(
            statistic=statistic,
            size=size,
            null=null,
            scope=scope or ("layer" if statistic == "logit" else "model"),
            estimator=estimator,
            kernel=kernel,
            bandwidth=bandwidth,
            extended=extended,
        )

    def offsets(self, settings: NullSettings) -> Tensor:
        """What is added to the base statistic per (layer, expert), float32 [L, E]."""
        if settings.statistic != "contribution":
            return torch.zeros(self.num_layers, self.num_experts)
        assert self.moments is not None
        assert settings.size is not None
        return self.moments.size(settings.size).log().float()

    def null_counts(self, settings: NullSettings) -> Histogram:
        """Binned counts of the base statistic over the null set."""
        kind = "logit" if settings.statistic == "logit" else "logprob"
        held = self.histograms.get(kind)
        if held is None:
            raise CalibrationMismatchError(
                f"this calibration holds no counts of {kind!r}, which statistic={settings.statistic!r} needs; "
                f"it holds {', '.join(map(repr, self.histograms)) or 'none'}."
            )
        if settings.null == "all":
            return held["unselected"] + held["selected"]
        return held[settings.null]

    def fit(self, settings: NullSettings) -> Fitted:
        """Null distributions per layer, float64, and the statistic's offsets; computed once per settings.

        Raises
        ------
        CalibrationError
            If a layer (with scope ``model``: the model) has no null samples.
        """
        if settings not in self._cache:
            offset_LE = self.offsets(settings)
            counts = self.null_counts(settings)
            nulls: list[Null] = []
            rows: list[int | None] = [None] if settings.scope == "model" else list(range(self.num_layers))
            for layer in rows:
                pooled = pool_counts(counts, offset_LE, layer)
                if pooled.num == 0:
                    where = "the model" if layer is None else f"layer {self.paths[layer]}"
                    raise CalibrationError(
                        f"{where} has no null samples (null={settings.null!r}): expected experts that the "
                        "router passed over; calibrate on more text, or use null='all'."
                    )
                nulls.append(
                    fit_null(
                        pooled,
                        settings.estimator,
                        kernel=settings.kernel,
                        bandwidth=settings.bandwidth,
                        extended=settings.extended,
                    )
                )
            if len(nulls) == 1:
                nulls *= self.num_layers
            self._cache[settings] = Fitted(tuple(nulls), offset_LE)
        return self._cache[settings]

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
        fitted = self.fit(self.settings(**settings))
        self._check_temperature(temperature)
        return self.fitted_p_values(
            logits_TE, self._index(layer), self.settings(**settings).statistic, fitted
        )

    def fitted_p_values(self, logits_TE: Tensor, index: int, statistic: str, fitted: Fitted) -> Tensor:
        """p-values float64 [T, E] of the layer with this index, from nulls that are fitted."""
        offset_E = fitted.offset_LE[index].to(logits_TE.device)
        score_func = self.layers[index].score_func
        return fitted.nulls[index].p_values(
            full_statistic(logits_TE, offset_E, statistic, score_func, self.temperature)
        )

    def _index(self, layer: str | int) -> int:
        if isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < self.num_layers:
            return layer
        if layer in self.paths:
            return self.paths.index(layer)
        raise CalibrationMismatchError(
            f"the calibration has no layer {layer!r}; it has {some_of(self.paths)}, or the indices 0 to "
            f"{self.num_layers - 1}."
        )

    def _check_temperature(self, temperature: float | None) -> None:
        if temperature is not None and temperature != self.temperature:
            raise CalibrationMismatchError(
                f"the calibration was made at temperature {self.temperature:g}, got temperature="
                f"{temperature:g}; calibrate again with that temperature."
            )

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
        self._check_temperature(temperature)
        chosen = self.settings(**settings)
        if chosen.statistic == "logit" and self.temperature != 1.0:
            warnings.warn(
                f"temperature={self.temperature:g} changes no decision with statistic='logit': the null is "
                "divided by it as well.",
                CalibrationWarning,
                stacklevel=2,
            )
        thresholds_LE = self.thresholds([alpha] * self.num_layers, get_procedure(procedure), chosen)
        self._check_reach(thresholds_LE, alpha, get_procedure(procedure), chosen)
        return self.table_from(thresholds_LE, alpha, get_procedure(procedure), chosen)

    def thresholds(self, alphas: list[float], procedure: Procedure, settings: NullSettings) -> Tensor:
        """Thresholds float32 [L, E] at one level per layer."""
        fitted = self.fit(settings)
        rows: dict[tuple[int, float], Tensor] = {}
        for null, alpha in zip(fitted.nulls, alphas, strict=True):
            if (id(null), alpha) not in rows:
                critical_E = procedure.critical_values(alpha, self.num_experts)
                rows[id(null), alpha] = smallest_passing(null, critical_E)
        return torch.stack([rows[id(n), a] for n, a in zip(fitted.nulls, alphas, strict=True)])

    def table_from(
        self, thresholds_LE: Tensor, alpha: float | None, procedure: Procedure, settings: NullSettings
    ) -> DecisionTable:
        """A decision table of thresholds [L, E]."""
        return DecisionTable(
            thresholds_LE=thresholds_LE,
            rule=procedure.rule or "step_up",
            statistic=settings.statistic,
            offset_LE=self.offsets(settings),
            paths=self.paths,
            temperature=self.temperature,
            alpha=alpha,
            label=f"{procedure.name}: {settings.describe()}",
        )

    def _check_reach(
        self, thresholds_LE: Tensor, alpha: float, procedure: Procedure, settings: NullSettings
    ) -> None:
        """Refuse thresholds that nothing can reach; warn where only some are out of reach."""
        tops = [layer.top_k for layer in self.layers]
        dead = [i for i, k in enumerate(tops) if bool(torch.isinf(thresholds_LE[i, :k]).all())]
        short = [i for i, k in enumerate(tops) if bool(torch.isinf(thresholds_LE[i, :k]).any())]
        if not short:
            return
        row = dead[0] if dead else short[0]
        samples = self.fit(settings).nulls[row].num
        rank = tops[row] if dead else 1
        critical = float(procedure.critical_values(alpha, self.num_experts)[rank - 1])
        factor = (1.0 / critical) / max(1, samples)
        needed = math.ceil(factor * max(1, self.tokens))
        text = (
            f"{procedure.name} at alpha={alpha:g} asks for p-values down to {critical:.2g} in layer "
            f"{self.paths[row]}, but {samples} null samples reach only {1 / (samples + 1):.2g}: calibrate on "
            f"about {needed} tokens or more (this calibration saw {self.tokens}), or raise alpha."
        )
        if dead:
            raise CalibrationError(f"no threshold is finite: {text}")
        warnings.warn(f"some thresholds are out of reach: {text}", CalibrationWarning, stacklevel=3)

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
    ) -> Solution:
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
        self._check_temperature(temperature)
        check_k(min_k, max_k, self.num_experts)
        check_clamp(clamp)
        chosen = self.settings(**settings)
        limits = Limits(min_k, max_k, clamp)
        return solve(self, experts_per_token, get_procedure(procedure), chosen, limits)

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
        rule, chosen = get_procedure(procedure), self.settings(**settings)
        check_alpha(alpha)
        limits = Limits(min_k, max_k, clamp)
        counters = [Counter(self, i, rule, chosen, limits) for i in range(self.num_layers)]
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
        chosen = self.settings(**settings)
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
        self._check_temperature(temperature)
        fitted = self.fit(chosen)

        def p_values(logits_TE: Tensor, context: RoutingContext) -> Tensor:
            return self.fitted_p_values(logits_TE, self._index(context.path), chosen.statistic, fitted)

        assert isinstance(level, float)
        return PValuePolicy(
            p_values, procedure=rule, alpha=level, temperature=self.temperature, weights=weights, **limits
        )

    # -- file, model, other calibrations -----------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration, to a temporary name first (`bh_routing.calibration.file`)."""
        from .file import save

        save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read a calibration; raises `CalibrationFileError` for a damaged or foreign file."""
        from .file import load

        return load(path)

    @staticmethod
    def from_kde_pickles(
        folder: str | os.PathLike[str], num_experts: int = 64, variant: str = ""
    ) -> Calibration:
        """Load ``distribution_model_layer_{i}[variant].pkl`` files (`bh_routing.calibration.kde_pickles`)."""
        from .kde_pickles import from_kde_pickles

        return from_kde_pickles(folder, num_experts, variant)

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
        from .fingerprint import check_model

        check_model(self, plan, strict=strict)

    def merge(self, *others: Calibration) -> Calibration:
        """One calibration from several of the same model on different texts.

        Counts add up exactly, moments in float64; the reservoir keeps the tokens with the smallest hashes.

        Raises
        ------
        CalibrationMismatchError
            If they differ in model, layers, temperature, trim, seed or window.
        """
        from .merge import merge

        merged = self
        for other in others:
            merged = merge(merged, other)
        return merged

    def summary(self) -> list[dict[str, Any]]:
        """One plain dictionary per layer: what was seen there, for tables and for people."""
        from .summary import summary_rows

        return summary_rows(self)

    def __repr__(self) -> str:
        from .summary import describe

        return describe(self)
