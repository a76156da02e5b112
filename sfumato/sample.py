"""Prompts and seeds to pictures through a diffusers pipeline, for `sfumato sample`, previews and the demo."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from sfumato.drawings import Drawing, Sampling, grid, grid_of, write
from sfumato.errors import UserError
from sfumato.models.family import Family
from sfumato.pipelines import add_loras, find_model, open_pipeline

__all__ = ["Drawing", "Sampling", "draw", "grid", "grid_of", "sample_folder", "write"]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def sample_folder(
    source: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prompt_window: int | None = None,
    variant: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    rank: int = 0,
    world: int = 1,
    drawn: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Draw with a diffusers folder, a run's export or a hub id; rank 0 writes PNGs, their list and a grid.

    loras: files or runs' folders, each with its weight.

    `prompt_window` None is what the run was trained with, or 77. Returns the PNGs' paths, [] on other ranks.
    Raises UserError for a source that holds no model, and for pictures that are not finite.
    """
    found = find_model(source, variant)
    window = prompt_window or found.prompt_window
    pipeline, family = open_pipeline(found.folder, device, dtype, window, variant)
    add_loras(pipeline, [*([(found.lora, 1.0)] if found.lora else []), *loras])
    drawings = draw(
        pipeline,
        prompts,
        seeds,
        sampling,
        family=family,
        model=str(source),
        rank=rank,
        world=world,
        drawn=drawn,
    )
    paths = write(drawings, out) if rank == 0 else []
    if len(paths) > 1:
        grid_of(drawings).save(out / "grid.png")
    bad = [drawing for drawing in drawings if not drawing.finite]
    if bad:
        raise UserError(
            f'the picture of "{bad[0].prompt}" with seed {bad[0].seed}'
            + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""),
            f"the model, computing in {str(dtype).removeprefix('torch.')}, gives numbers that are not finite",
            "draw in fp32; if that gives the same, the weights are broken",
        )
    return paths


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    *,
    family: Family | None = None,
    model: str = "",
    rank: int = 0,
    world: int = 1,
    drawn: Callable[[int, int], None] | None = None,
) -> list[Drawing]:
    """A picture for every pair of prompt and seed; all ranks call this together and all get all drawings.

    A picture depends on the weights, its prompt, its seed and `sampling` only: its noise comes from a CPU
    generator of its own, and no global random state is read or changed. With `family` prompts are read over
    that family's whole prompt window, without it the pipeline's own 77 tokens. `drawn(done, total)` is called
    after each of this rank's forward passes. Raises UserError for a size or a scheduler that does not fit.
    """
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    places = share(len(pairs), rank, world)
    found: list[Drawing] = []
    with evaluating(pipeline), scheduled(pipeline, sampling.scheduler), decoding_in_its_dtype(pipeline.vae):
        for start in range(0, len(places), sampling.batch_size):
            chunk = places[start : start + sampling.batch_size]
            here = [pairs[place % len(pairs)] for place in chunk]
            words = conditions([prompt for prompt, _ in here], sampling.negative, family)
            images = forward(pipeline, words, [seed for _, seed in here], sampling)
            scheduler = type(pipeline.scheduler).__name__
            found += [
                Drawing(place, *pair, image, sampling, scheduler, model, finite)
                for place, pair, (image, finite) in zip(chunk, here, images, strict=True)
                if place < len(pairs)
            ]
            if drawn is not None:
                drawn(start + len(chunk), len(places))
    return sorted(gather(found, world), key=lambda drawing: drawing.index)


