"""What a step tells besides its loss: sums on the device, one short vector a micro-batch, and what they mean.

Nothing here waits for a device. The engine adds the vectors up over micro-batches and steps, forgets those of
steps that did not count, and sums them over the ranks when a line is written (engine.metrics).
"""

import math
from typing import Any

import torch
from torch import Tensor

from sfumato.data.batch import Draws
from sfumato.engine import profiles, shards
from sfumato.engine.engine import Engine
from sfumato.objective import Objective

PARTS = 4
"""Equal parts of the schedule whose losses are told apart."""


@torch.no_grad()
def sums(objective: Objective, losses: Tensor, latents: Tensor, draws: Draws) -> Tensor:
    """What a micro-batch adds, (2 * PARTS + 4,) fp32 on its device.

    losses: (B,), as they count in the mean over the global batch; latents: (B, c, h, w). In order: of each
    part of the schedule the sum of its losses, and its number of samples; of the latents and then of the
    noise the sum over samples of their means, and of their mean squares.
    """
    t = objective.law.draw(draws.timestep)  # (B,) int64
    part = t * PARTS // objective.process.timesteps
    inside = part[:, None] == torch.arange(PARTS, device=t.device)  # (B, PARTS)
    own = torch.where(inside, losses.detach().float()[:, None], 0.0).sum(0)
    noise = draws.noise
    if objective.settings.noise_offset:
        noise = noise + objective.settings.noise_offset * draws.offset
    # A sample counts once, whatever the size of its latents.
    both = torch.stack([latents.detach().float(), noise]).flatten(2)  # (2, B, c * h * w)
    moments = torch.stack([both.mean(2), both.square().mean(2)], 1).sum(2)  # (2, 2)
    return torch.cat([own, inside.sum(0).float(), moments.flatten()])


def told(summed: list[float]) -> dict[str, Any]:
    """The log's keys from the sums over all samples of some steps; nothing of none."""
    if not summed:
        return {}
    losses, counts, moments = summed[:PARTS], summed[PARTS : 2 * PARTS], summed[2 * PARTS :]
    number = sum(counts)
    found: dict[str, Any] = {
        "loss_by_timestep": [
            loss / count if count else None for loss, count in zip(losses, counts, strict=True)
        ]
    }
    for name, mean, square in zip(("latent", "noise"), moments[::2], moments[1::2], strict=True):
        mean, square = mean / number, square / number
        found |= {f"{name}_mean": mean, f"{name}_std": math.sqrt(max(0.0, square - mean * mean))}
    return found


@torch.no_grad()
def weights(engine: Engine) -> Tensor:
    """Squared norms of this rank's own fp32 weights, and of what the first average is away from them, (2,).

    Their sums over ranks are those of the whole; no weight leaves its rank. The second is 0 where the run
    keeps no average.
    """
    kind = next(iter(profiles.kinds(engine.config.ema)), None)
    state = engine.deepspeed.basic_optimizer.state
    parts: list[Tensor] = []
    for shard in shards.owned(engine.deepspeed):
        master, average = shard.master, state[shard.flat].get(kind)
        apart = master.new_zeros(()) if average is None else squared(shard.view(average) - master)
        parts.append(torch.stack([squared(master), apart]))
    # A rank may own nothing of a small model.
    found = torch.stack(parts).sum(0) if parts else torch.zeros(2)
    # At stage 0 every rank owns all.
    copies = engine.ranks.world if engine.config.engine.zero_stage == 0 else 1
    return found.to(engine.ranks.device) / copies


def squared(numbers: Tensor) -> Tensor:
    """The sum of the squares, () fp32."""
    return torch.linalg.vector_norm(numbers, dtype=torch.float32).square()


def weights_told(summed: list[float], averaged: bool) -> dict[str, float]:
    """The log's keys from the sums of `weights` over ranks."""
    size, apart = summed
    found = {"weight_norm": math.sqrt(size)}
    if averaged:
        found["ema_distance"] = math.sqrt(apart / size) if size else 0.0
    return found
