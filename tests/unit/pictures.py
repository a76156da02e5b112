"""Small real data sets for the data tests, and what holds for each of them."""

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sfumato.config import Config, Data, parse
from sfumato.data.sources import Entry, Source, open_source
from sfumato.errors import UserError


def picture(number: int, size: tuple[int, int] = (40, 50)) -> Image.Image:
    """An RGB picture of size (height, width) that differs from every other number's."""
    values = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(values)


def ramp(height: int, width: int) -> Image.Image:
    """Red grows with the row and green with the column: a pixel says where it comes from."""
    rows, columns = np.mgrid[:height, :width]
    values = [(rows + 0.5) / height * 255, (columns + 0.5) / width * 255, np.zeros((height, width))]
    return Image.fromarray(np.stack(values, -1).round().astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image file's bytes."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def text_folder(place: Path, count: int, size: tuple[int, int] = (40, 50)) -> Path:
    """A folder of png pictures with .txt captions."""
    place.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number, size).save(place / f"{number:03}.png")
        (place / f"{number:03}.txt").write_text(f"picture {number}\n", encoding="utf-8")
    return place


def write_list(place: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A metadata.jsonl."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "metadata.jsonl").write_text(lines, encoding="utf-8")


def parquet_file(
    path: Path, cells: Sequence[Any], captions: Sequence[Any], group: int = 3, image_type: Any = None
) -> Path:
    """A file as the hub's pokemon-blip-captions has it: image struct<bytes, path>, text; some row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = image_type or pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, struct), "text": pa.array(captions)})
    pq.write_table(table, path, row_group_size=group)
    return path


def data_of(place: Path | str, **settings: Any) -> Data:
    """A config's data table."""
    return Data(source=str(place), **settings)


def config_of(
    place: Path | str, *, seed: int = 3, batch_size: int = 8, micro: int = 2, **data: Any
) -> Config:
    """A config for the loader; only what it reads matters."""
    return parse(
        {
            "seed": seed,
            "steps": 100,
            "batch_size": batch_size,
            "micro_batch_size": micro,
            "model": {"weights": "none"},
            "data": {"source": str(place), "store": f"{place}-store", "resolution": 32, "workers": 0} | data,
        }
    )


def struct(number: int) -> dict[str, Any]:
    """A cell as `datasets` writes it."""
    return {"bytes": encoded(picture(number)), "path": None}


def captions_of(count: int) -> list[str]:
    return [f"picture {number}" for number in range(count)]


def all_of(place: Path | str, **settings: Any) -> list[Entry]:
    """Every entry of a source."""
    return list(open_source(data_of(place, **settings)).entries())


def check_samples(source: Source, count: int, captions: list[list[str]] | None = None) -> None:
    """All pictures come out bit-equal, at their places, with their captions, also after pickling.

    They come in the same order each time, under names of their own, with stamps that stay.
    """
    captions = captions or [[f"picture {number}"] for number in range(count)]
    entries = list(source.entries())
    assert [entry.fault for entry in entries] == [""] * count
    assert [list(entry.captions) for entry in entries] == captions
    assert len({entry.name for entry in entries}) == count
    assert all(entry.stamp for entry in entries), "an entry without a stamp"
    for each in (source, pickle.loads(pickle.dumps(source))):
        assert list(each.entries()) == entries
        assert each.stamp() == source.stamp()
        for number in (*range(count), 0):
            with each.open(entries[number].image) as file, Image.open(file) as image:
                assert np.array_equal(np.asarray(image), np.asarray(picture(number))), f"picture {number}"


def faults_of(entries: Sequence[Entry]) -> dict[str, str]:
    """Name -> fault, of those that have one; each of them alone under its name."""
    assert len({entry.name for entry in entries}) == len(entries)
    return {entry.name: entry.fault for entry in entries if entry.fault}


def captions_by_name(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Name -> captions, of those without a fault."""
    return {entry.name: list(entry.captions) for entry in entries if not entry.fault}


def refused(place: Path | str, *words: str, **settings: Any) -> UserError:
    """The UserError of opening a source or telling its entries, which must hold these words."""
    with pytest.raises(UserError) as caught:
        all_of(place, **settings)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return caught.value
