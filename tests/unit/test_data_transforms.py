"""A picture's way to the tensor: what a viewer shows, its shapes kept, and numbers that say what was cut."""

import gzip
import inspect
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from sfumato.data.transforms import covering, decode, geometry, render
from sfumato.errors import UserError
from tests.unit.pictures import encoded, picture, ramp

Prepare = Callable[
    [Image.Image, tuple[int, int], tuple[float, float] | None, bool], tuple[Tensor, tuple[int, ...]]
]


def prepare(
    image: Image.Image, target: tuple[int, int], crop: tuple[float, float] | None, flip: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """What the loader makes of a picture: pixels in [-1, 1] and the six numbers."""
    cut = geometry((image.height, image.width), target, crop, flip)
    return render(image, cut) * 2 - 1, cut.six


# picture (h, w), target (h, w), crop, flip -> the six numbers, worked out by hand
SIX = [
    ((300, 500), (256, 256), None, False, (300, 500, 0, 85, 256, 256)),  # to 256 x 427, spare 171
    ((300, 500), (256, 256), (0.9, 0.25), False, (300, 500, 0, 43, 256, 256)),  # floor(0.25 * 172)
    ((300, 500), (256, 256), (0.9, 0.25), True, (300, 500, 0, 128, 256, 256)),  # 171 - 43
    ((500, 300), (256, 256), None, False, (500, 300, 85, 0, 256, 256)),
    ((500, 300), (256, 256), (0.25, 0.9), False, (500, 300, 43, 0, 256, 256)),
    ((500, 300), (256, 256), (0.25, 0.9), True, (500, 300, 43, 0, 256, 256)),  # nothing to mirror
    ((300, 500), (256, 256), (0.0, 0.0), True, (300, 500, 0, 171, 256, 256)),
    ((300, 500), (256, 256), (0.99, 0.9999), False, (300, 500, 0, 171, 256, 256)),
    (
        (300, 500),
        (128, 512),
        (0.5, 0.5),
        False,
        (300, 500, 90, 0, 128, 512),
    ),  # to 307 x 512: floor(0.5 * 180)
    ((64, 64), (64, 64), (0.7, 0.7), False, (64, 64, 0, 0, 64, 64)),
    ((1, 1), (8, 8), (0.7, 0.7), True, (1, 1, 0, 0, 8, 8)),
]


def check_six(prepare: Prepare) -> None:
    """T9: the six numbers are those expected, and the pixels are those that the numbers speak of."""
    for size, target, crop, flip, six in SIX:
        pixels, found = prepare(ramp(*size), target, crop, flip)
        assert found == six, f"{size} to {target}, {crop=} {flip=}: {found}, not {six}"
        assert pixels.shape == (3, *target) and pixels.dtype == torch.float32
        if min(size) < 64:
            continue
        height, width = covering(size, target)
        left = width - target[1] - six[3] if flip else six[3]
        rows = (six[2] + np.arange(target[0]) + 0.5) / height * 2 - 1
        columns = (left + np.arange(target[1]) + 0.5) / width * 2 - 1
        columns = columns[::-1] if flip else columns
        inside = slice(2, -2)  # the filter meets the border
        assert np.abs(pixels[0].mean(1).numpy() - rows)[inside].max() < 0.012, (
            "rows are not where they are said"
        )
        assert np.abs(pixels[1].mean(0).numpy() - columns)[inside].max() < 0.012, "columns are not where said"


def test_six() -> None:
    check_six(prepare)


def swapped(
    image: Image.Image, target: tuple[int, int], crop: object, flip: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """(w, h) order."""
    pixels, six = prepare(image, target, crop, flip)  # type: ignore[arg-type]
    return pixels, tuple(six[n] for n in (1, 0, 3, 2, 5, 4))


def unmirrored(
    image: Image.Image, target: tuple[int, int], crop: object, flip: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """crop_left from before the flip."""
    pixels, _ = prepare(image, target, crop, flip)  # type: ignore[arg-type]
    return pixels, prepare(image, target, crop, False)[1]  # type: ignore[arg-type]


def resized_as_original(
    image: Image.Image, target: tuple[int, int], crop: object, flip: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """The original size read after the resize."""
    pixels, six = prepare(image, target, crop, flip)  # type: ignore[arg-type]
    return pixels, (*covering((image.height, image.width), target), *six[2:])


def redrawn(
    image: Image.Image, target: tuple[int, int], crop: object, flip: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """Pixels of another crop than the numbers': a cached latent with a crop drawn anew."""
    return prepare(image, target, (0.6, 0.6), flip)[0], prepare(image, target, crop, flip)[1]  # type: ignore[arg-type]


def squeezed(
    image: Image.Image, target: tuple[int, int], crop: object, flip: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """Resized to the target without regard to the aspect."""
    six = prepare(image, target, crop, flip)[1]  # type: ignore[arg-type]
    return prepare(image.resize(target[::-1]), target, None, flip)[0], six


@pytest.mark.parametrize("broken", [swapped, unmirrored, resized_as_original, redrawn, squeezed])
def test_six_catches(broken: Prepare) -> None:
    with pytest.raises(AssertionError):
        check_six(broken)


def check_circle(prepare: Prepare) -> None:
    """A circle stays one: its width and height differ by less than a pixel for any shape of picture."""
    for size in ((300, 500), (500, 300), (233, 701), (911, 240)):
        image = Image.new("RGB", size[::-1], "black")
        middle, radius = (size[1] / 2, size[0] / 2), min(size) * 0.45
        ImageDraw.Draw(image).circle(middle, radius, "white")
        pixels, _ = prepare(image, (128, 128), None, False)
        light = (pixels[0].double() + 1) / 2
        across, down = light.sum(1).max(), light.sum(0).max()
        assert abs(across - down) < 1, f"{size}: the circle is {across:.1f} wide and {down:.1f} high"
        assert abs(across - 128 * 0.9) < 2, "the circle has another size"


def test_circle() -> None:
    check_circle(prepare)


def test_circle_catches_squeezing() -> None:
    with pytest.raises(AssertionError, match="wide"):
        check_circle(squeezed)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(8, 64), st.integers(8, 64)),
    st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)) | st.none(),
    st.booleans(),
)
def test_any_shape(
    size: tuple[int, int], target: tuple[int, int], crop: tuple[float, float] | None, flip: bool
) -> None:
    """The window lies inside the resized picture, which covers it and touches it on a side."""
    pixels, six = prepare(ramp(*size), target, crop, flip)
    height, width = covering(size, target)
    assert pixels.shape == (3, *target) and pixels.is_contiguous()
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert six[:2] == size and six[4:] == target
    assert 0 <= six[2] <= height - target[0] and 0 <= six[3] <= width - target[1]
    assert (height == target[0] and width >= target[1]) or (width == target[1] and height >= target[0])


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (33, 47), (64, 900), (257, 257)])
def test_window_is_cut_out_of_the_whole_picture(size: tuple[int, int]) -> None:
    """The same pixels as resizing everything first: the filter sees what lies beyond the window."""
    image = picture(0, size)
    for crop in ((0.0, 0.0), (0.3, 0.6), (0.999, 0.999)):
        pixels, six = prepare(image, (64, 64), crop, False)
        height, width = covering(size, (64, 64))
        whole = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), np.float32)
        part = whole[six[2] : six[2] + 64, six[3] : six[3] + 64].transpose(2, 0, 1)
        assert np.abs((pixels.numpy() + 1) * 127.5 - part).max() <= 1.001  # one step of rounding


