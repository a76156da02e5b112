"""What is to be drawn, and how. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

Picture = Path | Image.Image
"""A picture's file, which is read when it is needed, or the picture."""
ROLES = ("image", "mask", "condition")
"""The parts that a picture can have in a drawing, by their names in `Shot`."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn."""

    steps: int = 25
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance; 1 and less is without."""
    size: int | tuple[int, int] | None = None
    """Pixels: a square's side or (width, height); None is what the model was made for."""
    negative: str | None = None
    """What the pictures should not show, where a shot does not say; None is the pipeline's own."""
    scheduler: Literal["ddim", "euler", "dpm++", "unipc"] | None = None
    """The sampler; None is the model's own."""
    guidance_rescale: float = 0.0
    """Share of arXiv:2305.08891's correction of over-exposed pictures; 0.7 suits zero-terminal-SNR models."""
    batch_size: int = 1
    """Pictures per forward pass; with 1 a picture is the same to the bit whatever else is drawn."""
    strength: float | None = None
    """Share of the denoising that is done to a shot's image; None is 0.8, or 1 where a mask is given."""
    control_scale: float = 1.0
    """The factor of what a ControlNet adds."""


@dataclass(frozen=True)
class Shot:
    """One picture that is asked for."""

    prompt: str
    seed: int
    row: int = 0
    """Shots of the same prompt and pictures, which differ in the seed only, have the same row."""
    negative: str | None = None
    """None is what `Sampling` says."""
    image: Picture | None = None
    """The picture that is changed, in place of one from nothing."""
    mask: Picture | None = None
    """White where `image` is drawn anew, black where it stays."""
    condition: Picture | None = None
    """What the ControlNet is shown."""
    size: tuple[int, int] | None = None
    """(width, height) in pixels; None is what `Sampling` says."""

    @property
    def roles(self) -> frozenset[str]:
        """Which pictures it has, of ROLES."""
        return frozenset(role for role in ROLES if getattr(self, role) is not None)


def shots(prompts: Iterable[str], seeds: Iterable[int]) -> list[Shot]:
    """Every prompt with every seed, seeds running fastest."""
    seeds = list(seeds)
    return [Shot(prompt, seed, row) for row, prompt in enumerate(prompts) for seed in seeds]
