"""Prompts from the command line and from files, with the pictures that belong to each. Imports no torch.

A .jsonl file holds one object a line: {"prompt": text}, and if need be "negative", "seed" or "seeds",
"image", "mask", "condition". Paths in it are relative to the file.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.config.reading import check_text
from sfumato.drawing.options import SEEDS
from sfumato.drawing.request import ROLES, Picture, Shot
from sfumato.errors import UserError

KEYS = ("prompt", "negative", "seed", "seeds", *ROLES)
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Line:
    """A prompt with all that belongs to it."""

    prompt: str
    negative: str | None = None
    seeds: tuple[int, ...] | None = None
    image: Picture | None = None
    mask: Picture | None = None
    condition: Picture | None = None
    where: str = "the command line"
    """Where it stands, for messages."""


def gather(prompts: Sequence[str], file: Path | None) -> list[Line]:
    """The prompts of the command line, then those of a file. Raises UserError where there are none."""
    for prompt in prompts:
        check_text(prompt, f"the prompt {prompt!r}")
    lines = [Line(prompt) for prompt in prompts]
    if file is not None:
        lines += read_file(file)
    if not lines:
        raise UserError("pictures of no prompt", "no prompt is given", 'write one, in "", or --prompts FILE')
    return lines


def read_file(file: Path) -> list[Line]:
    """The prompts of a .txt or .jsonl file. Raises UserError for one without any, and for a faulty line."""
    asked = f"--prompts {file}"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        found = f"it cannot be read: {error.strerror}"
        raise UserError(asked, found, "name a .txt or .jsonl file of prompts") from None
    except UnicodeDecodeError:
        raise UserError(asked, "it is not in UTF-8", "save it as text in UTF-8") from None
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if file.suffix.lower() in (".jsonl", ".json"):
        lines = [read_object(line, file, f"{file}, line {number}") for number, line in numbered]
    else:
        lines = [Line(line, where=f"{file}, line {n}") for n, line in numbered if not line.startswith("#")]
    if not lines:
        raise UserError(asked, "no prompt is in it", "write one prompt a line")
    return lines


def read_object(text: str, file: Path, where: str) -> Line:
    """One line of a .jsonl file."""
    try:
        value = json.loads(text)
    except ValueError as error:  # also for a number of thousands of digits
        raise UserError(where, f"no JSON: {error}", 'write {"prompt": "a red fox"}') from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise UserError(where, "no object with a text under prompt", 'write {"prompt": "a red fox"}')
    for key in value:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            do = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
            raise UserError(where, f"the unknown key {key!r}", do)
    for key in ("negative", *ROLES):
        if not isinstance(value.get(key), str | None):
            raise UserError(where, f"{key} is no text", f'write "{key}": "..."')
    for key in ("prompt", "negative", *ROLES):
        check_text(value.get(key) or "", f"{where}: {key}")
    pictures = {role: file.parent / value[role] for role in ROLES if value.get(role) is not None}
    return Line(value["prompt"], value.get("negative"), seeds_of(value, where), **pictures, where=where)


def seeds_of(value: dict[str, Any], where: str) -> tuple[int, ...] | None:
    """The seeds that an object names."""
    if "seed" in value and "seeds" in value:
        raise UserError(where, "both seed and seeds", "keep one of them")
    seeds = value.get("seeds", [value["seed"]] if "seed" in value else None)
    if seeds is None:
        return None
    whole = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds)
    if not whole or not seeds or not all(seed in SEEDS for seed in seeds):
        raise UserError(where, f"the seeds {seeds!r}", "write whole numbers of 64 bits: [1, 2, 3]")
    return tuple(seeds)


def paired(lines: Sequence[Line], role: str, place: Path | None) -> list[Line]:
    """The lines, each with its picture from the file or folder that the command line names for a role.

    One picture goes with every prompt, one prompt with every picture, as many of both in order: the prompts'
    and that of the files' names. A line that names a picture of its own keeps it. Raises UserError else.
    """
    if place is None:
        return list(lines)
    files, asked = pictures_in(place, role), f"--{role} {place}"
    if len(files) == 1:
        files = files * len(lines)
    elif len(lines) == 1:
        lines = list(lines) * len(files)
    if len(files) != len(lines):
        found = f"{len(files)} pictures for {len(lines)} prompts"
        do = "give one picture, one prompt, or as many of both; or name each prompt's in a .jsonl file"
        raise UserError(asked, found, do)
    own = [getattr(line, role) is not None for line in lines]
    return [
        line if mine else replace(line, **{role: file})  # type: ignore[arg-type]
        for line, file, mine in zip(lines, files, own, strict=True)
    ]


def pictures_in(place: Path, role: str) -> list[Path]:
    """The file, or the pictures of the folder by name. Raises UserError if there are none."""
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
        if not files:
            raise UserError(f"--{role} {place}", "the folder holds no picture", "name a folder of pictures")
        return files
    if not place.is_file():
        raise UserError(f"--{role} {place}", "no such file or folder", "name a picture")
    return [place]


def check_alike(lines: Sequence[Line]) -> None:
    """Raise UserError unless all lines have the same kinds of pictures: they go through one pipeline."""
    first = lines[0]
    for line in lines:
        for role in ROLES:
            if (getattr(line, role) is None) != (getattr(first, role) is None):
                lacking, having = (line, first) if getattr(line, role) is None else (first, line)
                raise UserError(
                    f"one call that draws {having.where} and {lacking.where}",
                    f"the one has {'an' if role == 'image' else 'a'} {role}, the other has none",
                    f"give all of them one with --{role}, or draw them in two calls",
                )
    if first.mask is not None and first.image is None:
        raise UserError("drawing with a mask", "no image that it belongs to", "name it with --image")


def to_shots(lines: Sequence[Line], seeds: Sequence[int]) -> list[Shot]:
    """Every line with each of its seeds, or of those that all have."""
    return [
        Shot(line.prompt, seed, row, line.negative, line.image, line.mask, line.condition)
        for row, line in enumerate(lines)
        for seed in line.seeds or seeds
    ]
