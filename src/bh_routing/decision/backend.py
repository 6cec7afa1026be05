"""The decision as one operation: the PyTorch reference, and the Triton kernel beside it.

`decision_function` says which of the two runs. It imports Triton only where the kernel is going to be used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from .._words import Backend, check_word
from ..errors import InvalidParameterError, MissingDependencyError
from .types import RoutingDecision


def decision_function(
    backend: Backend, device: torch.device, *, num_experts: int, statistic: str, score_func: str
) -> Callable[..., RoutingDecision]:
    """The function that decides for a router on this device: `decide.decide_by_table` or its fused twin.

    ``"auto"`` is the fused one on a CUDA device where Triton is installed and the kernel computes what is asked,
    else PyTorch.

    Raises
    ------
    InvalidParameterError, MissingDependencyError
        If ``backend="triton"`` cannot be had.
    """
    check_word("backend", backend, Backend)
    from .select import decide_by_table

    if backend == "torch" or (backend == "auto" and (device.type != "cuda" or find_spec("triton") is None)):
        return decide_by_table
    try:
        from . import select_triton as triton_decide
    except ImportError as error:
        raise MissingDependencyError(
            "backend='triton' needs Triton, which is not installed; pip install 'bh-routing[triton]', or use "
            "backend='torch'."
        ) from error
    if triton_decide.supports(num_experts, statistic, score_func):
        if triton_decide.runs_on(device):
            return triton_decide.decide_by_table
        came = f"the device {device}"
    else:
        came = f"{num_experts} experts and the statistic {statistic!r} of {score_func!r} scores"
    if backend == "auto":
        return decide_by_table
    raise InvalidParameterError(
        "backend='triton' serves routers on a GPU with at most "
        f"{triton_decide.MOST_EXPERTS} experts and softmax or sigmoid scores, got {came}; use backend='auto'."
    )


__all__ = ["decision_function"]
