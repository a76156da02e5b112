"""`sfumato bench peers`: the same training by us, by a bare loop, and by others' scripts.

Each side is a real command on the same model, pictures, batch and number of steps, with the same threads and
allocator settings; they run in turn, round after round. Losses are compared before speeds: they are means
over other random draws, so they may differ by what chance allows. The dict that `run` gives, and writes as
JSON, format 2:

    format, model, family, task, parameters (that learn), size, batch, steps, rounds, machine
    sides [{"name", and for each round a number in each of the lists
        "start"    seconds from the command to its first step's end
        "step"     seconds of a step, the median of a round's steps after the first WARM
        "cpu"      seconds of the processor a step, of all its processes
        "memory"   bytes at most, of all its processes (shared pages by share)
        "losses"   the mean loss and its standard error}]
    ratios, cpu_ratios {name: [low, median, high] of "step" or "cpu" to the bare loop's in the same round}
"""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from sfumato.bench.bare import HINT, learner
from sfumato.bench.entrants import Work, entrants, find
from sfumato.bench.machine import machine
from sfumato.bench.race import Entrant, Seen, race
from sfumato.device import kind
from sfumato.errors import UserError
from sfumato.models.compiled import check_here

WARM = 3
"""Steps at the start of a round that are not timed."""
PICTURES = 64
MODELS = {
    # name: pixels, batch, steps of a round
    "tiny": (64, 8, 40),
    "base": (64, 16, 40),
    "mid": (128, 4, 15),
}
"""What is trained: the family's toy, the demo's base with its real weights, and a small one whose parts cost
in proportion what those of real ones do."""
VAE_WIDTH = {"sd": 40, "sdxl": 28}
"""Of mid's VAE: to encode a picture is 1.37 and 0.67 of the U-Net's FLOPs forward; 1.39 in SD 1.5 at 512
pixels, 0.72 in SDXL at 1024."""


