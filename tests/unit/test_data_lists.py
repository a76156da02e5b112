"""Lists that name images and their captions: jsonl and csv, whole and damaged, honest and hostile."""

import csv
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sfumato.data.sources import Span, open_source
from sfumato.data.sources.files import inside
from sfumato.data.sources.lists import Lists
from sfumato.data.sources.rows import Rows
from sfumato.data.sources.texts import Unusable
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


def pictures(place: Path, *names: str) -> Path:
    """The first picture under the first name, and so on."""
    for number, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(encoded(picture(number)))
    return place


def write_csv(path: Path, rows: Sequence[Sequence[str]], ending: str = "\r\n") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator=ending).writerows(rows)
    return path


def test_metadata_list(tmp_path: Path) -> None:
    pictures(tmp_path, "1.png", "2.png", "0.png")
    rows = [
        {"file_name": "1.png", "text": ["picture 0", "two"]},
        {"file_name": "2.png", "text": "one"},
        {"file_name": "./0.png", "text": "zero", "more": 3},
    ]
    write_list(tmp_path, rows)
    source = open_source(data_of(tmp_path))
    assert isinstance(source, Lists)
    check_samples(source, 3, [["picture 0", "two"], ["one"], ["zero"]])
    assert [entry.name for entry in source.entries()] == ["1.png", "2.png", "0.png"], "the order of the lines"


def test_fill50k(tmp_path: Path) -> None:
    """As its train.jsonl has it: images, conditioning images and texts; the script beside it is not run."""
    (tmp_path / "fill50k.py").write_text("raise SystemExit('this was run')")
    lines = []
    for number in range(3):
        pictures(tmp_path, *[f"images/{n}.png" for n in range(number + 1)])
        (tmp_path / "conditioning_images").mkdir(exist_ok=True)
        (tmp_path / "conditioning_images" / f"{number}.png").write_bytes(b"hint %d" % number)
        lines.append(
            {
                "text": f"picture {number}",
                "image": f"images/{number}.png",
                "conditioning_image": f"conditioning_images/{number}.png",
            }
        )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for place in (tmp_path, tmp_path / "train.jsonl"):
        check_samples(open_source(data_of(place)), 3)
        source = open_source(data_of(place, conditioning_column="conditioning_image"))
        check_samples(source, 3)
        entries = list(source.entries())
        assert entries[1].hint == Span("conditioning_images/1.png")
        assert source.open(Span("conditioning_images/1.png")).read() == b"hint 1"
        before = source.stamp()
        (tmp_path / "conditioning_images" / "1.png").write_bytes(b"hint 9")
        after = list(source.entries())
        assert source.stamp() != before
        assert [one.stamp != two.stamp for one, two in zip(entries, after, strict=True)] == [
            False,
            True,
            False,
        ]
        (tmp_path / "conditioning_images" / "1.png").write_bytes(b"hint 1")


def test_nested_lists_and_another_key(tmp_path: Path) -> None:
    text_folder(tmp_path / "a", 1)
    pictures(tmp_path, "-", "b/c/x.PNG")
    (tmp_path / "-").unlink()
    write_list(tmp_path / "b", [{"file_name": "c/x.PNG", "prompt": "picture 1"}])
    (tmp_path / "b" / "train.jsonl").write_text("of something else\n")
    source = open_source(data_of(tmp_path, caption_column="prompt"))
    assert captions_by_name(list(source.entries())) == {
        "b/c/x.PNG": ["picture 1"],
        "a/000.png": ["picture 0"],
    }
    assert source.open(Span("b/c/x.PNG")).read() == encoded(picture(1))


def test_lines_for_one_image_add_up(tmp_path: Path) -> None:
    """Side by side, apart, and in the list of a folder below; the same caption counts once."""
    text_folder(tmp_path, 3)
    pictures(tmp_path, "-", "b/x.png")
    (tmp_path / "-").unlink()
    pairs = [("000.png", "a"), ("000.png", "b"), ("001.png", "c"), ("b/x.png", "d"), ("./000.png", "e")]
    write_list(tmp_path, [{"file_name": name, "text": text} for name, text in [*pairs, ("001.png", "c")]])
    write_list(
        tmp_path / "b", [{"file_name": "../001.png", "text": ["f"]}, {"file_name": "x.png", "text": "g"}]
    )
    entries = all_of(tmp_path)
    assert captions_by_name(entries) == {
        "000.png": ["a", "b", "e"],
        "001.png": ["f", "c"],
        "b/x.png": ["g", "d"],
        "002.png": ["picture 2"],
    }
    assert list(captions_by_name(entries)) == ["001.png", "b/x.png", "000.png", "002.png"], "as the lists go"


