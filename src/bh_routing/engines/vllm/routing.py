"""The routers of one engine: the model's own choice in, the decided one out, counted on the device. No vLLM in here.

Shape legend: T tokens, E experts, K slots of the router's own choice, H hidden size.

vLLM's router runs first, and the decision only takes slots away: an unused slot carries weight 0 and the first expert
that the token keeps, because kernels write nothing, or nonsense, for an index that is no expert.

Over 350 lines: what vLLM's files call, in one file that runs, and is tested, without vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import support
from ...calibration.calibration import Calibration
from ...calibration.fingerprint import check_complete, check_layer
from ...decision.compensation import Compensation, compensated_norm
from ...decision.price import Step as SharedLoads
from ...decision.types import RouteNorm, RoutingDecision
from ...errors import CalibrationMismatchError, InvalidParameterError, UnsupportedModelError
from ...policies import LevelsPolicy, PhasePolicy, RoutingContext, RoutingPolicy, TablePolicy
from ...settings import counted, level_of
from ...stats.procedures import get_procedure
from ...telemetry.figures import Telemetry
from .levels import LevelBook
from .paths import match_layer
from .phases import PhaseCounts, by_phase
from .settings import Settings, number
from .step import DECODE, PADDING, Step

logger = logging.getLogger(__name__)

ATTRIBUTE = "bh_routing"  # of a vLLM runner: its LayerRouting


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What vLLM says about one of its routers.

    Attributes
    ----------
    name : str
        vLLM's name of the layer's experts.
    router : str
        The router's class.
    num_experts, top_k : int
    score_func : str or None
        What turns logits into weights; None: unknown.
    renormalize : bool
        Whether the selected weights are made to sum to a constant.
    hidden_size : int
        H, the width of the router's input.
    dtype : torch.dtype
        Of the router's input.
    """

    name: str
    router: str
    num_experts: int
    top_k: int
    score_func: str | None
    renormalize: bool
    hidden_size: int = 0
    dtype: torch.dtype = torch.float32


