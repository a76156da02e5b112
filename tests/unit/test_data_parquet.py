"""Parquet files as the hub has them, and every mistake that can be in one."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sfumato.data.sources import open_source
from sfumato.data.tables import Parquet
from sfumato.errors import UserError
from tests.unit.pictures import (
    captions_of,
    check_samples,
    data_of,
    encoded,
    parquet_file,
    picture,
    refused,
    struct,
)


def test_parquet_like_pokemon(tmp_path: Path) -> None:
    parquet_file(tmp_path / "data" / "train-001.parquet", [struct(n) for n in range(7)], captions_of(7))
    (tmp_path / "dataset_infos.json").write_text("{}")
    picture(9).save(tmp_path / "preview.png")
    source = open_source(data_of(tmp_path))
    assert isinstance(source, Parquet)
    check_samples(source, 7)
    assert source.name(4) == f"row 4 of {tmp_path / 'data' / 'train-001.parquet'}"


def test_parquet_of_several_files_and_groups(tmp_path: Path) -> None:
    counts = [4, 1, 5]
    starts = [0, 4, 5]
    for file, (start, count) in enumerate(zip(starts, counts, strict=True)):
        numbers = range(start, start + count)
        cells, captions = [struct(n) for n in numbers], [f"picture {n}" for n in numbers]
        parquet_file(tmp_path / f"part-{file}.parquet", cells, captions, group=2)
    source = open_source(data_of(tmp_path))
    check_samples(source, 10)
    assert source.name(4) == f"row 0 of {tmp_path / 'part-1.parquet'}"
    assert source.name(9) == f"row 4 of {tmp_path / 'part-2.parquet'}"


def test_parquet_reads_the_training_split(tmp_path: Path) -> None:
    parquet_file(tmp_path / "data" / "test-0.parquet", [struct(8)], ["no"])
    parquet_file(tmp_path / "data" / "train-0.parquet", [struct(0)], ["picture 0"])
    check_samples(open_source(data_of(tmp_path)), 1)


def test_parquet_of_plain_bytes_paths_and_lists(tmp_path: Path) -> None:
    texts = [["picture 0", "a"], ["picture 1"]]
    parquet_file(tmp_path / "a" / "x.parquet", [encoded(picture(n)) for n in (0, 1)], texts, 3, pa.binary())
    check_samples(open_source(data_of(tmp_path / "a")), 2, texts)
    parquet_file(tmp_path / "b" / "x.parquet", ["p/0.png", "p/1.png"], captions_of(2), 3, pa.string())
    (tmp_path / "b" / "p").mkdir()
    for number in (0, 1):
        picture(number).save(tmp_path / "b" / "p" / f"{number}.png")
    check_samples(open_source(data_of(tmp_path / "b")), 2)
    cells = [{"bytes": None, "path": "p/0.png"}, {"bytes": None, "path": "p/1.png"}]
    parquet_file(tmp_path / "b" / "x.parquet", cells, captions_of(2))
    check_samples(open_source(data_of(tmp_path / "b")), 2)


def test_parquet_keeps_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_file(tmp_path / "x.parquet", [struct(n) for n in range(8)], captions_of(8), group=2)
    source = open_source(data_of(tmp_path))
    assert isinstance(source, Parquet)
    size = len(encoded(picture(0)))
    monkeypatch.setattr("sfumato.data.tables.ROOM", 5 * size)
    for number in (0, 7, 2, 5, 1, 6, 3, 4):
        assert np.array_equal(np.asarray(source[number].image), np.asarray(picture(number)))
        assert len(source.kept) <= 2
    monkeypatch.setattr("sfumato.data.tables.ROOM", 1)
    assert source[0].image and len(source.kept) == 1


def test_parquet_mistakes(tmp_path: Path) -> None:
    file = parquet_file(tmp_path / "x.parquet", [struct(0), struct(1)], ["a", None])
    refused(tmp_path, "each of the 2 images", "1 without one", f"row 1 of {file}")
    refused(tmp_path, 'data.caption_column = "prompt"', "image, text", caption_column="prompt")
    refused(tmp_path, 'data.image_column = "photo"', "image, text", image_column="photo")
    parquet_file(file, [], pa.array([], pa.string()))
    refused(tmp_path, "without a row")
    parquet_file(file, [struct(0)], [3.5])
    refused(tmp_path, f"row 0 of {file}", "3.5")
    file.write_bytes(b"PAR1 not at all")
    refused(tmp_path, str(file), "cannot be read")


def test_parquet_cell_mistakes(tmp_path: Path) -> None:
    cells = [
        {"bytes": b"", "path": None},
        None,
        {"bytes": b"x", "path": None},
        {"bytes": None, "path": "no.png"},
    ]
    parquet_file(tmp_path / "x.parquet", cells, captions_of(4))
    source = open_source(data_of(tmp_path))
    for number in range(4):
        with pytest.raises(UserError, match=f"row {number} of"):
            source[number]


def test_parquet_column_of_another_type(tmp_path: Path) -> None:
    parquet_file(tmp_path / "x.parquet", [1, 2], captions_of(2), 3, pa.int64())
    with pytest.raises(UserError, match="row 0 of"):
        open_source(data_of(tmp_path))[0]


def test_fingerprint_of_parquet(tmp_path: Path) -> None:
    def fingerprint(captions: list[str], cells: int = 0) -> str:
        parquet_file(tmp_path / "x.parquet", [struct(cells)], captions)
        return open_source(data_of(tmp_path)).fingerprint

    assert fingerprint(["a"]) == fingerprint(["a"]) != fingerprint(["b"])
