"""Parquet files as the hub has them, and every mistake that can be in one."""

import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sfumato.data.sources import Span, open_source
from sfumato.data.sources.parquet import Parquet
from sfumato.data.sources.tables import HINT, IMAGE
from sfumato.errors import UserError
from tests.unit.pictures import (
    all_of,
    captions_by_name,
    captions_of,
    check_samples,
    data_of,
    encoded,
    faults_of,
    parquet_file,
    picture,
    refused,
    struct,
    text_folder,
)


def test_parquet_like_pokemon(tmp_path: Path) -> None:
    parquet_file(tmp_path / "data" / "train-001.parquet", [struct(n) for n in range(7)], captions_of(7))
    (tmp_path / "dataset_infos.json").write_text("{}")
    picture(9).save(tmp_path / "preview.png")
    source = open_source(data_of(tmp_path))
    assert isinstance(source, Parquet)
    check_samples(source, 7)
    entry = list(source.entries())[4]
    assert entry.name == "row 4 of data/train-001.parquet"
    assert entry.image == Span("data/train-001.parquet", 4, IMAGE)
    check_samples(open_source(data_of(tmp_path / "data" / "train-001.parquet")), 7)


def test_parquet_of_several_files_and_groups(tmp_path: Path) -> None:
    counts = [4, 1, 5]
    starts = [0, 4, 5]
    for file, (start, count) in enumerate(zip(starts, counts, strict=True)):
        numbers = range(start, start + count)
        cells, captions = [struct(n) for n in numbers], [f"picture {n}" for n in numbers]
        parquet_file(tmp_path / f"part-{file}.parquet", cells, captions, group=2)
    source = open_source(data_of(tmp_path))
    check_samples(source, 10)
    names = [entry.name for entry in source.entries()]
    assert (names[4], names[9]) == ("row 0 of part-1.parquet", "row 4 of part-2.parquet")


def test_parquet_beside_the_files_that_it_describes(tmp_path: Path) -> None:
    """img2dataset writes one without images beside the files, and the files count."""
    text_folder(tmp_path / "00000", 2)
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["x"]}), tmp_path / "00000.parquet")
    check_samples(open_source(data_of(tmp_path)), 2)
    refused(tmp_path, 'data.image_column = "image"', "url, caption", kind="parquet")