class LayerRouting:
    """One router: made by `EngineRouting.add`, usable after `EngineRouting.bind`."""

    def __init__(self, engine: EngineRouting, facts: LayerFacts, context: RoutingContext) -> None:
        self.engine, self.facts, self.context = engine, facts, context
        self.compensation: Compensation | None = None  # on the device
        self.added_TH: Tensor | None = None  # of the call in progress
        self.phases: PhaseCounts | None = None
        self.pairs = 0  # (token, expert) pairs computed by the ragged path, warm-up not counted

    def weigh(self, experts: torch.nn.Module | None) -> None:
        """Take down what one expert of this rank takes in memory."""
        held = 0 if experts is None else sum(p.nbytes for p in experts.parameters())
        self.context = replace(self.context, expert_bytes=held // self.facts.num_experts)

    def route(
        self, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor, *, count: bool
    ) -> tuple[Tensor, Tensor]:
        """Decide for one call.

        Parameters
        ----------
        logits_TE, weights_TK, experts_TK : Tensor
            The router's input and its own choice; integers of any kind.
        count : bool
            Whether the tokens are real (False while the engine warms up).

        Returns
        -------
        weights_TK, experts_TK
            New tensors of the same dtypes.
        """
        if logits_TE.shape[0] == 0:
            return weights_TK.clone(), experts_TK.clone()
        # Copies: the telemetry keeps small calls for later, and a compiled graph uses its buffers again.
        own_weights_TK, own_TK = weights_TK.clone(), experts_TK.to(torch.int64, copy=True)
        engine = self.engine
        policy, context = engine.levels or engine.policy, engine.complete(self.context, len(logits_TE))
        assert policy is not None
        decision = policy.decide(logits_TE, own_weights_TK, own_TK, context)
        if count and engine.telemetry is not None:
            engine.telemetry.update(context, decision, logits_TE)
            if self.phases is not None and engine.step is not None:
                self.phases.update(decision, engine.step.at(len(logits_TE))[1])
        if engine.settings.mode == "analyze":
            return weights_TK.clone(), experts_TK.clone()
        if self.compensation is not None:
            decision = replace(decision, logits_TE=logits_TE)
            self.added_TH = self.compensation.addition(decision, self.facts.dtype)
        return decision.weights_TK, filled(decision, experts_TK.dtype)

    def compensate(self, output_TH: Tensor) -> Tensor:
        """The layer's output with what stands in for the dropped experts of the call in progress."""
        added_TH, self.added_TH = self.added_TH, None
        if added_TH is None:
            return output_TH.clone()
        if added_TH.shape != output_TH.shape:
            raise InvalidParameterError(
                f"layer {self.facts.name}: expected an output for the {added_TH.shape[0]} tokens that were routed, "
                f'got {output_TH.shape[0]}; configure "compensation": false.'
            )
        return output_TH + added_TH.to(output_TH.dtype)


def filled(decision: RoutingDecision, dtype: torch.dtype = torch.int64) -> Tensor:
    """The router's own experts with the first kept one in place of the dropped ones, [T, K] in this dtype.

    A token that keeps none gets its first one, of weight 0, everywhere.

    Examples
    --------
    >>> import torch
    >>> from bh_routing.policies import RoutingContext, TopKPolicy
    >>> context = RoutingContext(path="gate", index=0, num_experts=4, empty=4, top_k=3, route_norm="none")
    >>> weights, experts = torch.tensor([[0.1, 0.5, 0.2]]), torch.tensor([[3, 0, 2]])
    >>> filled(TopKPolicy(2).decide(torch.zeros(1, 4), weights, experts, context))
    tensor([[0, 0, 2]])
    """
    own_TK, dropped_TK = decision.own_experts_TK, decision.dropped_TK
    if own_TK.shape[0] == 1 and own_TK.device.type == "cpu":  # in plain Python, as `decide_one_token`
        own, dropped = own_TK.tolist()[0], dropped_TK.tolist()[0]
        first = own[0 if all(dropped) else dropped.index(False)]  # without an expert all weights are 0
        chosen = [first if gone else expert for expert, gone in zip(own, dropped, strict=True)]
        return torch.tensor([chosen], dtype=dtype)
    first_T1 = (~dropped_TK).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.where(dropped_TK, own_TK.gather(-1, first_T1), own_TK).to(dtype)


class EngineRouting:
    """All routers of one engine in one process, the policy that decides for them, and what was counted.

    Parameters
    ----------
    settings : Settings

    Raises
    ------
    CalibrationError, BudgetError, InvalidParameterError
        If the settings cannot be served; said before any router is touched.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings = settings.at_rest()
        with _plain_tensors():
            self.calibration = settings.load_calibration()
            support.check("vLLM", settings.features(self.calibration))
            self.compensations = settings.compensations(self.calibration)
            self.policy: RoutingPolicy | None = None  # of top_k: made when the layers are known
            if settings.top_k is None:
                self.policy = settings.policy(self.calibration)
        self.telemetry: Telemetry | None = None
        self.levels: LevelsPolicy | None = (
            None  # the policy with a level for each request, where that is possible
        )
        self.book: LevelBook | None = None  # what knows those levels
        self.step: Step | None = (
            None  # the tokens of the step in progress; None before vLLM's model is loaded
        )
        self.layers: list[LayerRouting] = []
        self.left_out: list[str] = []  # names of layers that the calibration left out
        self.compensates = bool(self.compensations)

    # -- layers ------------------------------------------------------------------------------------------

    def add(self, facts: LayerFacts) -> LayerRouting | None:
        """Take a router in; None for one that the calibration left out.

        Raises
        ------
        CalibrationMismatchError, UnsupportedModelError
            If the calibration does not fit it, naming the layer and the field.
        """
        index, path, score_func = len(self.layers), facts.name, facts.score_func or "softmax"
        if self.calibration is not None:
            if self._left_out(facts.name):
                self.left_out.append(facts.name)
                return None
            index, path, score_func = self._check(self.calibration, facts)
        limit = max(self.settings.min_k or 1, self.settings.max_k or 1, self.settings.top_k or 1)
        if limit > facts.top_k:
            raise InvalidParameterError(
                f"layer {facts.name} selects {facts.top_k} experts, and vLLM's buffers have room for no more: "
                f"expected min_k, max_k and top_k up to that, got {limit}."
            )
        route_norm: RouteNorm = "renormalised" if facts.renormalize else "none"
        if self.compensates:
            route_norm = compensated_norm(route_norm, self.settings.weights)
        context = RoutingContext(
            path=path,
            index=index,
            num_experts=facts.num_experts,
            empty=facts.num_experts,
            top_k=facts.top_k,
            route_norm=route_norm,
            score_func=score_func,
        )
        layer = LayerRouting(self, facts, context)
        self.layers.append(layer)
        return layer

    def _left_out(self, name: str) -> bool:
        assert self.calibration is not None
        parent = name.rpartition(".")[0]
        return any(path.rpartition(".")[0] == parent for path in self.calibration.left_out)

    def _check(self, calibration: Calibration, facts: LayerFacts) -> tuple[int, str, str]:
        """Row, router path and score function of a layer in the calibration."""
        row = match_layer(facts.name, calibration.layers)
        record = calibration.layers[row]
        taken = [layer.facts.name for layer in self.layers if layer.context.path == record.path]
        if taken:
            raise CalibrationMismatchError(
                f"two layers of the model, {taken[0]!r} and {facts.name!r}, fit the calibrated layer "
                f"{record.path!r}; this model cannot be served with this calibration."
            )
        if facts.score_func is None:
            raise UnsupportedModelError(
                f"layer {facts.name}: its router, {facts.router}, does not say how it turns logits into weights, "
                f"and the calibration's thresholds are on {record.score_func} scores; this model is not supported."
            )
        found = {
            "num_experts": facts.num_experts,
            "top_k": facts.top_k,
            "score_func": facts.score_func,
            "route_norm": "renormalised" if facts.renormalize else "none",
        }
        check_layer(calibration, row, facts.name, found)
        return row, record.path, record.score_func

    def check_complete(self) -> None:
        """Raise `CalibrationMismatchError` unless every calibrated layer is one of the model's."""
        if self.calibration is None:
            return
        check_complete(self.calibration, (layer.context.path for layer in self.layers))

    def bind(self, device: torch.device, requests: int = 0) -> None:
        """Put thresholds, counters and the compensation on the device; the layers decide from then on.

        ``requests``: the most that a step has, each of which may have a level of its own; 0: none has.
        """
        with _plain_tensors():
            self._bind(device, requests)

    def _bind(self, device: torch.device, requests: int) -> None:
        for layer in self.layers:
            layer.context = replace(layer.context, device=device)
        contexts = [layer.context for layer in self.layers]
        if self.policy is None:
            self.policy = self.settings.top_k_policy(len(contexts), contexts[0].num_experts)
        self.policy.bind(contexts)
        weights = str(self.layers[0].facts.dtype).removeprefix("torch.") if self.layers else ""
        if sentence := self.settings.elsewhere(self.calibration, weights, "vLLM"):
            logger.warning("%s", sentence)
        like = self.policy.by_phase["prefill"] if isinstance(self.policy, PhasePolicy) else self.policy
        own = self.settings.top_k is None and not self.settings.priced
        if requests and own and isinstance(like, TablePolicy):
            self.levels = LevelsPolicy(self.policy, like, requests)
            self.levels.bind_rows(contexts)
        if self.settings.collect_stats:
            self.telemetry = Telemetry(contexts, [context.top_k for context in contexts])
            for layer in self.layers:
                layer.phases = PhaseCounts(layer.context.num_experts, layer.context.empty, device)
        if self.compensates and self.settings.mode == "patch":
            for layer in self.layers:
                layer.compensation = self.compensations[layer.context.path].to(device)

    def complete(self, context: RoutingContext, tokens: int) -> RoutingContext:
        """A layer's context with what is known of the tokens of the step in progress."""
        step = self.step
        if step is None:
            return context
        if self.settings.priced:
            return self._in_step(context, step, tokens)
        by_phase = isinstance(self.policy, PhasePolicy)
        if context.device.type != "cuda" and not step.leveled and not by_phase:
            return context  # on the host all is known, and nothing is recorded
        _, phase_T, level_T = step.at(tokens)
        return replace(
            context,
            level_T=None if self.levels is None else level_T,
            mask_T=phase_T != PADDING if context.device.type == "cuda" else None,
            decode_T=phase_T >= DECODE if by_phase else None,
        )

    def _in_step(self, context: RoutingContext, step: Step, tokens: int) -> RoutingContext:
        """The context of a call whose decoding tokens, one of each of their sequences, share what they load."""
        if not step.decoding:
            return context
        _, phase_T, _ = step.at(tokens)
        padding_T, priced_T = phase_T == PADDING, None
        if step.decoding < step.tokens:  # beside pieces of prompts; what padding gets is what is loaded
            priced_T = (phase_T == DECODE) | padding_T
        shared = SharedLoads(shape=(tokens, 1), tokens=step.decoding, priced_T=priced_T)
        return replace(context, step=shared, mask_T=~padding_T if tokens > step.tokens else None)

    # -- while it runs -----------------------------------------------------------------------------------

    @property
    def alpha(self) -> float | None:
        """The level in use; with a budget the solved one."""
        return level_of(self.policy)

    @property
    def budget(self) -> Any:
        """The budget in use, experts per token, also where a loss was named; None where a level was given."""
        return self.settings.budget(self.calibration)

    def set_level(
        self,
        *,
        alpha: Any = None,
        experts_per_token: Any = None,
        max_kl: Any = None,
        agreement: Any = None,
        distinct_experts: Any = None,
        price_load: Any = None,
    ) -> None:
        """Another level, budget or certified loss, or price, in the same buffers: nothing is compiled anew.

        Raises
        ------
        InvalidParameterError, BudgetError
            As `RoutingSettings.with_level` says, or if it cannot be served; nothing has changed then.
        """
        if self.settings.top_k is not None:
            raise InvalidParameterError(
                f"this engine was started with top_k={self.settings.top_k}, which has no level; start it with a "
                "calibration instead."
            )
        settings = self.settings.with_level(
            alpha=number("alpha", alpha),
            experts_per_token=_budget(experts_per_token),
            max_kl=number("max_kl", max_kl),
            agreement=number("agreement", agreement),
            distinct_experts=number("distinct_experts", distinct_experts),
            price_load=number("price_load", price_load),
        )
        assert self.policy is not None
        with _plain_tensors():
            settings.rewrite(self.policy, self.calibration)
        self.settings = settings

    def reset(self) -> None:
        """Set all statistics to zero."""
        if self.telemetry is not None:
            self.telemetry.reset()
        for layer in self.layers:
            layer.pairs = 0
            if layer.phases is not None:
                layer.phases.reset()
        if self.book is not None:
            self.book.counts.clear()

    def stats(self) -> dict[str, Any]:
        """What was counted, under the names of `bh_routing.BHRoutingIntegration` and `bh_routing.Telemetry`.

        Plain values that JSON knows: ``stats`` (mode, settings, mean and standard deviation of the experts per
        token), ``telemetry`` (`Telemetry.to_dict`; None without ``collect_stats``), ``layers`` (vLLM's name, the
        calibrated router and the router's class of each), ``left_out`` (layers that stay as they are), and
        ``pairs_computed`` ((token, expert) pairs that the ragged path handed to the kernel), ``phases``
        (`phases.by_phase`), ``requests`` (that began, by why they have their level, "default", "own" or "load", and by
        the level), and the default's ``alpha`` and ``experts_per_token``.
        """
        told: dict[str, Any] = {"mode": self.settings.mode} | self.settings.describe(
            self.policy,
            calibrated=self.calibration is not None,
            top_k=max((x.facts.top_k for x in self.layers), default=None),
        )
        told["compensation"] = self.compensates and self.settings.mode == "patch"
        figures = None if self.telemetry is None else self.telemetry.to_dict()
        if figures is not None:
            told |= counted(self.settings.mode, figures["total"])
        return {
            "stats": told,
            "telemetry": figures,
            "layers": [
                {"layer": x.facts.name, "path": x.context.path, "router": x.facts.router} for x in self.layers
            ],
            "left_out": list(self.left_out),
            "pairs_computed": sum(layer.pairs for layer in self.layers),
        } | self.metrics(layers=False)

    def metrics(self, *, layers: bool = True) -> dict[str, Any]:
        """``phases`` (`phases.by_phase`), ``requests`` and the level in use; of which layers, with ``layers``."""
        told: dict[str, Any] = {
            "phases": by_phase(layer.phases for layer in self.layers if layer.phases is not None),
            "requests": {} if self.book is None else {why: dict(by) for why, by in self.book.counts.items()},
            "alpha": self.alpha,
            "experts_per_token": self.budget,
        }
        return told | ({"layers": [layer.context.path for layer in self.layers]} if layers else {})

    def describe(self) -> str:
        """The routing in a few words, for a log line."""
        settings, level = self.settings, self.alpha
        if settings.top_k is not None:
            what = f"the {settings.top_k} largest logits"
        else:
            name = get_procedure(settings.procedure).name
            what = name if level is None else f"{name} at alpha {level:.4g}"
        if self.budget is not None:
            what += f", budget {self.budget}"
        source = "calibrated" if self.calibration is not None else "each token its own null"
        extra = ", with compensation" if self.compensates and settings.mode == "patch" else ""
        return f"{what}, {source}{extra}, mode {settings.mode}"


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """float32 on the host by default: vLLM builds a model with its dtype and its device as the defaults."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _budget(value: Any) -> Any:
    return value if isinstance(value, dict) else number("experts_per_token", value)
