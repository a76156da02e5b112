"""Every layout of a data set, read from real files, and every mistake that a user can make in one."""

import gzip
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sfumato.data.folder import Folder
from sfumato.data.sources import Source, files_under, open_source
from sfumato.data.tables import Parquet, Table
from sfumato.errors import UserError
from tests.unit.pictures import data_of, encoded, parquet_file, picture, text_folder, write_list


def check_samples(source: Source, count: int, captions: list[list[str]] | None = None) -> None:
    """All pictures come out bit-equal, at their places, with their captions, also after pickling."""
    captions = captions or [[f"picture {number}"] for number in range(count)]
    for each in (source, pickle.loads(pickle.dumps(source))):
        assert len(each) == count
        for number in (*range(count), 0):
            record = each[number]
            assert np.array_equal(np.asarray(record.image), np.asarray(picture(number))), f"picture {number}"
            assert record.captions == each.captions(number) == captions[number]
            assert record.name == each.name(number)
        assert len({each.name(number) for number in range(count)}) == count
    with pytest.raises(IndexError):
        source[count]
    with pytest.raises(IndexError):
        source[-1]


def refused(place: Path | str, *words: str, **settings: Any) -> UserError:
    """The UserError of opening a source, which must hold these words."""
    with pytest.raises(UserError) as caught:
        open_source(data_of(place, **settings))
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return caught.value


# Folders


def test_text_folder(tmp_path: Path) -> None:
    source = open_source(data_of(text_folder(tmp_path, 4)))
    assert isinstance(source, Folder)
    check_samples(source, 4)
    assert source.name(2) == str(tmp_path / "002.png")


def test_text_file_with_windows_marks(tmp_path: Path) -> None:
    text_folder(tmp_path, 1)
    (tmp_path / "000.txt").write_bytes(b"\xef\xbb\xbfein Kn\xc3\xa4uel\r\n")
    assert open_source(data_of(tmp_path)).captions(0) == ["ein Knäuel"]


def test_metadata_list(tmp_path: Path) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [{"file_name": "2.png", "text": ["picture 2", "two"]}, {"file_name": "0.png", "text": "zero"}]
    write_list(tmp_path, [*rows, {"file_name": "./1.png", "text": "one", "more": 3}])
    check_samples(open_source(data_of(tmp_path)), 3, [["zero"], ["one"], ["picture 2", "two"]])


def test_metadata_list_of_a_nested_folder_and_another_key(tmp_path: Path) -> None:
    text_folder(tmp_path / "a", 1)
    (tmp_path / "b" / "c").mkdir(parents=True)
    picture(1).save(tmp_path / "b" / "c" / "x.PNG")
    write_list(tmp_path / "b", [{"file_name": "c/x.PNG", "prompt": "picture 1"}])
    source = open_source(data_of(tmp_path, caption_column="prompt"))
    check_samples(source, 2)
    assert [source.name(number) for number in (0, 1)] == [
        str(tmp_path / "a" / "000.png"),
        str(tmp_path / "b" / "c" / "x.PNG"),
    ]


def test_list_stands_before_text_and_lines_add_up(tmp_path: Path) -> None:
    text_folder(tmp_path, 2)
    write_list(tmp_path, [{"file_name": "000.png", "text": "a"}, {"file_name": "000.png", "text": "b"}])
    check_samples(open_source(data_of(tmp_path)), 2, [["a", "b"], ["picture 1"]])


def test_hidden_files_and_links(tmp_path: Path) -> None:
    """Hidden folders hold copies (.ipynb_checkpoints); a linked folder counts once, even one above."""
    place = text_folder(tmp_path / "set", 2)
    shutil.copytree(place, place / ".ipynb_checkpoints")
    (place / "._000.png").write_bytes(b"resource fork")
    text_folder(tmp_path / "elsewhere", 3)
    (place / "link").symlink_to(tmp_path / "elsewhere")
    (place / "loop").symlink_to(place)
    assert [file for file in files_under(place) if file.endswith(".png")] == [
        "000.png",
        "001.png",
        "link/000.png",
        "link/001.png",
        "link/002.png",
    ]


def test_empty_caption_is_a_caption(tmp_path: Path) -> None:
    text_folder(tmp_path, 2)
    (tmp_path / "001.txt").write_text("")
    assert open_source(data_of(tmp_path)).captions(1) == [""]


def test_folder_mistakes(tmp_path: Path) -> None:
    refused(tmp_path / "not" / "there", "no such folder", str(Path.cwd()))
    refused(tmp_path, "an empty folder")
    (tmp_path / "notes.md").write_text("x")
    refused(tmp_path, "1 files, none of them an image")
    refused(tmp_path / "notes.md", "it is a file")


