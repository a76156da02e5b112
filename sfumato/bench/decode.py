"""From a JPEG file to the pixels that are trained on: ours, Pillow alone, and `datasets` with torch.

The photos are made up: broad shapes of colour with grain over them, so that the files are as large as a
camera's. Every side gives (3, H, W) fp32 in [-1, 1], the middle of the photo resized to cover a square.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.bench.sides import Distance, Side, side_by_side
from sfumato.data.transforms import Geometry, decode, geometry, render

GRAIN = 6.0  # standard deviation, of 255
LEVEL = 2 / 255  # one step of 8 bits, in [-1, 1]
FINEST = Distance(mean=1.5 * LEVEL, most=16 * LEVEL)
QUALITY = 92  # of the JPEG files


def photo(size: tuple[int, int], seed: int) -> Image.Image:
    """A made-up photo of (height, width)."""
    draw = np.random.default_rng(seed)
    shapes = Image.fromarray(draw.integers(0, 256, (8, 12, 3), np.uint8))
    broad = np.asarray(shapes.resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
    grain = draw.standard_normal((*size, 1), np.float32) * GRAIN
    return Image.fromarray((broad + grain).clip(0, 255).astype(np.uint8))


def photos(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Files of made-up photos of (height, width)."""
    paths = [folder / f"{size[1]}x{size[0]}-{number}.jpg" for number in range(count)]
    for seed, path in enumerate(paths):
        photo(size, seed).save(path, quality=QUALITY)
    return paths


def ours(path: Path, cut: Geometry, reduced: bool) -> dict[str, Tensor]:
    """As the loader does it; reduced: decoded at a half, a quarter or an eighth where that is enough."""
    with path.open("rb") as file:
        picture = decode(file, path.name, cut.resized if reduced else None)
    return {"pixels": render(picture, cut) * 2 - 1}


def scale_of(path: Path, cut: Geometry) -> int:
    """By how much the loader reduces a photo while it decodes it: 1, 2, 4 or 8."""
    with path.open("rb") as file:
        picture = decode(file, path.name, cut.resized)
    return round(cut.original[0] / picture.height)


def covered(image: Image.Image, side: int) -> Image.Image:
    """The middle of a picture, resized as a whole."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def pillow(path: Path, side: int) -> dict[str, Tensor]:
    """Pillow and NumPy alone; as a tensor, which costs nothing, to be compared."""
    with Image.open(path) as image:
        picture = covered(image.convert("RGB"), side)
    values = np.asarray(picture, np.float32).transpose(2, 0, 1)
    return {"pixels": torch.from_numpy(np.ascontiguousarray(values) / 127.5 - 1)}


def torch_pixels(image: Image.Image, side: int) -> dict[str, Tensor]:
    """What torchvision's usual chain of transforms comes to, without torchvision."""
    picture = covered(image.convert("RGB"), side)
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    return {"pixels": values.float().div(255).sub(0.5).div(0.5)}


def sides_of(paths: Sequence[Path], size: tuple[int, int], side: int) -> list[Side]:
    """Every way; an item is a photo's number."""
    import datasets

    table = datasets.Dataset.from_dict({"image": [str(path) for path in paths]})
    table = table.cast_column("image", datasets.Image())
    cut = geometry(size, (side, side), None, False)
    scale = scale_of(paths[0], cut)
    reduced = "full scale is needed" if scale == 1 else f"JPEG at 1/{scale}"
    once = 1.01 * LEVEL  # rounded at another place
    return [
        Side("Pillow alone", lambda number: pillow(paths[number], side)),
        Side(
            "datasets + torch",
            lambda number: torch_pixels(table[number]["image"], side),
            mean=LEVEL / 4,
            most=once,
        ),
        Side(
            "Sfumato, full scale",
            lambda number: ours(paths[number], cut, reduced=False),
            mean=LEVEL / 4,
            most=once,
        ),
        # A reduced scale leaves out the finest grain.
        Side(
            f"Sfumato ({reduced})",
            lambda number: ours(paths[number], cut, reduced=True),
            mean=FINEST.mean if scale > 1 else LEVEL / 4,
            most=FINEST.most if scale > 1 else once,
        ),
    ]


def decoding(folder: Path, size: tuple[int, int], side: int, count: int, rounds: int) -> dict[str, Any]:
    """Compare and time the decoding of `count` photos of (height, width) to a square of `side` pixels."""
    paths = photos(folder, size, count)
    what = f"decode a JPEG of {size[1]} x {size[0]} to {side} x {side}"
    return side_by_side(what, sides_of(paths, size, side), range(count), count, rounds)
