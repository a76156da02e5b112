"""From a picture as it lies on disk to the tensor that is trained on, and the numbers that say how."""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from sfumato.data.draws import pick
from sfumato.errors import UserError

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def upright_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """The picture as a viewer shows it: turned by its EXIF tag, alpha laid over white, 8-bit sRGB.

    Raises UserError, with the image's name, for pixels that have no one reading (floats).
    """
    image = turned(image)
    profile = image.info.get("icc_profile")
    if image.mode in SIXTEEN_BITS:
        # Pillow cuts such values off at 255, which turns the picture white.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "F":
        raise UserError(f"the image {name}", "its pixels are floats, of no known range", "save it as RGB")
    image = image if image.mode == "CMYK" else image.convert("RGB")
    if profile and (change := to_srgb(profile, image.mode)):
        image = change.apply(image)
    return image.convert("RGB")


def turned(image: Image.Image) -> Image.Image:
    """The picture turned and mirrored as its EXIF orientation says; viewers ignore broken EXIF data."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # which Pillow raises depends on the byte that is broken
        return image


@lru_cache(maxsize=8)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The change from an ICC profile's colours to sRGB; None if it is sRGB, of another mode, or broken."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of the same aspect, to the pixel, that covers the target."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))


def inside(window: tuple[float, ...], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The window (left, top, right, bottom) without what rounding put beyond a picture of (height, width)."""
    return window[0], window[1], min(window[2], size[1]), min(window[3], size[0])


def prepare(
    image: Image.Image, target: tuple[int, int], crop: tuple[float, float] | None, flip: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """Resize, crop and mirror an RGB picture.

    target: (height, width) in pixels. crop: two numbers in [0, 1) that place the window from top and left;
    None takes the middle. Returns the pixels (3, H, W) fp32 in [-1, 1] and SDXL's six numbers (original
    height, width, crop top, left, target height, width); the crop is counted in the resized picture, as it
    stands after mirroring (arXiv:2307.01952, section 2.2).
    """
    height, width = covering((image.height, image.width), target)
    spare = height - target[0], width - target[1]
    if crop is None:
        top, left = spare[0] // 2, spare[1] // 2
    else:
        top, left = pick(crop[0], spare[0] + 1), pick(crop[1], spare[1] + 1)
    original = image.height, image.width
    # Only the window is computed, out of the whole picture: a strip of 1 x 10,000 pixels would else become
    # 512 x 5,120,000 before the crop.
    down, across = original[0] / height, original[1] / width
    window = (left * across, top * down, (left + target[1]) * across, (top + target[0]) * down)
    image = image.resize((target[1], target[0]), Image.Resampling.LANCZOS, inside(window, original))
    if flip:
        image = ImageOps.mirror(image)
        left = spare[1] - left
    values = np.array(image, np.float32).transpose(2, 0, 1) / 127.5 - 1  # (3, H, W)
    return torch.from_numpy(np.ascontiguousarray(values)), (*original, top, left, *target)