def test_lines_for_one_image_with_weights_and_faults(tmp_path: Path) -> None:
    """A line that cannot be used is told as such; the others still make a record."""
    text_folder(tmp_path, 1)
    rows: list[dict[str, Any]] = [
        {"file_name": "000.png", "text": 7, "w": 1},
        {"file_name": "000.png", "text": ["a", "b"], "w": [1, 2]},
        {"file_name": "000.png", "text": "c"},
        {"file_name": "000.png", "text": ["a", "d"], "w": [9, 3]},
    ]
    write_list(tmp_path, rows)
    entries = all_of(tmp_path, caption_weight_column="w")
    (record,) = [entry for entry in entries if not entry.fault]
    assert (record.captions, record.weights) == (("a", "b", "d"), (1.0, 2.0, 3.0))
    assert list(faults_of(entries)) == ["line 1 of metadata.jsonl", "line 3 of metadata.jsonl"]


def test_one_image_with_several_hints_is_several_records(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "x.png", "y.png")
    pairs = [("x.png", "one"), ("y.png", "two"), ("x.png", "three")]
    write_list(tmp_path, [{"file_name": "a.png", "hint": hint, "text": text} for hint, text in pairs])
    entries = all_of(tmp_path, conditioning_column="hint")
    assert captions_by_name(entries) == {"a.png": ["one", "three"], "a.png with y.png": ["two"]}
    assert [entry.hint for entry in entries] == [Span("x.png"), Span("y.png")]


def test_images_that_no_line_names(tmp_path: Path) -> None:
    text_folder(tmp_path, 2)
    pictures(tmp_path, "listed.png", "masks/0.png", "alone.png", "IMG.HEIC")
    write_list(tmp_path, [{"file_name": "listed.png", "text": "x", "mask": "masks/0.png", "n": 1}])
    entries = all_of(tmp_path)
    named = {"listed.png": ["x"], "000.png": ["picture 0"], "001.png": ["picture 1"]}
    assert captions_by_name(entries) == named
    faults = faults_of(entries)
    assert list(faults) == ["IMG.HEIC", "alone.png"]
    assert faults["alone.png"].startswith("no line of a list names it, and: no caption: no alone.txt")
    assert captions_by_name(all_of(tmp_path, prompt="p")) == named | {"alone.png": ["p"]}
    # Of a list that is the source itself only the lines count.
    assert captions_by_name(all_of(tmp_path / "metadata.jsonl")) == {"listed.png": ["x"]}
    # Without a hint none of them can be used.
    hinted = all_of(tmp_path, conditioning_column="mask")
    assert captions_by_name(hinted) == {"listed.png": ["x"]}
    assert "no conditioning image" in faults_of(hinted)["000.png"]


def test_a_line_without_caption(tmp_path: Path) -> None:
    """The file beside the image has it, or the prompt, or nothing has."""
    text_folder(tmp_path, 1)
    pictures(tmp_path, "a.png", "b.png", "c.png")
    rows: list[dict[str, Any]] = [
        {"file_name": "000.png", "n": 1},
        {"file_name": "a.png"},
        {"file_name": "b.png", "text": None},
        {"file_name": "c.png", "text": ""},
    ]
    write_list(tmp_path, rows)
    entries = all_of(tmp_path)
    assert captions_by_name(entries) == {"000.png": ["picture 0"], "c.png": [""]}
    fault = faults_of(entries)["line 2 of metadata.jsonl"]
    assert "no caption: no a.txt or a.json beside it" in fault and 'no "text", but file_name' in fault
    told = captions_by_name(all_of(tmp_path, prompt="p"))
    assert told == {"000.png": ["picture 0"], "a.png": ["p"], "b.png": ["p"], "c.png": [""]}
    assert len(faults_of(all_of(tmp_path / "metadata.jsonl"))) == 3
    assert captions_by_name(all_of(tmp_path / "metadata.jsonl", prompt="p")) == told | {"000.png": ["p"]}


