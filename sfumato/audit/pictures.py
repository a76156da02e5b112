"""Small pictures for the page, as data URIs: no file lies beside it and nothing is fetched."""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sfumato.config import Config
from sfumato.data.buckets import Cells
from sfumato.data.index import Index
from sfumato.data.index.headers import quiet
from sfumato.data.samples import Samples
from sfumato.data.transforms import decode

SIDE = 128  # pixels
QUALITY = 82
MOST = 512  # pictures on a page
CAPTION = 300  # characters
THREADS = 4


class Album:
    """Makes the pictures of a page, at most MOST in all."""

    def __init__(self, config: Config, index: Index, cells: Cells) -> None:
        self.index, self.cells, self.left = index, cells, MOST
        self.most, self.prefix, self.suffix = (
            config.data.max_pixels,
            config.data.caption_prefix,
            config.data.caption_suffix,
        )
        # The channels and the factor are of latents, which no page shows.
        self.samples = Samples(config, index, cells, 4, 8, None)

    def bucket(self, bucket: int, count: int, usable: np.ndarray) -> list[dict[str, Any]]:
        """Some records of a bucket, from all over it, as their first visits show them."""
        sums = np.cumsum(self.cells.counts[bucket])
        places = np.unique(np.linspace(0, sums[-1] - 1, min(3 * count, int(sums[-1]))).astype(np.int64))
        parts = np.searchsorted(sums, places, side="right")
        numbers = self.cells.record(bucket, parts, places - np.r_[0, sums][parts])
        good = numbers[usable[numbers]]
        good = good[np.linspace(0, len(good) - 1, min(count, len(good))).astype(np.int64)]
        return self.show(good.tolist(), bucket)

    def show(self, numbers: Sequence[int], bucket: int | None = None) -> list[dict[str, Any]]:
        """Records' names, captions, sizes and pictures: whole ones, or as they are cut for a bucket."""
        numbers = numbers[: self.left]
        self.left -= len(numbers)
        with quiet(), ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda number: self.card(number, bucket), numbers))

    def card(self, number: int, bucket: int | None) -> dict[str, Any]:
        """One record. Its picture is "" if it cannot be had."""
        record = self.index.record(number)
        text = record.captions[0] if record.captions else ""
        told = {
            "name": record.name,
            "caption": f"{self.prefix}{text}{self.suffix}"[:CAPTION],
            "captions": len(record.captions),
            "height": record.size[0],
            "width": record.size[1],
        }
        try:
            with self.index.open(number) as file:
                if bucket is None:
                    picture = decode(file, record.name, (SIDE, SIDE), self.most)
                    size = inside((picture.height, picture.width))
                    picture = picture.resize(size, Image.Resampling.LANCZOS)
                else:
                    target = self.cells.sizes[bucket]
                    cut = self.samples.cut(number, record, 0, target)
                    picture = decode(file, record.name, cut.resized, self.most)
                    size = inside(target)
                    box = cut.box((picture.height, picture.width))
                    picture = picture.resize(size, Image.Resampling.LANCZOS, box)
                    picture = ImageOps.mirror(picture) if cut.flip else picture
            return told | {"picture": uri(picture), "shown": picture.size}
        except Exception:  # which Pillow raises depends on the byte that is broken; the walk has told it
            return told | {"picture": "", "shown": (SIDE, SIDE)}


def inside(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a (height, width) made small enough for the page."""
    scale = SIDE / max(size)
    return max(1, round(size[1] * scale)), max(1, round(size[0] * scale))


def uri(picture: Image.Image) -> str:
    """A picture within the page's text."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
