"""A model card: the hub can read it, its code runs, nothing that a user wrote steers it, no path is told."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from sfumato import config
from sfumato.report import card, public
from sfumato.report.curve import bounds, curve, label, smoothed, thinned, ticks

NASTY = "a `b` | c <script>alert(1)</script>\n---\nlicense: [x](javascript:1)\n\n# big \u202eback ![i](u) 😀"
STATE = {"step": 20, "samples": 40, "data": "abc123", "records": 7}


def settings(place: Path, **changes: Any) -> config.Config:
    values: dict[str, Any] = {
        "name": "cats",
        "output": str(place / "runs"),
        "steps": 20,
        "batch_size": 2,
        "model": {"weights": str(place / "base")},
        "data": {"source": str(place / "secret" / "pictures"), "resolution": 64, "store": str(place)},
        "optimizer": {"lr": 1e-3},
    }
    return config.parse(values | changes)


def facts(settings: config.Config, family: str = "sd") -> dict[str, Any]:
    method = settings.method
    trigger = method.word if method.kind == "textual_inversion" else settings.data.prompt
    return {"step": 20, "weights": "ema", "family": family, "trigger": trigger, "sfumato": "0.1.0"}


def written(place: Path, settings: config.Config, family: str = "sd", run: Path | None = None) -> str:
    folder = place / "export"
    folder.mkdir(exist_ok=True)
    card.write(folder, settings, STATE, facts(settings, family), run)
    return (folder / "README.md").read_text(encoding="utf-8")


def run_folder(place: Path) -> Path:
    """What the loop leaves: a curve with gaps and a torn line, and three sets of previews."""
    run = place / "runs" / "cats"
    lines = [json.dumps({"step": n, "loss": None if n == 7 else 1 / n}) for n in range(1, 31)]
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    for step in (10, 20, 30):
        folder = run / "images" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        told = []
        for number, prompt in enumerate(("a cat", NASTY)):
            Image.new("RGB", (64, 64), (step * 8, 60, 90 * number)).save(folder / f"{number}.png")
            told.append(json.dumps({"file": f"{number}.png", "prompt": prompt}) + "\n")
        (folder / "drawings.jsonl").write_text("".join(told))
    packages = {"torch": "2.13.0+cpu"}
    told_of = {"sfumato": "0.1.0", "python": "3.11", "ranks": 2, "device": "cpu", "packages": packages}
    (run / "environment.json").write_text(json.dumps(told_of))
    return run


def test_it_shows_the_curve_and_the_first_and_last_pictures(tmp_path: Path) -> None:
    text = written(tmp_path, settings(tmp_path), run=run_folder(tmp_path))
    assert "Drawn after 10 and 20 steps, with the same seeds" in text and "30" not in text.split("##")[0]
    with Image.open(tmp_path / "export" / "drawn.png") as sheet:
        assert {(80, 60, 0), (160, 60, 0), (80, 60, 90), (160, 60, 90)} <= set(
            colour for _, colour in sheet.getcolors(100_000)
        )
    assert card.losses(tmp_path / "runs" / "cats" / "metrics.jsonl", 20) == [
        (n, 1 / n) for n in range(1, 21) if n != 7
    ]
    with Image.open(tmp_path / "export" / "curve.png") as picture:
        assert picture.size == (960, 480)
    assert "7 images of `pictures`; 40 samples were seen. Fingerprint: `abc123`" in text
    assert "torch 2.13.0+cpu" in text and "2 cpu ranks" in text


def test_a_controlnet_is_shown_beside_its_second_images(tmp_path: Path) -> None:
    """Also where a prompt holds what other programs take for a line's end."""
    run = run_folder(tmp_path)
    for number in range(2):
        place = run / "images" / "conditions" / f"{number:03d}.png"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (7, 8, 9 + number)).save(place)
    for folder in run.glob("images/step-*"):
        rows = [{"file": f"{n}.png", "prompt": f"a\u2028cat\x85{n}"} for n in range(2)]
        told = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "drawings.jsonl").write_text(told, encoding="utf-8")
    assert "drawn.png" in written(tmp_path, settings(tmp_path), run=run)
    with Image.open(tmp_path / "export" / "drawn.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(100_000)}
    assert {(7, 8, 9), (7, 8, 10), (80, 60, 0), (160, 60, 90)} <= colours


def test_previews_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "images" / "step-000020" / "1.png").write_bytes(b"half")
    assert "drawn.png" not in written(tmp_path, settings(tmp_path), run=run)
    assert "curve.png" in written(tmp_path, settings(tmp_path), run=run)


