"""The base optimizer that DeepSpeed steps, and the learning rate's law."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from sfumato.config import Config
from sfumato.device import has_fused_adamw
from sfumato.engine.ema import averaging


def build(config: Config, parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> Optimizer:
    """The optimizer that `[optimizer]` names, with the averages that `[ema]` asks for.

    It has a group for each learning rate, whose "peak" is the rate after the warm-up.
    """
    settings = config.optimizer
    kind: type[Optimizer] = SGD
    options: dict[str, Any] = {"weight_decay": settings.weight_decay}
    if settings.name == "adamw":
        fused = has_fused_adamw(device)
        kind, options = AdamW, options | {"betas": settings.betas, "eps": settings.eps, "fused": fused}
    if config.ema.enabled:
        kind = averaging(kind)
    peaks: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        peaks.setdefault(config.peak_lr(name), []).append(parameter)
    return kind([{"params": several, "lr": peak, "peak": peak} for peak, several in peaks.items()], **options)


def lr_factor(config: Config, step: int) -> float:
    """The learning rate of applied step `step` (from zero) over its peak.

    A pure function of the step: no scheduler state, the same for any number of ranks, micro-batches and
    resumes. The warm-up rises as (step + 1) / warmup_steps; then `schedule` runs over the rest and the
    falling ones reach zero one step after the last.
    """
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    done = (step - optimizer.warmup_steps) / max(1, config.steps - optimizer.warmup_steps)  # [0, 1)
    match optimizer.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - done
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "cosine_with_restarts":
            return (1 + math.cos(math.pi * (done * optimizer.cycles % 1))) / 2
        case "polynomial":
            return (1 - done) ** optimizer.power
