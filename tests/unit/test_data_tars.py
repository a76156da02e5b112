"""Tar shards: the same records as in a folder and as the webdataset library reads them; damage; URLs."""

import io
import json
import pickle
import shutil
import subprocess
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sfumato.audit import examine
from sfumato.config import Data, parse
from sfumato.data.held import check_faults
from sfumato.data.index import open_index
from sfumato.data.sources import Entry, Source, Span, open_source
from sfumato.data.sources.patterns import expand
from sfumato.data.sources.tars import Tars
from sfumato.errors import UserError
from tests.unit.pictures import (
    all_of,
    captions_by_name,
    check_samples,
    data_of,
    encoded,
    faults_of,
    picture,
    refused,
    text_folder,
)

Member = tuple[str, bytes]


def write_tar(path: Path, members: list[Member], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def triplets(begin: int, end: int, kind: str = "png") -> list[Member]:
    """A picture, its caption, and a json that is not needed, for each number."""
    members = []
    for number in range(begin, end):
        members += [
            (f"{number:09}.{kind}", encoded(picture(number))),
            (f"{number:09}.txt", f"picture {number}\n".encode()),
            (f"{number:09}.json", json.dumps({"text": f"json {number}", "w": 2}).encode()),
        ]
    return members


def read(source: Source, entry: Entry) -> bytes:
    with source.open(entry.image) as file:
        return file.read()


def test_shards_in_a_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", triplets(0, 3))
    write_tar(tmp_path / "deep" / "00001.tar", triplets(3, 5))
    facts = pa.table({"url": ["http://x"], "caption": ["what img2dataset writes"]})
    pq.write_table(facts, tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    for kind in ("auto", "tar"):
        source = open_source(data_of(tmp_path, kind=kind))
        check_samples(source, 5)
        names = [entry.name for entry in source.entries()]
        assert names[2:4] == ["00000.tar/000000002", "deep/00001.tar/000000003"]


def test_formats_long_names_and_folders(tmp_path: Path) -> None:
    """Names of 16 digits, of letters of several bytes, longer than a header, below "./"; in each format."""
    stems = ["./0000000000000000", "a.b/c", "./猫/Knäuel", "x" * 90 + "/" + "y" * 120, "deep/" * 60 + "z"]
    members = []
    for number, stem in enumerate(stems):
        members += [(f"{stem}.PNG", encoded(picture(number))), (f"{stem}.Txt", f"picture {number}".encode())]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        source = open_source(data_of(write_tar(tmp_path / "x.tar", members, form)))
        check_samples(source, 5)
        names = [entry.name for entry in source.entries()]
        assert names[:3] == ["x.tar/0000000000000000", "x.tar/a.b/c", "x.tar/猫/Knäuel"]


def test_a_folder_and_its_tar_are_the_same(tmp_path: Path) -> None:
    place = text_folder(tmp_path / "set", 5)
    (place / "001.txt").write_text("one\n\ntwo\n")
    (place / "002.txt").write_text("")
    (place / "003.txt").unlink()
    (place / "003.json").write_text('{"text": ["a", "b"]}')
    (place / "004.txt").unlink()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(place, arcname=".")
    # tar.add sorts; a tar of a program that does not may keep files of one name apart.
    one, other = open_source(data_of(place)), open_source(data_of(tmp_path / "x.tar"))
    pairs = list(zip(one.entries(), other.entries(), strict=True))
    for here, there in pairs:
        assert (here.captions, bool(here.fault)) == (there.captions, bool(there.fault))
        assert there.name == f"x.tar/{here.name.removesuffix('.png')}"
        assert here.fault or read(one, here) == read(other, there)
    assert [here.captions for here, _ in pairs] == [("picture 0",), ("one", "two"), ("",), ("a", "b"), ()]
    assert captions_by_name(all_of(tmp_path / "x.tar", prompt="p"))["x.tar/004"] == ["p"]


def test_webdataset_reads_the_same(tmp_path: Path) -> None:
    """Its own writer's shards, and ours read by it: the same keys and bytes."""
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset==1.0.2")
    odd = [
        ("a.b.png", encoded(picture(7))),
        ("a.cls", b"1"),
        ("sub.d/c.png", encoded(picture(8))),
        ("sub.d/c.txt", b"x"),
        ("__meta__", b"x"),
        ("nodot", b"x"),
        ("no/dot", b"x"),
    ]
    write_tar(tmp_path / "ours-000000.tar", [*triplets(0, 3), *odd])
    with webdataset.ShardWriter(str(tmp_path / "theirs-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(3):
            writer.write(
                {"__key__": f"{number:04}", "png": encoded(picture(number)), "txt": f"picture {number}"}
            )
    check_samples(open_source(data_of(tmp_path / "theirs-{000000..000001}.tar")), 3)
    for pattern in ("ours-000000.tar", "theirs-{000000..000001}.tar"):
        theirs = list(webdataset.WebDataset(str(tmp_path / pattern), shardshuffle=False, empty_check=False))
        source = open_source(
            data_of(tmp_path / pattern, image_column="b.png" if "ours" in pattern else "image")
        )
        entries = list(source.entries())
        assert [entry.name.split("/", 1)[1] for entry in entries] == [each["__key__"] for each in theirs]
        for entry, each in zip(entries, theirs, strict=True):
            if not entry.fault:
                assert read(source, entry) == each.get("png", each.get("b.png"))
                assert list(entry.captions) == each["txt"].decode().split("\n")[:1]
    assert [bool(entry.fault) for entry in all_of(tmp_path / "ours-000000.tar")] == [False] * 3 + [
        True,
        False,
    ]


def test_json_and_weights(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", triplets(0, 2))
    entries = all_of(tmp_path / "x.tar", caption_file="json", caption_weight_column="w")
    assert [(entry.captions, entry.weights) for entry in entries] == [
        (("json 0",), (2.0,)),
        (("json 1",), (2.0,)),
    ]


def test_faults_of_records(tmp_path: Path) -> None:
    png = encoded(picture(0))
    members = [
        ("00.png", png),
        ("01.txt", b"no image"),
        ("02.jpg", png),
        ("02.png", png),
        ("02.txt", b"x"),
        ("03.png", png),
        ("03.txt", b"\xff"),
        ("04.png", png),
        ("04.png", png),
        ("04.txt", b"x"),
        ("05.heic", png),
        ("05.txt", b"x"),
        ("06.cls", b"1"),
        ("._07.png", b"what a Mac adds"),
        ("08.png", png),
        ("08.json", b"{"),
        ("09.png", png),
        ("09.txt", b"x" * (2**20 + 1)),
        ("10.png", png),
        ("10.txt", b"good"),
    ]
    entries = all_of(write_tar(tmp_path / "x.tar", members))
    assert captions_by_name(entries) == {"x.tar/10": ["good"]}
    assert faults_of(entries) == {
        "x.tar/00": "no caption: no txt or json beside it in the tar, and data.prompt is not set",
        "x.tar/01": "no image: its files are txt",
        "x.tar/02": "several images, jpg and png: name one in data.image_column",
        "x.tar/03": "its caption is not UTF-8: invalid start byte at byte 0",
        "x.tar/04": "two files 04.png",
        "x.tar/05": "a format that is not read: its files are heic, txt",
        "x.tar/06": "no image: its files are cls",
        "x.tar/08": faults_of(entries)["x.tar/08"],
        "x.tar/09": "its caption file has more than 1,048,576 bytes",
    }
    assert "not JSON" in faults_of(entries)["x.tar/08"]
    assert captions_by_name(all_of(tmp_path / "x.tar", image_column="jpg"))["x.tar/02"] == ["x"]


def test_files_that_stand_apart(tmp_path: Path) -> None:
    """WebDataset's rule: only neighbours are one record. The second half is told apart, not lost."""
    pairs = [(f"{n}.png", encoded(picture(n))) for n in range(2)] + [(f"{n}.txt", b"x") for n in range(2)]
    entries = all_of(write_tar(tmp_path / "x.tar", pairs))
    faults = faults_of(entries)
    assert len(entries) == len(faults) == 4
    assert "no caption" in faults["x.tar/0"]
    (apart,) = [name for name in faults if name.startswith("x.tar/0 at byte")]
    assert "no image" in faults[apart] and "sort the tar by name" in faults[apart]


def test_links_and_hostile_names(tmp_path: Path) -> None:
    """A name is a label, never a path; a link in a tar leads nowhere."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (
            ("../../etc/x.png", b"1"),
            ("../../etc/x.txt", b"up"),
            ("/abs.png", b"2"),
            ("/abs.txt", b"a"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind, target in (
            (tarfile.SYMTYPE, "/etc/hostname"),
            (tarfile.LNKTYPE, "/abs.png"),
            (tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type, info.linkname = kind, target
            tar.addfile(info)
            text = tarfile.TarInfo(f"link{kind.decode()}.txt")
            text.size = 1
            tar.addfile(text, io.BytesIO(b"x"))
    source = open_source(data_of(tmp_path / "x.tar"))
    entries = list(source.entries())
    assert captions_by_name(entries) == {"x.tar/../../etc/x": ["up"], "x.tar//abs": ["a"]}
    assert [read(source, entry) for entry in entries[:2]] == [b"1", b"2"]
    assert len(faults_of(entries)) == 3 and all("is a link" in fault for fault in faults_of(entries).values())
    for file in ("../x.tar", "/etc/hostname", "y.tar"):
        with pytest.raises(UserError, match="it is none of"):
            source.open(Span(file, 0, 1))


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_file_stored_in_pieces(tmp_path: Path, form: str) -> None:
    """`tar --sparse` leaves zeros out: such a file is a fault, and what follows is read."""
    with (tmp_path / "0.png").open("wb") as file:
        file.seek(2**22)
        file.write(b"x")
    for name in ("0.txt", "1.png", "1.txt"):
        (tmp_path / name).write_bytes(b"x")
    order = ["0.png", "0.txt", "1.png", "1.txt"]
    done = subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", "x.tar", *order], cwd=tmp_path)
    if done.returncode or (tmp_path / "x.tar").stat().st_size > 2**22:
        pytest.skip("this tar, or this file system, knows no holes")
    entries = all_of(tmp_path / "x.tar")
    assert captions_by_name(entries) == {"x.tar/1": ["x"]}
    assert "stored in pieces" in faults_of(entries)["x.tar/0"] and len(entries) == 2


def damaged(tmp_path: Path, data: bytes) -> tuple[list[str], str]:
    """The names of the records of a shard with these bytes, and the fault of the shard."""
    (tmp_path / "x.tar").write_bytes(data)
    entries = all_of(tmp_path / "x.tar")
    assert not any(entry.fault for entry in entries[:-1]), "a fault that is not the shard's"
    assert entries[-1].name == "x.tar"
    return [entry.name.removeprefix("x.tar/") for entry in entries[:-1]], entries[-1].fault


def header(number: int) -> int:
    """The byte where the first member of a record begins."""
    with tarfile.open(fileobj=io.BytesIO(whole())) as tar:
        return tar.getmember(f"{number:09}.png").offset


def whole() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in triplets(0, 4):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_damaged_shards(tmp_path: Path) -> None:
    """What stands before the damage is kept, and the shard is a fault: never fewer records in silence."""
    good, at = whole(), header(2)
    three = [f"{n:09}" for n in range(3)]
    for cut in (at, at + 100, at + 512, at + 700):
        names, fault = damaged(tmp_path, good[:cut])
        assert names == three[:2], f"cut at {cut - at}"
        # One that was never closed looks the same as one that was cut between members.
        assert ("no end is marked" if cut == at else "damaged") in fault
    # Cut right after the caption: the record is whole, but the shard is not.
    with tarfile.open(fileobj=io.BytesIO(good)) as tar:
        after = tar.getmember("000000002.json").offset
    names, fault = damaged(tmp_path, good[:after])
    assert names == three and fault == f"no end is marked: what may have followed byte {after:,} is lost"
    # Python's tarfile takes this for the end of the tar, without a word.
    names, fault = damaged(tmp_path, good[: at + 150] + b"\xff" + good[at + 151 :])
    assert names == three[:2] and f"damaged from byte {at:,}" in fault
    names, fault = damaged(tmp_path, good + good)
    assert names == [f"{n:09}" for n in range(4)] and "another tar" in fault
    for junk in (b"", b"x" * 5000, b"\x1f\x8b" + bytes(range(256)) * 9, good[:300]):
        assert damaged(tmp_path, junk)[0] == []


def test_a_damaged_shard_counts_whole(tmp_path: Path) -> None:
    """It is one fault, whatever is lost: of two shards one has most of its records behind the damage."""
    for number, data in enumerate((whole(), whole()[: header(1) + 100])):
        (tmp_path / f"{number}.tar").write_bytes(data)
    told = {"source": str(tmp_path), "resolution": 64, "store": str(tmp_path / "cache"), "max_faults": 0.4}
    index = open_index(data := Data(**told))
    index.check_faults(data)  # 1 of 6
    with pytest.raises(
        UserError, match=rf"1 of 2 shards damaged.*1\.tar is damaged from byte {header(1):,} on"
    ):
        check_faults(index, data)
    check_faults(index, data.model_copy(update={"max_faults": 0.5}))
    values = {"steps": 1, "batch_size": 1, "model": {"weights": "nowhere"}, "data": told}
    with pytest.raises(UserError, match="1 of 2 shards damaged"):
        examine(parse(values), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not report["verdict"]["can_start"] and "1 of 2 shards" in report["verdict"]["text"]
    assert [each["count"] for each in report["problems"] if each["kind"] == "damaged_shard"] == [1]


def test_tarfile_itself_would_lose_records() -> None:
    """The broken variant: what the test above is for."""
    good, at = whole(), header(2)
    with tarfile.open(fileobj=io.BytesIO(good[: at + 150] + b"\xff" + good[at + 151 :])) as tar:
        assert len(tar.getmembers()) == 6


def test_forged_headers(tmp_path: Path) -> None:
    """Lengths below nought, beyond the file, and of headers that would fill the memory."""
    for size in (2**62, 2**35):
        info = tarfile.TarInfo("a.png")
        info.size = size
        assert damaged(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))[0] == []
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**40
    names, fault = damaged(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert names == [] and "a header of" in fault
    info = tarfile.TarInfo("a.png")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xf4\x00"  # a number below nought
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    assert damaged(tmp_path, bytes(block) + bytes(2048))[0] == []


def test_the_last_record_of_a_damaged_shard_gets_no_prompt(tmp_path: Path) -> None:
    """Its caption was cut off: to train on the prompt instead would be wrong without a word."""
    (tmp_path / "x.tar").write_bytes(whole()[: header(3) - 1536 - 512])
    entries = all_of(tmp_path / "x.tar", prompt="p")
    assert all(entry.captions != ("p",) for entry in entries) and entries[-1].name == "x.tar"


def test_compressed_and_missing_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", triplets(0, 1))
    refused(tmp_path / "{0..2}.tar", "no file", "1.tar")
    refused(tmp_path / "x*.tar", "no file")
    refused(tmp_path / "9.tar", "no file")
    for name in ("1.tar.gz", "1.tgz", "1.tar.zst"):
        (tmp_path / name).write_bytes(b"x")
        refused(tmp_path / name, name, "compressed")
        refused(tmp_path, name, "compressed")
        (tmp_path / name).unlink()
    refused(tmp_path, "data.folder_repeats", folder_repeats=True)
    picture(0).save(tmp_path / "x.png")
    refused(tmp_path, "1 tar files and 1 images", "data.kind")
    (tmp_path / "x.png").unlink()
    write_tar(tmp_path / "0.tar", [])
    refused(tmp_path, "without a record")


def test_hints_in_shards(tmp_path: Path) -> None:
    members = [
        ("0.jpg", encoded(picture(0))),
        ("0.hint.png", b"hint 0"),
        ("0.txt", b"picture 0"),
        ("1.jpg", encoded(picture(1))),
        ("1.txt", b"x"),
    ]
    source = open_source(data_of(write_tar(tmp_path / "x.tar", members), conditioning_column="hint"))
    first, second = source.entries()
    assert first.hint is not None and source.open(first.hint).read() == b"hint 0"
    assert read(source, first) == encoded(picture(0))
    assert 'no conditioning image "hint": its files are jpg, txt' in second.fault
    plain = all_of(tmp_path / "x.tar")
    assert [entry.hint for entry in plain] == [None, None] and plain[0].image == first.image
    members[1] = ("0.png", b"hint 0")
    (both, _) = all_of(write_tar(tmp_path / "x.tar", members), conditioning_column="png")
    assert (both.image, both.hint) == (first.image, first.hint)


def test_stamp_of_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", triplets(0, 1))
    write_tar(tmp_path / "1.tar", triplets(1, 2))
    source = open_source(data_of(tmp_path))
    before, entries = source.stamp(), list(source.entries())
    write_tar(tmp_path / "1.tar", triplets(1, 3))
    assert source.stamp() != before
    after = list(source.entries())
    assert (entries[0].stamp == after[0].stamp, entries[1].stamp == after[1].stamp) == (True, False)


def test_a_window_is_a_file(tmp_path: Path) -> None:
    """Read in parts and sought in, it gives the same as the bytes alone, and no byte of its neighbours."""
    source = open_source(data_of(write_tar(tmp_path / "x.tar", triplets(0, 3))))
    data, entry = encoded(picture(1)), list(source.entries())[1]
    with source.open(entry.image) as file:
        plain = io.BytesIO(data)
        for offset, whence in ((0, 0), (100, 0), (-50, 2), (-20, 1), (10_000_000, 0), (3, 0)):
            assert file.seek(offset, whence) == plain.seek(offset, whence) == file.tell()
            assert file.read(37) == plain.read(37)
        assert file.read() == plain.read() and file.read(1) == b""
        with pytest.raises((OSError, ValueError)):
            file.seek(-1)
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[: entry.image.start + 10])
    with pytest.raises(OSError, match="it ends before byte"):
        source.open(entry.image)


def test_memory_of_a_shard(tmp_path: Path) -> None:
    """`tarfile` keeps every member that it has read: 1 KB for each."""
    peaks = []
    for count in (250, 1250):
        members = [(f"{n:06}.{kind}", b"a caption") for n in range(count) for kind in ("png", "txt")]
        source = open_source(data_of(write_tar(tmp_path / "x.tar", members)))
        tracemalloc.start()
        assert sum(1 for _ in source.entries()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1000 < 300, peaks


@pytest.mark.parametrize(
    "pattern",
    [
        "x.tar",
        "{1..3}",
        "{01..3}",
        "{3..1}",
        "{1..03}",
        "{0..10}",
        "{a,b}{1..2}",
        "{00..2}-{x,y}.tar",
        "a{,b}",
    ],
)
def test_braces_are_those_of_webdataset(pattern: str) -> None:
    braceexpand = pytest.importorskip("braceexpand", reason="pip install webdataset==1.0.2")
    assert expand(pattern) == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize(
    "pattern", ["{0..99999999999}.tar", "{0..999}" * 3, "{x}.tar", "{0..b}.tar", "{" + "9" * 5000 + "..1}"]
)
def test_braces_that_mean_nothing(pattern: str) -> None:
    with pytest.raises(UserError):
        expand(pattern)


@pytest.fixture
def memory() -> Iterator[Any]:
    """A file system that only fsspec reaches."""
    import fsspec

    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def test_shards_by_url(tmp_path: Path, memory: Any) -> None:
    for number in range(2):
        path = write_tar(tmp_path / f"{number:05}.tar", triplets(3 * number, 3 * number + 3))
        memory.pipe(f"/bucket/set/{number:05}.tar", path.read_bytes())
    memory.pipe("/bucket/set/notes.txt", b"x")
    urls = ("set/{00000..00001}.tar", "set/*.tar", "set", "set/*", "s*t/*.tar")
    for url in urls:
        source = open_source(data_of(f"memory://bucket/{url}"))
        assert isinstance(source, Tars)
        check_samples(source, 6)
        assert list(source.entries())[3].name == "00001.tar/000000003"
    before = source.stamp()
    memory.pipe("/bucket/set/00001.tar", memory.cat("/bucket/set/00001.tar"))
    assert source.stamp() != before, "written again at another time"
    refused("memory://bucket/set/{00000..00002}.tar", "00002.tar", "cannot be read")
    refused("memory://nothing", "no .tar file")


def test_a_server_that_tells_nothing_of_a_file(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change could not be seen: caches would go stale without a word."""
    memory.pipe("/b/x.tar", b"x")
    monkeypatch.setattr(type(memory), "info", lambda self, path: {"name": path, "type": "file", "size": None})
    refused("memory://b/x.tar", "no size, time or hash")


def test_parts_of_a_large_remote_image(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header takes one request, the whole image two; a file that was cut off is no shorter image."""
    big = encoded(picture(0, (400, 400)))
    assert len(big) > 3 * 2**16
    path = write_tar(tmp_path / "x.tar", [("0.png", big), ("0.txt", b"x"), ("1.png", big), ("1.txt", b"x")])
    memory.pipe("/b/x.tar", path.read_bytes())
    asked = []
    plain = type(memory).cat_file

    def counted(self: Any, path: str, start: int, end: int) -> bytes:
        asked.append((start, end))
        data: bytes = plain(self, path, start=start, end=end)
        return data

    monkeypatch.setattr(type(memory), "cat_file", counted)
    source = pickle.loads(pickle.dumps(open_source(data_of("memory://b/x.tar"))))
    entry = list(source.entries())[1]
    with source.open(entry.image) as file:
        assert file.read(100) == big[:100] and len(asked) == 1
        assert file.seek(70_000) and file.read(10) == big[70_000:70_010]
        file.seek(0)
        assert file.read() == big and len(asked) == 2
    memory.pipe("/b/x.tar", path.read_bytes()[: entry.image.start + 70_000])
    with pytest.raises(UserError, match="bytes came"), source.open(entry.image) as file:
        file.read()


class Server(BaseHTTPRequestHandler):
    """Gives one shard, or parts of it if `parts` is true."""

    shard = b""
    parts = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        found = self.path.startswith("/x.tar")
        data, wanted = (self.shard if found else b""), self.headers.get("Range")
        self.send_response(404 if not found else 206 if wanted and self.parts else 200)
        if wanted and self.parts and found:
            begin, end = wanted.removeprefix("bytes=").split("-")
            stop = min(int(end), len(self.shard) - 1)
            data = self.shard[int(begin) : stop + 1]
            self.send_header("Content-Range", f"bytes {begin}-{stop}/{len(self.shard)}")
        if self.parts:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", str(hash(self.shard)))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec needs it for http")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()
        thread.join()


def test_shards_by_http(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "shard", write_tar(tmp_path / "x.tar", triplets(0, 3)).read_bytes())
    source = open_source(data_of(f"{server}/x.tar?signature=secret"))
    check_samples(source, 3)
    entries, before = list(source.entries()), source.stamp()
    assert entries[0].name == "x.tar/000000000", "no secret in a name"
    monkeypatch.setattr(Server, "shard", Server.shard + bytes(512))
    assert source.stamp() != before
    error = refused(f"{server}/y.tar?signature=secret", "y.tar", "cannot be read")
    assert "secret" not in str(error)
    monkeypatch.setattr(Server, "parts", False)
    with pytest.raises(UserError):
        read(source, entries[2])


def test_protocols_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def absent(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    refused("nosuch://bucket/x.tar", "nosuch", "fsspec's protocols")
    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    refused("s3://me:key@bucket/{0..1}.tar", "Install s3fs", "pip install s3fs")
    assert "key" not in str(refused("s3://me:key@bucket/x.tar", "s3://bucket/x.tar"))
