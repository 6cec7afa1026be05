"""The integration: a model, a policy, and the patch that joins them.

`RoutingIntegration` takes any policy. `BHRoutingIntegration` is the class of the original design: it builds
the policy from a level (or a budget) and, where there is one, a calibration.

Over 350 lines: two public classes, of which more than half is what people read of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ._words import Mode, Skip, check_word
from .calibration.calibration import Calibration
from .calibration.certificate import weights_of
from .decision.compensation import Compensation
from .errors import InvalidParameterError, InvalidTypeError, PatchError
from .models.loading import default_calibration
from .patching import PatchPlan, RoutingPatch, make_plan
from .policies import LevelsPolicy, PhasePolicy, RoutingPolicy, TablePolicy
from .settings import RoutingSettings, counted, level_of
from .telemetry.figures import Telemetry
from .telemetry.phases import PhaseTelemetry

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="RoutingIntegration")


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
    compensations : mapping of router path to Compensation, optional
        What stands in for the dropped experts of the model's own choice (`Calibration.compensations`); with
        ``weights="model"`` kept experts keep their own weights then.
    plan : PatchPlan, optional
        Which routers, where it was made already (`bh_routing.make_plan`).

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
        compensations: Mapping[str, Compensation] | None = None,
        plan: PatchPlan | None = None,
    ) -> None:
        check_word("mode", mode, Mode)
        check_word("skip", skip, Skip)
        self.model, self.policy, self.mode = model, policy, mode
        self.collect_stats, self.skip = bool(collect_stats), skip
        self.compensations = dict(compensations or {})
        if getattr(policy, "min_k", 1) == 0 and not self.compensations:
            raise InvalidParameterError(
                "min_k=0 lets a token run without any expert, which needs compensations for what is dropped, and none "
                "were given; use min_k=1, or give compensations."
            )
        self.plan = _plan_of(model) if plan is None else plan
        if self.compensations:
            self.plan = self.plan.compensated(policy.weights)
        with _plainly():
            policy.bind(self.plan.contexts)
        slots = [policy.slots(context) for context in self.plan.contexts]
        kind = PhaseTelemetry if isinstance(policy, PhasePolicy) else Telemetry
        self._telemetry = kind(self.plan.contexts, slots) if collect_stats else None
        self._patch = RoutingPatch(
            self.plan,
            policy,
            telemetry=self._telemetry,
            change=mode == "patch",
            skip=skip,
            compensations=self.compensations,
        )

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
        with _plainly():
            self._patch.apply()
        for layer in self.plan.layers:
            logger.debug("%s: %s -> %s", layer.path, type(layer.router).__name__, self.policy)
        logger.info(
            "%s: %d routers patched, mode=%s", self.plan.model_class, len(self.plan.layers), self.mode
        )

    def unpatch_model(self) -> None:
        """Restore the model, bit for bit. Does nothing if it is not patched."""
        self._patch.remove()

    def __enter__(self: T) -> T:
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
        total: dict[str, Any] = {"mean_experts": None, "std_experts": None, "router_calls": 0, "tokens": 0}
        if self._telemetry is not None:
            total = self._telemetry.to_dict()["total"]
        if total["router_calls"] and (silent := total["silent_layers"]):
            logger.warning(
                "%d of %d patched routers were never called (%s%s): their layers run unrouted, or saw no token; "
                "a kernel that replaces the whole block bypasses its router.",
                len(silent),
                len(self.plan.layers),
                ", ".join(silent[:3]),
                ", ..." if len(silent) > 3 else "",
            )
        counts = counted(self.mode, total)
        counts = {name: float("nan") if value is None else value for name, value in counts.items()}
        return {"mode": self.mode} | self._settings() | counts

    def _settings(self) -> dict[str, Any]:
        return self.policy.describe()

    def __repr__(self) -> str:
        state = "patched" if self.is_patched else "not patched"
        return f"{type(self).__name__}({self.plan.model_class}, {self.policy!r}, mode={self.mode!r}, {state})"


def _plan_of(model: nn.Module) -> PatchPlan:
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    with _plainly():
        return make_plan(model)


@contextmanager
def _plainly() -> Iterator[None]:
    """Whatever the caller's mode and default device: buffers made in inference mode could not be rewritten outside."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


