"""Shots to drawings through a diffusers pipeline: for `sfumato sample`, previews and the demo."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from sfumato.drawing import inputs, pipelines
from sfumato.drawing.pictures import Drawing
from sfumato.drawing.request import Sampling, Shot
from sfumato.drawing.schedulers import scheduled
from sfumato.drawing.textkeys import remembering
from sfumato.drawing.words import words
from sfumato.errors import UserError
from sfumato.models.family import Family
from sfumato.models.loading import quiet

NOTHING: Mapping[str, Any] = {}


def draw(
    pipeline: Any,
    shots: Sequence[Shot],
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    *,
    family: Family | None = None,
    emphasis: bool = False,
    control: Any = None,
    model: str = "",
    settings: Mapping[str, Any] = NOTHING,
    rank: int = 0,
    world: int = 1,
    drawn: Callable[[int, int], None] | None = None,
    keep: Callable[[Drawing], object] | None = None,
    step: Callable[..., dict[str, Any]] | None = None,
) -> list[Drawing]:
    """A picture for every shot; all ranks call this together and all get all drawings.

    A picture depends on the weights, its shot and `sampling` only: its noise comes from a CPU generator of
    its own, and no global random state is read or changed. What a shot has besides words says which of
    diffusers' pipelines draws it, around the same parts; all shots have the same kinds of pictures.

    family: prompts are read over its whole prompt window; without it over the pipeline's own 77 tokens.
    emphasis: brackets in prompts are weights, which needs the family. control: the ControlNet of shots with a
    condition, unless the pipeline has its own. model, settings: told in the drawings' facts. drawn(done,
    total): called after each of this rank's forward passes; keep: with each of its drawings; step: diffusers'
    callback_on_step_end.
    Raises UserError for a size, a strength or a scheduler that does not fit.
    """
    if not shots:
        return []
    pipeline = fitting(pipeline, shots, control)
    places = share(len(shots), rank, world)
    found: list[Drawing] = []
    done = 0
    with (
        evaluating(pipeline),
        scheduled(pipeline, sampling.scheduler),
        coding_in_its_dtype(pipeline.vae),
        remembering(pipeline.components.values()),
    ):
        for chunk in chunks(places, shots, sampling.batch_size):
            here = [shots[place % len(shots)] for place in chunk]
            negatives = negatives_of(here, sampling)
            said = words(pipeline, [shot.prompt for shot in here], negatives, family, emphasis)
            images = forward(pipeline, said, here, sampling, step)
            scheduler = type(pipeline.scheduler).__name__
            new = [
                Drawing(place, shot, image, sampling, scheduler, model, finite, settings)
                for place, shot, (image, finite) in zip(chunk, here, images, strict=True)
                if place < len(shots)
            ]
            for drawing in new if keep is not None else []:
                keep(drawing)  # type: ignore[misc]
            found += new
            done += len(chunk)
            if drawn is not None:
                drawn(done, len(places))
    return sorted(gather(found, world), key=lambda drawing: drawing.index)


def fitting(pipeline: Any, shots: Sequence[Shot], control: Any) -> Any:
    """The pipeline that draws from what these shots have, around the same parts. Raises UserError.

    control: a ControlNet; None is the pipeline's own, if it has one.
    """
    control = control if control is not None else pipeline.components.get("controlnet")
    roles = shots[0].roles
    assert all(shot.roles == roles for shot in shots), "shots with different kinds of pictures in one call"
    if ("condition" in roles) != (control is not None):
        asked = "drawing with a ControlNet" if control is not None else "drawing from a condition"
        found = "no condition to show it" if control is not None else "no ControlNet that reads it"
        raise UserError(asked, found, "give both: --control FOLDER --condition IMAGE")
    kind = pipelines.class_for(type(pipeline), roles)
    return pipelines.becoming(pipeline, kind, **({"controlnet": control} if control is not None else {}))


def share(number: int, rank: int, world: int) -> list[int]:
    """The places that a rank draws: every world-th, and as many on every rank.

    Places from `number` on keep the ranks together and their pictures are thrown away: at ZeRO stage 3 a
    forward pass gathers weights from all ranks, and one that only some of them begin never ends.
    """
    return [rank + turn * world for turn in range(-(-number // world))]


def chunks(places: Sequence[int], shots: Sequence[Shot], most: int) -> Iterator[list[int]]:
    """The places in forward passes of at most `most`: of one size, and all or none with a negative."""

    def kind(place: int) -> tuple[Any, bool]:
        shot = shots[place % len(shots)]
        return shot.size, shot.negative is None

    for _, group in groupby(places, kind):
        alike = list(group)
        yield from (alike[start : start + most] for start in range(0, len(alike), most))


def negatives_of(shots: Sequence[Shot], sampling: Sampling) -> list[str] | None:
    """What these pictures should not show; None where nothing is said."""
    found = [sampling.negative if shot.negative is None else shot.negative for shot in shots]
    return None if None in found else [text for text in found if text is not None]


def gather(found: list[Any], world: int) -> list[Any]:
    """The things of all ranks, on each."""
    if world == 1:
        return found
    everyones: list[list[Any]] = [[] for _ in range(world)]
    # Through the machines' memory: a device would make room for all pictures of all ranks.
    group = dist.new_group(backend="gloo")
    dist.all_gather_object(everyones, found, group=group)
    dist.destroy_process_group(group)
    return [thing for things in everyones for thing in things]


def forward(
    pipeline: Any,
    said: Mapping[str, Any],
    shots: Sequence[Shot],
    sampling: Sampling,
    step: Callable[..., dict[str, Any]] | None = None,
) -> list[tuple[Image.Image, bool]]:
    """One call of the pipeline: a picture for each shot, and whether it is finite."""
    options = picture_options(pipeline, shots, sampling)
    if sampling.guidance_rescale:
        options["guidance_rescale"] = sampling.guidance_rescale
    taken = inspect.signature(type(pipeline).__call__).parameters
    for name in ("guidance_rescale", "controlnet_conditioning_scale"):
        if name in options and name not in taken:
            asked, found = f"{name} = {options[name]}", f"{type(pipeline).__name__} has no such setting"
            raise UserError(asked, found, "leave it out")
    if step is not None:
        options["callback_on_step_end"] = step
    with quiet():  # SDXL's pipelines warn of their VAE at every image
        pixels: Tensor = pipeline(
            **said,
            **options,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            # The CPU's numbers are the same on every machine, and those in bf16 are those in fp32, rounded.
            generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in shots],
            output_type="pt",
        ).images
    pixels = pixels.float().cpu()  # (B, 3, H, W) in [0, 1]
    finite = pixels.isfinite().flatten(1).all(1).tolist()
    colours = (pixels.nan_to_num() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)  # (B, H, W, 3)
    return [(Image.fromarray(picture.numpy()), good) for picture, good in zip(colours, finite, strict=True)]


def picture_options(pipeline: Any, shots: Sequence[Shot], sampling: Sampling) -> dict[str, Any]:
    """The pipeline's keywords for a size, and for the pictures that these shots start from."""
    roles, size = shots[0].roles, shots[0].size or sampling.size
    options: dict[str, Any] = size_of(pipeline, size)
    asked = (options["width"], options["height"]) if options else None
    if "image" in roles:
        options["image"] = [inputs.of_shot(shot, "image", asked) for shot in shots]
        options["strength"] = strength_of(sampling, "mask" in roles)
    if "mask" in roles:
        options["mask_image"] = [inputs.of_shot(shot, "mask", asked) for shot in shots]
    if "condition" in roles:
        name = "control_image" if "image" in roles else "image"
        options[name] = [inputs.of_shot(shot, "condition", asked) for shot in shots]
        options["controlnet_conditioning_scale"] = sampling.control_scale
    if "width" not in inspect.signature(type(pipeline).__call__).parameters:
        options = {name: value for name, value in options.items() if name not in ("width", "height")}
    return options


