"""A picture's size, from its header alone, is that of the picture which a viewer shows."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from sfumato.data.index import headers
from sfumato.data.index.headers import Unusable, quiet, size_of

HEIGHT, WIDTH = 30, 47
MOST = 10**6
KINDS = ["PNG", "JPEG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("P", "L"),
    "BMP": ("1", "L", "RGB", "RGBA"),
    "PPM": ("L", "RGB"),
    "TIFF": ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "I"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG2000": ("L", "RGB"),
    "TGA": ("RGB",),
    "ICO": ("RGBA",),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def picture(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    image = Image.fromarray(values)
    return image.convert("L").convert(mode) if mode.startswith("I") else image.convert(mode)


def encoded(image: Image.Image, kind: str, orientation: int | None = None) -> bytes:
    file = io.BytesIO()
    settings = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[headers.ORIENTATION] = orientation
        settings["exif"] = exif
    image.save(file, kind, **settings)
    return file.getvalue()


def shown(data: bytes) -> tuple[int, int]:
    """The size of the decoded picture, turned by Pillow itself."""
    with Image.open(io.BytesIO(data)) as image:
        try:
            upright = ImageOps.exif_transpose(image)
        except Exception:  # as transforms.turned: broken EXIF data count for nothing
            upright = image
        return upright.height, upright.width


def check_size(data: bytes) -> None:
    assert size_of(io.BytesIO(data), MOST) == shown(data)


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_kind_of_pixels(kind: str, mode: str) -> None:
    check_size(encoded(picture(mode), kind))


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_orientation(kind: str, orientation: int) -> None:
    data = encoded(picture(), kind, orientation)
    check_size(data)
    assert size_of(io.BytesIO(data), MOST) == ((WIDTH, HEIGHT) if 5 <= orientation <= 8 else (HEIGHT, WIDTH))


def test_a_size_without_orientation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "orientation", lambda *_: 1)
    with pytest.raises(AssertionError):
        check_size(encoded(picture(), "JPEG", 6))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and whole bytes of every chunk of a PNG."""
    found, place = [], 8
    while place < len(data):
        length = struct.unpack(">I", data[place : place + 4])[0]
        found.append((data[place + 4 : place + 8], data[place : place + 12 + length]))
        place += 12 + length
    return found


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def behind(data: bytes, *late: bytes) -> bytes:
    """A PNG with chunks put behind its pixels."""
    *front, end = (whole for _, whole in chunks(data))
    return data[:8] + b"".join([*front, *late, end])


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
ITXT = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)


@pytest.mark.parametrize("late", ["exif", "xmp", "raw"])
def test_png_with_orientation_behind_its_pixels(late: str) -> None:
    """Where exiftool writes it."""
    exif = dict(chunks(encoded(picture(), "PNG", 6)))[b"eXIf"]
    body = b"Exif\0\0" + exif[8:-4]
    raw = f"\nexif\n{len(body):8}\n{body.hex()}\n".encode()
    data = behind(
        encoded(picture(), "PNG"),
        {
            "exif": exif,
            "xmp": ITXT,
            "raw": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        }[late],
    )
    assert shown(data) == (WIDTH, HEIGHT), "the test's file is not turned"
    check_size(data)


def test_late_orientation_overlooked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "LATE", re.compile(b"never there"))
    with pytest.raises(AssertionError):
        check_size(behind(encoded(picture(), "PNG"), ITXT))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_orientation_in_xmp(kind: str) -> None:
    file = io.BytesIO()
    picture().save(file, kind, xmp=XMP)
    assert shown(file.getvalue()) == (WIDTH, HEIGHT)
    check_size(file.getvalue())


def test_broken_exif_counts_for_nothing() -> None:
    data = encoded(picture(), "JPEG", 6)
    place = data.index(b"Exif\0\0") + 6
    for number in range(place, place + 26):
        broken = data[:number] + bytes([data[number] ^ 0xFF]) + data[number + 1 :]
        check_size(broken)


