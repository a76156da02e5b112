"""Pixels as a viewer shows them, whatever kind of file they come from."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from sfumato.data.transforms import geometry, upright_rgb
from sfumato.errors import UserError
from tests.unit.pictures import ramp


def corner(image: Image.Image) -> tuple[int, ...]:
    """The first pixel, of an RGB picture."""
    assert image.mode == "RGB"
    return image.getpixel((0, 0))  # type: ignore[return-value]


def test_transparent_is_white() -> None:
    assert corner(upright_rgb(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))) == (255, 255, 255)
    assert corner(upright_rgb(Image.new("RGBA", (4, 4), (10, 20, 30, 255)))) == (10, 20, 30)
    half = corner(upright_rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert half == (127, 127, 127)
    assert corner(upright_rgb(Image.new("LA", (4, 4), (10, 0)))) == (255, 255, 255)
    assert corner(upright_rgb(Image.new("LA", (4, 4), (10, 255)))) == (10, 10, 10)


def test_transparent_palette_and_key_colour_are_white() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert corner(upright_rgb(palette)) == (200, 100, 50)
    palette.info["transparency"] = 1
    assert corner(upright_rgb(palette)) == (255, 255, 255)
    palette.info["transparency"] = b"\xff\x00"
    assert corner(upright_rgb(palette)) == (255, 255, 255)
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    keyed.info["transparency"] = (1, 2, 3)
    assert corner(upright_rgb(keyed)) == (255, 255, 255)


def test_transparent_catches_a_bare_conversion() -> None:
    """What convert("RGB") does alone: the hidden colour comes out."""
    assert corner(Image.new("RGBA", (4, 4), (10, 20, 30, 0)).convert("RGB")) == (10, 20, 30)


@pytest.mark.parametrize("value", [0, 128, 257, 25700, 65535])
def test_sixteen_bits_keep_their_grey(value: int) -> None:
    wide = Image.fromarray(np.full((4, 4), value, np.uint16))
    assert wide.mode == "I;16"
    assert corner(upright_rgb(wide)) == (round(value / 257),) * 3
    assert corner(upright_rgb(Image.fromarray(np.full((4, 4), value, np.int32)))) == (round(value / 257),) * 3


def test_sixteen_bits_catches_a_bare_conversion() -> None:
    assert corner(Image.fromarray(np.full((4, 4), 25700, np.int32)).convert("RGB")) == (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("HSV", (4, 4), (0, 255, 255)), (255, 0, 0)),
        (Image.new("YCbCr", (4, 4), (128, 128, 128)), (128, 128, 128)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_other_modes(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert corner(upright_rgb(image)) == expected


def test_turned_by_exif() -> None:
    """Orientation 6, as phones write it: the first row is the right side, so the sides change places."""
    image = ramp(30, 50)
    exif = image.getexif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    turned = upright_rgb(image)
    assert turned.size == (30, 50)
    assert geometry((turned.height, turned.width), (16, 16), None, False).six == (50, 30, 5, 0, 16, 16)
    assert turned.getpixel((29, 0)) == image.getpixel((0, 0)), "turned the wrong way"


def test_broken_exif_is_not_turned() -> None:
    image = ramp(30, 50)
    image.info["exif"] = b"Exif\x00\x00MM\x00\xcb\x00\x00\x00\x08"
    assert upright_rgb(image).size == (50, 30)


def test_colours_of_a_profile_become_srgb() -> None:
    """Linear light, as a profile says it, is lighter in sRGB; white and black stay."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (4, 4), (100, 150, 200))
    for profile in (srgb, lab, b"no profile", b""):
        image.info["icc_profile"] = profile
        assert corner(upright_rgb(image)) == (100, 150, 200), "changed without a reason"
    image.info["icc_profile"] = swapped_primaries(srgb)
    red, green, blue = corner(upright_rgb(image))
    assert blue < red and abs(green - 150) < 60, (red, green, blue)


def swapped_primaries(srgb: bytes) -> bytes:
    """A display profile whose red is sRGB's blue and the other way round, under another name."""
    tags = {
        srgb[128 + 4 + 12 * n :][:4]: 128 + 4 + 12 * n for n in range(int.from_bytes(srgb[128:132], "big"))
    }
    changed = bytearray(srgb)
    red, blue = tags[b"rXYZ"] + 4, tags[b"bXYZ"] + 4
    changed[red : red + 8], changed[blue : blue + 8] = srgb[blue : blue + 8], srgb[red : red + 8]
    return bytes(changed).replace("sRGB".encode("utf-16-be"), "BGRx".encode("utf-16-be"))


def test_transparent_picture_with_a_profile() -> None:
    """The profile outlives the background."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGBA", (4, 4), (100, 150, 200, 255))
    image.info["icc_profile"] = swapped_primaries(srgb)
    opaque = image.convert("RGB")
    opaque.info["icc_profile"] = image.info["icc_profile"]
    assert corner(upright_rgb(image)) == corner(upright_rgb(opaque)) != (100, 150, 200)


def test_floats_are_refused() -> None:
    with pytest.raises(UserError, match=r"x\.tif"):
        upright_rgb(Image.new("F", (4, 4)), "x.tif")


def test_every_other_kind_of_pixel_is_read() -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "RGBX", "I;16", "I;16B", "I;16L"):
        assert upright_rgb(Image.new(mode, (4, 4))).mode == "RGB", mode
    for mode in ("LA", "PA", "RGBa"):
        assert upright_rgb(Image.new(mode, (4, 4))).mode == "RGB", mode
