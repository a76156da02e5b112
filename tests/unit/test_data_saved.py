"""Data sets of the package `datasets`: saved folders and the hub."""

import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from sfumato.data.sources import Span, open_source
from sfumato.data.sources.saved import Saved
from sfumato.errors import UserError
from tests.unit.pictures import (
    all_of,
    captions_of,
    check_samples,
    data_of,
    encoded,
    faults_of,
    picture,
    refused,
    struct,
    text_folder,
)


def made(count: int) -> datasets.Dataset:
    """A data set with decoded pictures, as `datasets` users have it."""
    rows = {"image": [struct(n) for n in range(count)], "text": captions_of(count)}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_saved_data_set(tmp_path: Path) -> None:
    made(5).save_to_disk(str(tmp_path / "a"))
    source = open_source(data_of(tmp_path / "a"))
    assert isinstance(source, Saved)
    check_samples(source, 5)
    entry = list(source.entries())[2]
    assert (entry.name, entry.image.start) == ("row 2", 2)
    shutil.move(tmp_path / "a", tmp_path / "b")
    check_samples(open_source(data_of(tmp_path / "b", kind="datasets")), 5)


def test_saved_data_set_of_many_rows(tmp_path: Path) -> None:
    """More rows than are read at once, and in an order that was set before saving."""
    rows = {"image": [struct(n) for n in range(150)], "text": captions_of(150)}
    reverse = datasets.Dataset.from_dict({name: cells[::-1] for name, cells in rows.items()})
    reverse.select(range(149, -1, -1)).save_to_disk(str(tmp_path))
    check_samples(open_source(data_of(tmp_path)), 150)


def test_saved_data_set_of_arrays(tmp_path: Path) -> None:
    """A format that was set before saving is not ours to read through."""
    made(3).with_format("numpy").save_to_disk(str(tmp_path))
    check_samples(open_source(data_of(tmp_path)), 3)


def test_saved_hints_and_weights(tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "image": [struct(0), struct(1)],
        "hint": [struct(5), None],
        "text": [["a", "b"], ["c"]],
        "w": [[1.0, 2.0], [1.0]],
    }
    dataset = datasets.Dataset.from_dict(rows)
    dataset.cast_column("hint", datasets.Image()).save_to_disk(str(tmp_path))
    source = open_source(data_of(tmp_path, conditioning_column="hint", caption_weight_column="w"))
    first, second = source.entries()
    assert (first.captions, first.weights) == (("a", "b"), (1.0, 2.0))
    assert first.hint is not None and source.open(first.hint).read() == encoded(picture(5))
    assert second.fault == 'no image: "hint" holds neither bytes nor a path'


def test_stamp_of_a_saved_set(tmp_path: Path) -> None:
    made(2).save_to_disk(str(tmp_path / "a"))
    before = open_source(data_of(tmp_path / "a")).stamp()
    assert open_source(data_of(tmp_path / "a")).stamp() == before
    shutil.rmtree(tmp_path / "a")
    made(2).save_to_disk(str(tmp_path / "a"))
    assert open_source(data_of(tmp_path / "a")).stamp() != before


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
    with pytest.raises(UserError, match="has 2 rows"):
        open_source(data_of(tmp_path / "a")).open(Span("", 2, 0))
    next((tmp_path / "a").glob("*.arrow")).unlink()
    refused(tmp_path / "a", "cannot be read")
    empty = datasets.Dataset.from_dict({"image": [], "text": []})
    empty.save_to_disk(str(tmp_path / "b"))
    refused(tmp_path / "b", str(tmp_path / "b"))
    rows = {"image": [struct(0), struct(1)], "text": ["a", None]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "c"))
    assert "no caption" in faults_of(all_of(tmp_path / "c"))["row 1"]
    text_folder(tmp_path / "d", 1)
    refused(tmp_path / "d", "no data set", kind="datasets")


def test_paths_of_a_saved_set_stay_inside(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "secret.png")
    rows = {"image": ["../secret.png", str(tmp_path / "secret.png")], "text": ["a", "b"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    entries = all_of(tmp_path / "set")
    assert all("leaves the data folder" in fault for fault in faults_of(entries).values())
    source = open_source(data_of(tmp_path / "set"))
    for entry in entries:
        with pytest.raises(UserError, match="leaves the data folder"):
            source.open(entry.image)


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for kind in ("auto", "hub"):
        refused("someone/no-such-set", "someone/no-such-set", "no such folder", "from the hub", kind=kind)


def test_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a folder as it reads the hub: the cells hold paths, there of its caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    place = tmp_path / "cache" / "downloads"
    text_folder(place, 3)
    for text in place.glob("*.txt"):
        text.unlink()  # `datasets` would take the folder for one of texts
    lines = "".join(f'{{"file_name": "00{n}.png", "text": "picture {n}"}}\n' for n in range(3))
    (place / "metadata.jsonl").write_text(lines)
    source = data_of(place, kind="hub")
    assert len(faults_of(list(open_source(source).entries()))) == 3, "not in a cache"
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")
    check_samples(open_source(source), 3)


def test_code_of_the_hub_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of `datasets` would ask, and run it."""
    asked: dict[str, Any] = {}

    def load(path: str, trust_remote_code: bool | None = None) -> datasets.Dataset:
        asked.update(path=path, trust=trust_remote_code)
        return made(1)

    monkeypatch.setattr(datasets, "load_dataset", load)
    open_source(data_of("someone/fill50k", kind="hub"))
    assert asked == {"path": "someone/fill50k", "trust": False}


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(1).save_to_disk(str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(tmp_path, "pip install 'sfumato[hub]'")
