"""Numbers for a run that has no data and no weights: batches as a loader gives them, and random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import methods
from sfumato.config import Config
from sfumato.data.batch import Batch, Draws
from sfumato.methods import Method
from sfumato.models.family import Family
from sfumato.models.folder import Facts
from sfumato.models.loading import held_parts, quiet
from sfumato.planner.trace import bare_family

SPREAD = 0.02
"""Standard deviation of random weights: small enough that bf16 holds what a deep model makes of them."""
Make = Callable[..., Tensor]
"""(shape, dtype) -> numbers on the host."""


class Numbers:
    """Weights of no file, which an engine reads as it reads a run's; all of them random."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.random = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def check(self, module: nn.Module) -> None:
        """They fit any module."""

    def __call__(self, name: str, start: int, length: int) -> Tensor:
        """A slice of a parameter's flattened tensor, (length,)."""
        made = torch.empty(length, device=self.device)
        return made if self.random is None else made.normal_(0, SPREAD, generator=self.random)


def zeros(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers for what is only counted."""
    return torch.zeros(shape, dtype=dtype)


def drawn(random: torch.Generator) -> Make:
    """Numbers for what is timed: a card is faster with zeros. Pinned, as a loader's are, if it can be."""

    def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    return make


def method_of(config: Config, facts: Facts, device: torch.device) -> Method:
    """A run's method, whose frozen parts hold random numbers, or none on the meta device."""
    family = bare_family(config, facts)
    images, captions = held_parts(config)
    if device.type != "meta":
        if images:
            family.vae = filled(family.vae, device)
        # Captions are encoded once for a batch that the cache would give.
        family.text_encoders = {name: filled(part, device) for name, part in family.text_encoders.items()}
        family.device = device
    if captions or not config.learns_text:
        family.null_condition()  # made once in a run, so that it is no step's
    with quiet():
        return methods.build(config, family)


def filled(part: nn.Module, device: torch.device) -> Any:
    """A part without numbers, with random ones, on a device."""
    held = part.to_empty(device=device)
    random = torch.Generator(device).manual_seed(0)
    for tensor in [*held.parameters(), *held.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(0, SPREAD, generator=random)
        else:  # positions of a text encoder
            tensor.data.copy_(torch.arange(tensor.numel(), device=device).view(tensor.shape))
    return held


def batch_of(config: Config, family: Family, size: tuple[int, int], samples: int, make: Make) -> Batch:
    """A micro-batch as the loader makes it of pictures of `size` (height, width), on the host."""
    images, captions = held_parts(config)
    data = config.data
    height, width = (side // family.vae_factor for side in size)
    latents = (samples, family.latent_channels, height, width)
    perturbed = make(latents) if config.objective.input_perturbation else None
    times = (torch.arange(samples) + 0.5) / samples
    draws = Draws(make(latents), make(latents), times, make((*latents[:2], 1, 1)), perturbed)
    parameters = family.latent_channels * (1 if data.posterior == "mean" else 2)
    hinted = any(layout.conditioning_column for layout in data.layouts)
    whole = partial(torch.tensor, [*size, 0, 0, *size], dtype=torch.float32)
    text = None
    if not captions and not config.learns_text:
        rows = family.encode_prompts(["a cat"] * samples)
        text = {name: make(tuple(row.shape), row.dtype) for name, row in rows.items()}
    return Batch(
        ids=torch.arange(samples),
        visits=torch.zeros(samples, dtype=torch.long),
        captions=["a cat"] * samples,
        dropped=torch.zeros(samples, dtype=torch.bool),
        size_and_crop=torch.stack([whole()] * samples),
        draws=draws,
        pixels=make((samples, 3, *size)).clamp(-1, 1) if images else None,
        moments=None if images else make((samples, parameters, height, width), family.vae_dtype),
        text=text,
        hint=make((samples, 3, *size)).clamp(0, 1) if hinted else None,
    )
