"""What a type checker sees of the public interface: mypy reads this file (`make lint`), and what it says holds when it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import bh_routing
from bh_routing import BHRoutingIntegration, Calibration, RoutingSettings


def test_with_gives_the_integration_itself(tiny_olmoe: Any) -> None:
    integration = BHRoutingIntegration(tiny_olmoe(), alpha=0.5)
    with integration as it:
        assert_type(it, BHRoutingIntegration)
        assert it is integration
        assert_type(it.calibration, Calibration | None)
        assert_type(it.settings, RoutingSettings)
        assert_type(it.get_routing_stats(), dict[str, Any])
    with bh_routing.RoutingIntegration(tiny_olmoe(), bh_routing.TopKPolicy(1)) as other:
        assert_type(other, bh_routing.RoutingIntegration)


def test_the_statistics_are_typed_where_they_are_asked_for() -> None:
    logits = torch.zeros(2, 4)
    plain = bh_routing.benjamini_hochberg_routing(logits, max_k=2)
    assert_type(plain, tuple[Tensor, Tensor, Tensor])
    assert len(plain) == 3
    told = bh_routing.benjamini_hochberg_routing(logits, max_k=2, return_stats=True)
    assert_type(told, tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None]])
    assert set(told[3]) == {"p_values", "thresholds", "raw_counts"}
    assert_type(bh_routing.topk_routing(logits, k=2), tuple[Tensor, Tensor, Tensor])
