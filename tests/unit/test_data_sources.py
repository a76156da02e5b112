"""What every source shares: walking folders, decoding pictures, importing no more than needed."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data.sources import open_source
from sfumato.errors import UserError
from tests.unit.pictures import (
    data_of,
    encoded,
    picture,
    text_folder,
)

FORMATS = {
    "rgba.png": Image.new("RGBA", (9, 9), (9, 9, 9, 9)),
    "palette.png": picture(0).quantize(16),
    "la.png": Image.new("LA", (9, 9), (9, 9)),
    "cmyk.jpg": Image.new("CMYK", (9, 9), (9, 9, 9, 9)),
    "sixteen.png": Image.fromarray(np.full((9, 9), 9999, np.uint16)),
    "grey.jpg": Image.new("L", (9, 9), 9),
    "web.webp": picture(1),
    "moving.gif": picture(2),
    "bits.bmp": picture(3),
    "big.tiff": picture(4),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read(tmp_path: Path, name: str) -> None:
    FORMATS[name].save(tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("x")
    assert open_source(data_of(tmp_path))[0].image.size == FORMATS[name].size


BROKEN = {
    "empty.avif": encoded(picture(0), "AVIF")[:300] + bytes(900),
    "truncated.png": encoded(picture(0))[:-500],
    "truncated.jpg": encoded(picture(0), "JPEG")[:-500],
    "header.png": encoded(picture(0))[:12],
    "empty.png": b"",
    "text.png": b"<html>404</html>",
    "zip.webp": gzip.compress(b"x" * 99),
    "flipped.png": encoded(picture(0)).replace(b"IDAT", b"IDAT\xff\xff\xff", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_picture_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    (tmp_path / name).with_suffix(".txt").write_text("x")
    source = open_source(data_of(tmp_path))
    with pytest.raises(UserError, match=name):
        source[0]


def test_vanished_and_huge_pictures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(data_of(text_folder(tmp_path, 2)))
    (tmp_path / "000.png").unlink()
    with pytest.raises(UserError, match=r"000\.png"):
        source[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"001\.png"):
        source[1]


def test_a_folder_needs_no_table_packages(tmp_path: Path) -> None:
    """`datasets` and pyarrow take seconds to import; torch stays out of a check of the data."""
    place = text_folder(tmp_path, 1)
    code = (
        "import sys; from sfumato.config import Data; from sfumato.data.sources import open_source;"
        f"print(len(open_source(Data(source={str(place)!r}))));"
        "print([name for name in ('torch', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["1", "[]"]
