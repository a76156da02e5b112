"""The audit of the data on a folder with every kind of fault: what it counts, and the page that it writes."""

import io
import json
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from rich.console import Console

from sfumato.audit import examine
from sfumato.audit.findings import KINDS
from sfumato.audit.pixels import Trait
from sfumato.config import Config, parse
from sfumato.errors import UserError
from sfumato.models.vocabulary import write_tokenizer

SCRIPT = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
LONG = "word " * 90
TURN = 0x0112


def scene(number: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A soft picture of (height, width) as photographs are, unlike every other number's."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def save(place: Path, name: str, image: Image.Image, caption: str | None = None, **options: Any) -> None:
    """An image file and its caption."""
    image.save(place / name, **options)
    write(place, name, caption)


def write(place: Path, name: str, caption: str | None = None) -> None:
    """A caption beside an image."""
    text = f"a scene called {name}" if caption is None else caption
    (place / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def bomb() -> bytes:
    """A PNG of some hundred bytes that says it has 2,500,000,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def sixteen_bit(path: Path) -> None:
    """A 16-bit RGB PNG, which Pillow reads but does not write."""
    values = np.asarray(scene(70, (64, 64))).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 sound pictures, and at least one of everything that can be odd."""
    place = tmp_path_factory.mktemp("ward")
    for number in range(12):
        save(place, f"good{number:02}.png", scene(number))
    # Faults of the header, and of the pixels behind a sound header.
    (place / "bomb.png").write_bytes(bomb())
    (place / "text.png").write_text("no picture at all")
    file = io.BytesIO()
    scene(20, (200, 200)).save(file, "JPEG")
    (place / "cut.jpg").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    for name in ("bomb.png", "text.png", "cut.jpg"):
        write(place, name)
    # Kinds of pixels.
    save(place, "cmyk.jpg", scene(30).convert("CMYK"))
    sixteen_bit(place / "deep.png")
    write(place, "deep.png")
    grey = np.asarray(scene(31).convert("L")).astype(np.int32) * 256
    save(place, "deepgrey.png", Image.fromarray(grey.astype(np.uint16)))
    glass = scene(32)
    glass.putalpha(Image.fromarray(np.asarray(scene(33).convert("L"))))
    save(place, "glass.png", glass)
    save(place, "palette.png", scene(34).quantize(64), transparency=3)
    turned = scene(35, (64, 128))
    exif = turned.getexif()
    exif[TURN] = 6
    save(place, "turned.jpg", turned, exif=exif)
    save(place, "point.png", Image.new("RGB", (1, 1), "red"))
    save(place, "black.png", Image.new("RGB", (96, 96), "black"))
    save(place, "white.png", Image.new("RGB", (96, 96), "white"))
    save(place, "white2.png", Image.new("RGB", (128, 128), "white"))  # no copy: there is nothing to compare
    save(place, "moving.gif", scene(36), save_all=True, append_images=[scene(37)])
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    save(place, "profile.png", scene(38), icc_profile=lab)
    # Copies.
    shutil.copy(place / "good00.png", place / "copy00.png")
    shutil.copy(place / "good00.txt", place / "copy00.txt")
    save(place, "again01.jpg", scene(1, (192, 192)), quality=60)
    save(place, "mirror02.png", ImageOps.mirror(scene(2)))
    # Captions.
    save(place, "empty.png", scene(40), "")
    save(place, "long.png", scene(41), LONG)
    save(place, "script.png", scene(42), SCRIPT)
    save(place, "bell.png", scene(43), "a bell \x07 and \ufffd")
    save(place, "<b>bold.png", scene(44))
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of an SD folder as the audit reads: its JSON files and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    parts = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "scheduler": "DDIMScheduler",
    }
    index = {"_class_name": "StableDiffusionPipeline"} | {part: ["x", name] for part, name in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    for path in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        (folder / path).parent.mkdir()
        (folder / path).write_text("{}")
    write_tokenizer(folder / "tokenizer")
    return folder


def config_of(place: Path, model: Path | str, store: Path, **data: Any) -> Config:
    """A config; only what the audit reads matters."""
    told = {"source": str(place), "resolution": 64, "store": str(store), "max_faults": 0.2} | data
    return parse({"steps": 1, "batch_size": 4, "model": {"weights": str(model)}, "data": told})


@pytest.fixture(scope="module")
def out(ward: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the audit wrote about the ward."""
    out = tmp_path_factory.mktemp("out")
    examine(config_of(ward, model, out / "store"), out)
    return out


@pytest.fixture(scope="module")
def report(out: Path) -> Any:
    return json.loads((out / "report.json").read_text())


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(out: Path, kind: str) -> set[str]:
    """The records of a kind of finding."""
    return {told["name"] for told in lines(out / "findings.jsonl") if told["kind"] == kind}


KNOWN = {
    "fault": {"bomb.png", "text.png", "cut.jpg"},
    "rotated": {"turned.jpg"},
    "cmyk": {"cmyk.jpg"},
    "sixteen_bit": {"deep.png", "deepgrey.png"},
    "palette": {"palette.png", "moving.gif"},
    "alpha": {"glass.png", "palette.png"},
    "profile": {"profile.png"},
    "animated": {"moving.gif"},
    "grey": {"deepgrey.png", "black.png", "white.png", "white2.png"},
    "blank": {"point.png", "black.png", "white.png", "white2.png"},
    "dark": {"black.png"},
    "bright": {"white.png", "white2.png"},
    "exact_duplicate": {"good00.png"},
    "near_duplicate": {"good01.png"},
    "enlarged": {"point.png"},
    "cropped": {"turned.jpg"},
    "empty_caption": {"empty.png"},
    "long_caption": {"long.png"},
    "odd_caption": {"bell.png"},
    "repeated_caption": {"copy00.png"},
}
"""What is to be found in the ward: this and nothing else."""


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_and_nothing_else(kind: str, out: Path, report: Any) -> None:
    assert names(out, kind) == KNOWN.get(kind, set())
    counts = {problem["kind"]: problem["count"] for problem in report["problems"]}
    assert counts.get(kind, 0) == len(KNOWN.get(kind, set()))


def test_every_trait_is_a_kind() -> None:
    assert {trait.kind for trait in Trait} <= set(KINDS) and max(Trait) < 2**16


def test_faults_are_listed_with_their_reasons(out: Path, report: Any) -> None:
    told = {fault["name"]: fault for fault in lines(out / "faults.jsonl")}
    assert set(told) == KNOWN["fault"]
    assert "2,500,000,000 pixels" in told["bomb.png"]["reason"] and told["bomb.png"]["found_in"] == "scan"
    assert "not a picture" in told["text.png"]["reason"] and told["text.png"]["found_in"] == "scan"
    assert "truncated" in told["cut.jpg"]["reason"] and told["cut.jpg"]["found_in"] == "pixels"
    records = report["records"]
    assert (records["faults_scan"], records["faults_pixels"]) == (2, 1)
    assert records["usable"] == records["total"] - 3 == 12 + 20


def test_the_figures_of_pictures(report: Any) -> None:
    pictures = report["pictures"]
    assert pictures["formats"] == {"PNG": 28, "JPEG": 3, "GIF": 1}
    assert list(pictures["profiles"].values()) == [1]
    assert pictures["smallest"] == {"height": 1, "width": 1}
    assert pictures["largest"] == {"height": 192, "width": 192}
    assert sum(pictures["aspects"]["counts"]) == sum(pictures["sides"]["counts"]) == 32


def test_a_turned_picture_is_reckoned_as_it_is_seen(report: Any, out: Path) -> None:
    """64 x 128 turned by EXIF 6 is 128 x 64; half of it is cut away for a square."""
    detail = [told["detail"] for told in lines(out / "findings.jsonl") if told["name"] == "turned.jpg"]
    assert "50% cut away" in detail
    (bucket,) = report["buckets"]
    assert bucket["cropped_most"] == pytest.approx(0.5) and bucket["enlarged_most"] == 64
    assert bucket["enlarged"] == 1 and bucket["records"] == 33


def test_the_figures_of_captions(report: Any) -> None:
    captions = report["captions"]
    assert captions["count"] == 32 and captions["empty"] == captions["odd"] == captions["over_limit"] == 1
    assert captions["unit"] == "tokens" and captions["limit"] == 75
    longest = captions["longest"][0]
    assert longest["name"] == "long.png" and longest["length"] == 90
    # CLIP has one token for "word": 75 are read, 15 are not.
    assert longest["read"].split() == ["word"] * 75 and longest["cut"].split() == ["word"] * 15
    assert captions["most_frequent"] == [
        {"text": "a scene called good00.png", "records": 2, "first": "copy00.png"}
    ]


def test_without_the_model_words_are_counted(ward: Path, tmp_path: Path) -> None:
    examine(config_of(ward, tmp_path / "nowhere", tmp_path), tmp_path)
    captions = json.loads((tmp_path / "report.json").read_text())["captions"]
    assert captions["unit"] == "words" and "nowhere" in captions["why_words"]
    assert captions["longest"][0]["length"] == 90
    assert captions["limit"] is captions["over_limit"] is None
    assert "nowhere" in (tmp_path / "report.html").read_text()


class Reader(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def check_page(text: str) -> None:
    """Fail for a page that runs or loads anything, or whose tags do not match."""
    page = Reader(text)
    assert not page.open, f"not closed: {page.open}"
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "link", "b") or (tag, attributes) == ("b", {}), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(name) or "data:image/jpeg"
            assert value.startswith("data:image/jpeg"), f"<{tag} {name}={value}>"
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text


def test_the_page_is_inert_and_stands_alone(out: Path) -> None:
    text = (out / "report.html").read_text()
    check_page(text)
    assert "<script" not in text.lower() and "&lt;script&gt;alert(1)" in text
    assert "<b>bold" not in text and "&lt;b&gt;bold.png" in text
    assert text.count("data:image/jpeg;base64,") > 20


def test_a_page_without_escapes_is_caught(
    ward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.audit import page

    real = page.Environment

    def careless(**settings: Any) -> Any:
        return real(**settings | {"autoescape": False})

    monkeypatch.setattr(page, "Environment", careless)
    examine(config_of(ward, "nowhere", tmp_path), tmp_path)
    with pytest.raises(AssertionError):
        check_page((tmp_path / "report.html").read_text())


def test_too_many_faults_are_refused_after_the_report(ward: Path, tmp_path: Path) -> None:
    """2 of 35 are known from the scan, which 7% would allow; the third is found in its pixels."""
    with pytest.raises(UserError, match=r"3 \(8.57%\)") as caught:
        examine(config_of(ward, "nowhere", tmp_path, max_faults=0.07), tmp_path)
    assert "truncated" in str(caught.value) and "faults.jsonl" in str(caught.value)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"]["can_start"] is False and report["verdict"]["faults"] == 3
    assert "cannot start" in (tmp_path / "report.html").read_text()


def test_the_console_is_told(ward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, shown = [], io.StringIO()
    page = examine(
        config_of(ward, "nowhere", tmp_path), tmp_path, said.append, Console(file=shown, width=200)
    )
    text = shown.getvalue()
    assert page == tmp_path / "report.html" and str(page) in text and str(tmp_path / "report.json") in text
    assert "32  records of 35 can be trained on" in text and "A run can start" in text
    assert "35 of 35" not in (told := capsys.readouterr().out) and "pictures: 33 of 33" in told


def test_interrupted_it_leaves_nothing_half_done(
    ward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.report.counter import Counter

    def stop(self: Counter, count: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Counter, "add", stop)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        examine(config_of(ward, "nowhere", tmp_path / "store"), out)
    assert list(out.iterdir()) == []


def test_a_folder_that_cannot_be_written(ward: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="a report in"):
        examine(config_of(ward, "nowhere", tmp_path / "store"), tmp_path / "out")


def test_nothing_but_broken_pictures(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for number in range(3):
        file = io.BytesIO()
        scene(number, (200, 200)).save(file, "JPEG")
        (place / f"{number}.jpg").write_bytes(file.getvalue()[:-2000])
        write(place, f"{number}.jpg")
    with pytest.raises(UserError, match="100.00%"):
        examine(config_of(place, "nowhere", tmp_path), tmp_path / "out")
    check_page((tmp_path / "out" / "report.html").read_text())
    assert len(lines(tmp_path / "out" / "faults.jsonl")) == 3


def test_a_picture_one_pixel_wide_is_shown(tmp_path: Path) -> None:
    """Made small enough for the page, it would have no width."""
    place = tmp_path / "place"
    place.mkdir()
    save(place, "good.png", scene(1))
    save(place, "thin.png", scene(2, (500, 1)))
    page = examine(config_of(place, "nowhere", tmp_path), tmp_path / "out")
    assert names(tmp_path / "out", "enlarged") == {"thin.png"}
    assert "data:image/jpeg;base64," in page.read_text()


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    save(tmp_path, "secret.png", scene(1))
    rows = [{"file_name": name, "text": "a"} for name in ("../secret.png", "in.png")]
    save(place, "in.png", scene(2))
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examine(config_of(place, "nowhere", tmp_path, max_faults=0.5), tmp_path / "out")
    (fault,) = lines(tmp_path / "out" / "faults.jsonl")
    assert "secret.png" in fault["name"] + fault["reason"] and fault["found_in"] == "scan"


def test_conditioning_images(tmp_path: Path) -> None:
    """One of another shape, one cut off, one missing, one that is larger but of the same shape."""
    place = tmp_path / "place"
    (place / "edges").mkdir(parents=True)
    for name in ("same", "wide", "cut", "large", "missing"):
        save(place, f"{name}.png", scene(len(name)))
    save(place / "edges", "same.png", scene(1))
    save(place / "edges", "wide.png", scene(2, (96, 128)))
    save(place / "edges", "large.png", scene(3, (192, 192)))
    file = io.BytesIO()
    scene(4, (200, 200)).save(file, "JPEG")
    (place / "edges" / "cut.jpg").write_bytes(file.getvalue()[:-2000])
    rows = [
        {
            "file_name": f"{name}.png",
            "text": name,
            "edges": f"edges/{name}.{'jpg' if name == 'cut' else 'png'}",
        }
        for name in ("same", "wide", "cut", "large", "missing")
    ]
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(place, "nowhere", tmp_path, max_faults=0.5, conditioning_column="edges")
    examine(config, tmp_path / "out")
    out = tmp_path / "out"
    told = {fault["name"]: fault["reason"] for fault in lines(out / "faults.jsonl")}
    assert len(told) == 2 and any("missing.png" in reason for reason in told.values())
    assert told["cut.png"].startswith("the conditioning image: ") and "truncated" in told["cut.png"]
    assert names(out, "hint_shape") == {"wide.png"}
    assert json.loads((out / "report.json").read_text())["pictures"]["hints"] == 3


def test_buckets_and_what_is_too_small(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for number in range(6):
        save(place, f"wide{number}.png", scene(number, (64, 128)))
    save(place, "tall.png", scene(10, (128, 64)))
    save(place, "tiny.png", scene(11, (16, 16)))
    config = config_of(
        place, "nowhere", tmp_path, resolution=96, buckets={"step": 32, "upscale": False}, max_faults=0
    )
    examine(config, tmp_path / "out")
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    held = {(row["width"], row["height"]): row["records"] for row in report["buckets"] if row["records"]}
    assert held == {(128, 64): 6, (64, 128): 1}
    assert names(out, "too_small") == {"tiny.png"} and report["records"]["too_small"] == 1
    assert names(out, "small_bucket") == {"64 x 128"}
    assert not names(out, "enlarged") and not names(out, "cropped")