def test_parquet_reads_the_training_split(tmp_path: Path) -> None:
    parquet_file(tmp_path / "data" / "test-0.parquet", [struct(8)], ["no"])
    parquet_file(tmp_path / "data" / "train-0.parquet", [struct(0)], ["picture 0"])
    check_samples(open_source(data_of(tmp_path)), 1)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_parquet_of_plain_bytes_and_lists(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [["picture 0", "a"], ["picture 1"]]
    parquet_file(tmp_path / "x.parquet", [encoded(picture(n)) for n in (0, 1)], texts, 3, kind)
    check_samples(open_source(data_of(tmp_path)), 2, texts)


def test_parquet_of_paths(tmp_path: Path) -> None:
    """In a column of texts, in one of few texts that come again, and in the hub's struct."""
    for number in (0, 1):
        (tmp_path / "p").mkdir(exist_ok=True)
        picture(number).save(tmp_path / "p" / f"{number}.png")
    paths = ["p/0.png", "p/1.png"]
    columns = [
        pa.array(paths),
        pa.array(paths).dictionary_encode(),
        pa.array([{"bytes": None, "path": path} for path in paths], struct_type()),
    ]
    for column in columns:
        pq.write_table(pa.table({"image": column, "text": captions_of(2)}), tmp_path / "x.parquet")
        source = open_source(data_of(tmp_path))
        check_samples(source, 2)
        before, entries = source.stamp(), list(source.entries())
        picture(1).save(tmp_path / "p" / "1.png")
        after = list(source.entries())
        assert source.stamp() != before
        assert (entries[0].stamp == after[0].stamp, entries[1].stamp == after[1].stamp) == (True, False)


def struct_type() -> pa.DataType:
    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_paths_of_cells_do_not_leave_the_folder(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "secret.png")
    place = tmp_path / "set"
    paths = ["../secret.png", str(tmp_path / "secret.png"), "~/x.png", "a/../../secret.png", "C:\\x.png", ""]
    cells = [{"bytes": None, "path": path} for path in paths]
    parquet_file(place / "x.parquet", cells, captions_of(6))
    entries = all_of(place)
    assert len(faults_of(entries)) == 6
    assert all("leaves the data folder" in fault for fault in list(faults_of(entries).values())[:5])
    source = open_source(data_of(place))
    for entry in entries:
        with pytest.raises(UserError):
            source.open(entry.image)
    for file in ("../set/x.parquet", "/etc/hostname", "y.parquet"):
        with pytest.raises(UserError, match="it is none of"):
            source.open(Span(file, 0, IMAGE))
    with pytest.raises(UserError, match="has 6 rows"):
        source.open(Span("x.parquet", 6, IMAGE))


def test_parquet_keeps_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_file(tmp_path / "x.parquet", [struct(n) for n in range(8)], captions_of(8), group=2)
    source = open_source(data_of(tmp_path))
    assert isinstance(source, Parquet)
    spans = [entry.image for entry in source.entries()]
    assert not source.kept, "telling the entries reads no image"
    monkeypatch.setattr("sfumato.data.sources.parquet.ROOM", 5 * len(encoded(picture(0))))
    for number in (0, 7, 2, 5, 1, 6, 3, 4):
        assert source.open(spans[number]).read() == encoded(picture(number))
        assert len(source.kept) <= 2
    monkeypatch.setattr("sfumato.data.sources.parquet.ROOM", 1)
    assert source.open(spans[0]).read() and len(source.kept) == 1
    assert not pickle.loads(pickle.dumps(source)).kept


def test_parquet_is_read_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index opens images in threads, while others push row groups out."""
    parquet_file(tmp_path / "x.parquet", [struct(n) for n in range(8)], captions_of(8), group=1)
    monkeypatch.setattr("sfumato.data.sources.parquet.ROOM", 1)
    source = open_source(data_of(tmp_path))
    spans = [entry.image for entry in source.entries()]

    def read(number: int) -> bool:
        return source.open(spans[number % 8]).read() == encoded(picture(number % 8))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


def test_parquet_faults(tmp_path: Path) -> None:
    """Each row that is of no use, with its reason; those around it count."""
    cells = [
        struct(0),
        {"bytes": b"", "path": None},
        None,
        {"bytes": None, "path": "no.png"},
        {"bytes": encoded(picture(4)), "path": "../name only.png"},
        struct(5),
    ]
    captions = ["picture 0", "b", "c", "d", "picture 4", None]
    parquet_file(tmp_path / "x.parquet", cells, captions)
    entries = all_of(tmp_path)
    names = [f"row {n} of x.parquet" for n in range(6)]
    assert captions_by_name(entries) == {names[0]: ["picture 0"], names[4]: ["picture 4"]}
    nothing = 'no image: "image" holds neither bytes nor a path'
    assert faults_of(entries) == {
        names[1]: nothing,
        names[2]: nothing,
        names[3]: 'no such file: "no.png"',
        names[5]: 'no caption: "text" is empty, and data.prompt is not set',
    }
    assert captions_by_name(all_of(tmp_path, prompt="p"))[names[5]] == ["p"]


def test_parquet_without_a_caption_column(tmp_path: Path) -> None:
    parquet_file(tmp_path / "x.parquet", [struct(0), struct(1)], ["a", "b"])
    refused(tmp_path, 'data.caption_column = "prompt"', "image, text", caption_column="prompt")
    check_samples(open_source(data_of(tmp_path, caption_column="prompt", prompt="p")), 2, [["p"], ["p"]])


def test_parquet_mistakes(tmp_path: Path) -> None:
    file = parquet_file(tmp_path / "x.parquet", [struct(0), struct(1)], ["a", None])
    refused(tmp_path, 'data.image_column = "photo"', "image, text", image_column="photo")
    refused(tmp_path, 'data.conditioning_column = "hint"', "image, text", conditioning_column="hint")
    refused(tmp_path, 'data.caption_weight_column = "w"', "image, text", caption_weight_column="w")
    refused(tmp_path, "data.folder_repeats", folder_repeats=True)
    refused(tmp_path, "data.caption_file", caption_file="txt")
    parquet_file(tmp_path / "y.parquet", [struct(0)], ["a"])
    pq.write_table(pa.table({"image": [b"x"], "prompt": ["x"]}), tmp_path / "y.parquet")
    refused(tmp_path, 'data.caption_column = "text"', "image, prompt")
    (tmp_path / "y.parquet").unlink()
    parquet_file(file, [], pa.array([], pa.string()))
    refused(tmp_path, "without a row")
    parquet_file(file, [struct(0)], [3.5])
    assert "3.5" in faults_of(all_of(tmp_path))["row 0 of x.parquet"]
    file.write_bytes(b"PAR1 not at all")
    refused(tmp_path, str(file), "cannot be read")
    file.unlink()
    refused(tmp_path, "no parquet file", kind="parquet")


def test_damaged_row_group(tmp_path: Path) -> None:
    """The table of contents is whole, but a page is not: the file is of no use, and named."""
    cells = [struct(n) for n in range(4)]
    file = parquet_file(tmp_path / "x.parquet", cells, captions_of(4))
    data = bytearray(file.read_bytes())
    facts = pq.ParquetFile(file).metadata.row_group(0)
    for n in range(facts.num_columns):
        data[facts.column(n).data_page_offset : facts.column(n).data_page_offset + 20] = b"\xff" * 20
    file.write_bytes(data)
    refused(tmp_path, "x.parquet", "cannot be read")
    with pytest.raises(UserError, match="row group 0"):
        open_source(data_of(tmp_path)).open(Span("x.parquet", 0, IMAGE))


def test_parquet_column_of_another_type(tmp_path: Path) -> None:
    parquet_file(tmp_path / "x.parquet", [1, 2], captions_of(2), 3, pa.int64())
    assert len(faults_of(all_of(tmp_path))) == 2


def test_weights_and_hints(tmp_path: Path) -> None:
    table = pa.table(
        {
            "photo": pa.array([struct(n) for n in range(3)], struct_type()),
            "canny": pa.array([struct(7), None, struct(9)], struct_type()),
            "captions": [["a", "b"], ["c"], ["d", "e"]],
            "w": [[1.0, 2.0], [1.0], [0.0, 3.0]],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    settings = {"image_column": "photo", "caption_column": "captions", "conditioning_column": "canny"}
    source = open_source(data_of(tmp_path, caption_weight_column="w", **settings))
    first, second, third = source.entries()
    assert (first.captions, first.weights) == (("a", "b"), (1.0, 2.0))
    assert (third.captions, third.weights) == (("e",), (3.0,))
    assert second.fault == 'no image: "canny" holds neither bytes nor a path'
    assert first.hint == Span("x.parquet", 0, HINT) and third.hint is not None
    assert source.open(first.image).read() == encoded(picture(0))
    assert source.open(first.hint).read() == encoded(picture(7))
    assert source.open(third.hint).read() == encoded(picture(9))


def test_stamp_of_parquet(tmp_path: Path) -> None:
    parquet_file(tmp_path / "x.parquet", [struct(0)], ["a"])
    source = open_source(data_of(tmp_path))
    before, (entry,) = source.stamp(), source.entries()
    assert source.stamp() == before
    parquet_file(tmp_path / "x.parquet", [struct(0)], ["b"])
    assert source.stamp() != before and list(source.entries())[0].stamp != entry.stamp


def test_memory_of_parquet(tmp_path: Path) -> None:
    """Captions are told by the row group: twenty times as many take no more memory."""
    peaks = []
    for count in (500, 10_000):
        parquet_file(tmp_path / "x.parquet", [b"x"] * count, ["a caption " * 20] * count, 100, pa.binary())
        source = open_source(data_of(tmp_path))
        tracemalloc.start()
        assert sum(1 for _ in source.entries()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000, peaks
