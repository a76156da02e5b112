"""One labelled sheet of many pictures."""

import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
INK, PAPER, FAINT = "#1f2328", "#ffffff", "#d8dce1"


def grid(
    images: Sequence[Image.Image],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    side: int | None = None,
) -> Image.Image:
    """Pictures of any sizes, row by row, with a label left of each row and above each column.

    `side` in pixels is the longer side of the place for each picture: by default that of the largest, but at
    least 128, so that labels are readable beside small pictures. Labels are in Latin letters: Pillow's own
    font has no others.
    """
    assert len(images) == len(rows) * len(columns), (
        f"{len(images)} pictures do not fill {len(rows)} rows of {len(columns)}"
    )
    widest, highest = (max(image.size[axis] for image in images) for axis in (0, 1))
    side = side or max(128, widest, highest)
    cell = (-(-side * widest // max(widest, highest)), -(-side * highest // max(widest, highest)))
    font = ImageFont.load_default(max(14, min(side // 12, 32)))
    gap = max(4, side // 32)
    margin = 3 * gap
    beside = [wrap(text, font, max(cell[0], 160), cell[1]) for text in rows]
    above = [wrap(text, font, cell[0], cell[1]) for text in columns]
    left = margin + max(extent(text, font)[0] for text in beside) + 2 * gap
    width = left + len(columns) * (cell[0] + gap) - gap + margin
    heading = ImageFont.load_default(max(18, min(side // 9, 42)))
    title = wrap(title, heading, width - 2 * margin, cell[1])
    over = extent(title, heading)[1] + 3 * gap if title else 0
    top = margin + over + max(extent(text, font)[1] for text in above) + gap
    sheet = Image.new("RGB", (width, top + len(rows) * (cell[1] + gap) - gap + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((margin, margin), title, INK, heading)
    for column, text in enumerate(above):
        middle = left + column * (cell[0] + gap) + cell[0] // 2
        pen.multiline_text((middle, top - gap), text, INK, font, anchor="md", align="center")
    for row, text in enumerate(beside):
        middle = top + row * (cell[1] + gap) + cell[1] // 2
        pen.multiline_text((left - 2 * gap, middle), text, INK, font, anchor="rm", align="right")
    for place, image in enumerate(images):
        row, column = divmod(place, len(columns))
        put(sheet, image, (left + column * (cell[0] + gap), top + row * (cell[1] + gap)), cell)
    return sheet


def put(sheet: Image.Image, image: Image.Image, corner: tuple[int, int], cell: tuple[int, int]) -> None:
    """Place a picture in the middle of a cell, as large as fits.

    Small ones grow by a whole factor, pixel by pixel, so that nothing is shown that the model did not draw.
    """
    width, height = image.size
    if width <= cell[0] and height <= cell[1]:
        factor = min(cell[0] // width, cell[1] // height)
        fitted = image.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST)
    else:
        scale = min(cell[0] / width, cell[1] / height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        fitted = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    x, y = corner[0] + (cell[0] - fitted.width) // 2, corner[1] + (cell[1] - fitted.height) // 2
    sheet.paste(fitted, (x, y))
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + fitted.width, y + fitted.height), outline=FAINT)


def wrap(text: str, font: Font, width: int, height: int) -> str:
    """The text in lines of at most `width` pixels, cut with an ellipsis where they would pass `height`."""
    lines: list[str] = []
    for word in latin(text).split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines += broken(word, font, width)
        if len(lines) > height:  # more cannot be shown, as a line has a pixel at least
            break
    del lines[height + 2 :]
    while len(lines) > 1 and extent("\n".join(lines), font)[1] > height:
        lines.pop()
        lines[-1] = shortened(lines[-1], font, width)
    return "\n".join(lines)


def shortened(line: str, font: Font, width: int) -> str:
    """The line with an ellipsis at its end, within `width` pixels."""
    line = line.rstrip(" .,…")
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def latin(text: str) -> str:
    """The text without accents, other letters replaced by question marks: what Pillow's own font can show."""
    plain = unicodedata.normalize("NFKD", text)
    return "".join(
        letter if letter.isascii() else "?" for letter in plain if not unicodedata.combining(letter)
    )


def broken(word: str, font: Font, width: int) -> list[str]:
    """A word in pieces of at most `width` pixels."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def extent(text: str, font: Font) -> tuple[int, int]:
    """Width and height of lines of text in pixels."""
    box = ImageDraw.Draw(Image.new("1", (1, 1))).multiline_textbbox((0, 0), text, font)
    return round(box[2]), round(box[3])
