"""`RoutingSettings`: everything that a person can say about a routing, and the policy that it means.

The keywords of `bh_routing.BHRoutingIntegration`, vLLM's configuration, policies as text, the command line and YAML
files make one of these and hand it on. Importing this loads no torch, so that the options can be listed at once.

Over 350 lines: one object says everything, and each of its fields is documented, checked and named here only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .._words import (
    Backend,
    Clamp,
    Estimator,
    Mode,
    NullSet,
    Scope,
    Size,
    Skip,
    Statistic,
    WeightRule,
    check_word,
    did_you_mean,
    wanted,
)
from ..errors import InvalidParameterError, InvalidTypeError
from .levels import LEVELS, certified, check_levels, decided_by, of_phases

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration.calibration import Calibration
    from ..decision.compensation import Compensation
    from ..policies import PhasePolicy, PricePolicy, PValuePolicy, RoutingPolicy, TablePolicy
    from ..stats.procedures import Procedure
    from ..support import Feature

logger = logging.getLogger(__name__)

S = TypeVar("S", bound="RoutingSettings")

NEEDS_CALIBRATION = (
    "pass calibration=..., made by `bh-routing calibrate MODEL --text FILE`."  # the end of a sentence
)


@dataclass(frozen=True, kw_only=True, repr=False)
class RoutingSettings:
    """Everything that a person can say about a routing. Checked on creation.

    Attributes
    ----------
    alpha : float, optional
        Level, 0 < alpha < 1. Default 0.05, unless ``experts_per_token`` is given.
    temperature : float
        Divides the router logits before the statistic.
    min_k : int, optional
        At least so many experts. Default: 1, but 0 where a linear compensation meets a budget of at most a quarter of
        the model's own number: such a token runs without any expert. 0 needs a compensation.
    max_k : int, optional
        At most so many. Default: the model's own top-k. More than that widens the choice, where the family's
        scores are plain softmax or sigmoid.
    mode : {"patch", "analyze"}
        Change the routing, or only count what it would be.
    collect_stats : bool
    weights : {"model", "preserve", "sum"}
        ``"model"``: what the model's own convention gives the selected experts. ``"preserve"``: the row keeps
        the sum it had with top-k. ``"sum"``: sums to 1 (the original design; ruins a model trained without).
    experts_per_token : float or mapping of router path to float, optional
        A budget instead of a level: the level is solved on the calibration text.
    max_kl, agreement : float, optional
        Instead of a level: the loss that is accepted, as KL(own || routed) in nats per token, or the share of next words
        that must stay the same. The calibration's certificate says the level (``bh-routing certify``).
    phases : mapping, optional
        Instead of a level, one for each phase: ``{"prefill": {"experts_per_token": 8}, "decode": {"experts_per_token": 3}}``,
        or ``alpha``, and ``min_k`` beside it. A budget of the model's own number keeps every expert.
    procedure : str or Procedure
        A key of `bh_routing.PROCEDURES`, or an own one.
    pvalues : str or callable
        Only without a calibration: ``"robust"``, ``"softmax"`` or ``"batch"``, or ``f(logits_TE, context) -> p_TE``.
    clamp : {"after", "inside"}
        See `bh_routing.benjamini_hochberg_routing`.
    statistic, null, scope, estimator, size, kernel, bandwidth : optional
        Which calibrated statistic and null (`Calibration.settings`); default: the recommended configuration.
    compensation : bool, str, float or pair, optional
        What is added in place of dropped experts: "mean", fixed vectors; "linear", vectors that follow the token's
        router logits; "none" or False. Default: the best that the calibration holds, at the scale that it measured;
        True insists on one. A number from 0 to 1 is another scale, alone or with a form: ``("linear", 0.9)`` or
        ``"linear:0.9"``. With compensation, and ``weights="model"``, kept experts keep their own weights in every family: nothing is renormalised,
        because the dropped weight is still used.
    skip : {"auto", "compact", "zero"}
        How a dropped expert is kept out (`bh_routing.RoutingIntegration`).
    backend : {"auto", "torch", "triton"}
        What computes a calibrated decision: one fused kernel on a GPU with Triton, else PyTorch.
    distinct_experts : float, optional
        A budget of loads: experts that a layer reads in a decoding step, on average over the model, at the number of
        sequences in use (`bh_routing.decision.price`). What ``alpha`` or ``experts_per_token`` beside it drops stays
        dropped; without either all of the model's own choice is priced.
    price_load : float, optional
        The price of a load itself, in the units of the drop losses; 0 changes nothing.
    resident : mapping of router path to bool [E], or callable of the path that gives one, optional
        Experts that are in memory: with a price, their loads are free.
    batch_invariant : bool
        Refuse what makes a token's output depend on the other sequences of its batch.
    strict : bool
        False: a calibration whose router weights differ from the model's only warns.

    Raises
    ------
    InvalidParameterError, InvalidTypeError
        On creation, for a value out of range; one sentence that names it.

    Examples
    --------
    >>> RoutingSettings(alpha=0.1, min_k=2).to_dict()
    {'alpha': 0.1, 'min_k': 2}
    >>> RoutingSettings.from_dict({"alhpa": 0.1})
    Traceback (most recent call last):
    ...
    bh_routing.errors.InvalidParameterError: there is no setting 'alhpa'; did you mean 'alpha'?
    """

    alpha: float | None = None
    temperature: float = 1.0
    min_k: int | None = None
    max_k: int | None = None
    mode: Mode = "patch"
    collect_stats: bool = True
    weights: WeightRule = "model"
    experts_per_token: float | Mapping[str, float] | None = None
    max_kl: float | None = None
    agreement: float | None = None
    phases: Mapping[str, Mapping[str, Any]] | None = None
    procedure: str | Procedure = "bh"
    pvalues: Literal["robust", "softmax", "batch"] | Callable[..., Tensor] = "robust"
    clamp: Clamp = "after"
    statistic: Statistic | None = None
    size: Size | None = None
    null: NullSet | None = None
    scope: Scope | None = None
    estimator: Estimator | None = None
    kernel: str | None = None
    bandwidth: str | float | None = None
    compensation: bool | float | str | tuple[str, float] | None = None
    skip: Skip = "auto"
    backend: Backend = "auto"
    distinct_experts: float | None = None
    price_load: float | None = None
    resident: Mapping[str, Tensor] | Callable[[str], Tensor] | None = None
    batch_invariant: bool = False
    strict: bool = True

    def __post_init__(self) -> None:
        from ..decision.types import check_k, check_temperature
        from ..stats.kde import BANDWIDTHS, KERNELS
        from ..stats.procedures import check_alpha, get_procedure
        from ..stats.pvalues import P_VALUES

        for item in fields(self):
            value, words = getattr(self, item.name), WORDS.get(item.name)
            if words is not None and (value is not None or item.default is not None):
                check_word(item.name, value, words)
            if item.type == "bool" and not isinstance(value, bool):
                raise InvalidTypeError(f"{item.name} must be true or false, got {value!r}.")
        check_levels(self)
        if self.alpha is not None:
            check_alpha(self.alpha)
        for budget in _budgets(self.experts_per_token):
            if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < math.inf:
                raise InvalidParameterError(
                    f"experts_per_token must be a finite number of experts per token above 0, or one for each router, got {budget!r}."
                )
        self._check_price()
        check_temperature(self.temperature)
        check_k(1 if self.min_k is None else self.min_k, self.max_k, least=0)
        if wanted(self.compensation).form == "none" and self.min_k == 0:
            self.least_kept(None)  # raises
        get_procedure(self.procedure)
        if not callable(self.pvalues):
            check_word("pvalues", self.pvalues, P_VALUES)
        if self.kernel is not None:
            check_word("kernel", self.kernel, KERNELS)
        if isinstance(self.bandwidth, str):
            check_word("bandwidth", self.bandwidth, BANDWIDTHS)

    def _check_price(self) -> None:
        """Raise for a price that is none, and for what a batch-invariant routing cannot have."""
        for name, value, least in (
            ("distinct_experts", self.distinct_experts, "a number of experts per layer and step above 0"),
            ("price_load", self.price_load, "a finite number of at least 0"),
        ):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            in_range = number and (0.0 < value < math.inf or (value == 0.0 and name == "price_load"))  # type: ignore[operator]
            if value is not None and not in_range:
                raise InvalidParameterError(f"{name} must be {least}, got {value!r}.")
        if self.distinct_experts is not None and self.price_load is not None:
            raise InvalidParameterError(
                f"expected a budget of loads or their price, got both distinct_experts={self.distinct_experts!r} and "
                f"price_load={self.price_load!r}; give one of them."
            )
        if self.resident is not None and not self.priced:
            raise InvalidParameterError(
                "resident says which loads are free, which needs a price on loads; give distinct_experts or price_load."
            )
        if self.batch_invariant and (self.priced or self.pvalues == "batch"):
            what = "a price on loads" if self.priced else "pvalues='batch'"
            raise InvalidParameterError(
                f"batch_invariant=True asks for outputs that do not depend on the other sequences of a batch, and {what} "
                "makes them depend on those; leave one of the two out."
            )

    @property
    def priced(self) -> bool:
        """Whether loads have a price."""
        return self.distinct_experts is not None or self.price_load is not None

    # -- other forms --------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls: type[S], values: Mapping[str, Any]) -> S:
        """Settings of a mapping of field names to values.

        Raises
        ------
        InvalidParameterError, InvalidTypeError
            For an unknown name, with the nearest one, or a value out of range.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise InvalidParameterError(f"there is no setting {name!r}; {did_you_mean(str(name), known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults: the shortest mapping that means the same."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def __repr__(self) -> str:
        return f"RoutingSettings({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def with_level(
        self: S,
        *,
        alpha: float | None = None,
        experts_per_token: float | Mapping[str, float] | None = None,
        max_kl: float | None = None,
        agreement: float | None = None,
        phases: Mapping[str, Mapping[str, Any]] | None = None,
        distinct_experts: float | None = None,
        price_load: float | None = None,
    ) -> S:
        """The same settings at another level, or another price: of the two, what is not named stays.

        Raises
        ------
        InvalidParameterError
            Unless exactly one of the first five is given, or of the last two, or of both, and in range.
        """
        from ..stats.procedures import check_one_level

        levels: dict[str, Any] = {"max_kl": max_kl, "agreement": agreement, "phases": phases}
        levels |= {"alpha": alpha, "experts_per_token": experts_per_token}
        changes: dict[str, Any] = {}
        if distinct_experts is not None or price_load is not None:
            changes = {"distinct_experts": distinct_experts, "price_load": price_load}
        if not changes or any(value is not None for value in levels.values()):
            if max_kl is None and agreement is None and phases is None:
                check_one_level(alpha, experts_per_token)
            changes |= levels
        return replace(self, **changes)

    def level_policy(self, level: Mapping[str, Any], calibration: Calibration | None) -> TablePolicy:
        """The policy of these settings at another level: of a request, or of a row of a batch.

        Parameters
        ----------
        level : mapping
            One of alpha, experts_per_token, max_kl and agreement.

        Raises
        ------
        InvalidParameterError, CalibrationError, BudgetError, CertificateError
            If it names something else, or is one that the calibration cannot serve; or where a level has no table (without a
            calibration, or for a procedure that adapts).
        """
        from ..policies import TablePolicy

        known = tuple(name for name in LEVELS if name != "phases")
        if self.priced:
            raise InvalidParameterError(
                "levels of their own and a price on loads exclude each other, got a price; leave it out."
            )
        if not isinstance(level, Mapping):
            raise InvalidTypeError(
                f'a level must be a mapping such as {{"experts_per_token": 3}}, got {level!r}.'
            )
        for name in level:
            if name not in known:
                raise InvalidParameterError(f"a level has no {name!r}; {did_you_mean(str(name), known)}")
        made = self.with_level(**level).policy(calibration)
        if not isinstance(made, TablePolicy):
            raise InvalidParameterError(
                "levels of their own need a calibration, and a procedure that has a table: "
                f"{NEEDS_CALIBRATION}"
            )
        return made

    # -- what they mean -----------------------------------------------------------------------------------

    def budget(self, calibration: Calibration | None) -> float | Mapping[str, float] | None:
        """``experts_per_token``, or the level that is certified for the loss that was named.

        Raises
        ------
        CertificateError
            If the calibration's certificate does not cover it (`bh_routing.settings.levels.certified`).
        """
        if self.max_kl is None and self.agreement is None:
            return self.experts_per_token
        return certified(self, calibration)

    def elsewhere(self, calibration: Calibration | None, weights: str, engine: str) -> str | None:
        """With a certified loss, the sentence that it was certified on other weights or in another engine."""
        held = None if calibration is None else calibration.certificate
        named = self.max_kl is not None or self.agreement is not None
        return held.elsewhere(weights, engine) if held is not None and named else None

    def decided_by(self, calibration: Calibration) -> tuple[dict[str, Any], tuple[str, float]]:
        """What decides beside the level (`bh_routing.settings.levels.decided_by`)."""
        return decided_by(self, calibration)

    @property
    def null_settings(self) -> dict[str, Any]:
        """What `Calibration.settings` is asked for: the fields of the null that were chosen."""
        names = ("statistic", "null", "scope", "estimator", "size", "kernel", "bandwidth")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def check_calibrated(self, calibration: object) -> None:
        """Raise `InvalidParameterError` for a setting that needs a calibration where there is none."""
        if calibration is not None:
            return
        if self.min_k == 0:
            self.least_kept(None)  # raises

        insists = wanted(self.compensation).insists
        needs = {
            "experts_per_token": self.experts_per_token,
            "max_kl": self.max_kl,
            "agreement": self.agreement,
            "phases": self.phases,
            "compensation": self.compensation if insists else None,
            "distinct_experts": self.distinct_experts,
            "price_load": self.price_load,
        }
        for name, value in (needs | self.null_settings).items():
            if value is not None:
                raise InvalidParameterError(f"{name}={value!r} needs a calibration: {NEEDS_CALIBRATION}")

    def form(self, calibration: Calibration | None) -> str:
        """The form of compensation that these settings mean: "none", "mean" or "linear".

        Raises
        ------
        InvalidParameterError
            If the compensation was asked for and the calibration does not hold it.
        """

        form, _, insists = wanted(self.compensation)
        forms = ("none",) if calibration is None else calibration.forms
        chosen = forms[-1] if form is None else form
        if chosen not in forms or (insists and chosen == "none"):
            if calibration is None:
                raise InvalidParameterError(
                    f"compensation={self.compensation!r} needs a calibration: {NEEDS_CALIBRATION}"
                )
            if form == "linear":
                needs = "maps that are linear in the router's logits"
                advice = "calibrate anew (with --sensitivity, without --no-means), or use compensation='mean'"
            else:
                needs = "the experts' mean outputs"
                advice = "calibrate without --no-means, or turn the compensation off"
            raise InvalidParameterError(
                f"compensation={self.compensation!r} needs {needs}, which this calibration does not hold; {advice}."
            )
        return chosen

    def compensations(self, calibration: Calibration | None) -> dict[str, Compensation]:
        """What stands in for dropped experts, by router path (`Calibration.compensation`); empty for nothing.

        Raises
        ------
        InvalidParameterError
            If the compensation was asked for and the calibration does not hold it.
        """

        form = self.form(calibration)
        if calibration is None or form == "none":
            return {}
        return calibration.compensation(form, wanted(self.compensation).scale)

    def least_kept(self, calibration: Calibration | None) -> int:
        """``min_k``, or what None means: 0 where a linear compensation meets a budget of a quarter of the own number or less,
        the own number itself at a budget of just that, else 1.

        Raises
        ------
        InvalidParameterError
            For 0 without a compensation.
        """
        if self.phases is not None:
            return min(one.least_kept(calibration) for one in of_phases(self, calibration).values())
        form = self.form(calibration)
        if self.min_k == 0 and form == "none":
            hint = "" if calibration is None else ", unless a compensation stands in for what is dropped"
            raise InvalidParameterError(
                f"min_k must be at least 1, got 0; every token needs an expert{hint}."
            )
        if self.min_k is not None:
            return self.min_k
        budgets = [] if calibration is None else _budgets(self.budget(calibration))
        if calibration is None or not budgets:
            return 1
        most = {layer.top_k for layer in calibration.layers}
        if len(most) == 1 and set(budgets) == most and (self.max_k is None or self.max_k in most):
            return int(most.pop())  # the model's own number keeps every expert, which no level does
        if form != "linear":
            return 1
        own = sum(layer.top_k for layer in calibration.layers) / calibration.num_layers
        return 0 if sum(budgets) / len(budgets) <= own / 4 else 1

    def least_loaded(self, calibration: Calibration) -> int:
        """How many of a token's experts a price loads whatever they are worth: `least_kept`, but 0 with a linear compensation.

        A number that was given as ``min_k`` holds.
        """
        linear = self.min_k is None and self.form(calibration) == "linear"
        return 0 if linear else self.least_kept(calibration)

    def features(self, calibration: Calibration | None) -> list[Feature]:
        """What these settings ask of an engine (`bh_routing.support`); not widening, which the model's own number decides."""
        from ..stats.procedures import get_procedure

        form = self.form(calibration)
        asked: dict[Feature, bool] = {
            "levels and budgets": True,
            "p-values per token": calibration is None or not get_procedure(self.procedure).has_table,
            "mean compensation": form == "mean",
            "linear compensation": form == "linear",
            "token size": self.size == "token" or (self.size is None and form == "linear"),
            "min_k = 0": self.least_kept(calibration) == 0,
            "price": self.priced,
            "phases": self.phases is not None,
        }
        return [feature for feature, is_asked in asked.items() if is_asked]

    def policy(self, calibration: Calibration | None = None) -> TablePolicy | PValuePolicy | PhasePolicy:
        """The policy: from the calibration's table, else from p-values. Warns about settings that have no effect.

        Raises
        ------
        InvalidParameterError
            For a setting that needs a calibration where there is none.
        CalibrationError, BudgetError
            For a calibration that cannot serve the settings, or a budget that no level meets.
        """
        from ..policies import PhasePolicy, PValuePolicy, TablePolicy

        self.check_calibrated(calibration)
        if self.phases is not None:
            by_phase = of_phases(self, calibration)
            return PhasePolicy({phase: one.policy(calibration) for phase, one in by_phase.items()})
        limits: dict[str, Any] = {
            "procedure": self.procedure,
            "temperature": self.temperature,
            "min_k": self.least_kept(calibration),
            "max_k": self.max_k,
            "clamp": self.clamp,
            "weights": self.weights,
        }
        made: RoutingPolicy
        if calibration is None:
            made = PValuePolicy(self.pvalues, alpha=0.05 if self.alpha is None else self.alpha, **limits)
            if self.temperature != 1.0 and self.pvalues in ("robust", "batch"):
                logger.warning(
                    "temperature=%g has no effect: %s p-values do not depend on the scale of the logits.",
                    self.temperature,
                    self.pvalues,
                )
        else:
            made = calibration.policy(
                alpha=self.alpha,
                experts_per_token=self.budget(calibration),
                compensated=self.form(calibration),
                **self.null_settings,
                **limits,
            )
            if self.priced:
                made = self._with_price(made, calibration)
            if self.pvalues != "robust":
                logger.warning("pvalues=%r has no effect: the calibration's are used.", self.pvalues)
        if isinstance(made, TablePolicy):
            made.backend = self.backend
        elif self.backend != "auto":
            logger.warning(
                "backend=%r has no effect: without a calibration p-values are computed in PyTorch.",
                self.backend,
            )
        return made

    def _with_price(self, policy: RoutingPolicy, calibration: Calibration) -> PricePolicy:
        """The same policy under the price of these settings."""
        from ..calibration.loads import price_policy
        from ..policies import TablePolicy

        if not isinstance(policy, TablePolicy):
            raise InvalidParameterError(
                f"a price on loads acts on a decision table, which the procedure {self.procedure!r} does not have; use 'bh'."
            )
        whole = self.alpha is None and self.experts_per_token is None
        return price_policy(
            calibration,
            None if whole else policy.table,
            calibration.settings(compensated=self.form(calibration), **self.null_settings),
            distinct_experts=self.distinct_experts,
            price_load=self.price_load,
            first=self.least_loaded(calibration),
            resident=self.resident,
            min_k=policy.min_k,
            max_k=policy.max_k,
            clamp=policy.clamp,
            weights=policy.weights,
        )

    def rewrite(self, policy: RoutingPolicy, calibration: Calibration | None) -> None:
        """Write what these settings decide by into a policy that is in use, in the same buffers.

        Raises
        ------
        InvalidParameterError, CalibrationError, BudgetError
            If they cannot be served, or need another kind of policy; nothing has changed then.
        """
        from ..policies import PhasePolicy, PricePolicy, PValuePolicy, TablePolicy

        new = self.policy(calibration)
        if isinstance(policy, PhasePolicy) and isinstance(new, PhasePolicy):
            for phase, one in of_phases(self, calibration).items():
                one.rewrite(policy.by_phase[phase], calibration)
        elif isinstance(policy, TablePolicy) and type(new) is type(policy):
            policy.min_k = new.min_k  # None means one thing at one budget and another at another
            policy.set_table(new.table)
            if isinstance(policy, PricePolicy) and isinstance(new, PricePolicy):
                policy.first = new.first
                policy.set_prices(new.prices)
        elif isinstance(policy, PValuePolicy) and isinstance(new, PValuePolicy):
            policy.set_alpha(new.alpha)
            policy.pvalues = new.pvalues
        else:
            raise InvalidParameterError(
                f"expected settings of a {type(policy).__name__}, which is in use, got some of a {type(new).__name__}; "
                "unpatch and patch anew for that."
            )

    def describe(
        self, policy: RoutingPolicy | None, *, calibrated: bool, top_k: int | None = None
    ) -> dict[str, Any]:
        """Of a routing by a policy of these settings, what the original design's statistics say of its settings."""
        from ..stats.procedures import get_procedure

        told = {
            "alpha": level_of(policy),
            "temperature": self.temperature,
            "min_k": getattr(policy, "min_k", self.min_k or 1),
            "max_k": self.max_k or top_k,
            "procedure": get_procedure(self.procedure).name,
            "calibrated": calibrated,
        }
        names = ("experts_per_token", "max_kl", "agreement", "phases", "distinct_experts", "price_load")
        levels = {name: getattr(self, name) for name in names}
        return told | {name: value for name, value in levels.items() if value is not None}


COUNTED: dict[Mode, tuple[str, str]] = {
    "patch": ("mean_experts_per_token", "std_experts_per_token"),
    "analyze": ("bh_would_select_mean", "bh_would_select_std"),
}


def counted(mode: Mode, total: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of ``Telemetry.to_dict()["total"]`` under the original design's keys."""
    keys = (*COUNTED[mode], "total_forward_passes", "total_tokens")
    figures = (total[key] for key in ("mean_experts", "std_experts", "router_calls", "tokens"))
    return dict(zip(keys, figures, strict=True))


def level_of(policy: RoutingPolicy | None) -> float | None:
    """The level of a policy; None where it has none, or one for each layer."""
    return getattr(getattr(policy, "table", policy), "alpha", None)


def _budgets(experts_per_token: Any) -> list[Any]:
    if experts_per_token is None:
        return []
    return list(experts_per_token.values()) if isinstance(experts_per_token, Mapping) else [experts_per_token]


WORDS: dict[str, Any] = {
    "mode": Mode,
    "weights": WeightRule,
    "clamp": Clamp,
    "statistic": Statistic,
    "size": Size,
    "null": NullSet,
    "scope": Scope,
    "estimator": Estimator,
    "skip": Skip,
    "backend": Backend,
}