def test_missing_captions(tmp_path: Path) -> None:
    text_folder(tmp_path, 5)
    (tmp_path / "001.txt").unlink()
    (tmp_path / "003.txt").unlink()
    refused(tmp_path, "each of the 5 images", "2 without one", "001.png", "metadata.jsonl")


def test_caption_that_is_not_utf8(tmp_path: Path) -> None:
    text_folder(tmp_path, 1)
    (tmp_path / "000.txt").write_bytes("Knäuel".encode("latin-1"))
    refused(tmp_path, "000.txt", "not UTF-8")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "000.png"', ["line 2", "not JSON"]),
        ('["000.png", "x"]', ["line 2", "it is ['000.png', 'x']"]),
        ('{"file_name": "000.png", "caption": "x"}', ["line 2", '"text"', "file_name, caption"]),
        ('{"image": "000.png", "text": "x"}', ["line 2", '"file_name"', "image, text"]),
        ('{"file_name": "7.png", "text": "x"}', ["line 2", '"7.png"', "no such file"]),
        ('{"file_name": "000.png", "text": 7}', ["line 2", '"text" holds 7']),
        ('{"file_name": "000.png", "text": ["x", null]}', ["line 2", '"text" holds']),
    ],
)
def test_faulty_lines(tmp_path: Path, line: str, words: list[str]) -> None:
    text_folder(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text("\n" + line + "\n")
    refused(tmp_path, *words)


def test_fingerprint_of_a_folder(tmp_path: Path) -> None:
    """The same in another place; another for another name, size or caption."""

    def fingerprint() -> str:
        return open_source(data_of(tmp_path / "a")).fingerprint

    text_folder(tmp_path / "a", 3)
    first = fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert open_source(data_of(tmp_path / "b")).fingerprint == first
    seen = {first}
    (tmp_path / "a" / "001.txt").write_text("another")
    seen.add(fingerprint())
    (tmp_path / "a" / "002.png").rename(tmp_path / "a" / "009.png")
    (tmp_path / "a" / "002.txt").rename(tmp_path / "a" / "009.txt")
    seen.add(fingerprint())
    picture(1, (80, 80)).save(tmp_path / "a" / "001.png")
    seen.add(fingerprint())
    assert len(seen) == 4


# Pictures


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


# Parquet


def struct(number: int) -> dict[str, Any]:
    """A cell as `datasets` writes it."""
    return {"bytes": encoded(picture(number)), "path": None}


def captions_of(count: int) -> list[str]:
    return [f"picture {number}" for number in range(count)]


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


# `datasets`


def made(count: int) -> datasets.Dataset:
    """A data set with decoded pictures, as `datasets` users have it."""
    rows = {"image": [struct(n) for n in range(count)], "text": captions_of(count)}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_saved_data_set(tmp_path: Path) -> None:
    made(5).save_to_disk(str(tmp_path / "a"))
    source = open_source(data_of(tmp_path / "a"))
    assert isinstance(source, Table)
    check_samples(source, 5)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert open_source(data_of(tmp_path / "b")).fingerprint == source.fingerprint


def test_saved_splits(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": made(2), "test": made(1)}).save_to_disk(str(tmp_path / "a"))
    check_samples(open_source(data_of(tmp_path / "a")), 2)
    datasets.DatasetDict({"all": made(3)}).save_to_disk(str(tmp_path / "b"))
    check_samples(open_source(data_of(tmp_path / "b")), 3)
    datasets.DatasetDict({"x": made(1), "y": made(1)}).save_to_disk(str(tmp_path / "c"))
    refused(tmp_path / "c", "the splits x, y")


def test_saved_mistakes(tmp_path: Path) -> None:
    made(2).save_to_disk(str(tmp_path / "a"))
    refused(tmp_path / "a", "image, text", caption_column="prompt")
    next((tmp_path / "a").glob("*.arrow")).unlink()
    refused(tmp_path / "a", "cannot be read")
    empty = datasets.Dataset.from_dict({"image": [], "text": []})
    empty.save_to_disk(str(tmp_path / "b"))
    refused(tmp_path / "b", str(tmp_path / "b"))
    rows = {"image": [struct(0), struct(1)], "text": ["a", None]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "c"))
    refused(tmp_path / "c", "1 without one", "row 1 of")


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused("someone/no-such-set", "someone/no-such-set", "no such folder", "from the hub")


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(1).save_to_disk(str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(tmp_path, "pip install 'sfumato[hub]'")


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
