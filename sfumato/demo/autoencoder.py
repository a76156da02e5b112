"""The demo's autoencoder: a small diffusers AutoencoderKL trained from nothing on Noto and Twemoji.

Pixels (B, 3, 64, 64) in [-1, 1] <-> latents (B, 4, 16, 16).  It never sees OpenMoji,
the style the demo tunes to.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from sfumato.demo import emoji

RESOLUTION = 64
BASE_STYLES = ("noto", "twemoji")
SHIFT = 3  # pixels a drawing is moved by at most: the margin that emoji.FILL leaves
KL_WEIGHT = 3e-7  # on the KL summed over one image's 1,024 latents: about a twentieth of the whole loss


def new_autoencoder(channels: tuple[int, ...] = (24, 48, 96)) -> AutoencoderKL:
    """An untrained AutoencoderKL, f4 for three levels; the decoder has one block more per level."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def premultiplied(drawings: np.ndarray) -> Tensor:
    """RGBA uint8 (N, H, W, 4) -> float16 (N, 4, H, W) in 0..1, colours multiplied by alpha."""
    pixels = torch.from_numpy(drawings).permute(0, 3, 1, 2).float() / 255  # (N, 4, H, W)
    pixels[:, :3] *= pixels[:, 3:]
    return pixels.half()


def random_strokes(count: int, generator: np.random.Generator) -> Tensor:
    """Transparent layers of random lines, arcs, circles and boxes, premultiplied (count, 4, 64, 64) in 0..1.

    Thin dark lines are rare in the base styles; without them the decoder would smear any outlined style.
    Lines are one to two and a half pixels wide; a third of the closed shapes are filled.
    """
    side, layers = 4 * RESOLUTION, []
    for _ in range(count):
        layer = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        pen = ImageDraw.Draw(layer)
        for _ in range(int(generator.integers(1, 8))):
            top = 40 if generator.random() < 0.7 else 256
            ink = (*(int(c) for c in generator.integers(0, top, 3)), 255)
            fill = (
                (*(int(c) for c in generator.integers(0, 256, 3)), 255) if generator.random() < 0.33 else None
            )
            ends = [int(v) for v in generator.integers(0, side, 4)]
            box = [
                min(ends[0], ends[2]),
                min(ends[1], ends[3]),
                max(ends[0], ends[2]) + 8,
                max(ends[1], ends[3]) + 8,
            ]
            width, turn = int(generator.integers(4, 11)), int(generator.integers(0, 360))
            match int(generator.integers(0, 4)):
                case 0:
                    pen.line(ends, fill=ink, width=width)
                case 1:
                    pen.arc(box, turn, turn + 180, fill=ink, width=width)
                case 2:
                    pen.ellipse(box, outline=ink, fill=fill, width=width)
                case _:
                    pen.rounded_rectangle(box, 24, outline=ink, fill=fill, width=width)
        layers.append(np.asarray(layer.convert("RGBa").resize((RESOLUTION,) * 2, Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(layers)).permute(0, 3, 1, 2).float() / 255


def augmented(pixels: Tensor, strokes: Tensor, generator: torch.Generator) -> Tensor:
    """Premultiplied (B, 4, 64, 64) -> shifted, mirrored, stroked, on paper: (B, 3, 64, 64) in [-1, 1]."""
    count, out = len(pixels), []
    shifts = torch.randint(-SHIFT, SHIFT + 1, (count, 2), generator=generator).tolist()
    chance = torch.rand((count, 3), generator=generator)
    picks = torch.randint(len(strokes), (count,), generator=generator)
    for row, (dy, dx) in enumerate(shifts):
        # the frame's margin is as wide as the shift, so what wraps around is transparent
        one = torch.roll(pixels[row].float(), (dy, dx), (1, 2))
        one = one.flip(2) if chance[row, 0] < 0.5 else one
        if chance[row, 1] < 0.5:
            layer = strokes[picks[row]]
            one = layer + one * (1 - layer[3:])
        out.append(one)
    stacked = torch.stack(out)  # (B, 4, 64, 64)
    paper = torch.where(chance[:, 2:] < 0.75, 1.0, torch.rand((count, 3), generator=generator))  # (B, 3)
    flat = stacked[:, :3] + paper[:, :, None, None] * (1 - stacked[:, 3:])
    return flat * 2 - 1


def on_white(pixels: Tensor) -> Tensor:
    """Premultiplied (B, 4, H, W) in 0..1 -> (B, 3, H, W) in [-1, 1] on white."""
    pixels = pixels.float()
    return (pixels[:, :3] + 1 - pixels[:, 3:]) * 2 - 1


def loss_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean absolute error + mean squared error of the reconstruction + KL_WEIGHT x KL."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
    rebuilt = rebuilt.float()
    error = functional.l1_loss(rebuilt, images) + functional.mse_loss(rebuilt, images)
    return error + KL_WEIGHT * posterior.kl().float().mean()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """Decode the posterior's mode: (N, 3, H, W) in [-1, 1] -> the same."""
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in images.split(batch)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over the images of 10 log10(4 / MSE), in dB (the range of the pixels is 2)."""
    error = (reconstruct(vae, images) - images).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def latent_std(vae: AutoencoderKL, images: Tensor, batch: int = 64) -> float:
    """Standard deviation of all latents (posterior mean) of the images; its inverse is the scaling factor."""
    return float(torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(batch)]).std())


def rate(progress: float, peak: float, warm: float = 0.03) -> float:
    """Learning rate at a progress of 0..1: linear warm-up, then a cosine to a hundredth of the peak."""
    if progress < warm:
        return peak * (progress + 1e-3) / (warm + 1e-3)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm)))))


def base_pictures() -> tuple[Tensor, Tensor]:
    """Every named drawing of the base styles, premultiplied (N, 4, 64, 64), and its sampling weight (N,).

    The concepts the demo draws come three times as often as flags, people and symbols.
    """
    pixels, weights = [], []
    for style in BASE_STYLES:
        codes = list(emoji.files(style))
        pixels.append(premultiplied(emoji.drawings(style, codes, RESOLUTION)))
        weights += [3.0 if code in emoji.concepts() else 1.0 for code in codes]
    return torch.cat(pixels), torch.tensor(weights)


def checks() -> dict[str, Tensor]:
    """Style -> the concept drawings on white (N, 3, 64, 64); OpenMoji is here only to be measured."""
    codes = list(emoji.concepts())
    return {s: on_white(premultiplied(emoji.drawings(s, codes, RESOLUTION))) for s in emoji.STYLES}


class Average:
    """Exponential moving average of a model's weights, in a copy that is ready to be saved."""

    def __init__(self, model: AutoencoderKL, decay: float = 0.999) -> None:
        self.copy = type(model).from_config(model.config).requires_grad_(False).eval()
        self.copy.load_state_dict(model.state_dict())
        self.decay = decay

    @torch.no_grad()
    def update(self, model: AutoencoderKL, step: int) -> None:
        """Move towards the model; early steps count for more, or the start would linger."""
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.copy.parameters()), [p.detach() for p in model.parameters()], 1 - keep)


