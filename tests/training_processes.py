"""One process of the test of distributed data parallel: a few steps on its share of a batch, a refit, the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from bh_routing import BHRoutingIntegration
from bh_routing.training import AdaptiveRoutingLoss, refit
from bh_routing.training.refitting import RecentChoices


def main(folder: Path, rank: int, world: int) -> None:
    logging.disable_progress_bar()
    if world > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    ids = torch.load(folder / "ids.pt").chunk(world)[rank]
    first = model.model.layers[0].mlp.gate.weight.detach().clone()
    integrator = BHRoutingIntegration(
        model, calibration=folder / "calibration.safetensors", experts_per_token=3.0
    )
    loss = AdaptiveRoutingLoss(integrator, balance=0.5, z=0.01, budget=1.0, experts_per_token=4.0)
    recent = RecentChoices(4096)
    integrator.watchers.append(recent)
    runner = DistributedDataParallel(model) if world > 1 else model
    # Momentum-free, so that what differs is the gradient alone.
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    parts: list[float] = []
    with integrator:
        for _ in range(3):
            out = runner(input_ids=ids, labels=ids, use_cache=False)
            (out.loss + loss.auxiliary()).backward()
            parts += [float(loss.parts[name]) for name in ("balance", "z", "budget", "experts_per_token")]
            optimiser.step()
            optimiser.zero_grad()
        refit(integrator, recent)
        thresholds = integrator.policy.table.thresholds_LE[:, :6].clamp(-100, 100)
    if rank == 0:
        result = {
            "weights": torch.cat([p.detach().flatten()[:200] for p in model.parameters()]).tolist(),
            "parts": parts,
            "thresholds": thresholds.flatten().tolist(),
            "moved": float((model.model.layers[0].mlp.gate.weight - first).abs().max()),
        }
        (folder / f"result-{world}.json").write_text(json.dumps(result))
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
