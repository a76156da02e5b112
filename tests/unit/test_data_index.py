"""The index: what it holds, when it is made again, and that it neither forgets nor mixes up a record."""

import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfumato.config import Data
from sfumato.data import index
from sfumato.data.index import Fault, Index, PartFacts, Record, draft, open_index, scan
from sfumato.data.index.draft import line, unline
from sfumato.data.sources import Entry, Source, Span, open_source
from sfumato.errors import UserError
from tests.unit.toy_source import AtOnce, Toy, data_of, encoded, fill, indexed, names, opens, tell, toy


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "open_source", toy)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of eight pictures."""
    return fill(tmp_path / "photos", 8)


def test_it_holds_every_record(place: Path) -> None:
    tell(place, "003", captions=["one", "two"], weights=[1, 2.5])
    (place / "003.hint").write_bytes(encoded((3, 3)))
    made = indexed(place)
    assert len(made) == 8
    assert made.sizes.tolist() == [[10 + number, 20] for number in range(8)]
    assert made.sizes.dtype == np.uint32 and isinstance(made.sizes, np.memmap)
    assert made.part.dtype == np.uint16 and not made.part.any()
    assert made.digests is None
    assert made.record(3) == Record(
        "003.img", Span("003.img"), ["one", "two"], [1.0, 2.5], Span("003.hint"), (13, 20), 0
    )
    assert made.record(0) == Record("000.img", Span("000.img"), ["caption of 000.img"], [], None, (10, 20), 0)
    assert made.parts == [PartFacts(str(place), Fraction(1), 8)]
    assert made.faults == []
    assert names(made) == [f"{number:03}.img" for number in range(8)]
    assert "8 records" in made.where() and str(made.folder) in made.where()
    made.check_faults(data_of(place))


def test_it_opens_the_right_files(place: Path) -> None:
    hint = encoded((3, 3))
    (place / "005.hint").write_bytes(hint)
    made = indexed(place)
    for number in range(8):
        with made.open(number) as file:
            assert file.read() == (place / f"{number:03}.img").read_bytes()
    with made.open_hint(5) as file:
        assert file.read() == hint
    with pytest.raises(AssertionError, match=r"004\.img has no conditioning image"):
        made.open_hint(4)


def test_numbers_out_of_range(place: Path) -> None:
    made = indexed(place)
    for number in (-1, 8):
        with pytest.raises(IndexError):
            made.record(number)


def test_it_is_cheap_to_pickle(place: Path) -> None:
    made = indexed(place, digests=True)
    sent = pickle.dumps(made)
    assert len(sent) < 4000
    again = pickle.loads(sent)
    assert again.record(7) == made.record(7) and again.fingerprint == made.fingerprint
    assert again.parts == made.parts and np.array_equal(again.digests, made.digests)
    with again.open(2) as file:
        assert file.read() == (place / "002.img").read_bytes()
    shutil.rmtree(made.folder)
    with pytest.raises(UserError, match="start again"):
        pickle.loads(sent)


def test_digests(place: Path) -> None:
    (place / "002.hint").write_bytes(encoded((3, 3)))
    made = indexed(place, digests=True)
    assert made.digests is not None and made.digests.shape == (8, 16) and made.digests.dtype == np.uint8
    for number in range(8):
        data = (place / f"{number:03}.img").read_bytes() + (
            (place / "002.hint").read_bytes() if number == 2 else b""
        )
        assert made.digests[number].tobytes() == hashlib.blake2b(data, digest_size=16).digest()


def test_a_file_larger_than_a_block_is_hashed_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BLOCK", 7)
    made = indexed(place, digests=True)
    data = (place / "001.img").read_bytes()
    assert made.digests is not None
    assert made.digests[1].tobytes() == hashlib.blake2b(data, digest_size=16).digest()


def test_order_is_kept_whatever_each_open_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = fill(tmp_path / "photos", 700)  # more than are held at once

    def open_late(self: Toy, span: Span) -> BinaryIO:
        time.sleep(random.random() * 0.002)
        return (self.place / span.file).open("rb")

    monkeypatch.setattr(Toy, "open", open_late)
    made = indexed(place)
    assert names(made) == [f"{number:03}.img" for number in range(700)]
    assert made.sizes[:, 0].tolist() == list(range(10, 710))


# Faults


def test_faults_are_named_and_others_stay_in_order(place: Path) -> None:
    (place / "001.img").write_bytes(b"")
    (place / "002.img").write_bytes(encoded((9, 9))[:30])
    tell(place, "003", fault="its caption is not UTF-8")
    tell(place, "004", captions=[])
    (place / "005.hint").write_bytes(b"hello")
    made = indexed(place)
    assert names(made) == ["000.img", "006.img", "007.img"]
    assert made.sizes.tolist() == [[10, 20], [16, 20], [17, 20]]
    assert made.faults == [
        Fault("001.img", "the file is empty", 0),
        Fault("002.img", "its PNG header is damaged or cut off", 0),
        Fault("003.img", "its caption is not UTF-8", 0),
        Fault("004.img", "it has no caption", 0),
        Fault(
            "005.img",
            "the conditioning image: not a picture of a format that is read: it begins with b'hello'",
            0,
        ),
    ]
    assert "3 records, 5 set aside" in made.where()


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1.0], "2 captions, but 1 weights"),
        ([1.0, 0.0], "weight is 0.0"),
        ([1.0, -2.0], "weight is -2.0"),
        ([math.nan, 1.0], "weight is nan"),
        ([math.inf, 1.0], "weight is inf"),
    ],
)
def test_weights_that_mean_nothing(place: Path, weights: list[float], reason: str) -> None:
    tell(place, "003", captions=["a", "b"], weights=weights)
    made = indexed(place)
    assert [fault.name for fault in made.faults] == ["003.img"] and reason in made.faults[0].reason
    assert "003.img" not in opens(place)


def test_too_many_pixels(place: Path) -> None:
    made = indexed(place, max_pixels=15 * 20)
    assert [fault.name for fault in made.faults] == ["006.img", "007.img"]
    assert made.faults[0].reason == "it has 320 pixels, data.max_pixels allows 300"
    assert len(indexed(place)) == 8
    assert len(indexed(place, verify=False, max_pixels=15 * 20)) == 6


def test_faults_up_to_the_share_that_is_allowed(place: Path) -> None:
    for number in range(4):
        (place / f"00{number}.img").write_bytes(b"")
    made = indexed(place)
    made.check_faults(data_of(place, max_faults=0.5))
    with pytest.raises(UserError) as caught:
        made.check_faults(data_of(place, max_faults=0.49))
    for words in (
        "at most 49.00% of 8 records",
        "4 (50.00%): 000.img: the file is empty; 001.img: ",
        "002.img: the file is empty; ...",
        str(made.folder / "faults.jsonl"),
    ):
        assert words in str(caught.value)
    assert "003.img" not in str(caught.value)


def test_a_defect_of_a_source_is_not_the_user_s_fault(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Toy, span: Span) -> BinaryIO:
        raise AttributeError("a typing error")

    monkeypatch.setattr(Toy, "open", broken)
    with pytest.raises(AttributeError, match="a typing error"):
        indexed(place)


class Denied(Toy):
    """Files that the system does not give while .deny is there; the stamps do not change by that."""

    def open(self, span: Span) -> BinaryIO:
        file = super().open(span)
        if span.file in ("002.img", "004.img") and (self.place / ".deny").exists():
            file.close()
            raise PermissionError(13, "Permission denied", str(self.place / span.file))
        return file


@pytest.mark.parametrize("tried", [3, 0])
def test_what_could_not_be_read_is_tried_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, tried: int
) -> None:
    """A file server's bad minute must not cost records for ever; trying nothing again is caught."""
    monkeypatch.setattr(index, "open_source", Denied)
    monkeypatch.setattr(index, "TRIED", tried)
    (place / ".deny").touch()
    made = indexed(place)
    reasons = [(fault.name, fault.reason) for fault in made.faults]
    assert reasons == [(name, "it cannot be read: Permission denied") for name in ("002.img", "004.img")]
    opens(place)
    assert len(indexed(place)) == 6
    assert len(opens(place)) <= tried, "all is read again while nothing changed"
    (place / ".deny").unlink()
    again = indexed(place)
    if tried:
        assert names(again) == [f"{number:03}.img" for number in range(8)]
        assert set(opens(place)) == {"002.img", "004.img"}
    else:
        assert len(again) == 6