def check_tame(text: str, place: Path) -> None:
    """Fail if a user's text became markup, or a path of this machine is told."""
    head = ModelCard(text)
    assert head.data.license is None and head.data.library_name == "diffusers", "front matter was changed"
    assert text.count("\n---\n") == 1, "a second rule"
    body = re.sub(r"(?ms)^```.*?^```$", "", head.text)
    bare = re.sub(r"`[^`\n]*`", "", body.replace("\\`", ""))
    bare = re.sub(r"\\.", "", bare)
    for mark in ("<script", "](javascript", "![i]", "\n# big"):
        assert mark not in bare, f"{mark} is markup"
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), "a row has other cells"
    assert "\u202e" not in text, "a letter turns the line"
    assert str(place) not in text and "secret" not in text, "a path is told"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_user_wrote_steers_nothing(tmp_path: Path, kind: str) -> None:
    odd = settings(
        tmp_path,
        method={"kind": kind},
        preview={"prompts": [NASTY, "```\n```"]},
        data={"source": str(tmp_path / "secret" / "a|b `c`"), "resolution": 64, "prompt": NASTY},
        engine={"deepspeed": {"flops_profiler": {"output_file": "/secret/place.txt"}}},
    )
    check_tame(written(tmp_path, odd, run=run_folder(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [("plain", str), ("clean", str), ("literal", lambda text: f"`{text}`"), ("short", str)],
)
def test_text_put_in_as_it_is_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[str], str]
) -> None:
    monkeypatch.setattr(card, name, change)
    monkeypatch.setattr(public, name, change)
    with pytest.raises((AssertionError, ValueError)):
        test_what_a_user_wrote_steers_nothing(tmp_path, "full")


def test_the_front_matter(tmp_path: Path) -> None:
    local = ModelCard(written(tmp_path, settings(tmp_path))).data.to_dict()
    assert "base_model" not in local and "license" not in local
    assert local["tags"] == ["text-to-image", "diffusers", "stable-diffusion", "sfumato"]
    hub = settings(
        tmp_path,
        model={"weights": "stabilityai/stable-diffusion-xl-base-1.0"},
        method={"kind": "lora"},
        data={"source": "lambda/naruto", "prompt": "a photo of: sks dog #1"},
    )
    told = ModelCard(written(tmp_path, hub, "sdxl")).data.to_dict()
    assert told["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert told["base_model_relation"] == "adapter" and told["instance_prompt"] == "a photo of: sks dog #1"
    assert {"lora", "stable-diffusion-xl"} <= set(told["tags"]) and told["datasets"] == ["lambda/naruto"]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: openrail++\n---\n# Base\n")
    assert ModelCard(written(tmp_path, settings(tmp_path))).data.license == "openrail++"


def test_the_settings_train_the_same_run_again(tmp_path: Path) -> None:
    """The config in the card is the config, but for places."""
    rich = settings(
        tmp_path,
        method={"kind": "lora", "rank": 4, "targets": ["to_q", "re:.*/x"]},
        objective={"weight": {"kind": "min_snr", "gamma": 3.0}},
        data={
            "parts": [{"source": "a/one.tar"}, {"source": "two", "repeats": 2}],
            "buckets": {},
            "resolution": 64,
            "caption_prefix": "/tab\there 😀 \u202e",
        },
        engine={"deepspeed": {"comms_logger": {"enabled": True}}},
        preview={"prompts": [NASTY]},
    )
    block = re.search(r"```toml\n(.*?)```", written(tmp_path, rich), re.S)
    assert block is not None
    back = config.parse(tomllib.loads(block[1])).model_dump()
    wanted = rich.model_dump()
    for table in (back, wanted):
        table["output"] = table["model"]["weights"] = None
        table["data"]["parts"] = [part | {"source": None} for part in table["data"]["parts"]]
    assert back == wanted


@pytest.mark.parametrize("numbers", [[0.5], [1.0, 1.0, 1.0], [3e-5, 2e-5], list(range(100)), [-2.0, 5e6]])
def test_a_curve_of_any_size(numbers: list[float]) -> None:
    picture = curve([(10 * n, float(value)) for n, value in enumerate(numbers, 1)])
    blue = sum(count for count, (r, g, b) in picture.getcolors(1_000_000) if b > r + 60 and g < 120)
    assert blue > 20, "no line is seen"


def test_what_a_curve_is_made_of() -> None:
    flat = [(n, 2.0) for n in range(50)]
    assert [value for _, value in smoothed(flat)] == pytest.approx([2.0] * 50)
    straight = [(n, float(n)) for n in range(100)]
    assert dict(smoothed(straight))[50] == pytest.approx(50, abs=0.5), "the line lags behind"
    low, high = bounds([1.0] * 500 + [900.0], [1.0])
    assert high < 2, "a single value flattens all others"
    marks = list(ticks(0.07, 0.31, 5))
    assert 0.3 in marks and label(0.3, marks) == "0.30"
    many = [(n, float(n % 7)) for n in range(100_000)]
    few = thinned(many)
    assert len(few) <= 4000 and [n for n, _ in few] == sorted(n for n, _ in few)
