"""The command `sfumato sample`: prompts, seeds and pictures to new pictures, a comparison, or figures."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from sfumato.bench import drawing as speed
from sfumato.config.reading import check_text
from sfumato.drawing import compare, inputs, model, pipelines, prompts, sources
from sfumato.drawing.depth import estimator
from sfumato.drawing.draw import draw, strength_of
from sfumato.drawing.model import Opened, Ready, open_model
from sfumato.drawing.options import check_places
from sfumato.drawing.pictures import Album, Drawing
from sfumato.drawing.request import Picture, Sampling, Shot
from sfumato.drawing.schedulers import check_steps, class_of
from sfumato.drawing.words import cut_off
from sfumato.errors import UserError
from sfumato.models import control
from sfumato.report.counter import Counter


@dataclass(frozen=True)
class Request:
    """What the command line asks for; options.py says what each means."""

    model: str
    prompts: Sequence[str] = ()
    file: Path | None = None
    out: Path = Path("samples")
    seeds: Sequence[int] = (0,)
    sampling: Sampling = Sampling()
    window: int | None = None
    emphasis: bool = False
    dtype: str | None = None
    variant: str | None = None
    offload: bool = False
    vae: str = "whole"
    compile: bool = False
    loras: Sequence[tuple[Path, float]] = ()
    control: str | None = None
    image: Path | None = None
    mask: Path | None = None
    condition: Path | None = None
    depth: str | None = None
    depth_model: str | None = None
    fit: bool = False
    compare: Path | None = None
    bench: Path | None = None
    warm_up: int = 1
    repeats: int = 3


@dataclass(frozen=True)
class Place:
    """Where this process computes, and which of the ranks that share the pictures it is."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009 - never changed
    rank: int = 0
    world: int = 1


def request_of(arguments: argparse.Namespace) -> Request:
    """What a command line asks for."""
    given = {name: value for name, value in vars(arguments).items() if name in Request.__dataclass_fields__}
    given |= {"seeds": tuple(arguments.seeds or (0,)), "loras": tuple(arguments.lora)}
    sampling = Sampling(
        steps=arguments.steps,
        guidance=arguments.guidance,
        size=arguments.size,
        negative=arguments.negative,
        scheduler=arguments.scheduler,
        guidance_rescale=arguments.guidance_rescale,
        batch_size=arguments.batch,
        strength=arguments.strength,
        control_scale=arguments.control_scale,
    )
    return Request(**given, sampling=sampling)


def sample(request: Request, place: Place = Place()) -> list[Path]:  # noqa: B008 - frozen
    """Draw what is asked for; everything is checked before weights are loaded, and no file is replaced.

    All ranks call it together. Returns the files that were written, [] on other ranks than the first. Raises
    UserError, also for pictures that are not finite, which are written nevertheless.
    """
    if request.compare is not None and request.bench is not None:
        raise UserError("--compare and --bench", "one call does one of them", "leave one out")
    if place.rank == 0:
        check_places(request.out, request.bench)
    shots = asked_shots(request)
    columns = compare.columns_of(request.model, request.compare) if request.compare else []
    sources = [source for _, source in columns] or [request.model]
    ready = [find(request, source, shots, place) for source in sources]
    factor = pipelines.vae_factor(ready[0].found.folder)
    shots = inputs.sized(shots, whole_size(request.sampling), request.fit, factor)
    if request.depth == "auto":
        shots = with_depth(shots, request, place)
    if columns:
        return drawn_columns(request, [label for label, _ in columns], ready, shots, place)
    opened = open_model(ready[0])
    if place.rank == 0:
        warn(opened, shots, ready[0])
    if request.bench is not None:
        return measured(request, ready[0], opened, shots, place)
    album = agreed(Album(request.out), place)
    drawings = drawn(request, ready[0], opened, shots, place, album)
    paths = album.finish(drawings) if place.rank == 0 else []
    check_finite(drawings, ready[0].dtype)
    return paths


def asked_shots(request: Request) -> list[Shot]:
    """Every picture that is asked for. Raises UserError for prompts and pictures that do not go together."""
    if request.sampling.scheduler is not None:
        class_of(request.sampling.scheduler)
    if request.depth is not None and request.condition is not None:
        raise UserError("--depth and --condition", "both are what the ControlNet is shown", "leave one out")
    if request.depth_model is not None and request.depth != "auto":
        raise UserError(f"--depth-model {request.depth_model}", "no --depth auto", "add it, or leave it out")
    check_text(request.sampling.negative or "", f"--negative {request.sampling.negative!r}")
    lines = prompts.gather(request.prompts, request.file)
    lines = prompts.paired(lines, "image", request.image)
    lines = prompts.paired(lines, "mask", request.mask)
    lines = prompts.paired(lines, "condition", request.condition)
    if request.depth == "auto":
        lines = [replace(line, condition=line.image) for line in lines]
        if any(line.image is None for line in lines):
            raise UserError("--depth auto", "no image whose depth is meant", "name it with --image")
    elif request.depth is not None:
        lines = prompts.paired(lines, "condition", Path(request.depth))
    prompts.check_alike(lines)
    shots = prompts.to_shots(lines, request.seeds)
    if "image" in shots[0].roles:
        strength_of(request.sampling, "mask" in shots[0].roles)
    elif request.sampling.strength is not None:
        asked = f"--strength {request.sampling.strength}"
        raise UserError(asked, "no image that is changed", "name it with --image")
    if request.sampling.control_scale != Sampling.control_scale and "condition" not in shots[0].roles:
        asked = f"--control-scale {request.sampling.control_scale:g}"
        raise UserError(asked, "no ControlNet that adds anything", "name one with --control")
    return shots