# Made again when the sources change, and only what is new


def test_nothing_is_opened_twice(place: Path) -> None:
    first = indexed(place)
    assert sorted(opens(place)) == names(first)
    assert indexed(place).folder == first.folder
    assert not opens(place)


@pytest.mark.parametrize("digests", [False, True])
def test_one_changed_picture_of_fifty(tmp_path: Path, digests: bool) -> None:
    place = fill(tmp_path / "photos", 50)
    before = indexed(place, digests)
    opens(place)
    (place / "031.img").write_bytes(encoded((77, 66)))
    after = indexed(place, digests)
    assert opens(place) == ["031.img"]
    expected = [[10 + number, 20] for number in range(50)]
    expected[31] = [77, 66]
    assert after.sizes.tolist() == expected and names(after) == names(before)
    assert after.fingerprint != before.fingerprint
    if digests:
        assert before.digests is not None and after.digests is not None
        same = (before.digests == after.digests).all(1)
        assert same.sum() == 49 and not same[31]


def test_one_changed_caption(place: Path) -> None:
    before = indexed(place)
    opens(place)
    tell(place, "004", captions=["another"])
    after = indexed(place)
    assert not opens(place)
    assert after.record(4).captions == ["another"] and after.fingerprint != before.fingerprint
    assert after.sizes.tolist() == before.sizes.tolist()


