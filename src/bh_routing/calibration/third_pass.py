"""The third pass: what held-out windows say of the linear compensation, and the sizes of what it leaves over.

It reads a few windows that the linear compensation was not fitted to: forward, for the share of dropped outputs that it
explains there (by which its rank and ridge are chosen), then forward and backward with it in place of the means.

Shape legend: L routed layers, T tokens, K slots of the router's own choice, D router logits of a token, E experts,
R rank, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..patching import PatchPlan
from ..text import Batch
from .calibration import Calibration
from .compensation_scale import SCALES
from .dropping import Addition, Dropping, Pairs, dropping_policy
from .forwards import gather
from .linear_fit import LinearFit, LinearSums
from .linear_maps import LinearMaps, choose_fit, expert_numbers, largest_rank, shrunk
from .second_pass import linear_sums, mean_addition, mean_logits
from .token_sizes import Residuals, TokenSizes, fit_token_sizes

TOKENS = 16384  # that are held out, at most


def fit_maps(
    model: nn.Module,
    plan: PatchPlan,
    calibration: Calibration,
    sums: Mapping[str, LinearSums],
    batches: Sequence[Batch],
    rank: int | None,
    advance: Callable[[int], None],
) -> LinearMaps | None:
    """The linear compensation of every layer; None if it pays in none.

    Parameters
    ----------
    calibration : Calibration
        Of the first two passes, with mean outputs.
    sums : mapping of router path to LinearSums
        This process's, of the second pass.
    batches : sequence of Batch
        This process's held-out windows.
    rank : int, optional
        Of every layer. Default: chosen, up to 16 or where it takes 3 % of the experts' memory.
    """
    assert calibration.moments is not None
    held = linear_sums(plan, calibration)
    vectors = zip(plan.layers, calibration.means_LEH, strict=True)
    additions = {layer.path: mean_addition(m.float().to(layer.context.device)) for layer, m in vectors}
    dropping = Dropping(model, plan, dropping_policy(calibration), additions)
    for batch in batches:
        dropping.forward(batch, lambda path, pairs: held[path].take(pairs))
        advance(batch.num_tokens)
    chosen, numbers = [], [expert_numbers(layer.experts, calibration.num_experts) for layer in plan.layers]
    for layer, mean_EH, own in zip(plan.layers, calibration.moments.shrunk_means(), numbers, strict=True):
        ours, theirs = (
            one.added([parts[layer.path] for parts in gather({layer.path: one.parts()}, others_only=True)])
            for one in (sums[layer.path], held[layer.path])
        )
        most = largest_rank(own, mean_EH.shape[-1])
        chosen.append(shrunk(choose_fit(ours, theirs, rank, most), mean_EH))
    return LinearMaps.stack(chosen, numbers) if any(one.fit.rank for one in chosen) else None


def linear_dropping(model: nn.Module, plan: PatchPlan, calibration: Calibration) -> Dropping:
    """Forwards with experts dropped by the best sizes that were collected, and the linear compensation in their place."""
    assert calibration.linear is not None
    additions = {path: linear_addition(fit) for path, fit in _fits(plan, calibration.linear).items()}
    return Dropping(model, plan, dropping_policy(calibration, size=None), additions)


def at_scales(dropping: Dropping, batch: Batch) -> Iterator[Tensor]:
    """The routed model's logits at each of `bh_routing.calibration.compensation_scale.SCALES`."""
    for dropping.scale in SCALES:
        logits_BSV = dropping.logits(batch)
        assert logits_BSV is not None
        yield logits_BSV


def fit_sizes(
    model: nn.Module,
    plan: PatchPlan,
    calibration: Calibration,
    batches: Sequence[Batch],
    advance: Callable[[int], None],
) -> TokenSizes | None:
    """Sizes from the token under the calibration's linear compensation; None without one, or without windows."""
    if calibration.linear is None:
        return None
    fits = _fits(plan, calibration.linear)
    dropping = linear_dropping(model, plan, calibration)
    parts: dict[str, list[Residuals]] = {path: [] for path in fits}
    for batch in batches:

        def take(path: str, pairs: Pairs, index: int = batch.index) -> None:
            assert pairs.gradients_TH is not None
            left_TKH = pairs.outputs_TKH.float() - predicted_outputs(
                fits[path], pairs.logits_TD, pairs.experts_TK
            )
            effect_TK = torch.einsum("tkh,th->tk", left_TKH, pairs.gradients_TH.float())
            parts[path].append(
                Residuals(
                    logits_ND=pairs.logits_TD.float().cpu(),
                    experts_NK=pairs.experts_TK.long().cpu(),
                    size_NK=left_TKH.square().sum(-1).cpu(),
                    effect_NK=effect_TK.square().cpu(),
                    window_N=torch.full((len(effect_TK),), index),
                )
            )

        dropping.backward(batch, take)
        advance(batch.num_tokens)
    shares = gather(parts)
    every = [[one for share in shares for one in share[path]] for path in fits]
    if not all(every):
        return None
    centers = list(mean_logits(calibration))
    return fit_token_sizes([Residuals.joined(each) for each in every], centers, calibration.num_experts)


def _fits(plan: PatchPlan, maps: LinearMaps) -> dict[str, LinearFit]:
    """Each layer's map by path, float32, where the layer is."""
    found = {}
    for index, layer in enumerate(plan.layers):
        held = vars(maps.layer(index)).items()
        found[layer.path] = LinearFit(**{n: x.to(layer.context.device, torch.float32) for n, x in held})
    return found


def predicted_outputs(fit: LinearFit, logits_TD: Tensor, experts_TK: Tensor) -> Tensor:
    """m_e + A_e z~ for every pair of the own choice, float32 [T, K, H]."""
    z_TD = torch.where(torch.isfinite(logits_TD), logits_TD.float(), fit.center_D)
    white_TR = (torch.minimum(torch.maximum(z_TD, fit.low_D), fit.high_D) - fit.center_D) @ fit.whiten_DR
    slots = experts_TK.shape[-1]
    order_P = experts_TK.flatten().argsort(stable=True)
    counts = experts_TK.flatten().bincount(minlength=len(fit.mean_EH)).tolist()
    rows = [
        mean_H + white_TR[pair_N // slots] @ slope_RH
        for pair_N, mean_H, slope_RH in zip(order_P.split(counts), fit.mean_EH, fit.slope_ERH, strict=True)
    ]
    return torch.cat(rows)[order_P.argsort()].view(*experts_TK.shape, -1)


def linear_addition(fit: LinearFit) -> Addition:
    """The linear compensation at full scale."""

    def add(logits_TD: Tensor, weights_TK: Tensor, dropped_TK: Tensor, experts_TK: Tensor) -> Tensor:
        lost_TK = weights_TK.masked_fill(~dropped_TK, 0.0).float()
        return torch.einsum("tkh,tk->th", predicted_outputs(fit, logits_TD, experts_TK), lost_TK)

    return add