def run(
    what: str,
    examples: Path | None,
    rounds: int,
    out: Path | None,
    task: str = "full",
    family: str = "sd",
    recipe: Path | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure, show and write it to `out` as JSON.

    what: of MODELS. examples: diffusers' folder `examples`, recipe: that of deepspeed-diffusers; None:
    without that side. compiled: with engine.compile as a side, too. Raises UserError for folders that are
    not there, for work that there is no model for, and where nothing can be compiled; RuntimeError where a
    side fails.
    """
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--json {out}", f"no folder {out.parent}", "make it, or name another file")
    if what == "base" and (family != "sd" or task == "controlnet"):
        asked = f"--model base --family {family} --task {task}"
        raise UserError(asked, "the demo's base is of sd, without room for a ControlNet", "take tiny or mid")
    if compiled:
        check_here("--compiled", kind(), "fp32")
    size, batch, steps = MODELS[what]
    work = Work(task, family, size, batch, steps)
    scripts = find(work, examples, recipe)
    log = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="sfumato-peers-") as scratch:
        place = Path(scratch)
        learns = world(place, what, work)
        sides = entrants(place, work, scripts, compiled)
        seen: dict[str, list[Seen]] = {side.name: [] for side in sides}
        found: dict[str, Any] = {"format": 2, "model": what, **asdict(work), "parameters": learns}
        for number in range(rounds):
            for side in order(sides, number):
                log.print(f"round {number + 1} of {rounds}: {side.name}")
                seen[side.name].append(race(side))
                shutil.rmtree(side.folder, ignore_errors=True)
            found |= {"rounds": number + 1, "machine": machine(), **compared(seen)}
            if out is not None:  # after each round: one that is stopped is not for nothing
                out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console().print(table(found))
    return found


def order(sides: Sequence[Entrant], number: int) -> list[Entrant]:
    """The sides in a round: forwards and backwards in turn, so that no side always follows the same one."""
    return list(sides) if number % 2 == 0 else list(reversed(sides))


def world(place: Path, what: str, work: Work) -> int:
    """A model and captioned pictures, with outlines for a ControlNet; how many numbers learn."""
    make_model(place / "model", what, work.family)
    size, draw = work.size, np.random.default_rng(0)
    (place / "pictures").mkdir()
    rows = []
    for number in range(PICTURES):
        picture = Image.fromarray(draw.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((size, size))
        corner, side = draw.integers(0, size // 2, 2), int(draw.integers(size // 4, size // 2))
        box = [*corner.tolist(), *(corner + side).tolist()]
        ImageDraw.Draw(picture).ellipse(box, fill=tuple(draw.integers(0, 256, 3).tolist()))
        picture.save(place / "pictures" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"a ball of {side} on a sky"})
        if work.task == "controlnet":
            hint = Image.new("RGB", (size, size))
            ImageDraw.Draw(hint).ellipse(box, outline=(255, 255, 255))
            (place / "pictures" / "hints").mkdir(exist_ok=True)
            hint.save(place / "pictures" / "hints" / f"{number}.png")
            rows[-1][HINT] = f"hints/{number}.png"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "pictures" / "metadata.jsonl").write_text(text, encoding="utf-8")
    return sum(parameter.numel() for parameter in learner(place / "model", work.task)[2])


def make_model(folder: Path, what: str, family: str) -> None:
    """A diffusers folder of MODELS."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from sfumato.demo.run import SHIPPED
    from sfumato.models import family_class

    if what == "base":
        shutil.copytree(SHIPPED, folder)
        return
    family_class(family).tiny(folder)
    if what == "mid":
        torch.manual_seed(0)
        settings = dict(UNet2DConditionModel.load_config(folder / "unet"))
        settings |= {"block_out_channels": (128, 256, 384), "layers_per_block": 2, "norm_num_groups": 32}
        settings |= {"attention_head_dim": (2, 4, 6), "sample_size": MODELS[what][0] // 8}
        settings |= {"down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2)}
        settings |= {"up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D")}
        UNet2DConditionModel.from_config(settings).save_pretrained(folder / "unet")
        width, settings = VAE_WIDTH[family], dict(AutoencoderKL.load_config(folder / "vae"))
        settings |= {"block_out_channels": (width, 2 * width, 4 * width, 4 * width), "layers_per_block": 2}
        AutoencoderKL.from_config(settings).save_pretrained(folder / "vae")


def compared(seen: Mapping[str, Sequence[Seen]]) -> dict[str, Any]:
    """ "sides", "ratios" and "cpu_ratios" of all rounds so far; AssertionError for unequal losses."""
    sides = [figures(name, several) for name, several in seen.items()]
    compare_losses(sides)
    found: dict[str, Any] = {"sides": sides}
    for name, of in (("ratios", "step"), ("cpu_ratios", "cpu")):
        found[name] = {
            side["name"]: spread([own / other for own, other in zip(side[of], sides[0][of], strict=True)])
            for side in sides
        }
    return found


def figures(name: str, several: Sequence[Seen]) -> dict[str, Any]:
    """One side's figures, a number for each round."""
    losses = [loss for seen in several for loss in seen.losses]
    return {
        "name": name,
        "start": [seen.times[0] for seen in several],
        "step": [median(np.diff(seen.times[WARM:]).tolist()) for seen in several],
        "cpu": [seen.cpu / (len(seen.times) - 1) for seen in several],
        "memory": [seen.memory for seen in several],
        "losses": [fmean(losses), stdev(losses) / math.sqrt(len(losses))],
    }


def compare_losses(sides: Sequence[dict[str, Any]]) -> None:
    """AssertionError unless every side's mean loss is the first one's, as far as chance allows."""
    wanted, error = sides[0]["losses"]
    for side in sides[1:]:
        mean, own = side["losses"]
        allowed = 4 * math.hypot(error, own) + 0.02 * wanted
        assert abs(mean - wanted) <= allowed, f"{side['name']} has the loss {mean:.4f}, not {wanted:.4f}"


def spread(values: Sequence[float]) -> list[float]:
    """Lowest, median and highest."""
    return [min(values), median(values), max(values)]


def table(found: dict[str, Any]) -> Table:
    """The figures, a line for each side."""
    what = f"{found['task']} of {found['family']}, {found['model']}"
    title = f"{what}: {found['parameters'] / 1e6:.3g} M numbers learn, batch {found['batch']}, fp32"
    shown = Table(title=title, title_justify="left", box=None)
    shown.add_column("", no_wrap=True)
    for heading in (
        "first\nstep s",
        "step\nms",
        "x bare\nloop",
        "lowest\nhighest",
        "cpu\nms",
        "x bare\nloop",
        "\nMB",
        "\nloss",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for side in found["sides"]:
        low, middle, high = found["ratios"][side["name"]]
        shown.add_row(
            side["name"],
            f"{median(side['start']):.1f}",
            f"{median(side['step']) * 1e3:.1f}",
            f"{middle:.3f}",
            f"{low:.2f} {high:.2f}",
            f"{median(side['cpu']) * 1e3:.0f}",
            f"{found['cpu_ratios'][side['name']][1]:.3f}",
            f"{max(side['memory']) / 1e6:.0f}",
            f"{side['losses'][0]:.3f}±{side['losses'][1]:.3f}",
        )
    return shown
