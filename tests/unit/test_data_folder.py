"""Folders of image files with captions beside them, and every mistake that a user can make in one."""

import json
import os
import shutil
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest

from sfumato.data.sources import Span, open_source
from sfumato.data.sources.files import walk
from sfumato.data.sources.folder import Folder
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
    write_list,
)


def paths(place: Path, top: str = "") -> list[str]:
    return [listing.path + name for listing, name in walk(place, top)]


def make(place: Path, *files: str) -> Path:
    """Files whose content does not matter."""
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(b"x")
    return place


def test_text_folder(tmp_path: Path) -> None:
    source = open_source(data_of(text_folder(tmp_path, 4)))
    assert isinstance(source, Folder)
    check_samples(source, 4)
    entry = list(source.entries())[2]
    assert (entry.name, entry.image, entry.group, entry.repeats) == ("002.png", Span("002.png"), "", 1)


def test_text_file_with_windows_marks(tmp_path: Path) -> None:
    text_folder(tmp_path, 1)
    (tmp_path / "000.txt").write_bytes(b"\xef\xbb\xbfein Kn\xc3\xa4uel\r\n\r\n zwei \r\n")
    assert captions_by_name(all_of(tmp_path)) == {"000.png": ["ein Knäuel", "zwei"]}


def test_every_line_is_a_caption_and_an_empty_file_is_one(tmp_path: Path) -> None:
    text_folder(tmp_path, 3)
    (tmp_path / "000.txt").write_text("one\u2028still one\x85too\n\n  \n two")
    (tmp_path / "001.txt").write_text("")
    (tmp_path / "002.txt").write_text(" \n\n")
    told = captions_by_name(all_of(tmp_path))
    assert list(told.values()) == [["one\u2028still one\x85too", "two"], [""], [""]]


def test_json_beside_the_image(tmp_path: Path) -> None:
    """laion_sx: a jpg, a json and a txt of 9 digits for each record."""
    for number in range(2):
        stem = tmp_path / f"{number:09}"
        stem.with_suffix(".jpg").write_bytes(encoded(picture(number), "JPEG"))
        stem.with_suffix(".txt").write_text(f"line {number}\n")
        row = {"caption": [f"a {number}", "b"], "weights": [3, 0.5], "key": f"{number:09}"}
        stem.with_suffix(".json").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode())
    names = ["000000000.jpg", "000000001.jpg"]
    assert captions_by_name(all_of(tmp_path)) == dict(zip(names, [["line 0"], ["line 1"]], strict=True))
    settings = {"caption_file": "json", "caption_column": "caption"}
    told = all_of(tmp_path, **settings)
    assert captions_by_name(told) == dict(zip(names, [["a 0", "b"], ["a 1", "b"]], strict=True))
    assert told[0].weights == ()
    # A text file has no weights: with them the json goes first.
    weighted = all_of(tmp_path, caption_column="caption", caption_weight_column="weights")
    assert [entry.captions for entry in weighted] == [("a 0", "b"), ("a 1", "b")]
    assert {entry.weights for entry in weighted} == {(3.0, 0.5)}
    refused(tmp_path, "caption_weight_column", "text", caption_weight_column="weights", caption_file="txt")


def test_weight_of_nought_takes_a_caption_out(tmp_path: Path) -> None:
    text_folder(tmp_path, 2)
    (tmp_path / "000.json").write_text('{"text": ["a", "b", "c"], "w": [0, 1, 2]}')
    (tmp_path / "001.json").write_text('{"text": ["a", "b"], "w": [0, 0]}')
    told = all_of(tmp_path, caption_weight_column="w")
    assert (told[0].captions, told[0].weights) == (("b", "c"), (1.0, 2.0))
    assert "all 0" in told[1].fault


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "x"', "not JSON"),
        ("[1]", "no object"),
        ("[" * 100_000, "not JSON"),
        ('{"text": 7}', 'its caption "text" is 7'),
        ('{"text": ["x", null]}', "its caption"),
        ('{"text": "\\ud83d"}', "half a letter"),
        ('{"caption": "x"}', 'no caption: 000.json has no "text"'),
        ('{"text": null}', "no caption"),
        ('{"text": []}', "no caption"),
        ('{"text": "x"}', '"w" is None'),
        ('{"text": "x", "w": [1, 2]}', '"w" is [1, 2]'),
        ('{"text": "x", "w": -1}', '"w" is -1'),
        ('{"text": "x", "w": true}', '"w" is True'),
        ('{"text": "x", "w": NaN}', '"w" is nan'),
        ('{"text": "x", "w": 1' + "0" * 5000 + "}", "not JSON"),
    ],
)
def test_faulty_json(tmp_path: Path, content: str, reason: str) -> None:
    text_folder(tmp_path, 1)
    (tmp_path / "000.json").write_text(content)
    faults = faults_of(all_of(tmp_path, caption_file="json", caption_weight_column="w"))
    assert reason in faults["000.png"]


