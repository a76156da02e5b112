"""Drawing the class images that are missing, by the model that is then trained, all ranks together."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sfumato import models
from sfumato.config import Config
from sfumato.data.store.writer import published, sweep
from sfumato.drawing.draw import draw
from sfumato.drawing.pictures import Drawing
from sfumato.drawing.request import Sampling, Shot
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError
from sfumato.models.family import Family
from sfumato.models.loading import frozen
from sfumato.prior import Pictures
from sfumato.report.counter import Counter

SEEN = 90.0
"""Seconds after which a network file system shows what other machines wrote."""


def fill(
    config: Config,
    pictures: Pictures,
    missing: list[int],
    place: Ranks,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> None:
    """Draw the missing pictures, all ranks together; a start that is killed loses one of each rank.

    Raises UserError for a picture that is not finite or cannot be written, and when the other ranks take
    longer than engine.timeout.
    """
    if missing:
        sweep(pictures.folder)
        with artist(config, place, dtype, vae_dtype) as paint, Counter("class images", place.first) as done:
            for number in missing[place.rank :: place.world]:
                # Another run may have asked for the same.
                if not pictures.sound(number):
                    save(pictures, number, paint(number))
                done.add(place.world, len(missing))
        wait(place, config, len(missing))
    if place.first:
        see(pictures)
        pictures.finish()


@contextmanager
def artist(
    config: Config, place: Ranks, dtype: torch.dtype, vae_dtype: torch.dtype
) -> Iterator[Callable[[int], Drawing]]:
    """What draws the picture of a number; the model is in memory within the block only."""
    family: Family = models.load(config.model, place.device, dtype, vae_dtype, images=False, captions=False)
    net = frozen(
        family.denoiser_class, family.folder / family.learns, config.model.variant, dtype, place.device
    )
    pipeline, prior = family.assemble(net), config.data.prior
    assert prior is not None, "no class images are to be drawn"
    how = Sampling(prior.steps, prior.guidance, config.data.resolutions[0])

    def paint(number: int) -> Drawing:
        settings = {"dtype": str(dtype).removeprefix("torch.")}
        # One at a time and on this rank alone: it is the same to the bit whatever else is drawn.
        shots = [Shot(prior.prompt, number)]
        return draw(pipeline, shots, how, family=family, model=config.model.weights, settings=settings)[0]

    yield paint
    family.release()


def save(pictures: Pictures, number: int, drawing: Drawing) -> None:
    """Put a picture into its place. Raises UserError if it is not finite or cannot be written."""
    if not drawing.finite:
        raise UserError(
            f'class image {number} of "{pictures.prompt}"',
            f"{drawing.model}, computing in {drawing.settings['dtype']}, gives pixels that are not finite",
            'set model.vae_dtype = "fp32"; if that is not enough engine.precision = "bf16" or "fp32"',
        )
    with published(pictures.file(number), drawing.image.width * drawing.image.height * 3) as file:
        drawing.image.save(file, "PNG", pnginfo=drawing.png_text())


def see(pictures: Pictures) -> None:
    """Wait until this process sees what other ranks wrote. Raises UserError after SEEN seconds."""
    began = time.monotonic()
    while missing := pictures.missing():
        if time.monotonic() - began > SEEN:
            raise UserError(
                f'{pictures.count:,} class images of "{pictures.prompt}"',
                f"{len(missing):,} of them, the first {pictures.file(missing[0])}, are not there {SEEN:g} s "
                "after the ranks had drawn them",
                "set data.store to a folder that all machines share; then start again",
            )
        time.sleep(1.0)


def wait(place: Ranks, config: Config, number: int) -> None:
    """Wait for the other ranks' pictures. Raises UserError after engine.timeout, or when a rank has ended."""
    try:
        place.barrier()
    except RuntimeError as error:
        raise UserError(
            f"{number:,} class images, drawn by {place.world} ranks",
            f"rank {place.rank} has drawn its share, and waited for the others' up to "
            f"engine.timeout = {config.engine.timeout:g} s: {str(error).splitlines()[0]}",
            "see what the other ranks say; start again, which goes on with those that are missing",
        ) from error
