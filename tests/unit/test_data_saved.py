"""Data sets of the package `datasets`: saved folders and the hub."""

import shutil
import sys
from pathlib import Path

import datasets
import pytest

from sfumato.data.sources import open_source
from sfumato.data.tables import Table
from tests.unit.pictures import captions_of, check_samples, data_of, encoded, picture, refused, struct


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


def test_saved_data_set_of_arrays(tmp_path: Path) -> None:
    """A format that was set before saving is not ours to read through."""
    made(3).with_format("numpy").save_to_disk(str(tmp_path))
    check_samples(open_source(data_of(tmp_path)), 3)


def test_fingerprint_of_a_saved_set_sees_the_pictures(tmp_path: Path) -> None:
    rows = {"image": [struct(0), {"bytes": encoded(picture(1, (30, 20))), "path": None}], "text": ["a", "b"]}
    for name, order in (("a", (0, 1)), ("b", (1, 0))):
        swapped = rows | {"image": [rows["image"][n] for n in order]}
        datasets.Dataset.from_dict(swapped).save_to_disk(str(tmp_path / name))
    one, other = (open_source(data_of(tmp_path / name)).fingerprint for name in "ab")
    assert one != other


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
