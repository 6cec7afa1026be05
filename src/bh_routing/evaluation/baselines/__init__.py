"""Published and simple routing rules to compare with, as policies (`bh_routing.policies`).

Every one decides within the router's own choice: it drops experts, and never asks for one that the model did not
select, but for two of ``batchwise``. Their names are in `bh_routing.evaluation.entries.POLICIES`.

``batchwise``: the sequences of a decoding step share what they load. ``tokenwise``: each token by itself. ``shared``: tokens of a sequence share a budget. ``layerwise``: layers share
one.
"""

from .base import Baseline, mean_experts, solve
from .batchwise import BatchRule, BatchTopKPolicy, OpportunisticPolicy, SharedExpertsPolicy, mean_loads
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

__all__ = [
    "AdaptivePolicy",
    "AllocatedPolicy",
    "Baseline",
    "BatchRule",
    "BatchTopKPolicy",
    "DynamicSkippingPolicy",
    "EntropyPolicy",
    "MinPPolicy",
    "OpportunisticPolicy",
    "PerLayerPolicy",
    "RandomPolicy",
    "SequenceTopKPolicy",
    "SharedExpertsPolicy",
    "ThresholdPolicy",
    "TopPPolicy",
    "UniformPolicy",
    "allocate",
    "mean_experts",
    "mean_loads",
    "solve",
]
