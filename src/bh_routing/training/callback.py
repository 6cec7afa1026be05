"""`AdaptiveRoutingCallback`: what transformers' Trainer logs, refits and saves while it trains a patched model.

Shape legend: L layers, T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from .._words import check_whole
from ..calibration.calibration import Calibration
from ..calibration.forwards import gather
from ..decision.types import RoutingDecision
from ..errors import InvalidParameterError, InvalidTypeError
from ..integration import BHRoutingIntegration
from ..policies import RoutingContext
from ..telemetry.figures import Telemetry
from .loss import AdaptiveRoutingLoss
from .refitting import RecentChoices, recalibrate, refit

logger = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.safetensors"


# What is logged: the figure of a layer's telemetry.
FIGURES = {
    "experts_per_token": "mean_experts",
    "load_imbalance": "load_imbalance",
    "unused_experts": "unused_experts",
}


class AdaptiveRoutingCallback(TrainerCallback):
    """Keeps a calibration in step with a model that the Trainer changes, and logs what its routers do.

    Parameters
    ----------
    integrator : BHRoutingIntegration
        Made with a calibration, on the model that is trained (before PEFT wraps it). The callback patches it when
        training begins, if it is not patched, and leaves it patched.
    refit_every : int, optional
        Steps between refits of the null (`bh_routing.training.refit`); None: only at checkpoints and at the end.
    refit_tokens : int
        How many of the last training tokens (of each process) a refit looks at.
    recalibrate : callable, optional
        ``f(model) -> Calibration``: a refit then is a complete calibration on text (sizes, sensitivities and mean
        outputs too), as ``lambda model: calibrate(model, tokenizer, texts, sensitivity=True)``.
    loss : AdaptiveRoutingLoss, optional
        Its terms are logged too.

    Attributes
    ----------
    history : list of dict
        What was logged, each with its ``step``.

    Notes
    -----
    Logged, under ``routing/``: ``experts_per_token``, ``load_imbalance`` (largest load over the mean load) and
    ``unused_experts``, each for the model and per layer (``.../layer_0``, in the routers' order), ``budget`` and
    ``alpha``, and with ``loss`` its terms as ``loss_balance``, ``loss_z``, ``loss_budget``. They are added to the
    Trainer's own log; reporting integrations (TensorBoard and others) are called before ordinary callbacks: `attach`
    puts this one in front of them.

    With every checkpoint goes ``calibration.safetensors``, refitted first, so that it fits the routers that were
    saved. A run that is resumed goes on with the one of its checkpoint.

    Examples
    --------
    A Trainer under adaptive routing, with the losses::

        integrator = BHRoutingIntegration(model, calibration="calib.safetensors", experts_per_token=3.0)
        loss = AdaptiveRoutingLoss(integrator)
        trainer = Trainer(model, args, train_dataset=data, compute_loss_func=loss,
                          callbacks=[AdaptiveRoutingCallback(integrator, loss=loss)])
        trainer.train()
    """

    def __init__(
        self,
        integrator: BHRoutingIntegration,
        *,
        refit_every: int | None = 100,
        refit_tokens: int = 16_384,
        recalibrate: Callable[[nn.Module], Calibration] | None = None,
        loss: AdaptiveRoutingLoss | None = None,
    ) -> None:
        if not isinstance(integrator, BHRoutingIntegration):
            raise InvalidTypeError(
                f"integrator must be a BHRoutingIntegration, got {type(integrator).__name__}."
            )
        if integrator.calibration is None:
            raise InvalidParameterError(
                "expected an integration with a calibration, which the null is refitted into, got one without; make it "
                "with calibration=..."
            )
        check_whole(refit_every=(refit_every, 1), refit_tokens=(refit_tokens, 1))
        self.integrator, self.loss = integrator, loss
        self.refit_every, self.recalibrate = refit_every, recalibrate
        self.history: list[dict[str, float]] = []
        self._recent = RecentChoices(refit_tokens)
        contexts = integrator.plan.contexts
        self._counts = Telemetry(contexts, [integrator.policy.slots(context) for context in contexts])
        self._fitted_at = -1

    def attach(self, trainer: Any) -> None:
        """Move in front of the Trainer's other callbacks, so that reporting integrations see what is logged."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)

    def _count(
        self, router: nn.Module, context: RoutingContext, decision: RoutingDecision, logits_TE: Tensor
    ) -> None:
        """A watcher: what runs in training mode. The integration's own statistics are left to whoever made it."""
        if router.training:
            self._counts.update(context, decision, logits_TE)

    def refit(self, step: int) -> Calibration:
        """Fit the null to the routers as they are, once per step at most; returns the calibration in use."""
        assert self.integrator.calibration is not None
        if self._fitted_at != step:
            if self.recalibrate is not None:
                recalibrate(self.integrator, self.recalibrate)
            elif self._seen_anything():
                refit(self.integrator, self._recent, seed=step)
            self._fitted_at = step
        return self.integrator.calibration

    def _seen_anything(self) -> bool:
        return any(gather(any(self._recent.held.values())))

    # -- the Trainer's events ----------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Patch, watch, and take up the calibration of the checkpoint that is resumed from."""
        if not self.integrator.is_patched:
            self.integrator.patch_model()
        for watcher in (self._recent, self._count):
            if watcher not in self.integrator.watchers:
                self.integrator.watchers.append(watcher)
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / CALIBRATION_FILE
        if state.global_step and saved.is_file():
            self.integrator.set_calibration(Calibration.load(saved))
            logger.info("resumed with %s", saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refit where it is due."""
        self._recent.trim()
        if self.refit_every is not None and state.global_step % self.refit_every == 0:
            self.refit(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the routers' figures to what is logged while training."""
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        figures = self._figures()
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
        self.history.append({"step": float(state.global_step), **figures})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refit, and put the calibration beside the checkpoint."""
        calibration = self.refit(state.global_step)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            calibration.save(folder / CALIBRATION_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refit to the final routers, and stop watching."""
        self.refit(state.global_step)
        for watcher in (self._recent, self._count):
            if watcher in self.integrator.watchers:
                self.integrator.watchers.remove(watcher)
        self._recent.held.clear()

    def _figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        counts, *others = gather(self._counts)  # of all processes
        for other in others:
            counts.merge(other)
        counted = counts.to_dict()
        self._counts.reset()
        layers = counted["layers"]
        for index, layer in enumerate(layers):
            if layer["tokens"]:
                for name, key in FIGURES.items():
                    figures[f"routing/{name}/layer_{index}"] = float(layer[key])
        if counted["total"]["tokens"]:
            load_E = [sum(column) for column in zip(*(x["expert_load"] for x in layers), strict=True)]
            figures["routing/experts_per_token"] = counted["total"]["mean_experts"]
            figures["routing/load_imbalance"] = max(load_E) * len(load_E) / max(1, sum(load_E))
            figures["routing/unused_experts"] = float(load_E.count(0))
        budget, alpha = self.integrator.budget, self.integrator.alpha
        if isinstance(budget, (int, float)):
            figures["routing/budget"] = float(budget)
        elif budget is not None:
            for index, layer in enumerate(layers):
                figures[f"routing/budget/layer_{index}"] = float(budget[layer["path"]])
        if alpha is not None:
            figures["routing/alpha"] = float(alpha)
        if self.loss is not None:
            for name in ("balance", "z", "budget"):
                if name in self.loss.parts:
                    figures[f"routing/loss_{name}"] = float(self.loss.parts[name])
        return figures


__all__ = ["CALIBRATION_FILE", "AdaptiveRoutingCallback"]