def find(request: Request, source: str | Path, shots: Sequence[Shot], place: Place) -> Ready:
    """The model of a column, checked."""
    roles, control = shots[0].roles, request.control
    if request.compare is not None and control is None and not is_control(source):
        roles = roles - {"condition"}
    ready = model.find(
        source,
        roles=roles,
        window=request.window,
        emphasis=request.emphasis,
        loras=request.loras,
        control=control,
        dtype=request.dtype or ("fp32" if place.device.type == "cpu" else "bf16"),
        variant=request.variant,
        device=place.device,
        offload=request.offload,
        vae=request.vae,
        compile=request.compile,
    )
    check_steps(ready.found.folder, request.sampling.steps)
    return ready


def is_control(source: str | Path) -> bool:
    """Whether a column is a ControlNet's; others of its run are drawn without the condition."""
    export = sources.export_of(Path(source).expanduser())
    return export is not None and control.is_control(export)


def whole_size(sampling: Sampling) -> tuple[int, int] | None:
    """The size that is asked, as (width, height)."""
    return (sampling.size, sampling.size) if isinstance(sampling.size, int) else sampling.size


def with_depth(shots: Sequence[Shot], request: Request, place: Place) -> list[Shot]:
    """The shots, each with the depth map of its image, at the size that is drawn, as its condition."""
    estimate = estimator(request.depth_model, place.device)
    maps: dict[tuple[Picture, Any], Image.Image] = {}
    found = []
    for shot in shots:
        assert isinstance(shot.image, Path), "images of a command are files"
        key = (shot.image, shot.size)
        if key not in maps:
            maps[key] = estimate(inputs.of_shot(shot, "image", shot.size))
        found.append(replace(shot, condition=maps[key]))
    return found


def drawn(
    request: Request,
    ready: Ready,
    opened: Opened,
    shots: Sequence[Shot],
    place: Place,
    album: Album | None = None,
    step: Callable[..., dict[str, Any]] | None = None,
) -> list[Drawing]:
    """Draw shots with a model, all ranks together; an album keeps each as it is drawn."""
    settings = ready.settings()
    if request.depth == "auto":
        settings["condition"] = f"depth of the image by {request.depth_model}"
    if opened.control is None:
        shots = compare.without_condition(shots)
    # Only files' names go to a pipe.
    seen = place.rank == 0 and album is not None and len(shots) > 1 and sys.stdout.isatty()
    with Counter("drawing", seen) as told:
        return draw(
            opened.pipeline,
            shots,
            request.sampling,
            family=opened.family,
            emphasis=request.emphasis,
            control=opened.control,
            model=ready.name,
            settings=settings,
            rank=place.rank,
            world=place.world,
            drawn=lambda done, total: told.add(done - told.done, total),
            keep=album.save if album is not None else None,
            step=step,
        )


def warn(opened: Opened, shots: Sequence[Shot], ready: Ready) -> None:
    """Say which prompts have more words than are read."""
    texts = list(dict.fromkeys(text for shot in shots for text in (shot.prompt, shot.negative) if text))
    for text, length in cut_off(opened.pipeline, texts, ready.window, ready.emphasis):
        do = "--window 150 or 225 reads more" if ready.window < 225 else "the rest is not read"
        print(
            f'"{text[:60]}..." has {length} tokens, the first {75 * -(-ready.window // 77)} are read: {do}',
            file=sys.stderr,
        )


def drawn_columns(
    request: Request, texts: Sequence[str], ready: Sequence[Ready], shots: Sequence[Shot], place: Place
) -> list[Path]:
    """Draw a comparison; one model is in memory at a time."""
    every: list[Drawing] = []

    def column(each: Ready, album: Album) -> list[Drawing]:
        found = drawn(request, each, open_model(each), shots, place, agreed(album, place))
        every.extend(found)
        return found

    pairs = list(zip(texts, ready, strict=True))
    paths = compare.draw_columns(pairs, column, request.out, place.rank == 0)
    check_finite(every, ready[0].dtype)
    return paths


def measured(
    request: Request, ready: Ready, opened: Opened, shots: Sequence[Shot], place: Place
) -> list[Path]:
    """Measure how fast the shots are drawn, and write the figures."""
    assert request.bench is not None, "nothing is to be measured"
    figures = speed.measure(
        lambda step: drawn(request, ready, opened, shots, place, None, step),
        [opened.control, opened.pipeline.components.get("unet") or opened.pipeline.components["transformer"]],
        place.device,
        request.warm_up,
        request.repeats,
        place.world,
    )
    if place.rank != 0:
        return []
    speed.write(figures, request.bench)
    return [request.bench]


def agreed(album: Album, place: Place) -> Album:
    """The album, counting on all ranks from what the first found: others may see pictures of this call."""
    if place.world > 1:
        first: list[int] = [album.first]
        dist.broadcast_object_list(first)
        album.first = first[0]
    return album


def check_finite(drawings: Sequence[Drawing], dtype: str) -> None:
    """Raise UserError for pictures that are not finite."""
    bad = [drawing for drawing in drawings if not drawing.finite]
    if bad:
        raise UserError(
            f'the picture of "{bad[0].prompt}" with seed {bad[0].seed}'
            + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""),
            f"the model, computing in {dtype}, gives numbers that are not finite",
            "draw in fp32; if that gives the same, the weights are broken",
        )
