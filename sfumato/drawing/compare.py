"""A run's checkpoints side by side: what was given, the base, each step; a row for every prompt and seed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.drawing import sources
from sfumato.drawing.grid import grid
from sfumato.drawing.inputs import read
from sfumato.drawing.pictures import Album, Drawing, labels
from sfumato.drawing.request import Shot

Column = tuple[str, Any]


def columns_of(model: str, run: Path) -> list[tuple[str, str | Path]]:
    """A label and a source for each column: the model, then the run's exports by step. Raises UserError.

    Where the model is the run itself, the first is what the run started from.
    """
    base, steps = sources.checkpoints_of(run)
    first = base if Path(model).expanduser().resolve() == run.expanduser().resolve() else model
    return [("base", first), *((f"step {step}", folder) for step, folder in steps)]


def without_condition(shots: Sequence[Shot]) -> list[Shot]:
    """The shots for a model that has no ControlNet."""
    return [replace(shot, condition=None) for shot in shots]


def draw_columns(
    columns: Sequence[Column], draw: Callable[[Any, Album], list[Drawing]], out: Path, first: bool
) -> list[Path]:
    """Draw each column into a folder of its own, and all in one sheet; the first rank writes.

    draw: a column's model and the album of its folder to its drawings, in the order of the shots. Returns the
    PNGs' paths, and last the sheet's.
    """
    found: list[list[Drawing]] = []
    paths: list[Path] = []
    for label, model in columns:
        album = Album(out / label.replace(" ", "-"))
        found.append(draw(model, album))
        if first:
            paths += album.finish(found[-1], sheet=False)
    if not first:
        return []
    rows = found[0]
    texts = labels(rows)
    if len({drawing.seed for drawing in rows}) > 1:
        texts = [f"{text}, seed {drawing.seed}" for text, drawing in zip(texts, rows, strict=True)]
    given = {role: pictures_of(found[-1], role) for role in ("image", "condition")}
    sheets = [several for several in given.values() if several]
    sheets += [[drawing.image for drawing in column] for column in found]
    heads = [role for role, several in given.items() if several] + [label for label, _ in columns]
    cells = [sheet[place] for place in range(len(rows)) for sheet in sheets]
    return [*paths, Album(out).add_sheet(grid(cells, texts, heads))]


def pictures_of(drawings: Sequence[Drawing], role: str) -> list[Image.Image]:
    """The pictures that drawings were given in a role; [] unless each has one."""
    given = [getattr(drawing.shot, role) for drawing in drawings]
    if any(picture is None for picture in given):
        return []
    return [read(picture).convert("RGB") for picture in given]