def strength_of(sampling: Sampling, masked: bool) -> float:
    """The share of the denoising that is done to an image. Raises UserError for one that leaves no step."""
    strength = sampling.strength if sampling.strength is not None else 1.0 if masked else 0.8
    if not 0 < strength <= 1:
        raise UserError(
            f"the strength {strength}", "it is a share of the steps", "choose one above 0, up to 1"
        )
    if int(sampling.steps * strength) < 1:
        found = f"of {sampling.steps} steps that is none"
        raise UserError(f"the strength {strength}", found, "raise it, or draw with more steps")
    return strength


def size_of(pipeline: Any, size: int | tuple[int, int] | None) -> dict[str, int]:
    """The pipeline's keywords for a size in pixels; UserError if the VAE cannot make it."""
    if size is None:
        return {}
    width, height = (size, size) if isinstance(size, int) else size
    factor = pipeline.vae_scale_factor
    inputs.check_multiple((width, height), factor, None)
    return {"width": width, "height": height}


@contextmanager
def evaluating(pipeline: Any) -> Iterator[None]:
    """Within it every part is in eval mode and the pipeline draws no bar; afterwards all is as before."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    training = [module for part in parts for module in part.modules() if module.training]
    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**bar, "disable": True})
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**bar)
        for module in training:
            module.training = True


@contextmanager
def coding_in_its_dtype(vae: Any) -> Iterator[None]:
    """Within it the VAE takes pixels and latents of any precision, and gives latents of the pixels'.

    It may be kept at another precision than the rest: for training, or because it overflows.
    """
    encode, decode = vae.encode, vae.decode

    def cast_and_decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(latents.to(vae.dtype), *args, **kwargs)

    def cast_and_encode(pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = encode(pixels.to(vae.dtype), *args, **kwargs)
        if pixels.dtype != vae.dtype:
            law = found.latent_dist
            found.latent_dist = type(law)(law.parameters.to(pixels.dtype))
        return found

    vae.encode, vae.decode = cast_and_encode, cast_and_decode
    try:
        yield
    finally:
        del vae.encode, vae.decode
