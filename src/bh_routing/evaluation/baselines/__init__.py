"""Published and simple routing rules to compare with, as policies (`bh_routing.policies`).

Importing this package adds them to `bh_routing.policies.POLICIES`. Every one decides within the router's own
choice: it drops experts, and never asks for one that the model did not select.

``tokenwise``: each token by itself. ``shared``: tokens of a sequence share a budget. ``layerwise``: layers share
one.
"""

from ...policies import POLICIES
from .base import Baseline, mean_experts, solve
from .layerwise import PerLayerPolicy, allocate
from .shared import AllocatedPolicy, SequenceTopKPolicy
from .tokenwise import (
    AdaptivePolicy,
    DynamicSkippingPolicy,
    EntropyPolicy,
    MinPPolicy,
    RandomPolicy,
    ThresholdPolicy,
    TopPPolicy,
    UniformPolicy,
)

BASELINES: dict[str, type[Baseline]] = {
    policy.name: policy
    for policy in (
        TopPPolicy,
        MinPPolicy,
        ThresholdPolicy,
        EntropyPolicy,
        AdaptivePolicy,
        DynamicSkippingPolicy,
        RandomPolicy,
        UniformPolicy,
        SequenceTopKPolicy,
        PerLayerPolicy,
        AllocatedPolicy,
    )
}
POLICIES.update(BASELINES)

__all__ = [
    "BASELINES",
    "AdaptivePolicy",
    "AllocatedPolicy",
    "Baseline",
    "DynamicSkippingPolicy",
    "EntropyPolicy",
    "MinPPolicy",
    "PerLayerPolicy",
    "RandomPolicy",
    "SequenceTopKPolicy",
    "ThresholdPolicy",
    "TopPPolicy",
    "UniformPolicy",
    "allocate",
    "mean_experts",
    "solve",
]
