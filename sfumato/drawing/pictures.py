"""What was drawn: pictures with what it takes to draw them again, as files, a list and a sheet."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sfumato
from sfumato.drawing.grid import grid
from sfumato.drawing.request import ROLES, Sampling, Shot

NUMBER = re.compile(r"(\d{3,})-.*\.png")
LIST, SHEET = "drawings.jsonl", "grid"
CONDITIONS = "conditions"
"""The folder beside those of a run's previews that holds what a ControlNet was shown."""


@dataclass(frozen=True)
class Drawing:
    """One picture and all that is needed to draw it again."""

    index: int
    """Its place among all shots."""
    shot: Shot
    image: Image.Image
    sampling: Sampling
    scheduler: str
    """The class of the scheduler that drew it."""
    model: str = ""
    """The weights that drew it, for people to read."""
    finite: bool = True
    """False if the model gave infinite or undefined pixels."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else it was drawn with: adapters, dtype, prompt window."""

    @property
    def prompt(self) -> str:
        """What it shows."""
        return self.shot.prompt

    @property
    def seed(self) -> int:
        """The seed of its noise."""
        return self.shot.seed

    def facts(self) -> dict[str, Any]:
        """What is written into the PNG and into the list beside it."""
        shot, how = self.shot, self.sampling
        facts = {
            "prompt": shot.prompt,
            "negative": how.negative if shot.negative is None else shot.negative,
            "seed": shot.seed,
            "steps": how.steps,
            "guidance": how.guidance,
            "guidance_rescale": how.guidance_rescale,
            "scheduler": self.scheduler,
            "width": self.image.width,
            "height": self.image.height,
            "model": self.model,
            **self.settings,
        }
        for role in ROLES:
            picture = getattr(shot, role)
            if picture is not None:
                facts.setdefault(
                    role, str(picture) if isinstance(picture, Path) else "a picture without a file"
                )
        if shot.image is not None:
            facts["strength"] = (
                how.strength if how.strength is not None else 0.8 if shot.mask is None else 1.0
            )
        if shot.condition is not None:
            facts["control_scale"] = how.control_scale
        facts |= {"finite": self.finite, "software": f"Sfumato {sfumato.__version__}"}
        # Names of files need not be in UTF-8, and what is written is.
        return {
            name: value.encode(errors="replace").decode() if isinstance(value, str) else value
            for name, value in facts.items()
        }

    def file_name(self, first: int = 0) -> str:
        """What its file is called, if the first drawing's number is `first`."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower())[:40].strip("-") or "drawing"
        return f"{first + self.index:03d}-{words}-seed{self.seed}.png"

    def png_text(self) -> PngInfo:
        """The facts as texts of a PNG."""
        text = PngInfo()
        for key, value in self.facts().items():
            text.add_text(key, "" if value is None else str(value))
        return text


def write(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Save each drawing as a PNG that tells how it was made, and the list of them as drawings.jsonl.

    Drawings of the same names are replaced: those of a preview that is drawn again. An `Album` replaces none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / drawing.file_name() for drawing in drawings]
    for drawing, path in zip(drawings, paths, strict=True):
        drawing.image.save(path, pnginfo=drawing.png_text())
    (folder / LIST).write_text("".join(map(line, drawings, paths)), encoding="utf-8")
    return paths


def line(drawing: Drawing, path: Path) -> str:
    """A drawing's line in the list."""
    return json.dumps({"file": path.name, **drawing.facts()}, ensure_ascii=False) + "\n"


class Album:
    """A folder to which drawings are added; none that is there is replaced.

    Numbers go on after the highest there. Pictures are saved as soon as they are drawn, so that a call which
    is stopped loses none; the list and the sheet are written at its end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = [NUMBER.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        self.first = max((int(match[1]) + 1 for match in found if match), default=0)
        self.saved: dict[int, str] = {}

    def save(self, drawing: Drawing) -> Path:
        """Save one drawing as a PNG that tells how it was made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = self.folder / drawing.file_name(self.first)
        path, more = wanted, 1
        while True:
            try:
                # Another call may be drawing into the same folder.
                file = path.open("xb")
                break
            except FileExistsError:
                more += 1
                path = wanted.with_name(f"{wanted.stem}-{more}.png")
        with file:
            drawing.image.save(file, "PNG", pnginfo=drawing.png_text())
        self.saved[drawing.index] = path.name
        return path

    def finish(self, drawings: Sequence[Drawing], sheet: bool = True) -> list[Path]:
        """Add the drawings, which were saved, to the list, and write their sheet if they are several."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [self.saved.get(each.index) or each.file_name(self.first) for each in drawings]
        paths = [self.folder / name for name in names]
        with (self.folder / LIST).open("a", encoding="utf-8") as file:
            file.write("".join(map(line, drawings, paths)))
        if sheet and len(drawings) > 1:
            self.add_sheet(grid_of(drawings))
        return paths

    def add_sheet(self, sheet: Image.Image) -> Path:
        """Save a sheet as grid.png, or where that is taken under the number of its first drawing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = SHEET if self.first == 0 else f"{SHEET}-{self.first:03d}"
        name, more = f"{stem}.png", 1
        while True:
            try:
                file = (self.folder / name).open("xb")
                break
            except FileExistsError:
                more += 1
                name = f"{stem}-{more}.png"
        with file:
            sheet.save(file, "PNG")
        return self.folder / name


def grid_of(drawings: Sequence[Drawing]) -> Image.Image:
    """A sheet with a row for each prompt and a column for each seed, or for each place where seeds differ."""
    rows: dict[int, list[Drawing]] = {}
    for drawing in drawings:
        rows.setdefault(drawing.shot.row, []).append(drawing)
    seeds = [[drawing.seed for drawing in row] for row in rows.values()]
    width = max(map(len, seeds))
    alike = all(row == seeds[0] for row in seeds)
    columns = [f"seed {seed}" for seed in seeds[0]] if alike else [str(place + 1) for place in range(width)]
    blank = Image.new("RGB", (1, 1), "white")
    images = [
        row[place].image if place < len(row) else blank for row in rows.values() for place in range(width)
    ]
    return grid(images, labels([row[0] for row in rows.values()]), columns)


def labels(drawings: Sequence[Drawing]) -> list[str]:
    """What stands beside each row: its prompt, and the name of its own picture where they share a prompt."""
    prompts = list({drawing.shot.row: drawing.prompt for drawing in drawings}.values())
    found = []
    for drawing in drawings:
        files = [getattr(drawing.shot, role) for role in ROLES]
        names = [file.name for file in files if isinstance(file, Path)]
        shared = prompts.count(drawing.prompt) > 1 and names
        found.append(f"{drawing.prompt} ({names[0]})" if shared else drawing.prompt)
    return found
