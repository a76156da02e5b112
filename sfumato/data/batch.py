"""What a training step is a pure function of, besides the weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch's samples, drawn by the loader; latents are (c, h, w)."""

    posterior: Tensor
    """(B, c, h, w) fp32, N(0, 1): picks a latent from the VAE's Gaussian."""
    noise: Tensor
    """(B, c, h, w) fp32, N(0, 1): the diffusion noise."""
    timestep: Tensor
    """(B,) fp32, uniform in [0, 1): the objective turns it into a timestep."""
    offset: Tensor
    """(B, c, 1, 1) fp32, N(0, 1): noise that is constant over a channel."""
    perturbation: Tensor | None
    """(B, c, h, w) fp32, N(0, 1): noise of the input alone; None where it is not asked for."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        """The same draws with every tensor changed."""
        extra = None if self.perturbation is None else change(self.perturbation)
        return Draws(
            change(self.posterior), change(self.noise), change(self.timestep), change(self.offset), extra
        )


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-batch."""

    ids: Tensor
    """(B,) int64: the samples' numbers in the source."""
    visits: Tensor
    """(B,) int64: how often each came before."""
    pixels: Tensor
    """(B, 3, H, W) fp32 in [-1, 1]."""
    captions: list[str]
    """B captions, each chosen among its picture's."""
    dropped: Tensor
    """(B,) bool: the samples that train the unconditional model."""
    size_and_crop: Tensor
    """(B, 6) fp32, pixels: original height, width, crop top, left, target height, width."""
    draws: Draws

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""
        return replace(
            self,
            ids=change(self.ids),
            visits=change(self.visits),
            pixels=change(self.pixels),
            dropped=change(self.dropped),
            size_and_crop=change(self.size_and_crop),
            draws=self.draws.map(change),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; from pinned memory the copy does not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; the DataLoader calls this by its name."""
        return self.map(Tensor.pin_memory)
