"""A loss curve as a picture, drawn with Pillow alone."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[int, float]]

INK, PAPER, FAINT, RAW, LINE = "#1f2328", "#ffffff", "#e3e6ea", "#a9c4e4", "#0b5cad"
FINE = 2  # drawn so many times as large, because Pillow's lines are jagged
MOST = 4000  # points of a line; more would fall onto the same pixels


def curve(points: Points, width: int = 960, height: int = 480, what: str = "loss") -> Image.Image:
    """A picture of (step, value) pairs in the order of their steps: as they are, and a smoothed line.

    Single values far beyond all others leave the picture rather than flatten the rest.
    """
    points = [(step, value) for step, value in points if math.isfinite(value)]
    assert points, "a curve without a point"
    smooth = smoothed(points)
    font = ImageFont.load_default(15 * FINE)
    low, high = bounds([value for _, value in points], [value for _, value in smooth])
    first, last = points[0][0], points[-1][0]
    if first == last:
        first, last = first - 1, last + 1
    marks = [mark for mark in ticks(low, high, 5) if low <= mark <= high]
    names = [label(mark, marks) for mark in marks]
    left = max(font.getlength(name) for name in names) + 24 * FINE
    right = width * FINE - max(28 * FINE, font.getlength(f"{last:,}") / 2 + 8 * FINE)
    box = (left, 44 * FINE, right, height * FINE - 58 * FINE)
    sheet = Image.new("RGB", (width * FINE, height * FINE), PAPER)
    pen = ImageDraw.Draw(sheet)

    def at(step: float, value: float) -> tuple[float, float]:
        x = box[0] + (step - first) / (last - first) * (box[2] - box[0])
        return x, box[3] - (value - low) / (high - low) * (box[3] - box[1])

    for mark, name in zip(marks, names, strict=True):
        y = at(first, mark)[1]
        pen.line([(box[0], y), (box[2], y)], FAINT, FINE)
        pen.text((box[0] - 10 * FINE, y), name, INK, font, anchor="rm")
    for step in (mark for mark in ticks(first, last, 8) if mark == int(mark) and first <= mark <= last):
        x = at(step, low)[0]
        pen.line([(x, box[3]), (x, box[3] + 6 * FINE)], INK, FINE)
        pen.text((x, box[3] + 10 * FINE), f"{step:,.0f}", INK, font, anchor="mt")
    field = Image.new("L", sheet.size, 0)
    ImageDraw.Draw(field).rectangle(box, fill=255)
    several = len(smooth) > 1
    for line, colour, wide in ((points, RAW if several else LINE, 2), (smooth if several else [], LINE, 3)):
        layer = sheet.copy()
        trace(ImageDraw.Draw(layer), [at(*point) for point in thinned(line)], colour, wide * FINE)
        sheet.paste(layer, mask=field)
    pen = ImageDraw.Draw(sheet)
    pen.line([(box[0], box[1]), (box[0], box[3]), (box[2], box[3])], INK, FINE)
    pen.text(((box[0] + box[2]) / 2, height * FINE - 10 * FINE), "step", INK, font, anchor="mb")
    legend(pen, font, box, [(what, RAW if several else LINE), *([("smoothed", LINE)] if several else [])])
    return sheet.resize((width, height), Image.Resampling.LANCZOS)


def trace(pen: ImageDraw.ImageDraw, line: list[tuple[float, float]], colour: str, wide: int) -> None:
    """Draw a line through points, or a dot for a single one."""
    if len(line) > 1:
        pen.line(line, colour, wide, joint="curve")
    for x, y in line if len(line) == 1 else ():
        pen.ellipse((x - 2 * wide, y - 2 * wide, x + 2 * wide, y + 2 * wide), colour)


def legend(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    box: Sequence[float],
    entries: Sequence[tuple[str, str]],
) -> None:
    """Names of the lines, above the field, from its left."""
    x, y = box[0], 22 * FINE
    for name, colour in entries:
        pen.line([(x, y), (x + 28 * FINE, y)], colour, 4 * FINE)
        pen.text((x + 36 * FINE, y), name, INK, font, anchor="lm")
        x += 60 * FINE + font.getlength(name)


def smoothed(points: Points) -> Points:
    """The points' mean with weights that fall exponentially on both sides; nothing where they are few."""
    if len(points) < 8:
        return []
    keep = 1 - 1 / max(2, len(points) / 30)
    values = [value for _, value in points]
    ahead, back = running(values, keep), running(values[::-1], keep)[::-1]
    # Each value stands in both sums.
    return [
        (step, (a + b - value) / (m + n - 1))
        for (step, value), (a, m), (b, n) in zip(points, ahead, back, strict=True)
    ]


def running(values: Sequence[float], keep: float) -> list[tuple[float, float]]:
    """At each value the sum of all up to it, weighted less the older they are, and the sum of the weights."""
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append((total, weight))
    return found


def bounds(values: Sequence[float], smooth: Sequence[float]) -> tuple[float, float]:
    """The values between which the field lies."""
    ordered = sorted(values)
    beyond = len(ordered) // 100
    inner = ordered[beyond : len(ordered) - beyond]
    low, high = min(inner + list(smooth)), max(inner + list(smooth))
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def ticks(low: float, high: float, most: int) -> Iterator[float]:
    """Round numbers around an interval, about `most` of them in it."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    for number in range(math.floor(low / step), math.ceil(high / step) + 1):
        # Without the rounding a tick of 0.3 would be called 0.30000000000000004.
        yield round(number * step, 12 - math.floor(math.log10(step)))


def label(mark: float, marks: Sequence[float]) -> str:
    """A number with as many digits as tell it from its neighbours."""
    gap = min((abs(b - a) for a, b in pairwise(marks)), default=abs(mark) or 1.0)
    places = max(0, -math.floor(math.log10(gap) + 1e-9))
    if places <= 4 or not mark:
        return f"{mark:,.{places}f}" if places <= 4 else "0"
    return f"{mark:.{max(1, places + 1 + math.floor(math.log10(abs(mark))))}g}"


def thinned(points: Points) -> Points:
    """At most MOST points: of each stretch the lowest and the highest."""
    if len(points) <= MOST:
        return points
    size = -(-2 * len(points) // MOST)
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        found += sorted(ends)
    return found
