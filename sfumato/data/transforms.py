"""From a picture as it lies on disk to the tensor that is trained on, and the numbers that say how."""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from sfumato.data.draws import pick
from sfumato.data.index.headers import ORIENTATION
from sfumato.errors import UserError

# The number of pixels is compared with data.max_pixels, where a picture's header is read.
Image.MAX_IMAGE_PIXELS = None

RENDERING = 1
"""Another number when the same file and geometry give other pixels: it is a part of the caches' keys."""
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def decode(file: BinaryIO, name: str, covers: tuple[int, int] | None = None, most: int = 0) -> Image.Image:
    """The picture of an image file as a viewer shows it, RGB.

    covers: a (height, width) that is wanted of it at least; a JPEG far larger than that is decoded at a half,
    a quarter or an eighth of its size, which is several times as fast. most: pixels that it may have; 0: any.
    Raises UserError, with the name, if it cannot be read or is too large.
    """
    try:
        with Image.open(file) as image:
            if most and image.width * image.height > most:
                raise too_large(name, image.width * image.height, most)
            if covers is not None:
                high, wide = covers if image.getexif().get(ORIENTATION, 1) < 5 else covers[::-1]
                # Twice as large as asked for: Pillow's own measure for a reduction that nobody sees.
                image.draft(None, (2 * wide, 2 * high))
            image.load()
            return upright_rgb(image, name)
    except UserError:
        raise
    except Exception as error:
        # Broken files make Pillow raise OSError, SyntaxError, TypeError, struct.error ...
        found = f"it cannot be read: {type(error).__name__}: {error}"
        raise UserError(f"the image {name}", found, "mend the file, or take it away") from error


def too_large(name: str, pixels: int, most: int) -> UserError:
    """The error for a picture that would need too much memory."""
    found = f"it has {pixels:,} pixels, data.max_pixels allows {most:,}"
    return UserError(f"the image {name}", found, "make it smaller, or allow more")


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
    if image.mode not in ("RGB", "CMYK"):
        image = image.convert("RGB")
    if profile and (change := to_srgb(profile, image.mode)):
        image = change.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def turned(image: Image.Image) -> Image.Image:
    """The picture turned and mirrored as its EXIF orientation says; viewers ignore broken EXIF data."""
    try:
        if image.getexif().get(ORIENTATION, 1) == 1:
            return image  # Pillow would make a copy, which takes as long as half of the decoding
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


@dataclass(frozen=True)
class Geometry:
    """What is cut out of a picture. All are (height, width) or (top, left), in pixels."""

    original: tuple[int, int]
    """The picture as a viewer shows it."""
    resized: tuple[int, int]
    """The picture after resizing, of which the window is a part."""
    window: tuple[int, int]
    """Top and left of the window in the resized picture, before mirroring."""
    target: tuple[int, int]
    """The window's size: what is trained on."""
    flip: bool
    """Whether the window is mirrored."""

    @property
    def six(self) -> tuple[int, ...]:
        """SDXL's six numbers: original height, width, crop top, left, target height, width.

        The crop is counted in the resized picture as it stands after mirroring (arXiv:2307.01952, section
        2.2).
        """
        top, left = self.window
        if self.flip:
            left = self.resized[1] - self.target[1] - left
        return (*self.original, top, left, *self.target)

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The window (left, top, right, bottom) in the same picture of another (height, width)."""
        down, across = size[0] / self.resized[0], size[1] / self.resized[1]
        top, left = self.window[0] * down, self.window[1] * across
        # Rounding may put an edge a hair outside, which Pillow refuses.
        bottom, right = top + self.target[0] * down, left + self.target[1] * across
        return left, top, min(right, size[1]), min(bottom, size[0])


def geometry(
    size: tuple[int, int], target: tuple[int, int], crop: tuple[float, float] | None, flip: bool
) -> Geometry:
    """How a picture of (height, width) becomes the target.

    It is resized to cover the target, then cut. crop: two numbers in [0, 1) that place the window from top
    and left; None takes the middle.
    """
    resized = covering(size, target)
    spare = resized[0] - target[0], resized[1] - target[1]
    if crop is None:
        window = spare[0] // 2, spare[1] // 2
    else:
        window = pick(crop[0], spare[0] + 1), pick(crop[1], spare[1] + 1)
    return Geometry(size, resized, window, target, flip)


def render(image: Image.Image, cut: Geometry) -> Tensor:
    """The window of an RGB picture, (3, H, W) fp32 in [0, 1]; the picture may be of another scale.

    Only the window is computed, out of the whole picture: a strip of 1 x 10,000 pixels would else become
    512 x 5,120,000 before the crop.
    """
    size = cut.target[1], cut.target[0]
    image = image.resize(size, Image.Resampling.LANCZOS, cut.box((image.height, image.width)))
    if cut.flip:
        image = ImageOps.mirror(image)
    values = np.array(image, np.float32).transpose(2, 0, 1) / 255  # (3, H, W)
    return torch.from_numpy(np.ascontiguousarray(values))
