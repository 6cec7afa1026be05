"""`AdaptiveRoutingLoss`: what is added to a language-modelling loss while a patched model is trained.

Shape legend: L layers, T tokens, E experts, K slots of the router's own choice, J columns of a layer's sums.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._words import Scope, check_word
from ..decision.types import check_temperature
from ..errors import InvalidParameterError, InvalidTypeError, PatchError
from ..integration import RoutingIntegration
from ..policies import RoutingContext, TablePolicy
from .functional import balance_of, expected_experts, router_sums, z_of
from .tape import Seen, Tape

logger = logging.getLogger(__name__)


class AdaptiveRoutingLoss:
    """Load balancing, router z-loss and a budget for a patched model.

    auxiliary = balance * load_balancing_loss + z * router_z_loss + budget * mean(((n - b) / b)^2)

    with n the mean number of experts per token and b its target: one for the model, or one for each layer. n has the
    value of the decision and the gradient of `expected_experts`, so that its minimum is where the target is met.

    Parameters
    ----------
    integrator : RoutingIntegration
        It must be patched while the model runs; the losses see its decisions through ``integrator.watchers``.
    balance : float
        Coefficient of `load_balancing_loss` (OLMoE: 0.01).
    z : float
        Coefficient of `router_z_loss` (OLMoE: 0.001).
    budget : float
        Coefficient of the budget term; 0 leaves it out, which a policy without a decision table needs.
    experts_per_token : float or mapping of router path to float, optional
        The target. Default: the integration's own budget.
    temperature : float
        Of the relaxation, in units of the statistic (`expected_experts`).
    scope : {"model", "layer"}
        What the loads are balanced over (`load_balancing_loss`).

    Attributes
    ----------
    parts : dict of str to Tensor
        The terms of the last loss before their coefficients, detached: ``balance``, ``z``, ``budget``,
        ``experts_per_token``; from ``__call__`` also ``task``.

    Raises
    ------
    InvalidParameterError, InvalidTypeError
        For a negative coefficient, a target outside [min_k, max_k], a budget term where there is no decision table
        or no target.

    Notes
    -----
    Where gradients are averaged over processes (DDP; FSDP is not tested), the sums over tokens are added up over the
    default process group first: the gradient is that of one process with the whole batch, for tokens spread unevenly
    too. One all-reduce per call.

    Under ``torch.no_grad`` and in inference mode the losses have values and no gradients. A frozen router is no error:
    the losses then act on what produces its input, if anything does. Re-entrant gradient checkpointing hides the
    logits' graph (a warning says so): use ``use_reentrant=False``, transformers' default.

    Examples
    --------
    >>> from bh_routing import BHRoutingIntegration
    >>> from bh_routing.models import bundled_calibration
    >>> model, ids = getfixture("nano_model"), getfixture("token_ids")
    >>> integrator = BHRoutingIntegration(model, calibration=bundled_calibration(), experts_per_token=3.0)
    >>> loss = AdaptiveRoutingLoss(integrator)
    >>> with integrator:
    ...     output = model(input_ids=ids, labels=ids)
    ...     total = output.loss + loss.auxiliary()
    >>> sorted(loss.parts)
    ['balance', 'budget', 'experts_per_token', 'z']
    """

    def __init__(
        self,
        integrator: RoutingIntegration,
        *,
        balance: float = 0.01,
        z: float = 0.001,
        budget: float = 0.1,
        experts_per_token: float | Mapping[str, float] | None = None,
        temperature: float = 0.5,
        scope: Scope = "model",
    ) -> None:
        if not isinstance(integrator, RoutingIntegration):
            raise InvalidTypeError(
                f"integrator must be a RoutingIntegration, got {type(integrator).__name__}."
            )
        for name, value in (("balance", balance), ("z", z), ("budget", budget)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidTypeError(f"{name} must be a number, got {value!r}.")
            if not 0.0 <= value < float("inf"):
                raise InvalidParameterError(f"{name} must be a finite number of at least 0, got {value!r}.")
        check_word("scope", scope, Scope)
        self.temperature = check_temperature(temperature)
        self.integrator, self.scope = integrator, scope
        self.balance, self.z, self.budget = float(balance), float(z), float(budget)
        self._targets: dict[str, float] = {}
        if budget:
            self._targets = self._check_targets(experts_per_token)
            self._per_layer = isinstance(experts_per_token, Mapping)
        elif experts_per_token is not None:
            raise InvalidParameterError(
                f"experts_per_token={experts_per_token!r} is the target of the budget term, got budget=0; give it a "
                "coefficient, or leave the target out."
            )
        self.parts: dict[str, Tensor] = {}
        self._warned = False
        self._tape = Tape()
        integrator.watchers.append(self._tape)

    def close(self) -> None:
        """Stop watching the integration, and let go of what is held."""
        self._tape.take()
        if self._tape in self.integrator.watchers:
            self.integrator.watchers.remove(self._tape)

    def __call__(
        self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The model's own loss plus the auxiliary one; the form of the Trainer's ``compute_loss_func``.

        Parameters
        ----------
        outputs : model output, dict or tuple
            With ``loss`` where the model was given labels, else with ``logits`` [B, S, V].
        labels : Tensor, optional
            int64 [B, S], -100 where nothing is to be predicted.
        num_items_in_batch : int or Tensor, optional
            Labels of the whole accumulated batch: the loss is divided by it, and the auxiliary loss of this part
            weighs as its share of the labels.
        """
        task = _task_loss(outputs, labels, num_items_in_batch)
        auxiliary = self.auxiliary()
        if labels is not None and num_items_in_batch is not None:
            auxiliary = auxiliary * ((labels[..., 1:] != -100).sum() / num_items_in_batch)
        self.parts["task"] = task.detach()
        return task + auxiliary.to(task.device)

    def auxiliary(self) -> Tensor:
        """The weighted sum of the three terms over the tokens of all forwards since the last call: a scalar, float32 at least.

        Forwards without a graph (a reference model's, under ``no_grad``) count only where there is no other, and then
        the latest alone.

        Raises
        ------
        PatchError
            If no router of the integration ran since then.
        """
        held = self._tape.take()
        if not held:
            state = "was not called" if self.integrator.is_patched else "is not patched"
            raise PatchError(
                f"expected a forward of the patched model since the last loss, but the model {state}; patch it, run "
                "it on a batch, then ask for the loss."
            )
        self._tell_no_graph(held)
        rows, tops = [], []
        for path, calls in held.items():
            rows.append(torch.stack([self._row(path, seen) for seen in calls]).sum(0))
            tops.append(calls[0].own_experts_TK.shape[-1])
        device = rows[0].device
        sums_LJ = over_processes(torch.stack([row.to(device) for row in rows]))
        num = (sums_LJ.shape[-1] - 4) // 2
        load_LE, probability_LE = sums_LJ[:, :num], sums_LJ[:, num : 2 * num]
        z_L, tokens_L, soft_L, hard_L = sums_LJ[:, 2 * num :].unbind(-1)
        tokens_L = tokens_L.detach()
        slots_L = tokens_L * torch.tensor(tops, dtype=sums_LJ.dtype, device=device)
        balance = balance_of(load_LE.detach(), probability_LE, tokens_L, slots_L, self.scope)
        z = z_of(z_L, tokens_L)
        total = self.balance * balance + self.z * z
        self.parts = {"balance": balance.detach(), "z": z.detach()}
        self.parts["experts_per_token"] = hard_L.detach().sum() / tokens_L.sum().clamp_min(1.0)
        if self.budget:
            budget = self._budget_term(list(held), soft_L, hard_L.detach(), tokens_L)
            self.parts["budget"] = budget.detach()
            total = total + self.budget * budget
        return total

    def forget(self) -> None:
        """Leave the forwards since the last call out of the next `auxiliary`."""
        self._tape.take()

    # -- parts -------------------------------------------------------------------------------------------

    def _row(self, path: str, seen: Seen) -> Tensor:
        """One layer's sums over tokens: load, probability, z, tokens, expected and actual experts; [2E + 4]."""
        context = next(layer.context for layer in self.integrator.plan.layers if layer.path == path)
        sums = router_sums(seen.logits_TE, seen.experts_TK, seen.real_T, context.score_func)
        weight_T = seen.real_T.to(sums.z.dtype)
        hard = (seen.counts_T * weight_T).sum()
        soft = hard.detach()
        if self.budget:
            soft = (torch.where(seen.real_T, self._expected(context, seen), 0.0) * weight_T).sum()
        ends = torch.stack((sums.z, sums.tokens, soft.to(sums.z.dtype), hard.to(sums.z.dtype)))
        return torch.cat((sums.load_E, sums.probability_E, ends))

    def _expected(self, context: RoutingContext, seen: Seen) -> Tensor:
        """The relaxed count of every token, [T]."""
        policy = self.integrator.policy
        assert isinstance(policy, TablePolicy)
        logits_TE = torch.where(seen.real_T.unsqueeze(-1), seen.logits_TE, 0.0)
        statistic_TC = policy.statistic(logits_TE, context)
        if policy.slots(context) <= context.top_k:  # the candidates are the router's own
            statistic_TC = statistic_TC.gather(-1, seen.own_experts_TK)
        return expected_experts(
            statistic_TC,
            policy.thresholds_of(context),
            temperature=self.temperature,
            rule=policy.table.rule,
            min_k=policy.min_k,
            max_k=policy.max_k,
            clamp=policy.clamp,
        )

    def _budget_term(self, paths: list[str], soft_L: Tensor, hard_L: Tensor, tokens_L: Tensor) -> Tensor:
        """mean(((n - b) / b)^2), with n the actual mean and the gradient of the expected one."""
        wanted_L = torch.tensor([self._targets[p] for p in paths], dtype=soft_L.dtype, device=soft_L.device)
        count_L = soft_L + (hard_L - soft_L).detach()
        tokens_L = tokens_L.clamp_min(1.0)
        if not self._per_layer:
            count_L, wanted_L = (count_L.sum() / tokens_L.sum()).unsqueeze(0), wanted_L[:1]
            return ((count_L - wanted_L) / wanted_L).square().mean()
        return ((count_L / tokens_L - wanted_L) / wanted_L).square().mean()

    def _check_targets(self, wanted: float | Mapping[str, float] | None) -> dict[str, float]:
        """The target of every router, checked against what its policy may select."""
        policy, plan = self.integrator.policy, self.integrator.plan
        if not isinstance(policy, TablePolicy):
            raise InvalidParameterError(
                f"the budget term needs a decision table, got a policy without one ({type(policy).__name__}); make the "
                "integration with a calibration, or pass budget=0."
            )
        if wanted is None:
            wanted = getattr(self.integrator, "budget", None)
        if wanted is None:
            raise InvalidParameterError(
                "the budget term needs a target: expected experts_per_token here or in the integration, got neither; "
                "give it, or pass budget=0."
            )
        targets = {}
        for layer in plan.layers:
            if isinstance(wanted, Mapping) and layer.path not in wanted:
                raise InvalidParameterError(
                    f"experts_per_token must name every router, got none for {layer.path}; add it."
                )
            target = wanted[layer.path] if isinstance(wanted, Mapping) else wanted
            if isinstance(target, bool) or not isinstance(target, (int, float)):
                raise InvalidTypeError(f"experts_per_token must be a number of experts, got {target!r}.")
            most = policy.max_k if policy.max_k is not None else layer.context.top_k
            if not policy.min_k <= target <= most:
                raise InvalidParameterError(
                    f"experts_per_token must lie between min_k={policy.min_k} and max_k={most} in router "
                    f"{layer.path}, got {target!r}; change the target or the limits."
                )
            targets[layer.path] = float(target)
        return targets

    def _tell_no_graph(self, held: dict[str, list[Seen]]) -> None:
        """Warn once where trainable routers gave logits without a graph although gradients are on."""
        if self._warned or not torch.is_grad_enabled() or not self._tape.training:
            return
        if any(seen.logits_TE.requires_grad for calls in held.values() for seen in calls):
            return
        routers = [layer.router for layer in self.integrator.plan.layers if layer.path in held]
        if any(p.requires_grad for router in routers for p in router.parameters()):
            self._warned = True
            logger.warning(
                "the routers' logits carry no gradient although their weights are trained: the forward ran without "
                "gradients, or under re-entrant gradient checkpointing; use use_reentrant=False."
            )


def over_processes(sums: Tensor) -> Tensor:
    """The sums over all processes, with this process's gradient times their number.

    Where gradients are then averaged over processes, the average is the gradient of a function of the total.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return sums
    world = torch.distributed.get_world_size()
    if world == 1:
        return sums
    total = sums.detach().clone()
    torch.distributed.all_reduce(total)
    scaled = sums * world
    return scaled + (total - scaled).detach()


def _task_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The model's own loss, or the causal language-modelling loss of its logits."""
    loss: Tensor | None = (
        outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    )
    if loss is not None:
        return loss
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None or labels is None:
        raise InvalidParameterError(
            "expected outputs with a loss, or outputs with logits together with labels, got neither; pass labels to "
            "the model or to the loss."
        )
    from transformers.loss.loss_utils import ForCausalLMLoss

    total: Any = num_items_in_batch
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=total)


__all__ = ["AdaptiveRoutingLoss"]
