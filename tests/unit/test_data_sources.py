"""Which kind of source lies where, and what holds for all of them."""

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from sfumato.data.sources import CLASSES, Source, digest, file_stamp, open_source
from sfumato.data.sources.files import IMAGES
from tests.unit.pictures import (
    all_of,
    captions_of,
    check_samples,
    data_of,
    encoded,
    parquet_file,
    picture,
    refused,
    struct,
    text_folder,
    write_list,
)
from tests.unit.test_data_tars import triplets, write_tar


def folder(place: Path) -> Path:
    return text_folder(place, 3)


def listed(place: Path) -> Path:
    for number in range(3):
        (place / "images").mkdir(parents=True, exist_ok=True)
        picture(number).save(place / "images" / f"{number}.png")
    write_list(place, [{"file_name": f"images/{n}.png", "text": f"picture {n}"} for n in range(3)])
    return place


def nested_list(place: Path) -> Path:
    listed(place / "train")
    return place


def list_file(place: Path) -> Path:
    return (listed(place) / "metadata.jsonl").rename(place / "anything.jsonl")


def tars(place: Path) -> Path:
    write_tar(place / "0.tar", triplets(0, 2))
    write_tar(place / "1.tar", triplets(2, 3))
    return place


def parquet(place: Path) -> Path:
    parquet_file(place / "data" / "train-0.parquet", [struct(n) for n in range(3)], captions_of(3))
    return place


def saved(place: Path) -> Path:
    rows = {"image": [struct(n) for n in range(3)], "text": captions_of(3)}
    datasets.Dataset.from_dict(rows).save_to_disk(str(place))
    return place


LAYOUTS = [
    (folder, "", "Folder"),
    (listed, "", "Lists"),
    (nested_list, "", "Lists"),
    (list_file, "", "Lists"),
    (tars, "", "Tars"),
    (tars, "{0..1}.tar", "Tars"),
    (tars, "*.tar", "Tars"),
    (parquet, "", "Parquet"),
    (parquet, "data/train-0.parquet", "Parquet"),
    (saved, "", "Saved"),
]


@pytest.mark.parametrize(("make", "below", "kind"), LAYOUTS, ids=[f"{m.__name__}-{b}" for m, b, _ in LAYOUTS])
def test_the_same_records_in_every_layout(tmp_path: Path, make: Any, below: str, kind: str) -> None:
    """Found out, or said: one opens the same source, and it tells the same captions and image bytes."""
    place = make(tmp_path / "set") / below
    source = open_source(data_of(place))
    assert type(source).__name__ == kind
    check_samples(source, 3)
    for entry in source.entries():
        with source.open(entry.image) as file:
            assert file.readable() and file.seekable()
            whole = file.read()
            file.seek(1)
            assert file.tell() == 1 and file.read() == whole[1:]
    said = next(name for name, path in CLASSES.items() if path.endswith(kind))
    assert type(open_source(data_of(place, kind=said))) is type(source)


def test_the_order_is_no_folders_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine lists the same folder in another order."""
    plain = os.scandir

    class Reverse:
        def __init__(self, path: Any) -> None:
            with plain(path) as found:
                self.entries = sorted(found, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Any:
            return iter(self.entries)

        def __exit__(self, *told: object) -> None:
            pass

    sources: list[Source] = []
    for make, below, _ in LAYOUTS:
        place = make(tmp_path / f"{make.__name__}{len(sources)}") / below
        if "*" not in below:  # glob lists for itself; its answer is sorted
            sources.append(open_source(data_of(place)))
    before = [(source.stamp(), list(source.entries())) for source in sources]
    monkeypatch.setattr(os, "scandir", Reverse)
    again = [open_source(source.layout) for source in sources]
    assert [(source.stamp(), list(source.entries())) for source in again] == before


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_every_format_by_its_suffix(tmp_path: Path, kind: str) -> None:
    """In small letters and large ones."""
    if kind not in Image.registered_extensions():
        pytest.skip(f"this Pillow reads no {kind}")
    data = encoded(picture(0), Image.registered_extensions()[kind])
    for number, name in enumerate((f"a{kind}", f"b{kind.upper()}")):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {number}")
    source = open_source(data_of(tmp_path))
    entries = list(source.entries())
    assert [entry.captions for entry in entries] == [("caption 0",), ("caption 1",)]
    for entry in entries:
        with source.open(entry.image) as file:
            assert file.read() == data


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", gzip.compress(b"x", mtime=0), encoded(picture(0))[:-500]]
)
def test_a_source_does_not_judge_pixels(tmp_path: Path, data: bytes) -> None:
    """What an image's bytes are worth is found out by the index."""
    text_folder(tmp_path, 1)
    (tmp_path / "000.png").write_bytes(data)
    source = open_source(data_of(tmp_path))
    (entry,) = source.entries()
    with source.open(entry.image) as file:
        assert not entry.fault and file.read() == data


def test_what_is_no_source(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such folder")
    refused("no such/folder here", "no such folder or file", str(Path.cwd()))
    refused(tmp_path / "x.parquet", "no such folder or file")
    (tmp_path / "x.bin").write_bytes(b"x")
    refused(tmp_path / "x.bin", "it is a file")
    refused(tmp_path, "1 files, none of them an image, a parquet file or a tar")
    picture(0).save(tmp_path / "x.png")
    refused(tmp_path / "x.png", "it is a file", "folder")


@pytest.mark.parametrize("kind", ["tar", "parquet", "datasets", "hub"])
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, kind: str) -> None:
    refused(tmp_path, "data.folder_repeats", kind, kind=kind, folder_repeats=True)
    if kind != "tar":
        refused(tmp_path, "data.caption_file", kind, kind=kind, caption_file="json")


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for make, below, _ in LAYOUTS:
        place = make(tmp_path / make.__name__) / below
        assert len(all_of(f"~/{place.relative_to(tmp_path)}")) == 3


def test_stamp_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    one = file_stamp((tmp_path / "x").stat())
    assert one == file_stamp((tmp_path / "x").stat())
    (tmp_path / "x").write_bytes(b"xx")
    assert one != file_stamp((tmp_path / "x").stat())
    assert digest(["a", "b"]) != digest(["ab"]) != digest([])


def test_a_folder_needs_no_table_packages(tmp_path: Path) -> None:
    """`datasets` and pyarrow take seconds to import; torch stays out of a check of the data."""
    place = text_folder(tmp_path, 1)
    code = (
        "import sys; from sfumato.config import Data; from sfumato.data.sources import open_source;"
        f"print(len(list(open_source(Data(source={str(place)!r})).entries())));"
        "print([name for name in ('torch', 'datasets', 'pyarrow', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["1", "[]"]