def test_first_picture_of_several() -> None:
    others = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "green")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        file = io.BytesIO()
        picture().save(file, kind, save_all=True, append_images=others)
        check_size(file.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_no_pixel_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    data = encoded(picture(), kind, 6 if kind in KINDS else None)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert size_of(io.BytesIO(data), MOST) == ((WIDTH, HEIGHT) if kind in KINDS else (HEIGHT, WIDTH))


def png(height: int, width: int) -> bytes:
    """A PNG that says that it is so large, whatever its pixels are."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def floats() -> bytes:
    file = io.BytesIO()
    Image.new("F", (4, 4)).save(file, "TIFF")
    return file.getvalue()


FAULTS = {
    "empty": (b"", "the file is empty"),
    "text": (b"<!DOCTYPE html><html>", "not a picture .* begins with b'<!DOCTYPE html>"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "not a picture of a format that is read"),
    "zeros": (bytes(1000), "not a picture"),
    "cut PNG": (encoded(Image.new("RGB", (9, 9)), "PNG")[:20], "PNG header is damaged or cut off"),
    "cut JPEG": (encoded(Image.new("RGB", (9, 9)), "JPEG")[:50], "JPEG header is damaged or cut off"),
    "cut GIF": (encoded(Image.new("RGB", (9, 9)), "GIF")[:8], "GIF header is damaged or cut off"),
    "cut TIFF": (encoded(Image.new("RGB", (9, 9)), "TIFF")[:9], "TIFF header is damaged or cut off"),
    "cut WebP": (encoded(Image.new("RGB", (9, 9)), "WEBP")[:25], "WebP header is damaged or cut off"),
    "no pixels": (png(0, 5), "PNG header is damaged"),
    "bomb": (png(60_000, 60_000), r"it has 3,600,000,000 pixels, data.max_pixels allows 1,000,000"),
    "one too many": (png(1, MOST + 1), "1,000,001 pixels"),
    "floats": (floats(), "its pixels are floats"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_unusable(name: str) -> None:
    data, reason = FAULTS[name]
    with pytest.raises(Unusable, match=reason) as caught:
        size_of(io.BytesIO(data), MOST)
    assert not caught.value.passing


def test_as_many_pixels_as_allowed() -> None:
    assert size_of(io.BytesIO(png(1, MOST)), MOST) == (1, MOST)


@pytest.mark.parametrize("guard", [None, 100])
def test_pillows_guard_is_out_of_the_way_and_comes_back(guard: int | None) -> None:
    kept = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = guard
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with quiet():
                assert size_of(io.BytesIO(png(1000, 900)), MOST) == (1000, 900)
            assert Image.MAX_IMAGE_PIXELS == guard
            with pytest.raises(KeyError), quiet():
                raise KeyError
            assert Image.MAX_IMAGE_PIXELS == guard
    finally:
        Image.MAX_IMAGE_PIXELS = kept


def test_the_file_system_s_errors_may_pass(tmp_path: Path) -> None:
    class Failing(io.BytesIO):
        def read(self, *_: int) -> bytes:
            raise OSError(5, "Input/output error", "/some/machine/a.png")

    with pytest.raises(Unusable) as caught:
        size_of(Failing(png(2, 2)), MOST)
    assert caught.value.passing
    assert caught.value.reason == "it cannot be read: Input/output error"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_any_damage_ends_in_a_size_or_a_reason(kind: str) -> None:
    """Cut anywhere, any byte changed: never another error, and never a size that Pillow would not give."""
    data = encoded(picture().resize((9, 7)), kind, 6 if kind in KINDS else None)
    random = np.random.default_rng(1)
    broken = [data[:end] for end in range(0, len(data), max(1, len(data) // 150))]
    for _ in range(300):
        changed = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            changed[place] = random.integers(0, 256)
        broken.append(bytes(changed))
    outcomes = set()
    for each in broken:
        try:
            size = size_of(io.BytesIO(each), MOST)
            assert len(size) == 2 and min(size) > 0 and size[0] * size[1] <= MOST
            outcomes.add("size")
        except Unusable as error:
            assert error.reason and not error.passing
            outcomes.add("reason")
    assert outcomes == {"size", "reason"}
