"""What a page is made of: lines that grow, thinned curves, small pictures."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sfumato.report import page
from sfumato.report.page.charts import short
from sfumato.report.page.columns import BINS, Columns
from sfumato.report.page.pictures import BYTES, MOST, Album
from sfumato.report.page.record import Metrics
from sfumato.report.page.single import Story, alone
from tests.unit import run_files
from tests.unit.report_pages import Tags


def test_thinned_curves_keep_means_and_extremes() -> None:
    draw = np.random.default_rng(0)
    steps = np.arange(1, 100_001)
    values = draw.normal(size=len(steps))
    values[77_777], values[5] = 1e6, np.nan
    columns = Columns()
    for part in np.array_split(np.arange(len(steps)), 313):
        columns.add(steps[part], {"loss": values[part]})
    curve = columns.curve("loss")
    assert curve is not None and BINS // 2 <= len(curve.steps) <= BINS and columns.width == 32
    for place in (0, 1, 1000, len(curve.steps) - 1):
        mine = values[(steps // 32 == place)]
        mine = mine[np.isfinite(mine)]
        assert curve.mean[place] == pytest.approx(mine.mean())
        assert (curve.least[place], curve.most[place]) == (mine.min(), mine.max())
    assert curve.most.max() == 1e6
    assert 1e6 not in values[::32], "the broken variant, every 32nd point, loses the jump"


def test_numbers_are_short_and_right_to_five_digits() -> None:
    values = np.array(
        [0.0, -0.123456789, 1.0, 123456.789, 9.99999e-7, 3.14159265e-30, 1e300, -7e22, 0.1 + 0.2]
    )
    told = short(values)
    assert told == pytest.approx(values.tolist(), rel=5e-5, abs=1e-26)
    assert told[1] == -0.12346 and told[3] == 123460 and max(len(repr(value)) for value in told[:5]) < 12


def test_lines_are_read_once_while_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = Metrics(path)
    log.refresh()
    assert log.count == 0 and not log.wrong
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    log.refresh()
    assert (log.count, log.broken) == (1, 0), "a line that is being written is no fault"
    with path.open("a") as file:
        file.write(
            'ss": 1.0}\nrubbish\n[1]\n{"step": "4"}\n{"step": 5, "loss": NaN, "lr": null, "who": "?"}\n'
        )
    log.refresh()
    log.refresh()
    assert (log.count, log.broken) == (3, 3)
    curve = log.columns.curve("loss")
    assert curve is not None and curve.steps.tolist() == [1, 2] and curve.mean.tolist() == [3, 1]
    # The run went back: another file, which began with the same lines.
    (tmp_path / "new").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 7.0}\n' * 9)
    os.replace(tmp_path / "new", path)
    log.refresh()
    curve = log.columns.curve("loss")
    assert log.count == 18 and curve is not None and curve.mean.tolist() == [3, 7]


def test_a_long_run_is_read_in_seconds_and_its_page_is_small(tmp_path: Path) -> None:
    """50,000 lines of a run of a million steps; then 100 more."""
    path = tmp_path / "metrics.jsonl"
    block = [json.dumps(line) for line in run_files.lines(10_000, 20)]
    with path.open("w") as file:
        for number in range(100):
            for place, line in enumerate(block):
                step = number * 10_000 + 20 * (place + 1)
                file.write(re.sub(r'"step": \d+', f'"step": {step}', line, count=1) + "\n")
    story = Story(tmp_path)
    begun = time.process_time()
    text = alone(story)
    first = time.process_time() - begun
    with path.open("a") as file:
        file.writelines(
            json.dumps(line | {"step": 1_000_000 + line["step"]}) + "\n" for line in run_files.lines(100)
        )
    begun = time.process_time()
    alone(story)
    again = time.process_time() - begun
    print(f"50,000 lines: {first:.2f} s of CPU, then {again:.2f} s; page {len(text) / 1e6:.2f} MB")
    assert story.record.metrics.count == 50_100
    assert len(text) < 4e6 and first < 5 and again < first / 2, (len(text), first, again)


def test_pictures_stay_within_their_limits_and_are_made_once(tmp_path: Path) -> None:
    run_files.previews(tmp_path, [0], 1, ("a", "b", "c"))
    for step in range(100, 20_000, 100):
        shutil.copytree(tmp_path / "images" / "step-000000", tmp_path / "images" / f"step-{step:06d}")
    album = Album(tmp_path)
    album.refresh()
    told = album.page()
    size = sum(len(uri) for row in told["rows"] for uri in row["uris"].values())
    assert told["all"] == 200 and told["steps"][0] == 0 and told["steps"][-1] == 19_900
    assert 40 < len(told["steps"]) <= MOST // 3 and size < BYTES
    assert 2 <= len(album.page(most=12)["steps"]) <= 4 and len(album.page(size=1)["steps"]) == 2
    made = len(album.made)
    run_files.previews(tmp_path, [20_000], 20_000, ("a", "b", "c"))
    album.refresh()
    assert album.page()["steps"][-1] == 20_000 and len(album.made) == made + 3
    run_files.jsonl(tmp_path / "metrics.jsonl", run_files.lines(3))
    assert "51 of 201 sets are on this page" in Tags(page.write(tmp_path).read_text()).told


def test_only_pictures_of_the_step_are_shown(tmp_path: Path) -> None:
    run_files.previews(tmp_path, [1], 1)
    folder = tmp_path / "images" / "step-000001"
    secret = tmp_path / "secret.png"
    shutil.copy(folder / "000-drawn-seed0.png", secret)
    rows = [{"file": name, "prompt": "p", "seed": n} for n, name in
            enumerate(("../../secret.png", str(secret), "000-drawn-seed0.png", "..", 7, None))]  # fmt: skip
    run_files.jsonl(folder / "drawings.jsonl", rows)
    album = Album(tmp_path)
    album.refresh()
    assert [preview.path.name for preview in album.sets[1].values()] == ["000-drawn-seed0.png"]


def test_it_needs_no_torch() -> None:
    code = "import sfumato.report.page, sys; assert not {'torch', 'deepspeed', 'diffusers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