def train_autoencoder(
    out: str | Path,
    minutes: float = 20.0,
    batch: int = 8,
    peak: float = 8e-4,
    seed: int = 0,
    steps: int | None = None,
    start_from: str | Path | None = None,
    decoder_only: bool = False,
    channels: tuple[int, ...] = (24, 48, 96),
    tell: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train, write the averaged model to `out`, and give its numbers.

    minutes: wall clock that the schedule follows; with `steps` it follows the steps instead, which a busy
    machine cannot shorten.  start_from: a trained autoencoder to go on from.  decoder_only: leave the latents
    and the scaling factor as they are, so that a denoiser trained on them stays valid.
    """
    out = Path(out)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    pixels, weights = base_pictures()
    strokes, shown = random_strokes(1024, np.random.default_rng(seed)), checks()
    vae = AutoencoderKL.from_pretrained(start_from, low_cpu_mem_usage=False) if start_from else None
    vae = (vae or new_autoencoder(channels)).float().train()
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not decoder_only)
    learned = [weight for weight in vae.parameters() if weight.requires_grad]
    average = Average(vae)
    adam = torch.optim.AdamW(learned, lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    start, step, told = time.monotonic(), 0, 0.0
    while (progress := step / steps if steps else (time.monotonic() - start) / (60 * minutes)) < 1:
        adam.param_groups[0]["lr"] = rate(progress, peak)
        rows = torch.multinomial(weights, batch, replacement=True, generator=draw)
        loss = loss_of(vae, augmented(pixels[rows], strokes, draw))
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        adam.step()
        step += 1
        average.update(vae, step)
        if progress - told > 0.05:
            told = progress
            numbers = {style: round(psnr(average.copy, images[:64]), 2) for style, images in shown.items()}
            spent = time.monotonic() - start
            average.copy.save_pretrained(out)  # a run that is cut short leaves something usable
            tell(
                f"step {step} {spent:.0f} s {spent / step:.3f} s/step "
                f"loss {float(loss.detach()):.4f} {numbers}"
            )
    seconds = (time.monotonic() - start) / step
    return finish(average.copy, shown, out, rescale=not decoder_only) | {
        "steps": step,
        "seconds_per_step": seconds,
    }


def finish(vae: AutoencoderKL, shown: dict[str, Tensor], out: Path, rescale: bool) -> dict[str, float]:
    """Save the model in half precision, scaling factor from the Noto concepts, and measure it."""
    if rescale:
        vae.register_to_config(scaling_factor=1 / latent_std(vae, shown["noto"]))
    vae.half().save_pretrained(out)
    vae.float()  # keeps the rounding, so that the saved weights are what is measured
    numbers: dict[str, float] = {f"psnr_{style}": psnr(vae, images) for style, images in shown.items()}
    numbers |= {
        "scaling_factor": vae.config.scaling_factor,
        "parameters": sum(p.numel() for p in vae.parameters()),
    }
    (out / "measured.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    return numbers