class BHRoutingIntegration(RoutingIntegration):
    """Benjamini-Hochberg routing of a pretrained Mixture-of-Experts model.

    For each token and layer, "expert e is not called for" is a null hypothesis; the model's own top-k experts
    are the candidates, and those whose p-values the procedure rejects run. The others are skipped.

    Parameters
    ----------
    model : nn.Module
        A transformers model with supported routers (``bh-routing families``).
    alpha, temperature, min_k, max_k, mode, collect_stats
        The original design's parameters, in its order; as in `bh_routing.RoutingSettings`.
    calibration : Calibration or path, optional
        Calibrated null (``bh-routing calibrate``). ``"auto"``: the ``calibration.safetensors`` in the folder that the
        model was loaded from, if there is one. Without a calibration, every token is its own robust null.
    **settings
        Any other field of `bh_routing.RoutingSettings`: experts_per_token, procedure, weights, compensation, ...

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
        alpha: float | None = RoutingSettings.alpha,
        temperature: float = RoutingSettings.temperature,
        min_k: int | None = RoutingSettings.min_k,
        max_k: int | None = RoutingSettings.max_k,
        mode: Mode = RoutingSettings.mode,
        collect_stats: bool = RoutingSettings.collect_stats,
        *,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        asked = RoutingSettings.from_dict(
            {
                "alpha": alpha,
                "temperature": temperature,
                "min_k": min_k,
                "max_k": max_k,
                "mode": mode,
                "collect_stats": collect_stats,
                **settings,
            }
        )
        if isinstance(calibration, str) and calibration == "auto":
            calibration = default_calibration(getattr(getattr(model, "config", None), "name_or_path", ""))
        asked.check_calibrated(calibration)
        with _plainly():
            if calibration is not None and not isinstance(calibration, Calibration):
                calibration = Calibration.load(calibration)
            policy, compensations = asked.policy(calibration), asked.compensations(calibration)
            plan = _plan_of(model)
            if calibration is not None:
                calibration.check(plan, strict=asked.strict)
                plan = plan.without(calibration.left_out)
                if sentence := asked.elsewhere(calibration, weights_of(model), "transformers"):
                    logger.warning("%s", sentence)
        super().__init__(
            model,
            policy,
            mode=asked.mode,
            collect_stats=asked.collect_stats,
            skip=asked.skip,
            compensations=compensations,
            plan=plan,
        )
        # Without mean outputs now, there are none after a change of the calibration either.
        self.settings = asked if compensations else replace(asked, compensation=False)
        self.calibration = calibration
        self.temperature, self.min_k = asked.temperature, policy.min_k
        self.max_k = asked.max_k or max(c.top_k for c in plan.contexts)
        self._calibrated_contexts, self._told = plan.contexts, False
        self._one = policy  # the policy of one level for all, also while rows have their own

    @property
    def alpha(self) -> float | None:
        """The level in use; with a budget, the solved one (None where each layer or row has its own)."""
        return level_of(self.policy)

    @property
    def budget(self) -> float | Mapping[str, float] | None:
        """The budget in use, experts per token, also where a loss was named; None where a level was given."""
        return self.settings.budget(self.calibration)

    def set_level(
        self,
        *,
        alpha: float | None = None,
        experts_per_token: float | Mapping[str, float] | None = None,
        max_kl: float | None = None,
        agreement: float | None = None,
        phases: Mapping[str, Mapping[str, Any]] | None = None,
        distinct_experts: float | None = None,
        price_load: float | None = None,
        per_row: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Change the level, or the price, also while patched (and compiled): the same buffers are rewritten.

        ``per_row``: one for each row of the batch, as in ``[{"experts_per_token": 8}, {"alpha": 0.01}]``, for forwards
        and ``generate`` with batches of that many rows (a beam is a row), padded or not. Each row's tokens get what they
        would get alone. It needs a calibration.

        Raises
        ------
        InvalidParameterError, BudgetError, CertificateError
            Unless one of the first five is given (``phases`` to an integration that was made with them), or of the next two
            (of one that was made with a price), or of both, or ``per_row`` alone, and can be served; nothing has changed then.
        """
        level: dict[str, Any] = {
            "alpha": alpha,
            "experts_per_token": experts_per_token,
            "max_kl": max_kl,
            "agreement": agreement,
            "phases": phases,
            "distinct_experts": distinct_experts,
            "price_load": price_load,
        }
        if per_row is not None:
            if any(value is not None for value in level.values()):
                raise InvalidParameterError(
                    "expected one level for all or per_row, got both; give one of them."
                )
            self._set_rows(per_row)
            return
        settings = self.settings.with_level(**level)
        settings.rewrite(self._one, self.calibration)
        self.settings = settings
        self._decide_by(self._one)

    def _set_rows(self, per_row: Sequence[Mapping[str, Any]]) -> None:
        with _plainly():
            found = [self.settings.level_policy(level, self.calibration) for level in per_row]
            if not found or not isinstance(self._one, TablePolicy):
                raise InvalidParameterError(f"per_row must name at least one level, got {per_row!r}.")
            levels = LevelsPolicy(self._one, self._one, len(found), per_row=True)
            levels.bind_rows(self.plan.contexts)
            for row, policy in enumerate(found, 1):
                levels.set_row(row, policy.table.thresholds_LE, policy.min_k)
        self._decide_by(levels)

    def _decide_by(self, policy: RoutingPolicy) -> None:
        if self.policy is not policy:
            self.policy = policy
            self._patch.set_policy(policy)

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
        new = self.settings.compensations(calibration)
        if self.compensations.keys() != new.keys() or not all(
            new[p].fits(c) for p, c in self.compensations.items()
        ):
            raise InvalidParameterError(
                "expected a calibration with mean outputs of the same form as the one in use (the compensation is on), "
                "got others; calibrate with the same options."
            )
        if self.policy is not self._one:
            raise InvalidParameterError(
                "the levels of the rows follow the calibration in use; set one level for all before another calibration."
            )
        layers = zip(
            self.plan.layers, self._calibrated_contexts, strict=True
        )  # modules as they are, PEFT's among them
        plan = replace(self.plan, layers=tuple(replace(layer, context=context) for layer, context in layers))
        calibration.check(plan, strict=self.settings.strict)
        self.settings.rewrite(self.policy, calibration)
        self.calibration = calibration
        self.compensations = new
        self._patch.set_compensations(new)

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
        calibrated = self.calibration is not None
        return self.settings.describe(self.policy, calibrated=calibrated, top_k=self.max_k)

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
