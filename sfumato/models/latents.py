"""Latents: a sample of what the VAE gives, and whether it can be trained on."""

import torch
from torch import Tensor

from sfumato.errors import UserError


def draw(moments: Tensor, posterior: Tensor) -> Tensor:
    """Mean and log-variance (B, 2c, h, w), unit noise (B, c, h, w) -> a sample of that Gaussian.

    Of a mean alone, (B, c, h, w), the sample is the mean.
    """
    if moments.shape[1] == posterior.shape[1]:
        return moments
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior  # clamped as diffusers' Gaussian is


def check_finite(latents: Tensor, ids: Tensor, dtype: str) -> None:
    """Raise UserError that names the samples with latents that are not finite."""
    good = torch.isfinite(latents).flatten(1).all(1)  # (B,)
    if not bool(good.all()):
        bad = ids[~good.to(ids.device)].tolist()
        raise UserError(
            f"latents of the samples {', '.join(map(str, bad))}",
            f"the VAE, computing in {dtype}, gives numbers that are not finite",
            'look at these pictures; if they are sound, set model.vae_dtype = "fp32"',
        )