def test_a_strip_does_not_fill_the_memory() -> None:
    pixels, six = prepare(Image.new("RGB", (10000, 1), "red"), (512, 512), (0.5, 0.5), True)
    assert six[:2] == (1, 10000) and torch.equal(pixels[0], torch.ones(512, 512))


def test_range_and_order_of_channels() -> None:
    pixels, _ = prepare(Image.new("RGB", (8, 8), (255, 0, 51)), (8, 8), None, False)
    assert torch.equal(pixels[:, 0, 0], torch.tensor([1.0, -1.0, 51 / 127.5 - 1]))


def test_same_as_the_pipelines_own_numbers() -> None:
    """The order is that of StableDiffusionXLPipeline's own helper: (height, width) three times."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    pipeline = StableDiffusionXLPipeline(None, None, None, None, None, unet, EulerDiscreteScheduler())
    six = prepare(ramp(300, 500), (256, 256), (0.9, 0.25), True)[1]
    method = pipeline._get_add_time_ids
    assert list(inspect.signature(method).parameters)[:3] == [
        "original_size",
        "crops_coords_top_left",
        "target_size",
    ]
    ids = method(six[:2], six[2:4], six[4:], torch.float32, text_encoder_projection_dim=16)
    assert ids.tolist() == [list(map(float, six))]


def jpeg(image: Image.Image, **settings: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **settings)  # type: ignore[arg-type]
    return file


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("target", [(64, 64), (64, 128), (128, 64)])
def test_a_large_jpeg_is_decoded_small_and_shows_the_same(target: tuple[int, int], turned: bool) -> None:
    """Decoded at an eighth of its sides or so, the window is where it was, to a level in the mean."""
    image = ramp(1600, 2400)
    exif = image.getexif()
    exif[0x0112] = 6 if turned else 1
    size = (2400, 1600) if turned else (1600, 2400)
    for crop in (None, (0.0, 0.99), (0.4, 0.2)):
        cut = geometry(size, target, crop, False)
        small = decode(jpeg(image, exif=exif), "x.jpg", cut.resized)
        whole = decode(jpeg(image, exif=exif), "x.jpg")
        assert (whole.height, whole.width) == size
        assert small.width * 4 <= whole.width, "decoded at full size"
        assert small.width >= 2 * cut.resized[1] or small.height >= 2 * cut.resized[0], "decoded too small"
        gap = (render(small, cut) - render(whole, cut)) * 255
        assert gap.abs().mean() < 1 and gap.mean().abs() < 0.2 and gap.abs().max() < 4


def test_a_window_of_a_smaller_copy_is_the_same_window() -> None:
    """The conditioning image may be of another size than its target."""
    large = ramp(600, 900)
    for crop, flip in ((None, False), ((0.3, 0.8), True)):
        cut = geometry((600, 900), (64, 64), crop, flip)
        gap = render(large, cut) - render(large.resize((300, 200), Image.Resampling.LANCZOS), cut)
        assert gap.abs().max() < 0.02


def test_a_file_that_is_no_picture_and_one_that_is_too_large() -> None:
    with pytest.raises(UserError, match=r"(?s)the image a\.png.*cannot be read"):
        decode(io.BytesIO(b"not a picture"), "a.png")
    with pytest.raises(UserError, match=r"(?s)10,000 pixels.*max_pixels.*9,999"):
        decode(jpeg(Image.new("RGB", (100, 100))), "a.jpg", most=9999)
    whole = jpeg(ramp(100, 100)).getvalue()
    with pytest.raises(UserError, match="truncated"):
        decode(io.BytesIO(whole[: len(whole) // 2]), "a.jpg")


FORMATS = {
    "rgba.png": Image.new("RGBA", (9, 9), (9, 9, 9, 9)),
    "palette.png": picture(0).quantize(16),
    "la.png": Image.new("LA", (9, 9), (9, 9)),
    "cmyk.jpg": Image.new("CMYK", (9, 9), (9, 9, 9, 9)),
    "sixteen.png": Image.fromarray(np.full((9, 9), 9999, np.uint16)),
    "grey.jpg": Image.new("L", (9, 9), 9),
    "web.webp": picture(1),
    "moving.gif": picture(2),
    "bits.bmp": picture(3),
    "big.tiff": picture(4),
    "new.avif": picture(5),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read(name: str) -> None:
    file = io.BytesIO()
    FORMATS[name].save(file, Image.registered_extensions()["." + name.split(".")[1]])
    for covers in (None, (4, 4)):
        shown = decode(file, name, covers)
        assert shown.mode == "RGB" and shown.size == FORMATS[name].size


BROKEN = {
    "empty.avif": encoded(picture(0), "AVIF")[:300] + bytes(900),
    "truncated.png": encoded(picture(0))[:-500],
    "truncated.jpg": encoded(picture(0), "JPEG")[:-500],
    "header.png": encoded(picture(0))[:12],
    "empty.png": b"",
    "text.png": b"<html>404</html>",
    "zip.webp": gzip.compress(b"x" * 99, mtime=0),
    "flipped.png": encoded(picture(0)).replace(b"IDAT", b"IDAT\xff\xff\xff", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_picture_is_named(name: str) -> None:
    with pytest.raises(UserError, match=name):
        decode(io.BytesIO(BROKEN[name]), name)
