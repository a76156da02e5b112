"""The report in a real browser: it draws, zooms, slides and compares, and loads and runs nothing strange."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfumato.report import page
from tests.engine.chromium import Browser, browser, found
from tests.unit import run_files
from tests.unit.report_pages import HOSTILE, hostile_run

pytestmark = pytest.mark.skipif(found() is None, reason="no Chromium or Chrome is installed here")
CANVAS = "document.querySelectorAll('canvas')"
LOSS = "document.querySelector('figure.chart')"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def single(place: Path) -> Path:
    return page.write(run_files.write(place, "cats", steps=200))


@pytest.fixture(scope="module")
def started(place: Path) -> Iterator[Browser]:
    """One start for all tests."""
    with browser(place / "browser") as running:
        yield running


def check_quiet(window: Browser) -> None:
    """Fail for an error, a warning, a message or a dialog of the page, and for anything that it asked for."""
    window.value("0")
    assert not window.errors, window.errors
    assert not window.elsewhere(), window.elsewhere()


def seen(window: Browser, path: Path, width: int = 1240) -> None:
    """Open a page in a window."""
    window.size(width, 900)
    window.open(path)
    assert window.value("document.documentElement.dataset.ready").startswith("curves")
    check_quiet(window)


def box(window: Browser, what: str) -> dict[str, float]:
    """Where an element lies in the window, after it was scrolled there."""
    found: dict[str, float] = window.value(
        f"(() => {{ const e = {what}; e.scrollIntoView({{block: 'center'}});"
        " const b = e.getBoundingClientRect(); return {x: b.x, y: b.y, w: b.width, h: b.height}; })()"
    )
    return found


def axis(window: Browser) -> list[float]:
    """The steps that the first chart shows."""
    told: list[float] = window.value(f"[+{LOSS}.dataset.from, +{LOSS}.dataset.to]")
    return told


def until(window: Browser, script: str, what: str) -> Any:
    """What a script gives once it is true."""
    end = time.monotonic() + 60
    while not (value := window.value(script)):
        assert time.monotonic() < end, f"after a minute still not: {what}"
    return value


def test_curves_are_drawn_and_zoom_together(started: Browser, single: Path) -> None:
    seen(started, single)
    blank = (
        f"[...{CANVAS}].filter(c => new Set(new Uint32Array(c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data.buffer)).size < 8).length"
    )
    assert started.value(f"{CANVAS}.length") > 12 and started.value(blank) == 0, "a chart is blank"
    whole, before = axis(started), started.value(f"{CANVAS}[0].toDataURL()")
    at = box(started, f"{CANVAS}[0]")
    left, wide = at["x"] + 58, at["w"] - 72  # of the field in the canvas
    started.drag(left + wide / 4, left + wide / 2, at["y"] + at["h"] / 2)
    zoomed = axis(started)
    assert zoomed == pytest.approx([whole[1] / 4, whole[1] / 2], abs=1.5), zoomed
    spans = started.value(
        "[...new Set([...document.querySelectorAll('figure.chart')].map(f => f.dataset.to))]"
    )
    assert len(spans) == 1, "the charts share one axis"
    assert started.value(f"{CANVAS}[0].toDataURL()") != before
    assert "steps 50 to 100" in started.value("document.getElementById('range').textContent")
    for count in (1, 2):
        started.mouse("mousePressed", left + wide / 2, at["y"] + 60, count)
        started.mouse("mouseReleased", left + wide / 2, at["y"] + 60, count)
    assert axis(started) == whole and started.value(f"{CANVAS}[0].toDataURL()") == before
    check_quiet(started)


def test_values_are_told_by_mouse_and_keys(started: Browser, single: Path) -> None:
    seen(started, single)
    lines = [json.loads(line) for line in (single.parent / "metrics.jsonl").read_text().splitlines()]
    at = box(started, f"{CANVAS}[0]")
    left, wide = at["x"] + 58, at["w"] - 72
    started.mouse("mouseMoved", left + wide * 0.3, at["y"] + at["h"] / 2)
    told = until(started, f"{LOSS}.querySelector('.tip').textContent", "a value at the pointer")
    assert told.startswith("step 60") and f"{lines[59]['loss']:.5g}"[:6] in told, told
    shown = started.value("[...document.querySelectorAll('.cross')].filter(c => !c.hidden).length")
    assert shown == started.value(f"{CANVAS}.length"), "the line at a step goes through all charts"
    started.value(f"{CANVAS}[0].focus()")
    started.key("ArrowRight")
    assert started.value(f"{LOSS}.querySelector('.tip').textContent").startswith("step 61")
    whole = axis(started)
    started.key("+")
    assert axis(started)[1] - axis(started)[0] < 0.6 * (whole[1] - whole[0])
    started.key("Escape")
    assert axis(started) == whole
    check_quiet(started)


def test_scale_smoothing_and_lines_change_what_is_drawn(started: Browser, single: Path) -> None:
    seen(started, single)
    first = started.value(f"{CANVAS}[0].toDataURL()")
    low = started.value(f"+{LOSS}.dataset.low")
    started.value(f"{LOSS}.querySelector('.log').click()")
    second = started.value(f"{CANVAS}[0].toDataURL()")
    assert second != first and started.value(f"+{LOSS}.dataset.low") > max(low, 0)
    started.value("document.getElementById('smooth').focus()")
    started.key("Home")
    third = started.value(f"{CANVAS}[0].toDataURL()")
    assert third != second
    key = "document.querySelectorAll('figure.chart')[1].querySelector('.key')"
    before = started.value(f"{CANVAS}[1].toDataURL()")
    started.value(f"{key}.click()")
    assert started.value(f"{key}.getAttribute('aria-pressed')") == "false"
    assert started.value(f"{CANVAS}[1].toDataURL()") != before
    check_quiet(started)


def test_the_slider_changes_the_pictures(started: Browser, single: Path) -> None:
    seen(started, single)
    cell = "document.querySelector('img[data-cell]')"
    last = started.value(f"{cell}.src")
    assert started.value(f"{cell}.naturalWidth") == 192, "the picture is there"
    started.value("document.getElementById('step').focus()")
    started.key("ArrowLeft")
    assert started.value("document.getElementById('shown').textContent") == "step 150"
    assert started.value(f"{cell}.src") != last and started.value(f"{cell}.dataset.step") == "150"
    assert until(started, f"{cell}.naturalWidth", "the picture of step 150") == 192
    started.value("document.getElementById('on').click()")
    assert started.value(f"{cell}.src") == last
    drawn = started.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert drawn, "a picture is broken"
    check_quiet(started)


def test_runs_are_compared_side_by_side(started: Browser, single: Path, place: Path) -> None:
    other = run_files.write(place, "faster", steps=160, seed=1, optimizer__lr=3e-4)
    out = page.report([single.parent, other], place / "compare.html")
    seen(started, out)
    table = "[...document.querySelectorAll('#differences + .sheet tbody tr')]"
    rows = f"{table}.map(r => [...r.children].map(c => c.textContent))"
    assert started.value(rows) == [["steps", "200", "160"], ["optimizer.lr", "0.0001", "0.0003"]]
    assert started.value(f"[...{LOSS}.querySelectorAll('.key')].map(k => k.textContent)") == [
        "cats",
        "faster",
    ]
    cells = "[...document.querySelectorAll('.drawn')].map(d => d.querySelectorAll('img').length)"
    assert started.value(cells) == [2, 2, 2]
    started.value("document.getElementById('step').focus()")
    started.key("Home")
    for _ in range(3):
        started.key("ArrowRight")
    steps = "[...document.querySelectorAll('.drawn')][0].innerText.match(/step \\d+/g)"
    assert started.value(steps) == ["step 50", "step 80"], "each run's newest up to the slider's step"
    check_quiet(started)


def test_hostile_texts_do_nothing(started: Browser, single: Path, place: Path) -> None:
    """Scripts, handlers and elements in captions, names and keys stay words, in both pages."""
    folder = hostile_run(place / "hostile")
    path = page.write(folder)
    both = page.report([folder, single.parent], place / "hostile.html")
    for each in (path, both):
        seen(started, each)
        shown = started.value("document.body.textContent")
        assert HOSTILE[:60] in shown
        assert started.value("document.querySelectorAll('[onerror], img[src=x]').length") == 0
        started.value(f"{CANVAS}[{CANVAS}.length - 1].focus()")
        started.key("ArrowLeft")
        check_quiet(started)
    broken = place / "broken.html"
    text = path.read_text(encoding="utf-8")
    broken.write_text(text.replace("&lt;", "<").replace("&gt;", ">").replace("&#34;", '"'), encoding="utf-8")
    started.open(broken)
    started.value("0")
    assert started.errors, "without escapes there would be errors to see"


def test_on_a_phone_on_paper_in_the_dark_and_without_scripts(started: Browser, single: Path) -> None:
    for width in (320, 390):
        seen(started, single, width)
        assert started.value("document.documentElement.scrollWidth") <= width, (
            "the page is wider than a phone"
        )
    seen(started, single)
    light = started.value(f"{CANVAS}[0].toDataURL()")
    started.size(1240, 900, dark=True)
    dark = until(started, f"{CANVAS}[0].toDataURL() !== {json.dumps(light)} && 1", "curves for the dark")
    assert dark and started.value("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    assert len(started.call("Page.printToPDF", printBackground=True)["data"]) > 20_000
    check_quiet(started)
    started.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        started.open(single)
        found = started.call("DOM.getDocument", depth=1)["root"]["nodeId"]
        for what, least in ((".drawn img", 6), ("table tr", 60), ("noscript p", 1)):
            nodes = started.call("DOM.querySelectorAll", nodeId=found, selector=what)["nodeIds"]
            assert len(nodes) >= least, what
        assert not started.errors
    finally:
        started.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_run_without_anything_opens_too(started: Browser, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    started.open(page.write(tmp_path))
    assert "metrics.jsonl holds no step yet" in started.value("document.body.textContent")
    check_quiet(started)
    run_files.jsonl(tmp_path / "metrics.jsonl", [*run_files.lines(1)])
    seen(started, page.write(tmp_path))
    shutil.rmtree(tmp_path)
