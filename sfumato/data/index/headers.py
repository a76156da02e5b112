"""What the header of an image file tells: the size as a viewer shows it, read without decoding a pixel."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, PngImagePlugin, TiffImagePlugin

from sfumato.errors import UserError

ORIENTATION = 0x0112  # EXIF: how a viewer turns the picture; from 5 on its sides are exchanged
TIFF_WIDTH, TIFF_HEIGHT = 256, 257
KINDS = (
    (rb"\x89PNG", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"GIF8", "GIF"),
    (rb"BM", "BMP"),
    (rb"II\*\0|MM\0\*", "TIFF"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"....ftypavi[fs]", "AVIF"),
)
TAIL = 64 * 2**10  # bytes at the end of a PNG in which metadata behind the pixels are looked for
LATE = re.compile(rb"eXIf|XML:com\.adobe\.xmp|Raw profile type exif")


class Unusable(Exception):
    """Why a picture cannot be trained on. passing: that may change while the file does not."""

    def __init__(self, reason: str, passing: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.passing = reason, passing


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow without its warnings, and without its own guard: pixels are compared with data.max_pixels."""
    guard = Image.MAX_IMAGE_PIXELS
    Image.init()  # once, in place of once in each thread that meets a rare format
    try:
        Image.MAX_IMAGE_PIXELS = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\b")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = guard


def size_of(file: BinaryIO, most: int) -> tuple[int, int]:
    """(height, width) of the first picture of a file, turned as its EXIF orientation says; within `quiet`.

    most: pixels that it may have. Raises Unusable.
    """
    try:
        return read_header(file, most)
    except (Unusable, UserError):
        raise
    except Exception as error:
        # Broken files make Pillow raise OSError, SyntaxError, TypeError, struct.error ...
        if isinstance(error, OSError) and error.errno is not None:
            raise unread(error) from error
        raise Unusable(broken(file)) from error


def read_header(file: BinaryIO, most: int) -> tuple[int, int]:
    """As size_of, but with Pillow's own errors."""
    with Image.open(file) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # Only from version 11 on does Pillow exchange the sides of these itself.
            width, height = (int(image.tag_v2[tag]) for tag in (TIFF_WIDTH, TIFF_HEIGHT))
        if width < 1 or height < 1:
            raise Unusable(f"it has no pixels: {height} x {width}")
        if width * height > most:
            raise Unusable(f"it has {width * height:,} pixels, data.max_pixels allows {most:,}")
        if image.mode == "F":
            raise Unusable("its pixels are floats, of no known range")
        return (width, height) if orientation(image, file) in (5, 6, 7, 8) else (height, width)


def orientation(image: Image.Image, file: BinaryIO) -> int:
    """The EXIF orientation, 1 to 8; viewers ignore broken EXIF data, and so does this."""
    if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL))
        if LATE.search(file.read(TAIL)):
            file.seek(0)
            with Image.open(file) as late:
                late.load()
                image.info.update(late.info)
    try:
        # Not the PNG's own getexif: it decodes the pixels to reach what is behind them.
        return int(Image.Image.getexif(image).get(ORIENTATION, 1))
    except Exception:  # which Pillow raises depends on the byte that is broken
        return 1


def unread(error: OSError) -> Unusable:
    """For a file that the system does not give; without its path, which is another on another machine."""
    return Unusable(f"it cannot be read: {error.strerror or error}", passing=True)


def broken(file: BinaryIO) -> str:
    """Why Pillow knows no header in a file, by its first bytes."""
    try:
        file.seek(0)
        start = file.read(16)
    except OSError as error:
        raise unread(error) from error
    if not start:
        return "the file is empty"
    for pattern, kind in KINDS:
        if re.match(pattern, start, re.DOTALL):
            return f"its {kind} header is damaged or cut off"
    return f"not a picture of a format that is read: it begins with {start!r}"