def share(number: int, rank: int, world: int) -> list[int]:
    """The places that a rank draws: every world-th, and as many on every rank.

    Places from `number` on keep the ranks together and their pictures are thrown away: at ZeRO stage 3 a
    forward pass gathers weights from all ranks, and one that only some of them begin never ends.
    """
    return [rank + turn * world for turn in range(-(-number // world))]


def gather(found: list[Drawing], world: int) -> list[Drawing]:
    """The drawings of all ranks, on each."""
    if world == 1:
        return found
    everyones: list[list[Drawing]] = [[] for _ in range(world)]
    dist.all_gather_object(everyones, found)
    return [drawing for drawings in everyones for drawing in drawings]


def conditions(prompts: Sequence[str], negative: str | None, family: Family | None) -> Mapping[str, Any]:
    """The keywords that tell the pipeline what to draw and what not."""
    if family is None:
        return {"prompt": prompts, "negative_prompt": None if negative is None else [negative] * len(prompts)}
    absent = family.null_condition() if negative is None else family.encode_prompts([negative])
    absent = {name: rows.expand(len(prompts), *rows.shape[1:]) for name, rows in absent.items()}
    return family.prompt_inputs(family.encode_prompts(prompts), absent)


def forward(
    pipeline: Any, words: Mapping[str, Any], seeds: Sequence[int], sampling: Sampling
) -> list[tuple[Image.Image, bool]]:
    """One call of the pipeline: a picture for each seed, and whether it is finite."""
    options: dict[str, Any] = size_of(pipeline, sampling.size)
    if sampling.guidance_rescale:
        options["guidance_rescale"] = sampling.guidance_rescale
    pixels: Tensor = pipeline(
        **words,
        **options,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        # The CPU's numbers are the same on every machine, and those in bf16 are those in fp32, rounded.
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    pixels = pixels.float().cpu()  # (B, 3, H, W) in [0, 1]
    finite = pixels.isfinite().flatten(1).all(1).tolist()
    colours = (pixels.nan_to_num() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)  # (B, H, W, 3)
    return [(Image.fromarray(picture.numpy()), good) for picture, good in zip(colours, finite, strict=True)]


def size_of(pipeline: Any, size: int | tuple[int, int] | None) -> dict[str, int]:
    """The pipeline's keywords for a size in pixels; UserError if the VAE cannot make it."""
    if size is None:
        return {}
    width, height = (size, size) if isinstance(size, int) else size
    factor = pipeline.vae_scale_factor
    if width % factor or height % factor or min(width, height) < factor:
        near = [max(1, round(side / factor)) * factor for side in (width, height)]
        raise UserError(
            f"pictures of {width} x {height} pixels",
            f"this model's VAE makes multiples of {factor} pixels",
            f"choose for example {near[0]} x {near[1]}",
        )
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
def scheduled(pipeline: Any, name: str | None) -> Iterator[None]:
    """Within it the pipeline samples with the named scheduler, configured like its own."""
    own = pipeline.scheduler
    # Even its own is copied, because sampling leaves its traces in a scheduler.
    pipeline.scheduler = type(own).from_config(own.config) if name is None else other_scheduler(own, name)
    try:
        yield
    finally:
        pipeline.scheduler = own


def other_scheduler(own: Any, name: str) -> Any:
    """A scheduler of SCHEDULERS with the noise schedule and the target of the model's own."""
    if name not in SCHEDULERS:
        raise UserError(f"the scheduler {name!r}", "no such scheduler", f"choose {', '.join(SCHEDULERS)}")
    kind = getattr(diffusers, SCHEDULERS[name])
    if kind not in [*own.compatibles, type(own)]:
        raise UserError(
            f"the scheduler {name!r}",
            f"the model's own is {type(own).__name__}, of a process that {kind.__name__} does not sample",
            "leave the scheduler out",
        )
    # DDIM clips latents as if they were pixels unless it is told not to.
    silent = name == "ddim" and "clip_sample" not in own.config
    return kind.from_config(own.config, **({"clip_sample": False} if silent else {}))


@contextmanager
def decoding_in_its_dtype(vae: Any) -> Iterator[None]:
    """Within it the VAE takes latents of any precision: training may keep it at another than the rest."""
    decode = vae.decode

    def cast_and_decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = cast_and_decode
    try:
        yield
    finally:
        del vae.decode
