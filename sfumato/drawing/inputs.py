"""Pictures that a drawing starts from: read, checked before any work, and cut where that is asked."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from sfumato.data.transforms import decode, geometry, render
from sfumato.drawing.request import ROLES, Picture, Shot
from sfumato.errors import UserError

Size = tuple[int, int]


def read(picture: Picture) -> Image.Image:
    """The picture as a viewer shows it, RGB; UserError if its file cannot be read."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    try:
        file = picture.open("rb")
    except OSError as error:
        raise UserError(
            f"the image {picture}", f"it cannot be read: {error.strerror}", "name a picture"
        ) from None
    with file:
        return decode(file, str(picture))


def of_shot(shot: Shot, role: str, size: Size | None) -> Image.Image:
    """A shot's picture in a role, cut to (width, height); a mask is grey."""
    image = read(getattr(shot, role))
    if size is not None:
        image = cut(image, size)
    return image.convert("L") if role == "mask" else image


def cut(image: Image.Image, size: Size) -> Image.Image:
    """An RGB picture resized to cover (width, height), and the middle of it: the geometry of training."""
    if image.size == size:
        return image
    pixels = render(image, geometry((image.height, image.width), size[::-1], None, False))  # (3, H, W)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def named(picture: Picture) -> str:
    """What messages call it."""
    return str(picture) if isinstance(picture, Path) else "the picture"


def sized(shots: Sequence[Shot], size: Size | None, fit: bool, factor: int | None) -> list[Shot]:
    """The shots, each with the size that its pictures have, after each of them was read once.

    size: what is asked; None: that of a shot's first picture. fit: pictures of another size will be cut.
    factor: the VAE makes multiples of so many pixels, if that is known. Raises UserError for a picture that
    cannot be read, and for one of another size.
    """
    known: dict[Path, Size] = {}

    def size_of(picture: Picture) -> Size:
        if isinstance(picture, Image.Image):
            return picture.size
        if picture not in known:
            known[picture] = read(picture).size
        return known[picture]

    found: list[Shot] = []
    for shot in shots:
        pictures = [getattr(shot, role) for role in ROLES if role in shot.roles]
        if not pictures:
            found.append(shot)
            continue
        asked = size or size_of(pictures[0])
        for picture in pictures:
            if size_of(picture) != asked and not fit:
                raise another_size(picture, size_of(picture), asked, None if size else pictures[0])
        check_multiple(asked, factor, None if size else named(pictures[0]))
        found.append(replace(shot, size=asked))
    return found


def another_size(picture: Picture, size: Size, asked: Size, first: Picture | None) -> UserError:
    """The error for a picture that is not of the size that is drawn."""
    wanted = f"drawing {asked[0]} x {asked[1]} pixels" + (f", the size of {named(first)}" if first else "")
    found = f"{named(picture)} has {size[0]} x {size[1]}"
    return UserError(wanted, found, f"--fit cuts it; or ask for its size: --size {size[0]}x{size[1]}")


def check_multiple(size: Size, factor: int | None, picture: str | None) -> None:
    """Raise UserError for a size that the VAE cannot make. picture: the file that the size comes from."""
    width, height = size
    if factor is None or not (width % factor or height % factor):
        return
    near = [max(1, round(side / factor)) * factor for side in size]
    of = f", the size of {picture}" if picture else ""
    do = f"--size {near[0]}x{near[1]} --fit" if picture else f"choose for example {near[0]} x {near[1]}"
    found = f"this model's VAE makes multiples of {factor} pixels"
    raise UserError(f"pictures of {width} x {height} pixels{of}", found, do)
