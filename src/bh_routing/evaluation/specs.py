"""From what a person types to a routing: ``name:key=value,key=value`` -> `PolicySpec` -> `RoutingIntegration`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._words import did_you_mean
from ..errors import InvalidParameterError, UnknownPolicyError
from ..integration import RoutingIntegration
from ..policies import RoutingPolicy
from ..stats.procedures import ALIASES
from .entries import POLICIES, SOLVED
from .workbench import Workbench


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """A policy by name with its parameters; ``text`` is its canonical form."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    text: str

    @property
    def budget(self) -> float | None:
        """The budget, where one was given."""
        return self.parameters.get("experts")


Policy = str | PolicySpec | RoutingPolicy


# ------------------------------------------------------------------------------------------------ parsing


def _unknown(what: str, name: str, known: Iterable[str]) -> UnknownPolicyError:
    known = list(known)
    hint = did_you_mean(name, known)
    hint = f"; {hint}" if hint.startswith("did") else "."
    return UnknownPolicyError(f"{what} must be one of {', '.join(known) or '(none)'}, got {name!r}{hint}")


def parse_policy(text: str) -> PolicySpec:
    """Read ``name`` or ``name:key=value,key=value``.

    Raises
    ------
    UnknownPolicyError
        For a name or key that does not exist; it lists those that do, and the nearest.
    InvalidParameterError
        For a value that cannot be read, a missing or a doubled parameter.

    Examples
    --------
    >>> parse_policy("topp:p=0.3").parameters
    {'p': 0.3}
    >>> parse_policy("topq:p=0.3")
    Traceback (most recent call last):
    ...
    bh_routing.errors.UnknownPolicyError: policy must be one of full, topk, regular, normalised, uniform, adaptive, \
topp, minp, threshold, entropy, naee, random, seqtopk, perlayer, lexi, allocmoe, oea, xshare, batchtopk, original, bh, by, bonferroni, holm, \
hochberg, storey, higher_criticism, got 'topq'; did you mean 'topp'?
    """
    name, _, rest = text.strip().partition(":")
    name = ALIASES.get(name.strip(), name.strip())
    if name not in POLICIES:
        raise _unknown("policy", name, POLICIES)
    entry = POLICIES[name]
    parameters: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            raise InvalidParameterError(f"expected key=value in policy {text!r}, got {part!r}.")
        if key not in entry.parameters:
            raise _unknown(f"parameter of {name}", key, entry.parameters)
        if key in parameters:
            raise InvalidParameterError(f"policy {text!r} gives {key} twice.")
        try:
            read = parameters[key] = entry.parameters[key][0](value)
            if isinstance(read, float) and not (math.isfinite(read) and (key != "experts" or read > 0)):
                raise ValueError
        except ValueError:
            raise InvalidParameterError(
                f"cannot read {key}={value!r} of policy {name}: {entry.parameters[key][1]}."
            ) from None
    given = [key for key in entry.needs if key in parameters]
    if entry.needs and len(given) != 1:
        raise InvalidParameterError(
            f"policy {name} needs {'exactly one of ' if len(entry.needs) > 1 else ''}"
            f"{' and '.join(entry.needs)}, got {' and '.join(given) or 'none of them'}."
        )
    if "experts" in parameters and (both := [key for key in SOLVED if key in parameters]):
        raise InvalidParameterError(
            f"policy {text!r} gives {both[0]} and a budget, which is solved for it; give one of them."
        )
    body = ",".join(f"{key}={_show(value)}" for key, value in parameters.items())
    return PolicySpec(name=name, parameters=parameters, text=f"{name}:{body}" if body else name)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "/".join(_show(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def make_routing(spec: PolicySpec | str, bench: Workbench) -> RoutingIntegration:
    """The integration of a policy with a model, not patched yet.

    Raises
    ------
    BudgetError
        If the budget cannot be met.
    """
    spec = parse_policy(spec) if isinstance(spec, str) else spec
    return POLICIES[spec.name].build(bench, dict(spec.parameters))


def labelled(
    policies: Sequence[Policy] | Mapping[str, Policy],
) -> dict[str, PolicySpec | RoutingPolicy]:
    """Label -> policy, text parsed, the model's own routing first."""
    labels = list(policies) if isinstance(policies, Mapping) else [None] * len(policies)
    given = policies.values() if isinstance(policies, Mapping) else policies
    found: dict[str, PolicySpec | RoutingPolicy] = {"full": parse_policy("full")}
    asked = set()
    for label, policy in zip(labels, given, strict=True):
        read = parse_policy(policy) if isinstance(policy, str) else policy
        name = label or (read.text if isinstance(read, PolicySpec) else read.name)
        if name in asked:
            raise InvalidParameterError(
                f"policy {name!r} is there twice; give a mapping of labels to policies."
            )
        asked.add(name)
        found[name] = read
    return found
