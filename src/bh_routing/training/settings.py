"""`FinetuneSettings`: what a fine-tune does. Loads no torch, so that the command line can list the options at once."""

from __future__ import annotations

from dataclasses import dataclass

from .._words import Option, Scope, check_whole
from ..errors import InvalidParameterError


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """What a fine-tune does. Checked on creation.

    Attributes
    ----------
    steps : int
        Updates of the weights.
    experts_per_token : float
        The budget that is trained at.
    routed : bool
        False: the model's own routing throughout, with the same losses but for the budget (a control).
    learning_rate, warmup, weight_decay, clip
        AdamW (0.9, 0.99); the rate rises over ``warmup`` steps and falls linearly to 0; gradients are clipped to the
        norm ``clip``.
    batch_tokens, window : int
        Tokens of a step, and of one window of text.
    full_share : float
        How much of each step's loss is that of the model's own routing, 0 to 1. Above 0, every batch is run twice,
        with its own routing and with the budget's, so that quality is kept at both.
    distil : float
        How much of the budget's loss is the divergence KL(teacher || budget) instead of that of the text, 0 to 1. The
        teacher is a frozen copy of the model as it was, with its own routing; 0 makes none and learns from the text.
    balance, z, budget, temperature, scope
        As in `AdaptiveRoutingLoss`, but smaller: a divergence has smaller gradients than the loss of a text.
    refit_every : int
        Steps between refits of the null.
    refit_tokens : int
        Training tokens that a refit looks at.
    seed : int
    """

    steps: int
    experts_per_token: float = 3.0
    routed: bool = True
    learning_rate: float = 3e-4
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_tokens: int = 4096
    window: int = 256
    full_share: float = 0.0
    distil: float = 1.0
    balance: float = 0.001
    z: float = 0.0001
    budget: float = 0.02
    temperature: float = 0.5
    scope: Scope = "layer"
    refit_every: int = 100
    refit_tokens: int = 16_384
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("steps", "batch_tokens", "refit_every", "refit_tokens")
        check_whole(**{name: (getattr(self, name), 1) for name in whole})
        if self.window < 2 or self.warmup < 0:
            raise InvalidParameterError(
                f"window must be at least 2 and warmup at least 0, got {self.window!r} and {self.warmup!r}."
            )
        for name in ("full_share", "distil"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidParameterError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}.")
        for name in ("learning_rate", "clip"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise InvalidParameterError(f"{name} must be a number above 0, got {getattr(self, name)!r}.")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = (step + 1) / (self.warmup + 1)
        return self.learning_rate * min(rise, 1.0 - step / self.steps, 1.0)


# The fields that the command line has options for.
TEXT_OPTIONS = {
    "learning_rate": Option("peak of AdamW; 20 steps of warm-up, then linear to 0 (default 3e-4)", float),
    "batch_tokens": Option("tokens per step (default 4096)", int),
    "window": Option("tokens per window (default 256)", int),
    "full_share": Option(
        "share of the loss that is the own routing's; above 0, every batch is run twice (default 0)", float
    ),
    "distil": Option(
        "share of the budget's loss that is KL(model as it was || budget) instead of the text's (default 1)",
        float,
    ),
    "balance": Option("coefficient of the load-balancing loss (default 0.001)", float),
    "z": Option("coefficient of the router z-loss (default 0.0001)", float),
    "budget": Option("coefficient of the budget term (default 0.02)", float),
    "refit_every": Option("steps between refits of the null (default 100)", int),
}
