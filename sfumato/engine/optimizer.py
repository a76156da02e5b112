"""The base optimizer that DeepSpeed steps, the average it keeps, and the learning rate's law."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from sfumato.config import Config, Ema


def averaging(base: type[Optimizer]) -> type[Optimizer]:
    """A subclass of `base` that keeps state["ema"], an average of each weight, after each of its steps.

    As one more state tensor the average has the shape of whatever shard ZeRO hands to the optimizer: it costs
    4 bytes x parameters / ranks, follows the fp32 masters, and moves only when a step is really applied.
    """

    class Averaging(base):  # type: ignore[misc, valid-type]
        ema_decay = 0.0
        """Set before each step, see `ema_decay`."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            # The average starts from the weights before the first step. It is added after that step only,
            # because an empty state is how torch's optimizers know that they have to make theirs.
            averages = [self.state[p].get("ema", None) for p in weights]
            averages = [
                p.detach().clone() if a is None else a for p, a in zip(weights, averages, strict=True)
            ]
            result = super().step(closure)
            if weights:
                torch._foreach_lerp_(averages, weights, 1 - self.ema_decay)
            for weight, average in zip(weights, averages, strict=True):
                self.state[weight]["ema"] = average
            return result

    Averaging.__name__ = f"Averaging{base.__name__}"
    return Averaging


def ema_decay(ema: Ema, step: int) -> float:
    """Share of the old average that stays at the applied step `step` (from zero)."""
    return min(ema.decay, (1 + step) / (10 + step)) if ema.warmup else ema.decay


def build(config: Config, parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> Optimizer:
    """The optimizer that `[optimizer]` names, with the average if `[ema]` asks for it.

    It has a group for each learning rate, whose "peak" is the rate after the warm-up.
    """
    settings = config.optimizer
    kind: type[Optimizer] = SGD
    options: dict[str, Any] = {"weight_decay": settings.weight_decay}
    if settings.name == "adamw":
        fused = device.type in ("cpu", "cuda")  # one pass over memory where torch has the kernel
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
