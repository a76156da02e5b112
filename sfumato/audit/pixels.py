"""What one picture is: told by its header, and by its pixels."""

import io
import re
from enum import IntFlag, auto
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from sfumato.data.index.headers import orientation

FLAT = 2  # levels within which a picture counts as one colour, and a pixel as grey
DARK, BRIGHT = 5, 250  # mean levels
ENOUGH = 72  # pixels of the shorter side that the rest is reckoned from
STEP = 2  # levels by which a neighbour must be brighter; less is the noise of a JPEG on an even ground
GREY = np.array([0.299, 0.587, 0.114])
DEEP = re.compile(r"(?<!BGR);16[BLNS]*$")  # Pillow's names of pixels with 16 bits a channel


class Trait(IntFlag):
    """What is noted of a picture; several may hold. Sixteen bits hold them all."""

    ROTATED = auto()
    CMYK = auto()
    SIXTEEN_BIT = auto()
    PALETTE = auto()
    ALPHA = auto()
    PROFILE = auto()
    ANIMATED = auto()
    GREY = auto()
    BLANK = auto()
    DARK = auto()
    BRIGHT = auto()
    HINT_SHAPE = auto()
    FAULT = auto()

    @property
    def kind(self) -> str:
        """Its name in reports."""
        return str(self.name).lower()


class Header(NamedTuple):
    """What a file's header tells besides the size."""

    traits: Trait = Trait(0)
    format: str = "unknown"
    """Pillow's name."""
    profile: str = ""
    """The name of an ICC profile."""


class Pixels(NamedTuple):
    """What a picture's pixels tell."""

    traits: Trait
    hash: int
    """64 bits: in each of 8 rows, which of 8 places is brighter than the place on its left."""
    colours: bytes
    """Mean red, green and blue of the four quarters, 12 bytes."""


def header(file: BinaryIO) -> Header:
    """The facts of a file's header; for a file whose header the index has read, within `headers.quiet`.

    Raises what Pillow raises if the file is another one since then.
    """
    with Image.open(file) as image:
        profile = image.info.get("icc_profile")
        name = profile_name(profile) if profile else ""
        several = (
            getattr(image, "is_animated", False) and image.format != "MPO"
        )  # which is a JPEG of a camera
        holds = {
            Trait.ROTATED: orientation(image, file) in range(2, 9),
            Trait.CMYK: image.mode == "CMYK",
            Trait.SIXTEEN_BIT: deep(image),
            Trait.PALETTE: image.mode in ("P", "PA"),
            Trait.ALPHA: image.has_transparency_data,
            Trait.PROFILE: bool(name) and "sRGB" not in name,
            Trait.ANIMATED: bool(several),
        }
        return Header(joined(holds), image.format or "unknown", name)


def joined(holds: dict[Trait, bool]) -> Trait:
    """The traits that hold."""
    total = Trait(0)
    for trait, held in holds.items():
        total |= trait if held else Trait(0)
    return total


def deep(image: Image.Image) -> bool:
    """Whether a channel has sixteen bits, also where Pillow drops the lower eight as it decodes."""
    tiles = getattr(image, "tile", None)
    form = tiles[0][3] if tiles else ""
    form = form[0] if isinstance(form, tuple) and form else form
    return image.mode.startswith("I") or (isinstance(form, str) and DEEP.search(form) is not None)


@lru_cache(maxsize=64)
def profile_name(profile: bytes) -> str:
    """What an ICC profile calls itself; "unreadable" if it is broken."""
    try:
        opened = ImageCms.getOpenProfile(io.BytesIO(profile))
        return ImageCms.getProfileDescription(opened).strip() or "without a name"
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "unreadable"


def pixels(picture: Image.Image) -> Pixels:
    """The facts of an RGB picture's pixels; much the same for a smaller copy of it."""
    # Once over a large picture; the rest is reckoned from means of a few pixels.
    picture = picture.reduce(max(1, min(picture.size) // ENOUGH))
    values = np.asarray(picture.resize((9, 8), Image.Resampling.BOX), np.float64)  # (8, 9, 3)
    grey = values @ GREY  # (8, 9)
    colours = picture.resize((2, 2), Image.Resampling.BOX).tobytes()
    span = np.ptp(np.array(picture.getextrema()), axis=1)  # (3,)
    holds = {
        Trait.GREY: bool((np.ptp(values, axis=2) <= FLAT).all()),
        Trait.BLANK: bool((span <= FLAT).all()),
        Trait.DARK: bool(grey.mean() < DARK),
        Trait.BRIGHT: bool(grey.mean() > BRIGHT),
    }
    return Pixels(joined(holds), difference_hash(grey), colours)


def difference_hash(grey: np.ndarray) -> int:
    """64 bits from levels (8, 9): a bit is set where a place is brighter than the one on its left."""
    bits = np.diff(grey, axis=1) >= STEP  # (8, 8)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
