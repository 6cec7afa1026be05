"""`AdaptiveRoutingCallback`: what transformers' Trainer logs, refits and saves while it trains a patched model.

Shape legend: L layers, T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..calibration.calibration import Calibration
from ..calibration.forwards import gather
from ..decision.types import RoutingDecision
from ..errors import InvalidParameterError, InvalidTypeError
from ..integration import BHRoutingIntegration
from ..policies import RoutingContext
from ..telemetry.counters import recomputing
from .loss import AdaptiveRoutingLoss
from .refitting import RecentChoices, recalibrate, refit
from .tape import real_tokens

logger = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.safetensors"


class TrainingCounts:
    """A watcher that counts, per layer and in training mode only: tokens, experts, the experts' load."""

    def __init__(self, contexts: list[RoutingContext]) -> None:
        self.sums = {
            c.path: torch.zeros(c.num_experts + 2, dtype=torch.int64, device=c.device) for c in contexts
        }

    def __call__(
        self, router: nn.Module, context: RoutingContext, decision: RoutingDecision, logits_TE: Tensor
    ) -> None:
        if not router.training or recomputing():
            return
        sums = self.sums[context.path]
        real_T = real_tokens(context, logits_TE).long()
        runs_TK = (decision.experts_TK < context.num_experts).long() * real_T.unsqueeze(-1)
        index_TK = decision.experts_TK.clamp(max=context.num_experts - 1)
        sums[2:].index_add_(0, index_TK.flatten(), runs_TK.flatten())
        sums[0].add_(real_T.sum())
        sums[1].add_((decision.counts_T * real_T).sum())

    def take(self) -> dict[str, list[int]]:
        """The counts of all processes since the last call, by router path."""
        mine = {path: sums.tolist() for path, sums in self.sums.items()}
        for sums in self.sums.values():
            sums.zero_()
        parts = gather(mine)
        return {
            path: [sum(column) for column in zip(*(p[path] for p in parts), strict=True)] for path in mine
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
        for name, value in (("refit_every", refit_every), ("refit_tokens", refit_tokens)):
            if value is None and name == "refit_every":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidParameterError(f"{name} must be an integer of at least 1, got {value!r}.")
        self.integrator, self.loss = integrator, loss
        self.refit_every, self.recalibrate = refit_every, recalibrate
        self.history: list[dict[str, float]] = []
        self._recent = RecentChoices(refit_tokens)
        self._counts = TrainingCounts(integrator.plan.contexts)
        self._fitted_at = -1

    def attach(self, trainer: Any) -> None:
        """Move in front of the Trainer's other callbacks, so that reporting integrations see what is logged."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)

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
        for watcher in (self._recent, self._counts):
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
        for watcher in (self._recent, self._counts):
            if watcher in self.integrator.watchers:
                self.integrator.watchers.remove(watcher)
        self._recent.held.clear()

    def _figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        counts = self._counts.take()
        tokens, run, load_E = 0, 0, None
        for index, sums in enumerate(counts.values()):
            tokens, run = tokens + sums[0], run + sums[1]
            load_E = sums[2:] if load_E is None else [a + b for a, b in zip(load_E, sums[2:], strict=True)]
            if sums[0]:
                for name, value in _load_figures(sums).items():
                    figures[f"routing/{name}/layer_{index}"] = value
        if tokens and load_E is not None:
            figures |= {f"routing/{n}": v for n, v in _load_figures([tokens, run, *load_E]).items()}
        budget, alpha = self.integrator.budget, self.integrator.alpha
        if isinstance(budget, (int, float)):
            figures["routing/budget"] = float(budget)
        elif budget is not None:
            for index, path in enumerate(counts):
                figures[f"routing/budget/layer_{index}"] = float(budget[path])
        if alpha is not None:
            figures["routing/alpha"] = float(alpha)
        if self.loss is not None:
            for name in ("balance", "z", "budget"):
                if name in self.loss.parts:
                    figures[f"routing/loss_{name}"] = float(self.loss.parts[name])
        return figures


def _load_figures(sums: list[int]) -> dict[str, float]:
    """Experts per token, largest load over mean load, experts without a token."""
    tokens, run, *load_E = sums
    return {
        "experts_per_token": run / tokens,
        "load_imbalance": max(load_E) * len(load_E) / max(1, sum(load_E)),
        "unused_experts": float(load_E.count(0)),
    }


__all__ = ["CALIBRATION_FILE", "AdaptiveRoutingCallback"]
