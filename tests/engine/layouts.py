"""The same real drawings in every layout that the data room reads."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from sfumato.demo import emoji

SHAPES = [(96, 96), (128, 72), (72, 128), (110, 90)]  # width, height


def records(count: int) -> list[tuple[str, bytes, bytes, str]]:
    """Names, JPEG bytes, edges as PNG bytes, and captions of OpenMoji drawings of several shapes."""
    codes = list(emoji.concepts().items())[:count]
    found = []
    for number, (code, caption) in enumerate(codes):
        drawing = emoji.open_drawing(emoji.files("openmoji")[code]).resize((64, 64))
        width, height = SHAPES[number % len(SHAPES)]
        image = Image.new("RGB", (width, height), (255, 250 - 5 * (number % 9), 240))
        image.paste(drawing, ((width - 64) // 2, (height - 64) // 2), drawing.convert("RGBA"))
        files = []
        for kind, picture in (("JPEG", image), ("PNG", image.filter(ImageFilter.FIND_EDGES))):
            file = io.BytesIO()
            picture.save(file, kind)
            files.append(file.getvalue())
        found.append((f"{number:09}", *files, caption))
    return found  # type: ignore[return-value]


def laion(place: Path, told: list[tuple[str, bytes, bytes, str]]) -> dict[str, Any]:
    """Triplets in nested folders."""
    for number, (name, image, _, caption) in enumerate(told):
        folder = place / f"{number // 10:05}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jpg").write_bytes(image)
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps({"caption": caption, "aesthetic": 5.5}))
    return {"source": str(place)}


def shards(place: Path, told: list[tuple[str, bytes, bytes, str]]) -> dict[str, Any]:
    """WebDataset tars of ten records."""
    place.mkdir()
    for number in range(0, len(told), 10):
        with tarfile.open(place / f"{number // 10:05}.tar", "w") as tar:
            for name, image, _, caption in told[number : number + 10]:
                facts = json.dumps({"caption": caption}).encode()
                for ending, data in (("jpg", image), ("txt", caption.encode()), ("json", facts)):
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    last = (len(told) - 1) // 10
    return {"source": f"{place}/{{00000..{last:05}}}.tar"}


def parquet(place: Path, told: list[tuple[str, bytes, bytes, str]]) -> dict[str, Any]:
    """pokemon-blip-captions: data/train-001.parquet with image and text."""
    (place / "data").mkdir(parents=True)
    cells = [{"bytes": image, "path": f"{name}.jpg"} for name, image, _, _ in told]
    table = pa.table({"image": cells, "text": [caption for *_, caption in told]})
    pq.write_table(table, place / "data" / "train-001.parquet", row_group_size=8)
    return {"source": str(place)}


def fill50k(place: Path, told: list[tuple[str, bytes, bytes, str]]) -> dict[str, Any]:
    """train.jsonl with image, conditioning image and text."""
    lines = []
    for folder in ("images", "conditioning_images"):
        (place / folder).mkdir(parents=True)
    for name, image, edges, caption in told:
        (place / "images" / f"{name}.jpg").write_bytes(image)
        (place / "conditioning_images" / f"{name}.png").write_bytes(edges)
        row = {"text": caption, "image": f"images/{name}.jpg"}
        lines.append(json.dumps(row | {"conditioning_image": f"conditioning_images/{name}.png"}) + "\n")
    (place / "train.jsonl").write_text("".join(lines))
    return {"source": str(place), "conditioning_column": "conditioning_image"}


LAYOUTS = {"laion_sx": laion, "tar": shards, "parquet": parquet, "fill50k": fill50k}
