"""Fixtures of the calibration tests: a calibration made from random logits, without any model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bh_routing.calibration.accumulate import LayerCounts, LayerMoments, ReservoirSampler, join_moments
from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.data import CalibratedLayer, join_layers
from calibration_cases import random_logits


@pytest.fixture(scope="session")
def sha256_of() -> Callable[..., str]:
    """The first 16 digits of the SHA-256 of tensors' bytes."""

    def digest(*tensors: torch.Tensor) -> str:
        found = hashlib.sha256()
        for tensor in tensors:
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    return digest


@pytest.fixture(scope="session")
def synthetic_calibration() -> Callable[..., Calibration]:
    """Factory: counts, moments and a reservoir of random logits, through the accumulators of `calibrate`."""

    def make(
        seed: int = 0,
        tokens: int = 4000,
        layers: int = 2,
        experts: int = 16,
        top_k: int = 4,
        moments: bool = True,
        sensitivity: bool = True,
        reservoir: int = 2000,
        temperature: float = 1.0,
        score_func: str = "softmax",
        **changes: Any,
    ) -> Calibration:
        logits_LTE = random_logits(seed, tokens, layers, experts)
        own_LTK = logits_LTE.topk(top_k, -1).indices
        generator = torch.Generator().manual_seed(seed + 1000)
        per_layer, sums = [], []
        for index in range(layers):
            counts = LayerCounts(f"layers.{index}.gate", experts, score_func, temperature, min(top_k, 3))
            counts.update(logits_LTE[index], own_LTK[index])
            per_layer.append(counts.histograms())
            sums.append(LayerMoments(experts))
            outputs = torch.randn(tokens * top_k, 6, generator=generator) + torch.arange(6.0)
            outputs = outputs * (1.0 + own_LTK[index].reshape(-1, 1) / experts)
            sums[-1].update(outputs, own_LTK[index].flatten())
        sampler = ReservoirSampler(reservoir, layers, experts, top_k)
        hashes = torch.randint(2**62, (tokens,), generator=generator)
        sampler.add(hashes, logits_LTE.transpose(0, 1), own_LTK.transpose(0, 1))
        measured = join_moments(sums)
        if sensitivity:
            from dataclasses import replace

            measured = replace(
                measured,
                sensitivity_tokens_LE=measured.tokens_LE.clone(),
                sensitivity_LE=torch.rand(layers, experts, generator=generator).double() + 0.5,
            )
        fields: dict[str, Any] = {
            "model_id": "synthetic",
            "layers": tuple(
                CalibratedLayer(
                    path=f"layers.{index}.gate",
                    experts_path=f"layers.{index}.experts",
                    top_k=top_k,
                    score_func=score_func,
                    route_norm="none",
                )
                for index in range(layers)
            ),
            "num_experts": experts,
            "histograms": join_layers(per_layer),
            "moments": measured if moments else None,
            "reservoir": sampler.result() if reservoir else None,
            "reservoir_size": reservoir,
            "fingerprint_LD": torch.randn(layers, 16, generator=generator, dtype=torch.float64),
            "temperature": temperature,
            "trim": min(top_k, 3),
            "tokens": tokens,
            "documents": 1,
            "text_digest": f"{seed:032x}",
            "window": 128,
            "library_version": "test",
        }
        return Calibration(**(fields | changes))

    return make