def test_faults_of_single_images(tmp_path: Path) -> None:
    text_folder(tmp_path, 8)
    (tmp_path / "001.txt").unlink()
    (tmp_path / "002.txt").write_bytes("Knäuel".encode("latin-1"))
    (tmp_path / "003.png").unlink()
    (tmp_path / "003.png").mkdir()  # a folder, whatever its name
    (tmp_path / "004.png").unlink()
    (tmp_path / "004.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "005.png").unlink()
    os.mkfifo(tmp_path / "005.png")
    (tmp_path / "006.txt").write_bytes(b"x" * (2**20 + 1))
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    (tmp_path / "IMG_1.txt").write_text("a phone's picture")
    entries = all_of(tmp_path)
    assert list(captions_by_name(entries)) == ["000.png", "007.png"]
    assert faults_of(entries) == {
        "001.png": "no caption: no 001.txt or 001.json beside it, and data.prompt is not set",
        "002.png": "its caption is not UTF-8: invalid continuation byte at byte 2",
        "004.png": 'no such file: "004.png"',
        "005.png": '"005.png" is not a file',
        "006.png": "its caption file has more than 1,048,576 bytes",
        "IMG_1.HEIC": ".heic is a format that is not read: convert it to png or jpg",
    }


def test_prompt_is_for_images_without_a_caption(tmp_path: Path) -> None:
    text_folder(tmp_path, 3)
    (tmp_path / "001.txt").unlink()
    (tmp_path / "002.txt").write_text("")
    told = captions_by_name(all_of(tmp_path, prompt="a photo of sks dog"))
    assert list(told.values()) == [["picture 0"], ["a photo of sks dog"], [""]]
    assert captions_by_name(all_of(tmp_path, prompt=""))["001.png"] == [""]


def test_folder_repeats(tmp_path: Path) -> None:
    make(tmp_path, "10_sks dog/a.png", "10_sks dog/a.txt", "10_sks dog/deep/2_x/b.png", "1_reg/c.png")
    make(tmp_path, "top.png", "top.txt", "20240131_walk/d.png", "20240131_walk/d.txt")
    entries = all_of(tmp_path, folder_repeats=True)
    told = [(entry.name, entry.group, entry.repeats, entry.captions) for entry in entries]
    assert told == [
        ("10_sks dog/a.png", "10_sks dog", 10, ("x",)),
        ("10_sks dog/deep/2_x/b.png", "10_sks dog", 10, ("sks dog",)),
        ("1_reg/c.png", "1_reg", 1, ("reg",)),
        ("20240131_walk/d.png", "", 1, ("x",)),
        ("top.png", "", 1, ("x",)),
    ]
    assert {entry.group for entry in all_of(tmp_path, prompt="p")} == {""}
    make(tmp_path, "0_off/x.png")
    refused(tmp_path, "0_off", "no visits", folder_repeats=True)


def test_order_is_that_of_whole_paths(tmp_path: Path) -> None:
    """ "a.png" stands before "a/b.png", and "Z" before "a": by letters' numbers, not as a folder lists."""
    files = ["a/b.png", "a.png", "a-.png", "Z.png", "ä.png", "a/a/c.png", "aa/x.png", "猫　犬/👩‍🎨.png"]
    make(tmp_path, *files)
    assert paths(tmp_path) == sorted(files)
    assert [entry.name for entry in all_of(tmp_path, prompt="p")] == sorted(files)


def test_hidden_files_and_links(tmp_path: Path) -> None:
    """Hidden folders hold copies (.ipynb_checkpoints); a linked folder counts once; no circle is walked."""
    place = text_folder(tmp_path / "set", 2)
    shutil.copytree(place, place / ".ipynb_checkpoints")
    make(place, "._000.png", "v3/x.png", ".store/y.png")
    text_folder(tmp_path / "elsewhere", 2)
    make(tmp_path / "elsewhere", "sub/z.png")
    (tmp_path / "elsewhere" / "back").symlink_to(place)
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    (place / "link").symlink_to(tmp_path / "elsewhere")
    (place / "more").symlink_to(tmp_path / "elsewhere" / "sub")
    (place / "loop").symlink_to(place)
    (place / "current").symlink_to(place / "v3")
    (place / "hidden").symlink_to(place / ".store")
    (place / "itself").symlink_to(place / "itself")
    assert [file for file in paths(place) if file.endswith(".png")] == [
        "000.png",
        "001.png",
        "hidden/y.png",
        "link/000.png",
        "link/001.png",
        "link/sub/z.png",
        "v3/x.png",
    ]


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    """The caches of the hub are made of them. Another file behind the link is another stamp."""
    blobs = text_folder(tmp_path / "blobs", 3)
    (tmp_path / "set").mkdir()
    for number in range(2):
        for kind in ("png", "txt"):
            (tmp_path / "set" / f"{number:03}.{kind}").symlink_to(blobs / f"{number:03}.{kind}")
    source = open_source(data_of(tmp_path / "set"))
    check_samples(source, 2)
    before = source.stamp()
    picture(2).save(blobs / "001.png")
    assert source.stamp() != before


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    text_folder(tmp_path, 1)
    try:
        (tmp_path / os.fsdecode(b"K\xf6ln.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system refuses such names")
    entries = all_of(tmp_path)
    assert faults_of(entries) == {"K\\udcf6ln.png": "its name is not UTF-8"}
    assert open_source(data_of(tmp_path)).stamp()
    json.dumps([entry.name for entry in entries]).encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_without_permission(tmp_path: Path) -> None:
    (text_folder(tmp_path, 1) / "below").mkdir(mode=0)
    refused(tmp_path, "below", "Permission")


def test_vanished_folder_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be listed must not be missing in silence."""
    text_folder(tmp_path / "below", 1)
    plain = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "below":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(tmp_path, str(tmp_path / "below"), "Permission denied")


def test_folder_mistakes(tmp_path: Path) -> None:
    refused(tmp_path / "not" / "there", "no such folder", str(Path.cwd()))
    refused(tmp_path, "an empty folder")
    (tmp_path / "notes.md").write_text("x")
    refused(tmp_path, "1 files, none of them an image")
    refused(tmp_path, "1 files, none of them an image", kind="folder")
    refused(tmp_path / "notes.md", "it is a file")
    refused(tmp_path / "notes.md", "it is a file", kind="folder")


@pytest.mark.parametrize("within", [True, False])
def test_conditioning_images_of_a_folder(tmp_path: Path, within: bool) -> None:
    """The file of the same path in a folder of hints, inside the source or beside it."""
    source = tmp_path / "set" / "images"
    hints = source / "hints" if within else tmp_path / "set" / "hints"
    text_folder(source, 3)
    make(source, "deep/x.jpg", "deep/x.txt")
    make(hints, "000.png", "001.webp", "deep/x.png")
    (hints / "000.png").write_bytes(b"hint 0")
    opened = open_source(data_of(source, conditioning_column="hints"))
    entries = list(opened.entries())
    assert [entry.name for entry in entries] == ["000.png", "001.png", "002.png", "deep/x.jpg"]
    assert faults_of(entries) == {"002.png": "no conditioning image: hints/002.png"}
    assert entries[0].hint is not None and entries[3].hint == Span("hints/deep/x.png")
    assert opened.open(entries[0].hint).read() == b"hint 0"
    assert opened.open(entries[0].image).read() == encoded(picture(0))
    before, stamp = opened.stamp(), entries[0].stamp
    (hints / "000.png").write_bytes(b"hint 9")
    assert opened.stamp() != before and list(opened.entries())[0].stamp != stamp


def test_conditioning_folder_that_is_not_there(tmp_path: Path) -> None:
    text_folder(tmp_path / "set", 1)
    for name in ("hints", "../set", "/tmp", "~", ""):
        refused(tmp_path / "set", "data.conditioning_column", "metadata.jsonl", conditioning_column=name)


@pytest.mark.parametrize(
    "file", ["../secret.png", "/etc/hostname", "a/../../secret.png", "", "..\\secret.png"]
)
def test_no_span_leads_out_of_the_place(tmp_path: Path, file: str) -> None:
    """An index that others wrote may hold any span."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    source = open_source(data_of(text_folder(tmp_path / "set", 1)))
    with pytest.raises(UserError, match="does not lie below"):
        source.open(Span(file))


def test_a_file_that_is_gone_is_the_systems_error(tmp_path: Path) -> None:
    source = open_source(data_of(text_folder(tmp_path, 1)))
    (tmp_path / "000.png").unlink()
    with pytest.raises(FileNotFoundError):
        source.open(Span("000.png"))
    os.mkfifo(tmp_path / "000.png")
    with pytest.raises(OSError, match="not a file"):
        source.open(Span("000.png"))


def test_stamp_sees_every_change(tmp_path: Path) -> None:
    """Also one of the same size and time, and one of a caption; a stray file does not count."""
    text_folder(tmp_path, 2)
    source = open_source(data_of(tmp_path))
    seen = [source.stamp()]
    (tmp_path / "log.out").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    assert source.stamp() == seen[0]

    def changed() -> None:
        seen.append(source.stamp())
        assert len(set(seen)) == len(seen), f"change {len(seen) - 1} was not seen"

    image = tmp_path / "000.png"
    status = image.stat()
    image.write_bytes(image.read_bytes()[::-1])
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    changed()
    (tmp_path / "000.txt").write_text("another")
    changed()
    (tmp_path / "000.json").write_text("{}")
    changed()
    (tmp_path / "001.png").rename(tmp_path / "002.png")
    changed()
    (tmp_path / "000.txt").unlink()
    changed()


def test_stamp_of_an_entry_is_of_its_image(tmp_path: Path) -> None:
    text_folder(tmp_path, 2)
    before = all_of(tmp_path)
    picture(7).save(tmp_path / "001.png")
    (tmp_path / "000.txt").write_text("another")
    after = all_of(tmp_path)
    assert before[0].stamp == after[0].stamp and before[1].stamp != after[1].stamp


def test_kind_folder_reads_no_list(tmp_path: Path) -> None:
    text_folder(tmp_path, 2)
    write_list(tmp_path, [{"file_name": "000.png", "text": "of the list"}])
    check_samples(open_source(data_of(tmp_path, kind="folder")), 2)


def peak(place: Path) -> tuple[int, int]:
    """How many entries there are, and the most bytes that telling them held at once."""
    source = open_source(data_of(place, prompt="p"))
    tracemalloc.start()
    try:
        count = sum(1 for _ in source.entries())
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    """Eight times the folders take no more memory; a list of all entries would."""
    for folder in range(40):
        os.makedirs(f"{tmp_path}/many/{folder:03}")
        for number in range(100):
            os.close(os.open(f"{tmp_path}/many/{folder:03}/{number:05}.png", os.O_CREAT))
    (tmp_path / "few").mkdir()
    for folder in range(5):
        (tmp_path / "few" / f"{folder:03}").symlink_to(tmp_path / "many" / f"{folder:03}")
    few, many = peak(tmp_path / "few"), peak(tmp_path / "many")
    assert (few[0], many[0]) == (500, 4000)
    more = 7 * 3500  # 7 bytes a record; measured: below 1,000 in all
    assert many[1] < few[1] + more, f"{few[1]:,} bytes for 500 entries, {many[1]:,} for 4,000"
    tracemalloc.start()
    kept = list(islice(open_source(data_of(tmp_path / "many", prompt="p")).entries(), 500))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(kept) == 500 and held > few[1] + more, "the bound would not catch entries that are kept"