def test_a_changed_or_new_hint(place: Path) -> None:
    (place / "004.hint").write_bytes(encoded((3, 3)))
    indexed(place)
    opens(place)
    (place / "004.hint").write_bytes(b"")
    (place / "005.hint").write_bytes(encoded((3, 3)))
    after = indexed(place)
    assert set(opens(place)) == {"004.img", "004.hint", "005.img", "005.hint"}
    assert [fault.name for fault in after.faults] == ["004.img"]


def test_records_that_come_go_and_move(place: Path) -> None:
    indexed(place)
    opens(place)
    (place / "002.img").unlink()
    (place / "aaa.img").write_bytes(encoded((5, 5)))
    (place / "001.img").rename(place / "zzz.img")
    after = indexed(place)
    assert names(after) == ["000.img", *(f"{number:03}.img" for number in range(3, 8)), "aaa.img", "zzz.img"]
    assert after.sizes[:, 0].tolist() == [10, 13, 14, 15, 16, 17, 5, 11]
    assert set(opens(place)) == {"aaa.img", "zzz.img"}


def test_a_mended_picture(place: Path) -> None:
    whole = (place / "002.img").read_bytes()
    (place / "002.img").write_bytes(whole[:20])
    assert len(indexed(place)) == 7
    opens(place)
    (place / "002.img").write_bytes(whole)
    assert len(indexed(place)) == 8
    assert opens(place) == ["002.img"]


