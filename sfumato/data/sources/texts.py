"""Captions and their weights, as files beside an image, lines of a list and cells of a table hold them."""

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.config import Layout

LONGEST = 2**20  # bytes of a caption file
TOO_LONG = f"its caption file has more than {LONGEST:,} bytes"
UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # ends a line, or cannot be written
HALVES = re.compile(r"[\ud800-\udfff]")  # half of a letter: no file can hold it


class Unusable(Exception):
    """Why a record cannot be trained on. A source tells it as the fault of an entry."""


@dataclass(frozen=True)
class Texts:
    """The captions of a record; weights are () where all count alike."""

    captions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


def shown(value: Any) -> str:
    """A foreign value for a message: a text as it is, if it stands on a line; anything else cut short."""
    if isinstance(value, str) and len(value) <= 300 and not UNSHOWN.search(value):
        return value
    return reprlib.repr(value)


def of_lines(data: bytes) -> Texts:
    """Each line of a text file that is not empty; one empty caption if there is none. Raises Unusable."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"its caption is not UTF-8: {error.reason} at byte {error.start}") from None
    # Not splitlines: it also parts a caption that holds one of Unicode's line separators.
    lines = [line.strip() for line in text.split("\n")]
    return Texts(tuple(line for line in lines if line) or ("",))


def of_json(data: bytes, layout: Layout) -> Texts:
    """The captions under a key of a JSON object. Raises Unusable, also if it is no object."""
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unusable(f"its json is not JSON: {shown(str(error))}") from None
    if not isinstance(row, dict):
        raise Unusable(f"its json is no object with keys: {shown(row)}")
    return of_row(row, layout)


def of_row(row: Mapping[str, Any], layout: Layout) -> Texts:
    """The captions of a list's line or a table's row; none if it has none. Raises Unusable."""
    key, weight = layout.caption_column, layout.caption_weight_column
    captions = captions_of(row.get(key), key)
    if weight is None or not captions:
        return Texts(captions)
    weights = weights_of(row.get(weight), weight, len(captions))
    # A caption of weight 0 is never chosen.
    used = [(text, weight) for text, weight in zip(captions, weights, strict=True) if weight > 0]
    if not used:
        raise Unusable(f'the weights "{weight}" of its captions are all 0')
    return Texts(tuple(text for text, _ in used), tuple(weight for _, weight in used))


def captions_of(value: Any, key: str) -> tuple[str, ...]:
    """A text or a list of texts, without the spaces around them; () for none. Raises Unusable."""
    values = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(values, list | tuple) or not all(isinstance(text, str) for text in values):
        raise Unusable(f'its caption "{key}" is {shown(value)}, not a text or a list of texts')
    for text in values:
        if HALVES.search(text):
            raise Unusable(f'its caption "{key}" holds half a letter: {shown(text)}')
    return tuple(text.strip() for text in values)


def weights_of(value: Any, key: str, count: int) -> list[float]:
    """A number for each caption, at least 0. Raises Unusable."""
    values = value if isinstance(value, list | tuple) else [value]
    try:
        # Cells of csv are texts.
        weights = [math.nan if isinstance(each, bool) else float(each) for each in values]
    except (TypeError, ValueError, OverflowError):
        weights = []
    if len(weights) != count or not all(math.isfinite(each) and each >= 0 for each in weights):
        raise Unusable(f'"{key}" is {shown(value)}: give one number for each of its captions, here {count}')
    return weights


def sidecars(layout: Layout) -> tuple[str, ...]:
    """The kinds of files that may hold captions; the first that does is taken."""
    if layout.caption_file != "auto":
        return (layout.caption_file,)
    # A text file has no weights.
    return ("txt", "json") if layout.caption_weight_column is None else ("json", "txt")


def beside(layout: Layout, read: Callable[[str], bytes | None]) -> Texts:
    """The captions that the files beside an image hold; none if there is no such file.

    read gives the content of the file with a suffix, "txt" or "json", or None. Raises Unusable.
    """
    for kind in sidecars(layout):
        data = read(kind)
        if data is not None:
            found = of_lines(data) if kind == "txt" else of_json(data, layout)
            if found.captions:
                return found
    return Texts()


def merged(several: list[Texts]) -> Texts:
    """All captions of several lines for one image; one that comes again counts once."""
    if len(several) == 1:
        return several[0]
    weighted: dict[str, float] = {}
    for texts in several:
        for text, weight in zip(texts.captions, texts.weights or (1.0,) * len(texts.captions), strict=True):
            weighted.setdefault(text, weight)
    alike = not any(texts.weights for texts in several)
    return Texts(tuple(weighted), () if alike else tuple(weighted.values()))