def test_image_column(tmp_path: Path) -> None:
    """A column that is asked for goes before file_name."""
    pictures(tmp_path, "a.png", "b.png")
    write_list(tmp_path, [{"file_name": "a.png", "photo": "b.png", "image": "b.png", "text": "x"}])
    assert all_of(tmp_path / "metadata.jsonl")[0].name == "a.png"
    assert all_of(tmp_path / "metadata.jsonl", image_column="photo")[0].name == "b.png"


def test_repeats_of_listed_folders(tmp_path: Path) -> None:
    pictures(tmp_path, "10_dog/a.png", "b.png")
    write_list(tmp_path, [{"file_name": "10_dog/a.png"}, {"file_name": "b.png", "text": "b"}])
    entries = all_of(tmp_path, folder_repeats=True)
    assert [(entry.group, entry.repeats, entry.captions) for entry in entries] == [
        ("10_dog", 10, ("dog",)),
        ("", 1, ("b",)),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"file_name": "000.png"', "not JSON"),
        ('["000.png", "x"]', "no object with keys: ['000.png', 'x']"),
        (
            '{"image_file": "000.png", "text": "x"}',
            'no "file_name" or "image": its keys are image_file, text',
        ),
        ('{"file_name": "", "text": "x"}', 'no "file_name"'),
        ('{"file_name": 7, "text": "x"}', "no path of a file: 7"),
        ('{"file_name": "7.png", "text": "x"}', 'no such file: "7.png"'),
        ('{"file_name": "000.txt", "text": "x"}', '"000.txt" is not of a format that is read'),
        ('{"file_name": "folder.png", "text": "x"}', '"folder.png" is not a file'),
        ('{"file_name": ".hidden/x.png", "text": "x"}', "hidden"),
        ('{"file_name": "000.png", "text": 7}', 'its caption "text" is 7'),
        ('{"file_name": "000.png", "text": ["x", null]}', 'its caption "text" is'),
        ('{"file_name": "000.png", "text": "\\ud800"}', "half a letter"),
        ('{"file_name": "\\ud800.png", "text": "x"}', "no path of a file"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "no path of a file"),
        ('{"file_name": "' + "x" * 5000 + '.png", "text": "x"}', "cannot be read"),
        ('{"file_name": "../secret.png", "text": "x"}', "path leaves the data folder: ../secret.png"),
        ('{"file_name": "a/../../secret.png", "text": "x"}', "path leaves the data folder"),
        ('{"file_name": "..\\\\secret.png", "text": "x"}', "path leaves the data folder"),
        ('{"file_name": "SECRET", "text": "x"}', "path leaves the data folder: /"),
        ('{"file_name": "C:\\\\secret.png", "text": "x"}', "path leaves the data folder"),
        ('{"file_name": "\\\\\\\\host\\\\secret.png", "text": "x"}', "path leaves the data folder"),
        ('{"file_name": "~/secret.png", "text": "x"}', "path leaves the data folder"),
        ('{"file_name": "..", "text": "x"}', "path leaves the data folder"),
        ('{"file_name": "file:///etc/secret.png", "text": "x"}', "no such file"),
    ],
)
def test_faulty_lines(tmp_path: Path, line: str, reason: str) -> None:
    """Each is named by its number, with its reason, and the lines around it count."""
    place = text_folder(tmp_path / "set", 2)
    pictures(tmp_path, "secret.png", "set/.hidden/x.png")
    (place / "folder.png").mkdir()
    good = '{"file_name": "00%d.png", "text": "x"}'
    line = line.replace("SECRET", str(tmp_path / "secret.png"))
    (place / "metadata.jsonl").write_text(f"\n{good % 0}\n{line}\n{good % 1}\n")
    entries = all_of(place)
    assert captions_by_name(entries) == {"000.png": ["x"], "001.png": ["x"]}
    faults = faults_of(entries)
    assert list(faults) == ["line 3 of metadata.jsonl"]
    assert reason in faults["line 3 of metadata.jsonl"]
    assert faults_of(all_of(place / "metadata.jsonl")).keys() == (
        {*faults} if "hidden" not in reason else set()
    )
    if reason.startswith("path leaves"):
        row = {"file_name": "000.png", "text": "x", "hint": json.loads(line)["file_name"]}
        (place / "metadata.jsonl").write_text(json.dumps(row))
        hinted = faults_of(all_of(place, conditioning_column="hint"))
        assert reason in hinted["line 1 of metadata.jsonl"]


