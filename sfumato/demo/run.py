"""`sfumato demo`: the main job, small but real, and two honest figures about it."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from sfumato import config, launch
from sfumato.demo import emoji, measure
from sfumato.drawing.draw import draw
from sfumato.drawing.grid import grid
from sfumato.drawing.pictures import Drawing, write
from sfumato.drawing.pipelines import open_pipeline
from sfumato.drawing.request import Sampling, shots
from sfumato.tuning import has_accelerator, has_bf16

SHIPPED = Path(__file__).parent / "base"
"""The base model; base.py says how it was made."""
SETTINGS = Path(__file__).parent / "demo.toml"
SAMPLING = Sampling(steps=20, guidance=2.0, batch_size=48)
MOST_RANKS = 4
"""Ranks that train on a CPU, at most: each holds about a gigabyte, and the batch is cut among them."""


@dataclass(frozen=True)
class Result:
    """What the demo found, and where its picture is."""

    picture: Path
    own: int
    """Of the evaluation prompts, how many base drawings are nearest to their own image of the base's set."""
    pool: int
    """Images in the base's set."""
    before: float
    """Style distance of the base's drawings to the new style's set, on held-out prompts."""
    after: float
    """The same of the tuned drawings."""
    seconds: float


def demo(output: Path = Path("runs"), base: Path = SHIPPED, overrides: tuple[str, ...] = ()) -> Result:
    """Fine-tune the shipped base model on OpenMoji's style and show what became of it.

    The concepts that are drawn were held out: the run never sees them in the new style.
    """
    start = time.perf_counter()
    images = output / "demo" / "images-openmoji"
    emoji.write_images("openmoji", images, codes=emoji.tuning())
    ours = [f"output={output}", f"model.weights={base}", f"data.source={images}"]
    ours = [*suited(), *ours, f"data.store={output / 'demo' / 'cache'}"]
    wishes = [*config.beside(ours, map(config.key_of, overrides)), *overrides]
    settings = config.load(SETTINGS, wishes)
    held = {code: emoji.concepts()[code] for code in emoji.held_out()}
    print(f"The base draws {len(held)} concepts, as it learned them in the style of Noto ...")
    before = drawn(base, list(held.values()))
    print(f"\nTraining on {len(emoji.tuning())} other concepts in the style of OpenMoji:")
    tuned = trained(settings, wishes)
    print("\nThe tuned model draws the same concepts ...")
    after = drawn(tuned, list(held.values()))
    write(after, settings.folder / "drawings")
    result = report(settings.folder, list(held), before, after, start)
    tell(result)
    return result


def suited() -> list[str]:
    """The settings that suit this machine: a rank for every core of a CPU, and numbers that the CPU knows."""
    settings = [f"micro_batch_size={config.load(SETTINGS).batch_size // ranks()}"]
    known = has_accelerator(os.environ) or has_bf16()
    return settings if known else [*settings, "engine.precision=fp32"]


def ranks() -> int:
    """As many as the cores of a CPU, for one rank of two threads is slower than two of one; else one."""
    cores = 1 if has_accelerator(os.environ) else len(os.sched_getaffinity(0))
    return max(count for count in (1, 2, MOST_RANKS) if count <= cores)


def trained(settings: config.Config, wishes: list[str]) -> Path:
    """Run the command `sfumato train`, as any user does, and return the exported model's folder.

    Raises SystemExit with the command's exit code if it fails; it has told why.
    """
    words = ["train", str(SETTINGS), *wishes, "--gpus", str(ranks())]
    print("$ sfumato", *words, flush=True)
    command = [sys.executable, "-m", "sfumato", *words]
    code = launch.run(command, ranks(), settings.folder / "logs", settings.environment)
    if code:
        raise SystemExit(code)
    return settings.folder / "export"


def drawn(model: Path, prompts: list[str]) -> list[Drawing]:
    """One drawing of each prompt, seed 0."""
    pipeline, _ = open_pipeline(model, "cpu", torch.float32)
    return draw(pipeline, shots(prompts, [0]), SAMPLING, model=str(model))


def report(
    folder: Path, codes: list[str], before: list[Drawing], after: list[Drawing], start: float
) -> Result:
    """Measure the drawings of the concepts `codes`, and make the grid of the evaluation prompts."""
    everything = list(emoji.concepts())
    real_noto, real_openmoji = real("noto", everything), real("openmoji", everything)
    old, new = [measure.features(pixels_of(drawings)) for drawings in (before, after)]  # (N, 1280)
    noto = measure.features(real_noto)
    style = measure.style(real_openmoji)
    rows = [codes.index(code) for code in emoji.evaluation_prompts()]
    own = [everything.index(codes[row]) for row in rows]
    _, found = measure.own_neighbours(old[rows], own, noto)
    trained = list(emoji.tuning())
    seen = measure.features(real_openmoji[[everything.index(code) for code in trained]])
    closest = measure.nearest(new[rows], seen).tolist()
    pictures = emoji.drawings("openmoji", [trained[place] for place in closest], 64)
    nearest = [emoji.on_white(Image.fromarray(picture)) for picture in pictures]
    columns = ["base", "tuned", "nearest training image"]
    cells = [
        cell
        for row, image in zip(rows, nearest, strict=True)
        for cell in (before[row].image, after[row].image, image)
    ]
    half = len(rows) // 2
    names = [emoji.concepts()[codes[row]] for row in rows]
    sheets = [grid(cells[3 * a : 3 * b], names[a:b], columns) for a, b in ((0, half), (half, len(rows)))]
    picture = folder / "demo.png"
    beside(sheets).save(picture)
    return Result(
        picture=picture,
        own=found,
        pool=len(everything),
        before=measure.style_distance(measure.style(pixels_of(before)), style),
        after=measure.style_distance(measure.style(pixels_of(after)), style),
        seconds=time.perf_counter() - start,
    )


def pixels_of(drawings: list[Drawing]) -> torch.Tensor:
    """Drawings as (N, 3, H, W) in 0..1."""
    return measure.pixels([drawing.image for drawing in drawings])


def real(style: str, codes: list[str]) -> torch.Tensor:
    """The real drawings of concepts in a style, on white: (N, 3, 64, 64) in 0..1."""
    return measure.pixels([emoji.on_white(Image.fromarray(one)) for one in emoji.drawings(style, codes, 64)])


def beside(sheets: list[Image.Image]) -> Image.Image:
    """Pictures side by side, top aligned."""
    joined = Image.new("RGB", (sum(s.width for s in sheets), max(s.height for s in sheets)), "white")
    x = 0
    for sheet in sheets:
        joined.paste(sheet, (x, 0))
        x += sheet.width
    return joined


def tell(result: Result) -> None:
    """Print the two figures and where the picture is."""
    chance = emoji.PROMPTS / result.pool
    print(f"""
{result.own} of {emoji.PROMPTS} drawings of the base have their own Noto image as nearest neighbour
among {result.pool}, in EfficientNet-Lite0's last features (chance: {chance:.1f} of {emoji.PROMPTS}).

Style distance to OpenMoji on {emoji.HELD_OUT} concepts that training never saw in it:
base {result.before:.2f}, tuned {result.after:.2f}, which is {result.after / result.before:.0%} of the base's.
(Unbiased kernel distance between the channel means and deviations of EfficientNet-Lite0's first
three feature maps. 0 is the style itself.)

Look at {result.picture}: base, tuned, nearest training image. It took {result.seconds:.0f} s.""")
