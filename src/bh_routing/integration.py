"""The integration: a model, a policy, and the patch that joins them.

`RoutingIntegration` takes any policy. `BHRoutingIntegration` is the class of the original design: it builds
the policy from a level (or a budget) and, where there is one, a calibration.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from .decision.backend import Backend, check_backend
from .decision.compensation import check_strength
from .decision.types import Clamp, WeightRule, check_clamp, check_k, check_temperature
from .errors import InvalidParameterError, InvalidTypeError, PatchError
from .patching import PatchPlan, RoutingPatch, make_plan
from .patching.apply import Skip
from .policies import PValuePolicy, RoutingPolicy, TablePolicy
from .stats.procedures import check_alpha, check_one_level, get_procedure
from .telemetry.figures import Telemetry

if TYPE_CHECKING:
    from .calibration.calibration import Calibration

logger = logging.getLogger(__name__)

Mode = Literal["patch", "analyze"]


class RoutingIntegration:
    """Routes a pretrained Mixture-of-Experts model by a policy, reversibly.

    Parameters
    ----------
    model : nn.Module
        A transformers model (or anything whose routers keep the same contract). Its source, weights,
        ``requires_grad`` and training flags are never touched.
    policy : RoutingPolicy
        What decides (see `bh_routing.policies`).
    mode : {"patch", "analyze"}
        ``"patch"``: the decision replaces the model's. ``"analyze"``: the model routes as always, and only
        the statistics say what the policy would have done.
    collect_stats : bool
        Keep telemetry (per layer, exact per token, on the model's device).
    skip : {"auto", "compact", "zero"}
        How a dropped expert is kept out: ``"compact"`` costs nothing, ``"zero"`` (index kept, weight 0) saves
        nothing and is safe everywhere; ``"auto"`` takes ``"compact"`` wherever the experts allow it.
    means : mapping of router path to Tensor, optional
        Mean outputs [E, H] of the experts; what a dropped expert of the model's own choice would have added
        on average is then added back (compensation).

    Raises
    ------
    NoRoutersError, UnsupportedModelError
        If the model has no router, or none that can be served.
    InvalidParameterError
        If the policy does not fit the routers.

    Examples
    --------
    >>> from bh_routing.policies import TopKPolicy
    >>> model = getfixture("nano_model")
    >>> with RoutingIntegration(model, TopKPolicy(4)) as integrator:
    ...     _ = model(input_ids=getfixture("token_ids"))
    ...     integrator.telemetry.mean_experts_per_token
    4.0
    """

    def __init__(
        self,
        model: nn.Module,
        policy: RoutingPolicy,
        *,
        mode: Mode = "patch",
        collect_stats: bool = True,
        skip: Skip = "auto",
        means: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if mode not in ("patch", "analyze"):
            raise InvalidParameterError(f"mode must be 'patch' or 'analyze', got {mode!r}.")
        if skip not in ("auto", "compact", "zero"):
            raise InvalidParameterError(f"skip must be 'auto', 'compact' or 'zero', got {skip!r}.")
        self.model, self.policy, self.mode = model, policy, mode
        self.collect_stats, self.skip = bool(collect_stats), skip
        self.means = dict(means or {})
        self.plan = self._make_plan()
        policy.bind(self.plan.contexts)
        slots = [policy.slots(context) for context in self.plan.contexts]
        self._telemetry = Telemetry(self.plan.contexts, slots) if collect_stats else None
        self._patch = RoutingPatch(
            self.plan,
            policy,
            telemetry=self._telemetry,
            change=mode == "patch",
            skip=skip,
            means=self.means,
        )

    def _make_plan(self) -> PatchPlan:
        return make_plan(self.model)

    @property
    def is_patched(self) -> bool:
        """Whether the model is patched by this integration now."""
        return self._patch.applied

    @property
    def telemetry(self) -> Telemetry:
        """What was counted (see `bh_routing.telemetry.figures.Telemetry`).

        Raises
        ------
        PatchError
            With ``collect_stats=False``.
        """
        if self._telemetry is None:
            raise PatchError(
                "no statistics were collected: expected collect_stats=True, got False; "
                "make the integration with collect_stats=True."
            )
        return self._telemetry

    @property
    def watchers(self) -> list[Callable[..., None]]:
        """Functions ``f(router, context, decision, logits_TE)`` called after every decision; add to it or remove.

        Tensors carry their graph. A copy of the model is not watched.
        """
        return self._patch.watchers

    def patch_model(self) -> None:
        """Apply the plan: all routers, or none.

        Raises
        ------
        PatchError
            If the model is patched already.
        """
        self._patch.apply()
        for layer in self.plan.layers:
            logger.debug("%s: %s -> %s", layer.path, type(layer.router).__name__, self.policy)
        logger.info(
            "%s: %d routers patched, mode=%s", self.plan.model_class, len(self.plan.layers), self.mode
        )

    def unpatch_model(self) -> None:
        """Restore the model, bit for bit. Does nothing if it is not patched."""
        self._patch.remove()

    def __enter__(self) -> Any:
        self.patch_model()
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch_model()

    def reset_stats(self) -> None:
        """Set all statistics to zero."""
        if self._telemetry is not None:
            self._telemetry.reset()

    def get_routing_stats(self) -> dict[str, Any]:
        """The statistics as a plain dictionary.

        In mode ``"patch"``: ``mode``, ``mean_experts_per_token``, ``std_experts_per_token``,
        ``total_forward_passes`` (router calls) and the policy's settings. In mode ``"analyze"``: ``mode``,
        ``bh_would_select_mean``, ``bh_would_select_std``, ``total_forward_passes``. Means over no token, or
        without ``collect_stats``, are NaN. `telemetry` has everything per layer.
        """
        telemetry = self._telemetry
        nan = float("nan")
        mean = nan if telemetry is None else telemetry.mean_experts_per_token
        std = nan if telemetry is None else telemetry.std_experts_per_token
        calls = 0 if telemetry is None else telemetry.total_forward_passes
        if telemetry is not None and calls and (silent := telemetry.silent_layers()):
            logger.warning(
                "%d of %d patched routers were never called (%s%s): their layers run unrouted, or saw no token; "
                "a kernel that replaces the whole block bypasses its router.",
                len(silent),
                len(self.plan.layers),
                ", ".join(silent[:3]),
                ", ..." if len(silent) > 3 else "",
            )
        tokens = 0 if telemetry is None else telemetry.num_tokens
        if self.mode == "analyze":
            counts = {"bh_would_select_mean": mean, "bh_would_select_std": std}
        else:
            counts = {"mean_experts_per_token": mean, "std_experts_per_token": std}
        return (
            {"mode": self.mode}
            | self._settings()
            | counts
            | {"total_forward_passes": calls, "total_tokens": tokens}
        )

    def _settings(self) -> dict[str, Any]:
        return self.policy.describe()

    def __repr__(self) -> str:
        state = "patched" if self.is_patched else "not patched"
        return f"{type(self).__name__}({self.plan.model_class}, {self.policy!r}, mode={self.mode!r}, {state})"


class BHRoutingIntegration(RoutingIntegration):
    """Benjamini-Hochberg routing of a pretrained Mixture-of-Experts model.

    For each token and layer, "expert e is not called for" is a null hypothesis; the model's own top-k experts
    are the candidates, and those whose p-values the procedure rejects run. The others are skipped.

    Parameters
    ----------
    model : nn.Module
        A transformers model with supported routers (``bh-routing families``).
    alpha : float, optional
        Level, 0 < alpha < 1. Default 0.05, unless ``experts_per_token`` is given.
    temperature : float
        Divides the router logits before the statistic.
    min_k : int
        At least so many experts.
    max_k : int, optional
        At most so many. Default: the model's own top-k. More than that widens the choice, where the family's
        scores are plain softmax or sigmoid.
    mode : {"patch", "analyze"}
        Change the routing, or only count what it would be.
    collect_stats : bool
    weights : {"model", "preserve", "sum"}
        ``"model"``: what the model's own convention gives the selected experts. ``"preserve"``: the row keeps
        the sum it had with top-k. ``"sum"``: sums to 1 (the original design; ruins a model trained without).
    calibration : Calibration or path, optional
        Calibrated null (``bh-routing calibrate``). Without one, every token is its own robust null.
    experts_per_token : float or mapping of router path to float, optional
        A budget instead of a level: the level is solved on the calibration text.
    procedure : str
        A key of `bh_routing.PROCEDURES`.
    pvalues : str or callable
        Only without a calibration: ``"robust"``, ``"softmax"`` or ``"batch"``.
    clamp : {"after", "inside"}
        See `bh_routing.benjamini_hochberg_routing`.
    statistic, null, scope, estimator, size, kernel, bandwidth : optional
        Which calibrated statistic and null (`Calibration.settings`); default: the recommended configuration.
    compensation : bool or float, optional
        Add what the dropped experts would have added on average back; default: where the calibration has it, at the
        strength that the calibration measured. A number from 0 to 1 is another strength. With compensation, and
        ``weights="model"``, kept experts keep their own weights in every family: nothing is renormalised,
        because the dropped weight is still used.
    skip : {"auto", "compact", "zero"}
    backend : {"auto", "torch", "triton"}
        What computes a calibrated decision: one fused kernel on a GPU with Triton, else PyTorch.
    strict : bool
        False: a calibration whose router weights differ from the model's only warns.

    Raises
    ------
    NoRoutersError, UnsupportedModelError, InvalidParameterError, InvalidTypeError
        For a model or a parameter that cannot be served. The model is untouched then.
    CalibrationError, BudgetError
        For a calibration that does not fit, or a budget that no level meets.

    Notes
    -----
    With a calibrated null per layer, hypotheses whose p-values are independent or PRDS, text exchangeable
    with the calibration text and no binding clamp, the expected share of falsely rejected nulls among the
    rejected is at most alpha. Candidates, clamps and a null pooled over layers are choices beyond that: then
    alpha is a knob, and the telemetry counts the tokens at which min_k or max_k bound.

    Examples
    --------
    >>> model, ids = getfixture("nano_model"), getfixture("token_ids")
    >>> with BHRoutingIntegration(model, alpha=0.3, max_k=8, mode="patch") as integrator:
    ...     _ = model(input_ids=ids)
    ...     stats = integrator.get_routing_stats()
    >>> 1 <= stats["mean_experts_per_token"] <= 8
    True
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float | None = None,
        temperature: float = 1.0,
        min_k: int = 1,
        max_k: int | None = None,
        mode: Mode = "patch",
        collect_stats: bool = True,
        *,
        weights: WeightRule = "model",
        calibration: Calibration | str | os.PathLike[str] | None = None,
        experts_per_token: float | Mapping[str, float] | None = None,
        procedure: str = "bh",
        pvalues: Any = "robust",
        clamp: Clamp = "after",
        statistic: str | None = None,
        null: str | None = None,
        scope: str | None = None,
        estimator: str | None = None,
        size: str | None = None,
        kernel: str | None = None,
        bandwidth: str | float | None = None,
        compensation: bool | float | None = None,
        skip: Skip = "auto",
        backend: Backend = "auto",
        strict: bool = True,
    ) -> None:
        if alpha is not None and experts_per_token is not None:
            raise InvalidParameterError(
                f"expected a level or a budget, got both alpha={alpha!r} and "
                f"experts_per_token={experts_per_token!r}; give one of them."
            )
        if alpha is None and experts_per_token is None:
            alpha = 0.05
        if alpha is not None:
            alpha = check_alpha(alpha)
        self.temperature = check_temperature(temperature)
        check_k(min_k, max_k)
        check_clamp(clamp)
        get_procedure(procedure)
        check_backend(backend)
        self._strength = check_strength(compensation)
        self.min_k, self.clamp, self.procedure = min_k, clamp, procedure
        self.weights = weights
        chosen = {
            "statistic": statistic,
            "null": null,
            "scope": scope,
            "estimator": estimator,
            "size": size,
            "kernel": kernel,
            "bandwidth": bandwidth,
        }
        self._choice: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
        self._strict = strict
        self.calibration: Calibration | None = None
        self._budget: Any = experts_per_token
        self._told = False
        limits: dict[str, Any] = {"min_k": min_k, "max_k": max_k, "clamp": clamp, "weights": weights}

        if calibration is None:
            needs = {"experts_per_token": experts_per_token, "compensation": compensation or None} | chosen
            for name, value in needs.items():
                if value is not None:
                    raise InvalidParameterError(
                        f"{name}={value!r} needs a calibration: pass calibration=..., made by "
                        "`bh-routing calibrate MODEL --text FILE`."
                    )
            assert alpha is not None
            policy: RoutingPolicy = PValuePolicy(
                pvalues, procedure=procedure, alpha=alpha, temperature=self.temperature, **limits
            )
            if self.temperature != 1.0 and pvalues in ("robust", "batch"):
                logger.warning(
                    "temperature=%g has no effect: %s p-values do not depend on the scale of the logits.",
                    self.temperature,
                    pvalues,
                )
            means: Mapping[str, Tensor] = {}
        else:
            from .calibration.calibration import Calibration

            held = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
            self.calibration = held
            means = held.mean_outputs(self._strength)
            if compensation and not means:
                raise InvalidParameterError(
                    f"compensation={compensation!r} needs the experts' mean outputs, which this calibration does not hold; "
                    "calibrate without --no-means, or pass compensation=False."
                )
            self._choice["compensated"] = bool(means)
            policy = held.policy(
                alpha=alpha,
                experts_per_token=experts_per_token,
                procedure=procedure,
                temperature=self.temperature,
                **self._choice,
                **limits,
            )
        if isinstance(policy, TablePolicy):
            policy.backend = backend
        elif backend != "auto":
            logger.warning(
                "backend=%r has no effect: without a calibration p-values are computed in PyTorch.", backend
            )
        super().__init__(model, policy, mode=mode, collect_stats=collect_stats, skip=skip, means=means)
        self.max_k = max_k if max_k is not None else max(c.top_k for c in self.plan.contexts)

    def _make_plan(self) -> PatchPlan:
        plan = super()._make_plan()
        if self.calibration is not None:
            self.calibration.check(plan, strict=self._strict)
            plan = plan.without(self.calibration.left_out)
        self._calibrated_plan = plan
        if self.means and self.weights == "model":
            plan = plan.with_route_norm("none")
        return plan

    @property
    def alpha(self) -> float | None:
        """The level in use; with a budget, the solved one (None where each layer has its own)."""
        policy = self.policy
        if isinstance(policy, PValuePolicy):
            return policy.alpha
        return policy.table.alpha if isinstance(policy, TablePolicy) else None

    @property
    def budget(self) -> float | Mapping[str, float] | None:
        """The budget in use, experts per token; None where a level was given."""
        return self._budget

    def set_level(
        self,
        *,
        alpha: float | None = None,
        experts_per_token: float | Mapping[str, float] | None = None,
    ) -> None:
        """Change the level or the budget, also while patched (and compiled): the same buffers are rewritten.

        Raises
        ------
        InvalidParameterError, BudgetError
            Unless exactly one of the two is given and can be served; nothing has changed then.
        """
        check_one_level(alpha, experts_per_token)
        if self.calibration is None:
            if alpha is None:
                raise InvalidParameterError(
                    f"experts_per_token={experts_per_token!r} needs a calibration: pass calibration=..., made "
                    "by `bh-routing calibrate MODEL --text FILE`."
                )
            assert isinstance(self.policy, PValuePolicy)
            self.policy.set_alpha(alpha)
            return
        new = self.calibration.policy(
            alpha=None if alpha is None else check_alpha(alpha),
            experts_per_token=experts_per_token,
            procedure=self.procedure,
            temperature=self.temperature,
            min_k=self.min_k,
            max_k=self.policy.max_k,  # type: ignore[attr-defined]
            clamp=self.clamp,
            weights=self.weights,
            **self._choice,
        )
        if isinstance(self.policy, TablePolicy) and isinstance(new, TablePolicy):
            self.policy.set_table(new.table)
        elif isinstance(self.policy, PValuePolicy) and isinstance(new, PValuePolicy):
            self.policy.set_alpha(new.alpha)
        self._budget = experts_per_token

    def set_calibration(self, calibration: Calibration) -> None:
        """Follow another calibration of the same routers, at the same level or budget, also while patched.

        For a model whose weights have changed: the table and the compensation are rewritten in the same buffers.

        Raises
        ------
        InvalidParameterError
            If the integration was made without a calibration, or with the compensation and the new one holds none.
        CalibrationError, BudgetError
            If the new one cannot serve the routers, the level or the budget; nothing has changed then.
        """
        old = self.calibration
        if old is None:
            raise InvalidParameterError(
                "expected an integration that was made with a calibration, got one without; make it with "
                "calibration=..."
            )
        means = calibration.mean_outputs(self._strength) if self.means else {}
        if self.means.keys() != means.keys() or any(means[p].shape != m.shape for p, m in self.means.items()):
            raise InvalidParameterError(
                "expected a calibration with mean outputs of the same form as the one in use (the compensation is on), "
                "got others; calibrate with the same options."
            )
        calibration.check(self._calibrated_plan, strict=self._strict)
        level = {"experts_per_token": self._budget} if self._budget is not None else {"alpha": self.alpha}
        self.calibration = calibration
        try:
            self.set_level(**level)
        except BaseException:
            self.calibration = old
            raise
        self.means = means
        self._patch.set_means(means)

    def unpatch_model(self) -> None:
        """Restore the model, bit for bit. Does nothing if it is not patched."""
        if self.is_patched:
            self._tell_uncalibrated()
        super().unpatch_model()

    def get_routing_stats(self) -> dict[str, Any]:
        """The statistics under the original design's keys (and some more).

        In mode ``"patch"``: ``mode``, ``alpha``, ``temperature``, ``min_k``, ``max_k``,
        ``mean_experts_per_token``, ``std_experts_per_token``, ``total_forward_passes``; in mode ``"analyze"``:
        ``mode``, ``bh_would_select_mean``, ``total_forward_passes``, and the settings too. With a budget
        ``alpha`` is the solved level. Means are exact per token, over all layers.
        """
        self._tell_uncalibrated()
        return super().get_routing_stats()

    def _settings(self) -> dict[str, Any]:
        settings = {
            "alpha": self.alpha,
            "temperature": self.temperature,
            "min_k": self.min_k,
            "max_k": self.max_k,
            "procedure": self.procedure,
            "calibrated": self.calibration is not None,
        }
        if self._budget is not None:
            settings["experts_per_token"] = self._budget
        return settings

    def _tell_uncalibrated(self) -> None:
        """Say once what the uncalibrated null selected, and how to do better."""
        telemetry = self._telemetry
        if self._told or self.calibration is not None or telemetry is None or not telemetry.num_tokens:
            return
        self._told = True
        logger.warning(
            "uncalibrated routing (pvalues=%r) selected %.2f experts per token at alpha=%g; a calibrated null "
            "gives the level a meaning and keeps more quality: `bh-routing calibrate MODEL --text FILE`.",
            getattr(self.policy, "pvalues", None),
            telemetry.mean_experts_per_token,
            self.alpha,
        )