def test_paths_that_stay_inside() -> None:
    assert inside("b/", "../a/./x.png") == "a/x.png"
    assert inside("", "images\\0.png") == "images/0.png"
    assert inside("b/", "..x/y.png") == "b/..x/y.png"
    for base, path in (("", "../x"), ("b/", "../../x"), ("", "/x"), ("", "."), ("b/", "..")):
        with pytest.raises(Unusable, match="leaves"):
            inside(base, path)


def test_a_link_that_a_list_names_is_followed(tmp_path: Path) -> None:
    """What a text says is confined; what the user linked is the user's."""
    pictures(tmp_path, "blobs/0.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.png").symlink_to(tmp_path / "blobs" / "0.png")
    write_list(tmp_path / "set", [{"file_name": "0.png", "text": "picture 0"}])
    check_samples(open_source(data_of(tmp_path / "set")), 1)


def test_csv(tmp_path: Path) -> None:
    """With quotes, commas and lines within a cell, a mark at the beginning, and two kinds of line ends."""
    names = ["a, b.png", "Kn\u00e4uel.png", "0000000000000002.png"]
    pictures(tmp_path, *names)
    texts = ["one,\r\ntwo", ' "quoted" ', ""]
    rows = [
        ["text", "file_name", "w"],
        *([text, name, "0.5"] for name, text in zip(names, texts, strict=True)),
    ]
    for ending in ("\n", "\r\n"):
        plain = write_csv(tmp_path / "metadata.csv", rows, ending).read_bytes()
        for begin in (b"", b"\xef\xbb\xbf"):
            (tmp_path / "metadata.csv").write_bytes(begin + plain)
            wanted = [["one,\r\ntwo"], ['"quoted"'], [""]]
            for place in (tmp_path, tmp_path / "metadata.csv"):
                check_samples(open_source(data_of(place)), 3, wanted)
            assert all_of(tmp_path, caption_weight_column="w")[1].weights == (0.5,)


def test_csv_lines_for_one_image_add_up(tmp_path: Path) -> None:
    """They are read again from the middle of the file, after cells of several lines."""
    text_folder(tmp_path, 2)
    rows = [["file_name", "text"], ["000.png", "a\nb"], ["001.png", "c\n\n"], ["000.png", 'd,\n"e"']]
    write_csv(tmp_path / "metadata.csv", rows)
    assert captions_by_name(all_of(tmp_path)) == {"000.png": ["a\nb", 'd,\n"e"'], "001.png": ["c"]}


def test_csv_mistakes(tmp_path: Path) -> None:
    text_folder(tmp_path, 3)
    path = tmp_path / "metadata.csv"
    write_csv(path, [["file_name", "caption"], ["000.png", "x"]])
    refused(tmp_path, "the column text", "file_name, caption")
    write_csv(path, [["name", "text"], ["000.png", "x"]])
    refused(tmp_path, "file_name or image", "name, text")
    for empty in (b"", b"\n\n", b"\xff\xfe"):
        path.write_bytes(empty)
        refused(tmp_path, "the names of columns", "metadata.csv")
    path.write_bytes(
        b'file_name,text\n000.png,x\n001.png\n002.png,"a"b\n\xff.png,x\n\n001.png,y,z\n002.png,ok\n001.png,"open'
    )
    entries = all_of(path)
    assert captions_by_name(entries) == {"000.png": ["x"], "002.png": ["ok"]}
    faults = faults_of(entries)
    assert [name.split()[1] for name in faults] == ["3", "4", "5", "7", "9"]
    for word, reason in zip(
        ["1 cells under 2", "csv", "UTF-8", "3 cells", "csv"], faults.values(), strict=True
    ):
        assert word in reason


def test_windows_marks_in_jsonl(tmp_path: Path) -> None:
    """A byte order mark, CR LF, and Unicode's line ends, which end no line of JSON."""
    text_folder(tmp_path, 2)
    text = "one\u2028two\x85three"
    lines = [f'{{"file_name": "00{n}.png", "text": "{text}"}}' for n in range(2)]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert captions_by_name(all_of(tmp_path)) == {"000.png": [text], "001.png": [text]}


