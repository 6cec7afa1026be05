"""Which experts each kind of text uses: usage per layer and domain, and its picture.

Shape legend: L routed layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..integration import RoutingIntegration
from ..text import cut_windows
from .report_plots import heat, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def expert_usage(
    integration: RoutingIntegration,
    tokenizer: Any,
    texts: Mapping[str, str],
    *,
    window: int = 256,
    limit: int | None = None,
) -> dict[str, Tensor]:
    """Each expert's share of a text's tokens, by name of the text, float64 [L, E].

    A row adds up to the experts per token of its layer. The integration's statistics start anew with each text.

    Parameters
    ----------
    integration : RoutingIntegration
        Not patched, with ``collect_stats=True``. ``TopKPolicy()`` is the model's own routing.
    texts : mapping of str to str
        Name of a domain -> its text.
    window, limit : int
        Tokens per window, and at most so many windows of each text, spread evenly over it.

    Raises
    ------
    InvalidInputError
        For a text of fewer than two tokens.

    Examples
    --------
    >>> from bh_routing import RoutingIntegration, TopKPolicy
    >>> from bh_routing.data import sample_sections
    >>> integration = RoutingIntegration(getfixture("nano_model"), TopKPolicy(4))
    >>> usage = expert_usage(integration, getfixture("nano_tokenizer"), sample_sections(), limit=1)
    >>> list(usage), tuple(usage["code"].shape), float(usage["code"][0].sum().round(decimals=6))
    (['fiction', 'encyclopaedia', 'docs', 'code', 'dialogue', 'simple'], (4, 64), 4.0)
    """
    model: Any = integration.model
    usage = {}
    for name, text in texts.items():
        integration.reset_stats()
        with integration:
            for ids_1S in cut_windows(tokenizer, text, window, limit):
                model(input_ids=ids_1S.to(model.device), use_cache=False)
        layers = integration.telemetry.to_dict()["layers"]
        loads = [torch.tensor(layer["expert_load"]) / max(1, layer["tokens"]) for layer in layers]
        usage[name] = torch.nn.utils.rnn.pad_sequence(loads, batch_first=True).double()
    return usage


def plot_usage(usage: Mapping[str, Tensor]) -> Figure:
    """A panel per text: layers down, experts across, shaded by the share of tokens that an expert ran for.

    Raises
    ------
    MissingDependencyError
        Without matplotlib.
    """
    most = 100 * max(float(usage_LE.max()) for usage_LE in usage.values())
    layers = max(len(usage_LE) for usage_LE in usage.values())
    height = 0.6 + len(usage) * (0.9 + 0.16 * layers)
    figure = new_figure("Share of tokens by expert and layer", height=height)
    for axes, (name, usage_LE) in zip(
        figure.subplots(len(usage), squeeze=False)[:, 0], usage.items(), strict=True
    ):
        axes.set_title(
            f"{name}: {float(usage_LE.sum(-1).mean()):.2f} experts per token", fontsize=9, loc="left"
        )
        names = [f"layer {i}" for i in range(len(usage_LE))]
        heat(axes, (100 * usage_LE).tolist(), names, "expert", "% of tokens", most)
    return figure


__all__ = ["expert_usage", "plot_usage"]