def replaced(place: Path) -> None:
    """Put another picture in a file, of the same number of bytes, and set the time back."""
    path = place / "003.img"
    path.write_bytes(encoded((30, 8), "BMP"))
    indexed(place)
    before = path.stat()
    time.sleep(0.02)  # more than the clock's tick of any file system here
    path.write_bytes(encoded((20, 12), "BMP"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert indexed(place).record(3).size == (20, 12), "the replaced picture was not seen"


def test_a_replaced_picture_of_the_same_size_and_time(place: Path) -> None:
    replaced(place)


def test_a_stamp_without_the_change_time_is_caught(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(self: Toy, path: Path) -> str:
        return f"{path.stat().st_size}:{path.stat().st_mtime_ns}"

    monkeypatch.setattr(Toy, "stamps", weak)
    with pytest.raises(AssertionError, match="was not seen"):
        replaced(place)


def test_a_key_without_the_stamp_is_caught(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(layout: int, entry: Entry) -> bytes:
        return hashlib.blake2b(entry.name.encode(), digest_size=16).digest()

    monkeypatch.setattr(scan, "key_of", weak)
    with pytest.raises(AssertionError, match="was not seen"):
        replaced(place)


def test_records_without_a_stamp_are_always_opened(place: Path) -> None:
    for number in range(8):
        tell(place, f"{number:03}", stamp="")
    indexed(place)
    opens(place)
    (place / "new.txt").touch()
    indexed(place)
    assert len(opens(place)) == 8


def test_another_span_in_an_unchanged_container() -> None:
    entry = Entry("a", Span("a.tar", 0, 5), stamp="1")
    others = [
        Entry("a", Span("a.tar", 512, 5), stamp="1"),
        Entry("b", Span("a.tar", 0, 5), stamp="1"),
        Entry("a", Span("a.tar", 0, 5), stamp="2"),
        Entry("a", Span("a.tar", 0, 5), stamp="1", hint=Span("b")),
    ]
    keys = {scan.key_of(0, each) for each in (entry, *others)} | {scan.key_of(1, entry)}
    assert len(keys) == 6 and scan.key_of(0, entry) == scan.key_of(0, entry)


def test_keys_that_begin_alike_are_not_mixed_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scan.key_of
    monkeypatch.setattr(scan, "key_of", lambda *told: bytes(8) + whole(*told)[8:])
    indexed(place)
    tell(place, "000", captions=["another"])
    assert indexed(place).sizes[:, 0].tolist() == list(range(10, 18))


def test_another_pillow_looks_at_the_faults_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "002.img").write_bytes(b"of a format to come")
    indexed(place)
    opens(place)
    monkeypatch.setattr("PIL.__version__", "99.0")
    indexed(place)
    assert opens(place) == ["002.img"]


# On the disk


def folders(made: Index) -> list[str]:
    return sorted(path.name for path in made.folder.parent.iterdir() if path.name != ".lock")


def test_at_most_two_are_kept(place: Path) -> None:
    made = []
    for number in range(4):
        tell(place, "000", captions=[f"state {number}"])
        made.append(indexed(place))
    assert folders(made[-1]) == sorted(each.folder.name for each in made[-2:])
    assert made[0].record(0).captions == ["state 0"], "an index that is open stays readable"


def test_the_newest_is_taken_unseen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = indexed(place)
    tell(place, "000", captions=["another"])
    monkeypatch.setattr(Toy, "stamp", lambda self: pytest.fail("the source was looked at"))
    assert indexed(place, verify=False).folder == first.folder
    monkeypatch.undo()
    monkeypatch.setattr(index, "open_source", Toy)
    second = indexed(place)
    assert indexed(place, verify=False).folder == second.folder != first.folder


def test_without_one_it_is_made_unasked(place: Path) -> None:
    assert len(indexed(place, verify=False)) == 8


def test_an_older_state_that_is_back_is_the_newest(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = ["a"]
    monkeypatch.setattr(Toy, "stamp", lambda self: state[0])
    first = indexed(place)
    state[0] = "b"
    second = indexed(place)
    os.utime(second.folder / "index.json", (2e9, 2e9))  # made on a machine whose clock is ahead
    assert indexed(place, verify=False).folder == second.folder
    state[0] = "a"
    assert indexed(place).folder == first.folder
    assert indexed(place, verify=False).folder == first.folder
    state[0] = "c"
    third = indexed(place)
    assert indexed(place, verify=False).folder == third.folder


def test_what_is_asked_for_has_a_place_of_its_own(place: Path) -> None:
    plain, hashed = indexed(place), indexed(place, digests=True)
    assert plain.folder.parent != hashed.folder.parent
    assert plain.fingerprint == hashed.fingerprint
    assert indexed(place, verify=False).digests is None
    assert indexed(place, digests=True, verify=False).digests is not None


def test_two_folders_of_the_same_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("one", 3), ("two", 5)):
        fill(tmp_path / name / "photos", count)
        monkeypatch.chdir(tmp_path / name)
        made = open_index(Data(source="photos", store=tmp_path / "store"))
        assert (
            len(made)
            == len(open_index(Data(source="photos", store=tmp_path / "store"), verify=False))
            == count
        )
    for source in ("s3://bucket/{00..11}.tar", "someone/somewhere"):
        assert index.located(source) == source
    assert index.located("photos/{000..123}.tar") == str(tmp_path / "two" / "photos/{000..123}.tar")
    assert index.located("{000..123}.tar") == str(tmp_path / "two" / "{000..123}.tar")


DAMAGES = {
    "cut sizes": lambda folder: cut(folder / "sizes.npy"),
    "cut records": lambda folder: cut(folder / "records.jsonl"),
    "no offsets": lambda folder: (folder / "offsets.npy").unlink(),
    "no facts": lambda folder: (folder / "index.json").unlink(),
    "garbled facts": lambda folder: (folder / "index.json").write_text("{"),
    "another format": lambda folder: (folder / "index.json").write_text('{"format": 0}'),
    "a pickle": lambda folder: np.save(folder / "part.npy", np.array([{}] * 8), allow_pickle=True),
    "cut keys and sizes": lambda folder: (cut(folder / "keys.npy"), cut(folder / "sizes.npy")),
}


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_one_is_made_again(place: Path, damage: str, verify: bool) -> None:
    whole = indexed(place, digests=True)
    DAMAGES[damage](whole.folder)
    again = indexed(place, digests=True, verify=verify)
    assert again.fingerprint == whole.fingerprint and again.sizes.tolist() == [[10 + n, 20] for n in range(8)]
    assert folders(again) == [again.folder.name]


def test_digests_that_are_gone_are_not_taken_as_known(place: Path) -> None:
    whole = indexed(place, digests=True)
    (whole.folder / "digests.npy").unlink()
    again = indexed(place, digests=True)
    assert again.digests is not None and np.array_equal(again.digests, whole.digests)


def test_plain_numpy_reads_the_columns(place: Path) -> None:
    folder = indexed(place, digests=True).folder
    shapes = {path.stem: np.load(path, allow_pickle=False).shape for path in folder.glob("*.npy")}
    assert shapes == {"sizes": (8, 2), "part": (8,), "offsets": (9,), "keys": (8, 2), "digests": (8, 16)}
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[2]) == ["002.img", "002.img", ["caption of 002.img"], [], None]


def test_a_store_that_cannot_be_written(place: Path) -> None:
    store = place.parent / "store"
    store.write_text("a file in its place")
    with pytest.raises(UserError, match=r"data\.store"):
        indexed(place)


# Text of all kinds


HOSTILE = [
    "two\nlines\r\nand more\u2028\u2029\x85",
    "a lone \ud800 surrogate \udfff",
    "\ud83d\ude00",  # two lone ones, which are not the smiley that they would make in UTF-16
    "NUL \x00 and \x1b[31m",
    '"], [null',
    "\\u0041\\",
    "",
    "\U0001f600 한국어",
    "\ufeffmark",
    "x" * 2**20,
]


def test_hostile_captions_come_back_as_they_were(place: Path) -> None:
    for number, text in enumerate(HOSTILE[:8]):
        tell(place, f"{number:03}", captions=[text, "second"])
    tell(place, "000", captions=HOSTILE)
    made = indexed(place)
    assert made.record(0).captions == HOSTILE
    for number, text in enumerate(HOSTILE[1:8], 1):
        assert made.record(number).captions == [text, "second"]
    assert (made.folder / "records.jsonl").read_bytes().count(b"\n") == 8


TEXT = st.text(st.characters(codec=None, exclude_categories=()))


@given(st.lists(TEXT))
def test_any_text_stands_in_one_line(texts: list[str]) -> None:
    told = line([*texts])
    assert told.count(b"\n") == 1 and unline(told) == texts


def test_file_names_of_all_kinds(tmp_path: Path) -> None:
    place = tmp_path / "photos"
    place.mkdir()
    odd = ["a b", "\u00fc", "u\u0308", "日本", "🙂", "q'\"[]", "line\nbreak", os.fsdecode(b"\xff\xfe")]
    for number, name in enumerate(odd):
        (place / f"{name}.img").write_bytes(encoded((10 + number, 3)))
    made = indexed(place, digests=True)
    assert sorted(names(made)) == sorted(f"{name}.img" for name in odd)
    for number in range(len(odd)):
        assert made.record(number).size[0] == 10 + odd.index(made.name(number).removesuffix(".img"))
        made.open(number).close()
    opens(place)
    (place / "new.img").write_bytes(encoded((3, 3)))
    indexed(place, digests=True)
    assert opens(place) == ["new.img"]


# Fingerprints


def moved(place: Path, name: str = "elsewhere") -> Path:
    """A copy of a folder, with other times."""
    other = place.parent / name / "photos"
    shutil.copytree(place, other, ignore=shutil.ignore_patterns(".*"))
    for path in other.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return other


def test_the_same_data_elsewhere_has_the_same_fingerprint(place: Path) -> None:
    (place / "004.img").write_bytes(b"")
    (place / "005.hint").write_bytes(encoded((3, 3)))
    assert indexed(moved(place)).fingerprint == indexed(place).fingerprint
    parts = [
        Data(parts=({"source": str(each)}, {"source": str(each)}), store=place.parent / "s")  # type: ignore[arg-type]
        for each in (place, moved(place, "third"))
    ]
    assert open_index(parts[0]).fingerprint == open_index(parts[1]).fingerprint


CHANGES: dict[str, Any] = {
    "caption": lambda place: tell(place, "003", captions=["another"]),
    "weights": lambda place: tell(place, "003", captions=["caption of 003.img"], weights=[2]),
    "size": lambda place: (place / "003.img").write_bytes(encoded((99, 20))),
    "fewer": lambda place: (place / "003.img").unlink(),
    "fault": lambda place: (place / "003.img").write_bytes(b""),
    "name": lambda place: (place / "007.img").rename(place / "008.img"),
    "order": lambda place: [
        (place / old).rename(place / new)
        for old, new in (("006.img", "x"), ("007.img", "006.img"), ("x", "007.img"))
    ],
    "hint": lambda place: (place / "003.hint").write_bytes(encoded((3, 3))),
    "group": lambda place: tell(place, "003", group="a"),
    "repeats": lambda place: [tell(place, f"{number:03}", repeats=2) for number in range(8)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_have_another_fingerprint(place: Path, change: str) -> None:
    other = moved(place)
    CHANGES[change](other)
    assert indexed(other).fingerprint != indexed(place).fingerprint


def test_other_bytes_of_the_same_size_have_the_same_fingerprint(place: Path) -> None:
    """It is of what the order of samples depends on; the bytes are what digests are for."""
    other = moved(place)
    (other / "003.img").write_bytes(encoded((13, 20), colour="blue"))
    assert indexed(other).fingerprint == indexed(place).fingerprint


# Parts


def grouped(place: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        fill(place / name, count)
    return place


def test_groups_have_repeats_of_their_own(tmp_path: Path) -> None:
    place = grouped(tmp_path / "photos", {"10_dog": 2, "3_cat": 4})
    made = indexed(place, folder_repeats=True)
    assert made.parts == [
        PartFacts(f"{place}/10_dog", Fraction(10), 2),
        PartFacts(f"{place}/3_cat", Fraction(3), 4),
    ]
    assert made.part.tolist() == [0, 0, 1, 1, 1, 1]
    assert made.record(2).part == 1


def several(tmp_path: Path, *parts: dict[str, Any], counts: tuple[int, ...] = (3, 6, 2)) -> Data:
    for number, (part, count) in enumerate(zip(parts, counts, strict=False)):
        part["source"] = str(fill(tmp_path / f"photos{number}", count))
    return Data(parts=parts, store=tmp_path / "store")  # type: ignore[arg-type]


def test_parts_with_repeats(tmp_path: Path) -> None:
    data = several(tmp_path, {"repeats": 2.5}, {}, {"repeats": 1 / 3})
    made = open_index(data)
    assert [part.repeats for part in made.parts] == [Fraction(5, 2), Fraction(1), Fraction(1, 3)]
    assert [part.count for part in made.parts] == [3, 6, 2]
    assert made.part.tolist() == [0] * 3 + [1] * 6 + [2] * 2
    with made.open(4) as file:
        assert file.read() == (tmp_path / "photos1" / "001.img").read_bytes()
    other = data.model_copy(
        update={"parts": (data.parts[0].model_copy(update={"repeats": 3.0}), *data.parts[1:])}
    )
    again = open_index(other)
    assert again.folder == made.folder and again.parts[0].repeats == 3
    assert again.fingerprint != made.fingerprint


def test_layout_and_group_repeats_multiply(tmp_path: Path) -> None:
    grouped(tmp_path / "photos", {"10_dog": 2, "3_cat": 4})
    parts = ({"source": str(tmp_path / "photos"), "folder_repeats": True, "repeats": 0.5},)
    made = open_index(Data(parts=parts, store=tmp_path / "store"))  # type: ignore[arg-type]
    assert [part.repeats for part in made.parts] == [Fraction(5), Fraction(3, 2)]


@given(
    st.lists(
        st.tuples(
            st.floats(0.01, 100),
            st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 40)), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_weights_are_shares_of_an_epoch(layouts: list[tuple[float, list[tuple[int, int]]]]) -> None:
    """Of a layout's groups each keeps its own repeats, relative to the others."""
    asked = tuple({"source": str(n), "weight": weight} for n, (weight, _) in enumerate(layouts))
    data = Data(parts=asked)  # type: ignore[arg-type]
    told = [
        {"layout": layout, "group": f"{group}", "repeats": repeats, "count": count}
        for layout, (_, groups) in enumerate(layouts)
        for group, (count, repeats) in enumerate(groups)
    ]
    parts = index.parts_of(data, told)
    visits = [float(part.repeats * part.count) for part in parts]
    records = sum(part.count for part in parts)
    assert sum(visits) == pytest.approx(records, rel=0.01, abs=1e-2)
    total = sum(weight for weight, _ in layouts)
    for layout, (weight, groups) in enumerate(layouts):
        own = [(part, facts) for part, facts in zip(told, parts, strict=True) if part["layout"] == layout]
        share = sum(facts.repeats * facts.count for _, facts in own) / records
        assert float(share) == pytest.approx(weight / total, rel=0.01, abs=1e-2)
        ratios = [float(facts.repeats / part["repeats"]) for part, facts in own]
        assert ratios == pytest.approx([ratios[0]] * len(groups), rel=0.01, abs=1e-5)
    assert all(part.repeats.denominator <= 10**6 and part.repeats > 0 for part in parts)


def test_weights_are_exact_where_they_can_be(tmp_path: Path) -> None:
    made = open_index(several(tmp_path, {"weight": 3}, {"weight": 1}, counts=(3, 6)))
    visits = [part.repeats * part.count for part in made.parts]
    assert visits == [Fraction(27, 4), Fraction(9, 4)]


def test_a_part_without_a_record_of_use(tmp_path: Path) -> None:
    place = grouped(tmp_path / "photos", {"10_dog": 5, "3_cat": 4})
    for path in (place / "10_dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        indexed(place, folder_repeats=True)
    for words in (
        f'"{place}/10_dog"',
        "none of its 5",
        "10_dog/000.img: the file is empty",
        "10_dog/002.img",
    ):
        assert words in str(caught.value)
    assert "003.img" not in str(caught.value)
    opens(place)
    fill(place / "10_dog", 5)
    assert len(indexed(place, folder_repeats=True)) == 9
    assert len(opens(place)) == 5, "what was seen before the error is not looked at again"


def test_a_source_without_a_record(tmp_path: Path) -> None:
    data = several(tmp_path, {}, {}, counts=(3, 0))
    with pytest.raises(UserError, match=r"photos1.*\n.*there is none"):
        open_index(data)


def test_too_many_parts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "MOST_PARTS", 3)
    for number in range(8):
        tell(place, f"{number:03}", group=f"{number // 2}")
    with pytest.raises(UserError, match="more than 3 parts"):
        indexed(place)


# What it costs


class Series(Source):
    """As many records as the source's name says, all of one picture."""

    def stamp(self) -> str:
        return self.layout.source

    def entries(self) -> Iterator[Entry]:
        for number in range(int(self.layout.source)):
            yield Entry(f"{number:06}", Span("all"), ("a caption",), stamp="1")

    def open(self, span: Span) -> BinaryIO:
        return io.BytesIO(ONE)


ONE = encoded((2, 3), "PPM")


def calls(count: int, store: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Python functions that the making of an index calls, in this thread, without the pool's waiting."""
    monkeypatch.setattr(index, "open_source", Series)
    monkeypatch.setattr(scan, "ThreadPoolExecutor", AtOnce)
    total = 0

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal total
        total += event == "call"

    sys.setprofile(profile)
    try:
        open_index(Data(source=str(count), store=store))
    finally:
        sys.setprofile(None)
    return total


def test_a_record_costs_the_same_whatever_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = (10, 500, 1000, 3000)  # the first pays for what is done once
    _, few, more, most = (calls(count, tmp_path / "store", monkeypatch) for count in counts)
    assert (most - more) / 2000 == pytest.approx((more - few) / 500, rel=0.05)
    assert (most - more) / 2000 < 150


@pytest.mark.parametrize(("text", "least"), [(1, 100), (2**20, 1)])
def test_so_many_records_are_held_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: int, least: int
) -> None:
    """Some hundred, and fewer of long captions, however slow their files are."""
    told, most = 0, 0

    class Wide(Series):
        def entries(self) -> Iterator[Entry]:
            nonlocal told
            for entry in super().entries():
                told += 1
                yield replace(entry, captions=(entry.name.ljust(text),))

    def add(self: draft.Draft, *values: Any) -> None:
        nonlocal most
        most = max(most, told - self.records)
        whole(self, *values)

    whole = draft.Draft.add
    monkeypatch.setattr(draft.Draft, "add", add)
    monkeypatch.setattr(index, "open_source", Wide)
    count = 2000 if text == 1 else 60
    assert len(open_index(Data(source=str(count), store=tmp_path))) == count
    assert least <= most <= min(2 * scan.AHEAD, 2 * scan.AHEAD_TEXT // text + 2)


def test_lines_are_told_now_and_then(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    open_index(data_of(place), tell=lines.append)
    assert not lines, "it took no 5 seconds"
    monkeypatch.setattr(scan, "TOLD", 0.0)
    tell(place, "000", captions=["another"])
    open_index(data_of(place), tell=lines.append)
    assert len(lines) == 8
    assert lines[2].startswith(f"indexing {place}: 3 records, ") and lines[2].endswith(" a second")


def test_a_picture_is_opened_once_by_pillow(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = [0]
    whole = Image.open

    def counted(*told: Any, **more: Any) -> Any:
        count[0] += 1
        return whole(*told, **more)

    monkeypatch.setattr(Image, "open", counted)
    indexed(place, digests=True)
    assert count[0] == 8 == len(opens(place))


# Over the sources of the package


def as_folder(place: Path, pictures: list[bytes]) -> Path:
    place.mkdir()
    for number, data in enumerate(pictures):
        (place / f"{number:03}.png").write_bytes(data)
        (place / f"{number:03}.txt").write_text(f"caption {number}")
    return place


def as_list(place: Path, pictures: list[bytes]) -> Path:
    as_folder(place, pictures)
    rows = [{"image": f"{number:03}.png", "text": f"caption {number}"} for number in range(len(pictures))]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "train.jsonl"


def as_tars(place: Path, pictures: list[bytes]) -> str:
    place.mkdir()
    for shard in range(2):
        with tarfile.open(place / f"{shard}.tar", "w") as tar:
            for number in range(shard, len(pictures), 2):
                for end, data in (("png", pictures[number]), ("txt", f"caption {number}".encode())):
                    member = tarfile.TarInfo(f"{number:03}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(place / "{0..1}.tar")


def table(pictures: list[bytes]) -> dict[str, list[Any]]:
    captions = [f"caption {number}" for number in range(len(pictures))]
    return {"image": [{"bytes": data, "path": None} for data in pictures], "text": captions}


def as_parquet(place: Path, pictures: list[bytes]) -> Path:
    place.mkdir()
    pq.write_table(pa.table(table(pictures)), place / "a.parquet", row_group_size=7)
    return place


def as_saved(place: Path, pictures: list[bytes]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(table(pictures)).save_to_disk(str(place))
    return place


@pytest.mark.parametrize("lay", [as_folder, as_list, as_tars, as_parquet, as_saved])
def test_the_package_s_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lay: Any) -> None:
    """More records than are held at once, read by all threads: each comes out as it went in."""
    monkeypatch.setattr(index, "open_source", open_source)
    pictures = [encoded((1 + number % 50, 1 + number // 50)) for number in range(600)]
    (pictures[5], pictures[300]) = (b"", b"no picture")
    data = Data(source=str(lay(tmp_path / "data", pictures)), store=tmp_path / "store")
    made = pickle.loads(pickle.dumps(open_index(data, digests=True)))
    assert len(made) == 598 and len(made.faults) == 2
    told = {}
    for number in range(598):
        with made.open(number) as file:
            bytes_ = file.read()
        assert made.digests[number].tobytes() == hashlib.blake2b(bytes_, digest_size=16).digest()
        with Image.open(io.BytesIO(bytes_)) as image:
            assert made.sizes[number].tolist() == [image.height, image.width]
        told[bytes_] = made.record(number).captions
    assert told == {data: [f"caption {n}"] for n, data in enumerate(pictures) if n not in (5, 300)}
    again = open_index(data, digests=True)
    assert again.folder == made.folder and again.fingerprint == made.fingerprint
