"""Folders of image files with captions, and every mistake that a user can make in one."""

import os
import shutil
from pathlib import Path

import pytest

from sfumato.data.folder import Folder
from sfumato.data.sources import files_under, open_source
from tests.unit.pictures import check_samples, data_of, picture, refused, text_folder, write_list


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


def test_unicode_lines_in_a_caption(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line to str.splitlines, but not to JSON."""
    text_folder(tmp_path, 1)
    text = "one\u2028two\x85three"
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "000.png", "text": "{text}"}}\r\n')
    assert open_source(data_of(tmp_path)).captions(0) == [text]


def test_picture_formats_that_are_not_read(tmp_path: Path) -> None:
    """Half of a phone's pictures must not be left out without a word."""
    text_folder(tmp_path, 2)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    refused(tmp_path, "1 pictures in a format", "IMG_1.HEIC")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_without_permission(tmp_path: Path) -> None:
    (text_folder(tmp_path, 1) / "below").mkdir(mode=0)
    refused(tmp_path, "below", "Permission")


def test_vanished_folder_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.walk passes over a folder that it cannot list; its pictures would be missing in silence."""
    text_folder(tmp_path / "below", 1)

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(tmp_path, str(tmp_path), "Permission denied")


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
        ('{"file_name": "000.txt", "text": "x"}', ["line 2", '"000.txt"', "not of a format"]),
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
