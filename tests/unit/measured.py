"""What a training step keeps and takes, measured on real tensors: what the planner must foretell.

It shares the run's own parts with the planner, and none of the planner's code.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sfumato import methods, models
from sfumato.config import Config
from sfumato.data.batch import Batch, Draws
from sfumato.engine.ds_config import autocast
from sfumato.models.loading import DTYPES, frozen_dtypes, held_parts
from sfumato.objective import Objective

CPU = torch.device("cpu")


@dataclass
class Step:
    """A run's parts on a device, filled with random numbers."""

    config: Config
    device: torch.device

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        config = self.config
        dtypes = frozen_dtypes(config)
        self.family = models.load(config.model, self.device, *dtypes, *held_parts(config))
        self.method = methods.build(config, self.family)
        self.parts = self.method.build().to(self.device)
        if not autocast(config):
            self.parts.to(DTYPES[config.engine.precision])
        self.method.settle(self.parts)
        self.objective = Objective(config.objective, self.family.scheduler_config)

    def batch(self, size: tuple[int, int], samples: int) -> Batch:
        """A random micro-batch of pictures of a size (height, width)."""
        latent = (samples, 4, size[0] // 8, size[1] // 8)
        images, captions = held_parts(self.config)
        text = None
        if not captions and not self.config.learns_text:
            self.family.__dict__.pop("_null", None)
            text = self.family.encode_prompts(["a cat"] * samples)
        hinted = any(layout.conditioning_column for layout in self.config.data.layouts)
        batch = Batch(
            ids=torch.arange(samples),
            visits=torch.zeros(samples, dtype=torch.long),
            captions=["a cat <new>"] * samples,
            dropped=torch.zeros(samples, dtype=torch.bool),
            size_and_crop=torch.rand(samples, 6),
            draws=Draws(
                torch.randn(latent),
                torch.randn(latent),
                torch.rand(samples),
                torch.randn(samples, 4, 1, 1),
                None,
            ),
            pixels=torch.rand(samples, 3, *size) if images else None,
            moments=None if images else torch.randn(samples, 8, *latent[2:]),
            text=text,
            hint=torch.rand(samples, 3, *size) if hinted else None,
        )
        return batch.to(self.device)

    def losses(self, latents: Tensor, condition: Any, batch: Batch) -> Tensor:
        """As the loop has them, (B,)."""

        def ask(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast(self.config)):
                answer: Tensor = self.parts(x_t, t, condition)
            return answer

        return self.objective.losses(ask, latents, batch.draws)

    def kept(self, size: tuple[int, int], samples: int) -> int:
        """Bytes that autograd keeps after a forward pass: weights and inputs apart, each storage once."""
        batch = self.batch(size, samples)
        latents, condition = self.method.encode(batch)
        given = [latents, *condition.values(), *vars(batch.draws).values(), batch.hint]
        theirs = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
        theirs |= storages(self.parts)
        found: list[weakref.ref[Tensor]] = []

        def pack(tensor: Tensor) -> Tensor:
            found.append(weakref.ref(tensor))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = self.losses(latents, condition, batch)
        # A part of the graph that leads to no weight that learns is gone by now, with what it kept.
        alive = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for ref in found
            if (t := ref()) is not None
        }
        assert losses.requires_grad
        return sum(size for place, size in alive.items() if place not in theirs)


def storages(part: nn.Module) -> set[int]:
    """Where a module's numbers lie."""
    return {t.untyped_storage().data_ptr() for t in (*part.parameters(), *part.buffers())}


def peak(step: Step, size: tuple[int, int], samples: int) -> int:
    """The most bytes that torch's CPU allocator gave at once to encoding, forward and backward pass.

    Gradients of weights are dropped as soon as they are there.
    """
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in step.parts.parameters()
        if p.requires_grad
    ]
    batch = step.batch(size, samples)
    # The profiler is not told of the end of what was there before: the batch counts until the end.
    held = sum(
        t.nbytes for t in [*vars(batch).values(), *vars(batch.draws).values()] if isinstance(t, Tensor)
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as told:
        latents, condition = step.method.encode(batch)
        losses = step.losses(latents, condition, batch)
        del latents, condition  # as in the loop
        losses.sum().backward()
    for hook in hooks:
        hook.remove()
    events = [event for event in told.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = held
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most