def test_lines_that_are_not_utf8(tmp_path: Path) -> None:
    text_folder(tmp_path, 2)
    good = b'{"file_name": "001.png", "text": "x"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "000.png", "text": "\xe4"}\n' + good)
    entries = all_of(tmp_path / "metadata.jsonl")
    assert "not UTF-8" in faults_of(entries)["line 1 of metadata.jsonl"]
    assert captions_by_name(entries) == {"001.png": ["x"]}


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    text_folder(tmp_path, 1)
    with (tmp_path / "metadata.jsonl").open("wb") as file:
        file.truncate(2**25)
    refused(tmp_path, "line 1 of metadata.jsonl", "longer than")


def test_which_list(tmp_path: Path) -> None:
    text_folder(tmp_path, 1)
    refused(tmp_path, "metadata.jsonl", "data.kind", kind="list")
    refused(tmp_path / "000.png", "another kind", kind="list")
    write_list(tmp_path, [{"file_name": "000.png", "text": "x"}])
    write_csv(tmp_path / "metadata.csv", [["file_name", "text"], ["000.png", "y"]])
    refused(tmp_path, "metadata.csv and metadata.jsonl", "data.source")
    assert captions_by_name(all_of(tmp_path / "metadata.csv")) == {"000.png": ["y"]}
    refused(tmp_path / "other.jsonl", "no such folder or file")


def test_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    refused(tmp_path, "none of them an image")
    refused(tmp_path / "metadata.jsonl", "none of them an image")


def test_a_list_that_changes_while_it_is_read(tmp_path: Path) -> None:
    text_folder(tmp_path, 3)
    long = "x" * 2**16  # more than is read ahead
    write_list(tmp_path, [{"file_name": f"00{n}.png", "text": long} for n in range(3)])
    told = open_source(data_of(tmp_path)).entries()
    next(told)
    write_list(tmp_path, [{"file_name": f"00{n}.png", "text": long} for n in (0, 2, 1)])
    with pytest.raises(UserError, match="changed while it was read"):
        list(told)


def test_stamp_of_a_list(tmp_path: Path) -> None:
    """A list in a folder that holds much else does not look at that."""
    text_folder(tmp_path, 3)
    write_list(tmp_path, [{"file_name": f"00{n}.png", "text": "x"} for n in range(2)])
    whole, alone = open_source(data_of(tmp_path)), open_source(data_of(tmp_path / "metadata.jsonl"))
    before = whole.stamp(), alone.stamp()
    assert before == (whole.stamp(), alone.stamp())
    (tmp_path / "002.png").write_bytes(b"another")
    assert whole.stamp() != before[0] and alone.stamp() == before[1]
    (tmp_path / "001.png").write_bytes(b"another")
    changed = alone.stamp()
    assert changed != before[1]
    write_list(tmp_path, [{"file_name": f"00{n}.png", "text": "y"} for n in range(2)])
    assert alone.stamp() != changed


def test_rows_begin_where_they_say(tmp_path: Path) -> None:
    """Every row can be read again from its byte."""
    lines = ['{"a": 1}', "", "[1]", '{"a": "\u00e4\u732b"}', "bad", '{"a": 3}']
    (tmp_path / "x.jsonl").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    write_csv(tmp_path / "x.csv", [["a", "b"], ["1", "x\n\ny"], ["\u00e4\u732b", '"'], ["3", ""]])
    for name in ("x.jsonl", "x.csv"):
        rows = Rows(tmp_path, name)
        told = list(rows)
        assert [row.values.get("a") for row in told if row.values] in (
            [1, "\u00e4\u732b", 3],
            ["1", "\u00e4\u732b", "3"],
        )
        for row in told:
            again = rows.at(row.offset)
            assert (again.values, again.fault) == (row.values, row.fault)


def test_memory_of_a_list(tmp_path: Path) -> None:
    """At most 64 bytes a line; the lines themselves are not kept."""
    peaks = []
    for count in (1, 500, 2500):  # the first one imports what the others need
        rows = ({"file_name": f"{n}.png", "text": "a caption " * 20} for n in range(count))
        write_list(tmp_path, list(rows))
        source = open_source(data_of(tmp_path))
        tracemalloc.start()
        assert sum(1 for _ in source.entries()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1]) / 2000 < 64, peaks
