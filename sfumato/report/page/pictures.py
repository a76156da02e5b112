"""Previews as small pictures inside the page."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.drawing.pictures import CONDITIONS, LIST
from sfumato.report.page.lines import Rows
from sfumato.report.page.record import entries

SIDE, QUALITY = 320, 80  # of a small picture
MOST = 240  # pictures of a page
BYTES = 3_500_000  # of all of them, as text
PROMPTS = 24  # of a set
PIXELS = 2**26  # of a picture that is opened
Key = tuple[str, str, int]
"""A prompt, its seed, and which of those with both alike."""
Small = tuple[str, int, int]
"""A picture as a data URI, its width and height."""


@dataclass(frozen=True)
class Preview:
    """A picture in a run's folder."""

    path: Path
    prompt: str
    seed: str
    condition: Path | None = None
    """What a ControlNet was shown."""


class Album:
    """The previews of a run. A picture is made small once, however often the page is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "images"
        self.made: dict[tuple[str, int, int], Small | None] = {}
        self.sets: dict[int, dict[Key, Preview]] = {}

    def refresh(self) -> None:
        """Look which sets of previews there are. Only the newest may still be growing."""
        steps = {}
        for path in entries(self.folder, "step-*"):
            number = path.name.removeprefix("step-")
            if number.isdecimal() and number.isascii() and len(number) < 16:
                steps[int(number)] = path
        last = max(steps, default=0)
        found = {
            step: self.sets[step] if step in self.sets and step != last else previews(steps[step])
            for step in sorted(steps)
        }
        self.sets = {step: rows for step, rows in found.items() if rows}

    def small(self, path: Path) -> Small | None:
        """A picture as small as the page shows it; None if it cannot be read."""
        try:
            seen = path.stat()
            key = (str(path), seen.st_size, seen.st_mtime_ns)
            if key not in self.made:
                self.made[key] = encoded(path)
            return self.made[key]
        except OSError:
            return None

    def page(self, most: int = MOST, size: int = BYTES) -> dict[str, Any]:
        """Pictures over steps within the limits, always with those of the first and the last step.

        most: pictures; size: of them as text, in bytes. Gives `rows`: prompt, seed, and `uris` by step. Where
        not all steps fit, every second, fourth, ... is taken, so that a page written later takes no others.
        """
        every = [*self.sets]
        keys = [*dict.fromkeys(key for rows in self.sets.values() for key in rows)]
        shown = keys[:PROMPTS]
        ends = sum(self.bytes_of(step, shown) for step in every[:1] + every[-1:])
        fit = min(most // max(1, len(shown)), 2 * size // max(1, ends))
        stride = 1
        while -(-len(every) // stride) + 1 > max(2, fit):
            stride *= 2
        steps = every[::stride] if stride < len(every) else every[:1]
        steps += [step for step in every[-1:] if step not in steps]
        rows = []
        for key in shown:
            made = {step: self.small(self.sets[step][key].path) for step in steps if key in self.sets[step]}
            there = {step: small for step, small in made.items() if small is not None}
            sizes = [small[1:] for small in there.values()]
            given = self.sets[max(made)][key].condition if made else None
            condition = self.small(given) if given is not None else None
            rows.append(
                {
                    "prompt": key[0],
                    "seed": key[1],
                    "uris": {step: small[0] for step, small in there.items()},
                    "size": max(sizes, default=(SIDE, SIDE)),
                    "condition": condition[0] if condition is not None else None,
                    "unreadable": len(made) - len(there),
                }
            )
        return {
            "steps": steps,
            "all": len(every),
            "rows": [row for row in rows if row["uris"]],
            "unreadable": sum(row["unreadable"] for row in rows),
            "more": len(keys) - len(shown),
        }

    def bytes_of(self, step: int, keys: list[Key]) -> int:
        """What a step's pictures take on the page."""
        made = [self.small(row.path) for key, row in self.sets[step].items() if key in keys]
        return sum(len(small[0]) for small in made if small is not None)


def previews(folder: Path) -> dict[Key, Preview]:
    """The pictures of a step, as their list tells; where it tells nothing, all that lie there."""
    rows = Rows(folder / LIST)
    rows.refresh()
    told = [(row.get("file"), row.get("prompt"), row.get("seed"), "condition" in row) for row in rows.all]
    told = told or [(path.name, path.stem, "", False) for path in sorted(entries(folder, "*.png"))]
    found: dict[Key, Preview] = {}
    for place, (name, prompt, seed, conditioned) in enumerate(told):
        # A list that names files elsewhere is not ours.
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
            continue
        words = prompt if isinstance(prompt, str) else json.dumps(prompt)
        turn = 0
        while (key := (words, str(seed), turn)) in found:
            turn += 1
        # The list names the user's own file, which the page has no business to read.
        shown = folder.parent / CONDITIONS / f"{place:03d}.png" if conditioned else None
        found[key] = Preview(folder / name, words, str(seed), shown)
    return found


def encoded(path: Path) -> Small | None:
    """A picture made small; None where it is none."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            if picture.width * picture.height > PIXELS:
                return None
            small = picture.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        small.save(out, "WEBP", quality=QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode(), *small.size
