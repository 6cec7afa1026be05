"""What the patched routers did: exact counts per token and layer, gathered on the device, read on demand.

Shape legend: T tokens, E experts (width of the logits), K slots of the router's own choice, S slots of the
decision (S > K only when widening), N = S + K + 1 columns.

Every router call adds a table of N columns per token to two flat buffers, one of integers and one of floats,
both laid out in the same bins::

    column                         bin                                   integer   float
    decided slot (S columns)       the expert                            1         its decided weight
    own slot (K columns)           the expert, in the half for kept      1         its own weight
                                   or in the half for dropped slots
    the token (1 column)           cell (count, raw count)               1         entropy of its weights
    any column of padding          the last bin

so that one index and two scatters give everything; all figures are derived when somebody reads them. Small calls
(decoding) are kept until there are enough of them, or until somebody reads, and then counted together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .._files.checks import defined
from .._lazy import needed
from ..decision.types import RoutingDecision
from ..errors import InvalidInputError
from ..policies import RoutingContext
from .counters import LayerCounters, recomputing
from .derived import LayerSums, figures, layer_figures, total_figures


class Telemetry:
    """Counts what the routers of one model did, exact per token, without synchronising with a GPU.

    Parameters
    ----------
    contexts : sequence of RoutingContext
        One per router; the buffers are allocated on each ``context.device``.
    slots : sequence of int
        Slots per token in the decision of each router (``policy.slots(context)``).

    Notes
    -----
    Tokens whose mask is False are counted as padding and nowhere else. A forward that gradient checkpointing
    repeats within the backward pass is not counted again (it is where checkpointing is wrapped around a module
    compiled by itself, whose graph cannot know; compile around the checkpointing instead). Integers are exact;
    float sums are float64 (float32 on MPS, which has no float64); a weight that is not finite counts as 0.

    `to_dict` returns ``{"layers": [...], "total": {...}}`` of plain Python values; what is not defined (a mean
    over no tokens) is None. Keys of a layer and, unless marked *, of the total, over all tokens of all layers:

    ======================== =====================================================================
    path*, index*            the router's module path and position
    num_experts*, top_k*     E and K
    slots*                   S, slots per token in the decision
    router_calls             calls of the router
    tokens                   tokens seen without padding (total: of the layer that saw most)
    padding_tokens           tokens that the mask left out (total: of the layer that left out most)
    decisions                tokens, added over layers: what every mean of the total is over
    fallback_tokens          tokens with non-finite logits, which kept the router's own choice
    mean_experts             experts per token
    std_experts              its standard deviation over tokens (population)
    min_experts, max_experts smallest and largest count seen
    share_at_min             share of tokens with the smallest count seen
    share_at_max             share of tokens with the largest count seen
    share_without_expert     share of tokens that ran without any expert (min_k = 0)
    mean_raw_count           what the procedure rejected, before the clamp (without fallback tokens)
    floor_tokens             tokens where min_k bound: count above the raw count (without fallback tokens)
    ceiling_tokens           tokens where max_k bound: count below the raw count (without fallback tokens)
    share_floor              floor_tokens as a share of the tokens
    share_ceiling            ceiling_tokens as a share of the tokens
    share_saved              1 - experts run / experts of the router's own choice; negative when widening
    mean_selected_weight     sum of a token's weights as decided
    mean_own_weight          sum of the weights of the router's own choice
    mean_lost_weight         sum of the router's own weights of what was dropped
    lost_weight_share        mean_lost_weight / mean_own_weight
    mean_entropy             entropy of the decided weights as a distribution, nats (without fallback tokens)
    own_kept_share           share of the router's own choice that was kept
    decided_own_share        share of the decided experts that are the router's own choice (1 unless widening)
    jaccard                  kept / union of the router's own choice and the decision, pooled over tokens
    load_imbalance*          largest expert load over the mean load; 1 is perfectly even
    load_cv*                 standard deviation over mean of the expert load
    unused_experts           experts that no token reached (total: summed over layers)
    own_load_imbalance*      the same three figures for the router's own choice
    own_load_cv*
    own_unused_experts
    count_histogram          tokens by number of experts, [S + 1]
    raw_count_histogram*     tokens by raw count, [E + 1] (without fallback tokens)
    expert_load*             tokens by expert, [E]; empty slots are not counted
    own_expert_load*         the same for the router's own choice
    dropped_load*            tokens of which the expert was dropped, [E]
    expert_weight*           sum of decided weights by expert, [E]
    steps                    decoding steps, added over layers: tokens of different sequences that are computed together
    mean_loads               experts that a layer reads in a step, resident ones left out
    own_mean_loads           the same for the router's own choice
    loads_saved, bytes_saved how many fewer were read, over all layers and steps, and their weights' bytes
    shared_pairs             pairs that ran on loads for which the step's other tokens paid
    load_histogram*          layer's steps by loads, [E + 1]
    own_load_histogram*      the same for the router's own choice
    layers, silent_layers    total only: number of routers; paths of those that saw no call
    ======================== =====================================================================

    Where the logits are wider than the experts module (identity experts), [E] is the number of real experts.
    """

    def __init__(self, contexts: Sequence[RoutingContext], slots: Sequence[int]) -> None:
        if len(contexts) != len(slots):
            raise InvalidInputError(
                f"telemetry needs one number of slots per router, got {len(slots)} for {len(contexts)} routers."
            )
        self._layers = {c.path: LayerCounters(c, s) for c, s in zip(contexts, slots, strict=True)}
        if len(self._layers) != len(contexts):
            raise InvalidInputError(
                f"router paths must differ, got {len(contexts)} routers with {len(self._layers)} paths."
            )

    @property
    def layers(self) -> dict[str, LayerCounters]:
        """The counters of each router, by its path: what an engine that counts by itself writes to."""
        return dict(self._layers)

    def update(
        self, context: RoutingContext, decision: RoutingDecision, logits_TE: Tensor | None = None
    ) -> None:
        """Count one router call.

        Parameters
        ----------
        context : RoutingContext
            Of the router; its ``mask_T`` may be None (every token counts) or bool [T].
        decision : RoutingDecision
        logits_TE : Tensor, optional
            Only used to find tokens with non-finite logits where the decision does not tell them.
        """
        if recomputing():  # counted before
            return
        layer = self._layers.get(context.path)
        if layer is None:
            raise InvalidInputError(
                f"router {context.path} is none of the {len(self._layers)} that this telemetry was made for."
            )
        layer.update(decision, context.mask_T, logits_TE, context.step)

    def reset(self) -> None:
        """Set every counter to zero, in the same buffers."""
        for layer in self._layers.values():
            layer.reset()

    def merge(self, other: Telemetry) -> Telemetry:
        """Add the counters of another telemetry of the same routers; returns self.

        Raises
        ------
        InvalidInputError
            If the other has other routers, or the same with another number of experts or slots.
        """
        mine, theirs = ([x.shape for x in t._layers.values()] for t in (self, other))
        if mine != theirs:
            different = next((pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]), None)
            detail = f"{different[0]} and {different[1]}" if different else f"{len(mine)} and {len(theirs)}"
            raise InvalidInputError(
                "only telemetry of the same routers can be merged (path, experts, empty index, top_k, slots); "
                f"got {detail}."
            )
        for layer, more in zip(self._layers.values(), other._layers.values(), strict=True):
            layer.add(more)
        return self

    def silent_layers(self) -> list[str]:
        """Paths of the routers that saw no call."""
        return [path for path, layer in self._layers.items() if not layer.waiting and not int(layer.calls)]

    @property
    def mean_experts_per_token(self) -> float:
        """Experts per token, over all tokens of all layers; NaN before the first."""
        return float(self._total()["mean_experts"])

    @property
    def std_experts_per_token(self) -> float:
        """Population standard deviation of the same; NaN before the first."""
        return float(self._total()["std_experts"])

    @property
    def total_forward_passes(self) -> int:
        """Router calls, added over layers."""
        return int(self._total()["router_calls"])

    @property
    def num_tokens(self) -> int:
        """Tokens without padding that went through the layer that saw most."""
        return int(self._total()["tokens"])

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain Python values; the keys are in the class docstring."""
        sums = self._read()
        told = {"layers": [layer_figures(s) for s in sums], "total": total_figures(sums)}
        found: dict[str, Any] = defined(told)
        return found

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row per layer: the figures of `to_dict` that are single values.

        Raises
        ------
        MissingDependencyError
            Without pandas.
        """
        return to_frame([layer_figures(s) for s in self._read()], "to_frame", ", or use to_dict")

    def __repr__(self) -> str:
        sums = self._read()
        total = total_figures(sums)
        rows = [(s.path, figures([s])) for s in sums] + [("all", total)]
        width = max(len(name) for name, _ in rows)
        lines = [
            f"Telemetry: {total['layers']} routers, {total['router_calls']} calls, {total['tokens']} tokens",
            f"{'layer':<{width}} {'tokens':>9} {'mean':>6} {'std':>6} {'saved':>7}",
        ]
        lines += [
            f"{name:<{width}} {f['tokens']:>9} {f['mean_experts']:>6.2f} {f['std_experts']:>6.2f} "
            f"{f['share_saved']:>7.1%}"
            for name, f in rows
        ]
        return "\n".join(lines)

    def _read(self) -> list[LayerSums]:
        return [layer.read() for layer in self._layers.values()]

    def _total(self) -> dict[str, Any]:
        return total_figures(self._read())


def to_frame(rows: Sequence[Mapping[str, Any]], what: str = "a DataFrame", otherwise: str = "") -> Any:
    """A pandas DataFrame with a row for each: the values that are single numbers or words."""
    single = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in rows]
    return needed("pandas", what, "frame", otherwise).DataFrame(single)
